"""Run by torchrun: loss and gradients of a model whose layers PyTorch's FSDP has split, against the whole model's."""

from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import golden
from training.attention import PACKED
from training.data import collate
from training.trainer import exact_policy


def split_model(policy: MixedPrecisionPolicy) -> nn.Module:
    model, mesh = golden.model(PACKED).train(), init_device_mesh("cpu", (2,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def same_gradients(batch: dict[str, Any]) -> None:
    whole, split = golden.model(PACKED).train(), split_model(MixedPrecisionPolicy())
    whole(**batch, skip_logits=True).loss.backward()
    split(**batch, skip_logits=True).loss.backward()
    expected = dict(whole.named_parameters())
    for name, parameter in split.named_parameters():
        mean = expected[name].grad
        dist.all_reduce(mean)
        torch.testing.assert_close(parameter.grad.full_tensor(), mean / 2, atol=1e-6, rtol=1e-4, msg=name)
    print("same gradients", flush=True)


def same_loss_in_bf16(batch: dict[str, Any]) -> None:
    """As with autocast, which rounds neither the angles nor the loss."""
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    plugin.set_mixed_precision("bf16")
    split, angles = split_model(exact_policy(plugin.mixed_precision_policy)), []
    split.transformer.h[0].attn.register_forward_pre_hook(
        lambda _, args, kwargs: angles.extend(kwargs["query_rotary"]), with_kwargs=True
    )
    with torch.autocast("cpu", torch.bfloat16):
        expected = golden.model(PACKED).train()(**batch, skip_logits=True).loss
    loss = split(**batch, skip_logits=True).loss
    loss.backward()
    assert {angle.dtype for angle in angles} == {loss.dtype} == {torch.float32}
    assert loss != loss.bfloat16(), "the loss was rounded"
    torch.testing.assert_close(loss, expected, atol=0, rtol=0.01)
    print("same loss", flush=True)


def main() -> None:
    dist.init_process_group("gloo")
    rows = [golden.ids(length, dist.get_rank())[0] for length in (20, 33)]
    batch = collate([{"input_ids": row, "labels": row, "lengths": [len(row)]} for row in rows])
    same_gradients(batch)
    same_loss_in_bf16(batch)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
