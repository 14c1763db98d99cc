"""Attention over a row of several samples: each attends to itself alone, without a mask over all pairs of tokens."""

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

PACKED = "packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    sequence_lengths: list[int] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention of query, key and value (1, H, T, D) within sequences of these lengths: (1, T, H, D).

    On CUDA in half precision by PyTorch's flash attention for sequences of various lengths, else one after the other.
    """
    if sequence_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if dropout == 0 and has_varlen(query.device, query.dtype, query.shape[-1]):
        from torch.nn.attention.varlen import varlen_attn

        borders, longest = kwargs["cu_seq_lens_q"], max(sequence_lengths)
        rows = (part[0].transpose(0, 1).contiguous() for part in (query, key, value))  # (T, H, D)
        output = varlen_attn(*rows, borders, borders, longest, longest, scale=scaling, window_size=(-1, 0))
        return output[None], None
    sequences = zip(*(part.split(sequence_lengths, dim=2) for part in (query, key, value)), strict=True)
    outputs = [scaled_dot_product_attention(*sequence, dropout_p=dropout, is_causal=True, scale=scaling)
               for sequence in sequences]  # fmt: skip
    return torch.cat(outputs, dim=2).transpose(1, 2), None


@cache
def has_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether PyTorch's flash attention for sequences of various lengths takes queries of this kind."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or head_dim > 256:
        return False
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "window_size" in inspect.signature(varlen_attn).parameters


AttentionInterface.register(PACKED, packed_attention)
