"""The figures of a run: operations against PyTorch's own count of them, tokens against the batches."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

import golden
from qwen.loss import IGNORED
from training.data import PaddingCollator, collate
from training.speed import PEAK_FLOPS, Work, peak_flops, training_flops


def items() -> list[dict]:
    found = []
    for k, length in enumerate((50, 62, 31)):
        ids = golden.ids(length, k)[0]
        found.append(
            {"input_ids": ids, "labels": ids.masked_fill(torch.arange(length) < 20, IGNORED), "lengths": [length]}
        )
    return found


@pytest.mark.parametrize("adapter", [False, True])
def test_operations_are_those_that_pytorch_counts(adapter: bool) -> None:
    model = golden.model("eager", num_hidden_layers=3).train()
    if adapter:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn", "c_proj", "w1", "w2"]))
    length = 62
    item = items()[1]
    with FlopCounterMode(display=False) as counter:
        model(**collate([item]), skip_logits=True).loss.backward()
    supervised = int((item["labels"] != IGNORED).sum())
    # Eager attention computes all pairs, the future ones too.
    expected = training_flops(model, model.config, length, supervised, length * length)
    # With an adapter the lowest layer's input needs no gradient, which the formula counts.
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.06 if adapter else 0.01)


def test_work_is_the_same_padded_or_not() -> None:
    for batch in (collate(items()), PaddingCollator(0)(items())):
        work = Work()
        work.add(batch)
        work.add(batch)
        pairs = sum(length * length for length in (50, 62, 31))
        assert (work.tokens, int(work.supervised), work.pairs) == (2 * 143, 2 * (143 - 60), 2 * (pairs // 2))


def test_peak_of_a_gpu_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12,
             "NVIDIA A10G": 70e12, "NVIDIA A10": 125e12, "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12,
             "Tesla V100-SXM2-16GB": 125e12, "Tesla T4": 65e12, "NVIDIA GeForce RTX 4090": 165e12,
             "NVIDIA RTX A4000": None, "NVIDIA A100-SXM4-80GB MIG 1g.10gb": None, "NVIDIA T400 4GB": None,
             "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA RTX A1000": None, "NVIDIA GeForce RTX 4090 D": None,
             "Something else": None}  # fmt: skip
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(gpu, "bf16") == peak
    assert peak_flops(gpu, "fp32") is None and peak_flops(torch.device("cpu"), "bf16") is None
    assert min(PEAK_FLOPS.values()) > 1e13
