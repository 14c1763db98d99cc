"""How much work a run has done, how fast, and what share of the hardware's arithmetic that is."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qwen import QWenConfig
from qwen.loss import IGNORED

# Dense tensor-core operations per second in half precision, by the makers' data sheets. A card is the first entry all
# of whose words are words of its name: an RTX A4000 is no A40.
PEAK_FLOPS = {
    "B200": 2.25e15, "GH200": 989e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
    "H800": 989e12, "H20": 148e12, "A100": 312e12, "A800": 312e12, "L40S": 362e12, "L40": 181e12, "A40": 150e12,
    "A10G": 70e12, "A10": 125e12, "L4": 121e12, "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
    "V100": 125e12, "T4": 65e12,
}  # fmt: skip
UNLIKE = {"Laptop", "D", "MIG"}  # of lesser cards, or parts of one, under the same name


@dataclass
class Work:
    """What this process has trained on."""

    tokens: int = 0
    supervised: Any = 0  # a tensor on the device: reading it would make the device wait
    pairs: int = 0  # of tokens that attend to each other

    def add(self, batch: dict[str, Any]) -> None:
        if "attention_mask" in batch:
            lengths = batch["attention_mask"].sum(-1).tolist()
        else:
            lengths = batch["sequence_lengths"]
        self.tokens += sum(lengths)
        self.pairs += sum(length * length for length in lengths) // 2
        if "labels" in batch:
            self.supervised = self.supervised + (batch["labels"] != IGNORED).sum()
        elif "completion_mask" in batch:  # of a preference
            self.supervised = self.supervised + batch["completion_mask"].sum()

    def totals(self, accelerator: Any) -> tuple[float, float, float]:
        """Tokens, supervised tokens and pairs of all processes."""
        counts = [float(self.tokens), float(self.supervised), float(self.pairs)]
        return tuple(accelerator.reduce(torch.tensor(counts, device=accelerator.device)).tolist())


def training_flops(model: nn.Module, config: QWenConfig, tokens: float, supervised: float, pairs: float) -> float:
    """Operations that training on so many tokens asks for; those of a second forward pass are not counted.

    A matrix of N weights takes 2 N forward, 2 N for the gradient of its input, and 2 N for its own if it is trained.
    """
    width = config.num_attention_heads * config.kv_channels
    layer = 4 * config.hidden_size * width + 3 * config.hidden_size * config.intermediate_size // 2
    layers, head = config.num_hidden_layers * layer, config.hidden_size * config.vocab_size
    adapters = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "lora_" in name)
    flops = (4 * layers + 6 * adapters) * tokens if adapters else 6 * layers * tokens
    flops += (4 if adapters else 6) * head * supervised
    return flops + 12 * width * config.num_hidden_layers * pairs


def peak_flops(device: torch.device, precision: str) -> float | None:
    """The peak of a known GPU; None elsewhere."""
    if device.type != "cuda" or precision == "fp32":
        return None
    words = re.split(r"[\s-]+", torch.cuda.get_device_name(device))
    if UNLIKE & {*words}:
        return None
    return next((peak for known, peak in PEAK_FLOPS.items() if {*known.split()} <= {*words}), None)
