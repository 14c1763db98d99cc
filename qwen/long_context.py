"""How Qwen-7B reads further than it was trained, at inference only: dynamic NTK stretches the rotary base for prompts
longer than the training length, and logn scales late queries."""

import math

import torch
from torch import Tensor


def dynamic_ntk_alpha(lengths: Tensor, seq_length: int) -> Tensor:
    """Dynamic NTK's factor for prompts of `lengths` (B,) tokens: 1 up to `seq_length` S, 3 up to 2S, 7 up to 4S, ...

    The published formula max(2**ceil(log2(L / S) + 1) - 1, 1), by comparing integers, so that no rounding of a
    logarithm decides at the borders.
    """
    borders = seq_length * 2 ** torch.arange(24, device=lengths.device)
    doublings = (lengths[:, None] > borders).sum(-1)
    return (2.0 ** (doublings + 1) - 1).float()


def logn_scale(position_ids: Tensor, seq_length: int) -> Tensor:
    """Factor of a query at 0-based position p: log(p + 1) / log(seq_length) beyond seq_length, else 1. (B, 1, T, 1)."""
    scale = torch.log(position_ids + 1.0) / math.log(seq_length)
    return scale.clamp(min=1.0)[:, None, :, None]
