"""Run by torchrun: loss and gradients of a model whose layers PyTorch's FSDP has split, against the whole model's."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import golden
from training.attention import PACKED
from training.data import collate


def main() -> None:
    dist.init_process_group("gloo")
    rows = [golden.ids(length, dist.get_rank())[0] for length in (20, 33)]
    batch = collate([{"input_ids": row, "labels": row, "lengths": [len(row)]} for row in rows])
    whole, split = golden.model(PACKED).train(), golden.model(PACKED).train()
    mesh = init_device_mesh("cpu", (2,))
    for block in split.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(split, mesh=mesh)
    whole(**batch, skip_logits=True).loss.backward()
    split(**batch, skip_logits=True).loss.backward()
    expected = dict(whole.named_parameters())
    for name, parameter in split.named_parameters():
        mean = expected[name].grad
        dist.all_reduce(mean)
        torch.testing.assert_close(parameter.grad.full_tensor(), mean / 2, atol=1e-6, rtol=1e-4, msg=name)
    print("same gradients", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
