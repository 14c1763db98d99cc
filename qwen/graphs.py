"""Decode steps recorded as CUDA graphs: launching a step's kernels one by one takes longer than a GPU needs for them.

A graph is bound to addresses, so its inputs are tensors that stay and are filled before each replay. There is one for
each of some numbers of rows; a step of fewer rows is filled up with rows that read and write the pool's spare page.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .hardware import has_paged_attention
from .paged_attention import PagedStep
from .pages import PagePool, layer_devices

SIZES = (1, 2, 4, 8, *range(16, 257, 8))  # rows


@dataclass
class Recorded:
    """A graph, the inputs it reads and the logits (rows, V) it writes."""

    ids: Tensor  # (rows)
    positions: Tensor  # (rows)
    alphas: Tensor  # (rows)
    tables: Tensor  # (rows, pages) int32
    logits: Tensor | None = None
    graph: Any = None


class DecodeGraphs:
    """Runs the steps in which every sequence gets one token."""

    def __init__(self, model: Any, pool: PagePool, tokens: int) -> None:
        """`tokens` is the longest that a sequence can be."""
        self.model, self.pool, self.width = model, pool, pool.pages_for(tokens)
        self.recorded: dict[int, Recorded] = {}
        self.pages = -1  # that the pool had when these were recorded
        self.memory: Any = None  # that all graphs share

    @torch.inference_mode()
    def logits(self, ids: Sequence[int], step: PagedStep, alphas: Sequence[float]) -> Tensor:
        """Logits (N, V) for the next token of each sequence; good until the next call."""
        if self.pages != self.pool.size:  # grown, and so somewhere else
            self.recorded, self.pages, self.memory = {}, self.pool.size, None
        N = len(ids)
        size = next(size for size in SIZES if size >= N)
        if size not in self.recorded:
            self.recorded[size] = self._record(size)
        to = self.recorded[size]
        spare = size - N
        fill(to.ids, torch.tensor([*ids, *[0] * spare]))
        fill(to.positions, torch.tensor([*step.pasts, *[0] * spare]))
        fill(to.alphas, torch.tensor([*alphas, *[1.0] * spare]))
        tables = torch.zeros(size, self.width, dtype=torch.int32)  # page 0 is the spare one
        tables[:N, : step.tables.shape[1]] = step.tables
        fill(to.tables, tables)
        to.graph.replay()
        return to.logits[:N]

    def _record(self, size: int) -> Recorded:
        device = self.model.device
        ids, positions = (torch.zeros(size, dtype=torch.long, device=device) for _ in range(2))
        tables = torch.zeros(size, self.width, dtype=torch.int32, device=device)
        to = Recorded(ids, positions, torch.ones(size, device=device), tables)
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            self._compute(to)  # loads what the first call loads
        torch.cuda.current_stream(device).wait_stream(side)
        to.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(to.graph, pool=self.memory, capture_error_mode="thread_local"):
            to.logits = self._compute(to)
        self.memory = to.graph.pool()
        return to

    def _compute(self, of: Recorded) -> Tensor:
        return self.model(
            of.ids[None],
            position_ids=of.positions[None],
            past_key_values=PagedStep.of_singles(self.pool, of.tables, of.positions),
            ntk_alpha=of.alphas[None],
            use_cache=True,
        ).logits[0]


def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy without waiting."""
    tensor.copy_(values.pin_memory() if tensor.device.type == "cuda" else values, non_blocking=True)


def can_record(model: Any) -> bool:
    """Whether steps of this model can be graphs: it is whole on one GPU whose attention reads pages."""
    [device, *others] = set(layer_devices(model)) | {model.device}
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())  # of accelerate, which moves tensors
    return not others and not hooked and has_paged_attention(device, model.dtype) and getattr(model, "graphs", True)
