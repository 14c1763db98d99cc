"""One step over pages: the new tokens of any mix of sequences, chunks of prompts and single ones, in one flat row.

`PagedStep` stands where transformers has a cache. The model calls `attend` in every layer: on NVIDIA GPUs from compute
capability 8.0 on FlashAttention reads the pages, elsewhere they are copied together for PyTorch's attention. The
compiled CPU kernels read the tables themselves.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .hardware import has_paged_attention
from .pages import PagedSequence, PagePool


@dataclass
class PagedStep:
    """New tokens (N), `counts[i]` of sequence i behind the `pasts[i]` that its pages hold already.

    `tables` (sequences, pages) int32 says which page of the pool is each sequence's first, second, ...
    """

    pool: PagePool
    counts: list[int]
    pasts: list[int]
    tables: Tensor
    _places: dict[torch.device, "Places"] = field(default_factory=dict)
    ntk_alpha: Tensor | None = None  # kept here by the model

    @classmethod
    def of(cls, pool: PagePool, sequences: Sequence[PagedSequence], counts: Sequence[int]) -> "PagedStep":
        """A step over sequences that have pages for all their new tokens."""
        width = max(len(sequence.pages) for sequence in sequences)
        tables = [[page.number for page in s.pages] + [0] * (width - len(s.pages)) for s in sequences]
        pasts = [sequence.length for sequence in sequences]
        return cls(pool, list(counts), pasts, torch.tensor(tables, dtype=torch.int32))

    def positions(self) -> Tensor:
        """Of each new token in its sequence (N)."""
        pairs = zip(self.pasts, self.counts, strict=True)
        return torch.tensor([p for past, count in pairs for p in range(past, past + count)])

    def per_token(self, values: Sequence[float]) -> Tensor:
        """A value of each sequence, for each of its new tokens (N)."""
        return torch.tensor(values).repeat_interleave(torch.tensor(self.counts))

    def get_seq_length(self) -> int:
        """Tokens that the longest sequence had before this step."""
        return max(self.pasts)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None
    ) -> Tensor:
        """What queries (1, H, N, D) see, (1, N, H, D); keys and values of the same shape go into the pages first."""
        places = self._on(query.device)
        pages = self.pool.layers[layer]
        for target, new in zip(pages, (key, value), strict=True):
            target[places.pages, :, places.offsets] = new[0].transpose(0, 1)
        if has_paged_attention(query.device, query.dtype):
            return attend_paged(query[0].transpose(0, 1), pages, places, scaling, window)[None]
        out = query.new_empty(query.shape[2], query.shape[1], query.shape[3])  # (N, H, D)
        for part in places.parts:
            rows = query[0, :, part.tokens].unflatten(1, part.positions.shape).transpose(0, 1)  # (B, H, T, D)
            seen = attend_gathered(rows, pages, part, scaling, window)
            out[part.tokens] = seen.transpose(1, 2).flatten(0, 1)
        return out[None]

    def _on(self, device: torch.device) -> "Places":
        if device not in self._places:
            self._places[device] = Places.of(self, device)
        return self._places[device]

    @classmethod
    def of_singles(cls, pool: PagePool, tables: Tensor, positions: Tensor) -> "PagedStep":
        """A token of each sequence, for tables (N, pages) and positions (N) on the GPU, whatever they will hold: a step
        that can be recorded."""
        N = len(positions)
        step = cls(pool, [1] * N, [0] * N, tables)
        step._places[tables.device] = Places.of_singles(tables, positions, pool.page_size)
        return step


@dataclass
class Gathered:
    """Sequences whose queries are computed together: one of each, or all of one sequence."""

    tokens: Tensor | slice  # which of the step's
    table: Tensor  # (B, pages)
    positions: Tensor  # (B, T)


@dataclass
class Places:
    """Where a step's tokens go and what they read, as tensors of one device."""

    pages: Tensor  # (N): the page of each new token
    offsets: Tensor  # (N): its place there
    parts: list[Gathered]  # for attention over copies
    tables: Tensor  # (sequences, pages) int32
    begins: Tensor  # (sequences + 1) int32: where each sequence's new tokens begin
    lengths: Tensor  # (sequences) int32: tokens of each, the new ones included
    most_queries: int
    most_keys: int

    @classmethod
    def of(cls, step: PagedStep, device: torch.device) -> "Places":
        P, positions = step.pool.page_size, step.positions()
        counts = torch.tensor(step.counts)
        rows = torch.arange(len(counts)).repeat_interleave(counts)
        begins = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)])
        tables = step.tables.to(device)
        long_tables = tables.long()

        def gathered(sequences: list[int], tokens: Tensor | slice) -> Gathered:
            pages = max(step.pool.pages_for(step.pasts[i] + step.counts[i]) for i in sequences)
            at = positions[tokens].view(len(sequences), -1).to(device)
            return Gathered(
                tokens if isinstance(tokens, slice) else tokens.to(device), long_tables[sequences, :pages], at
            )

        singles = [i for i, count in enumerate(step.counts) if count == 1]
        parts = [gathered(singles, begins[singles])] if singles else []
        parts += [
            gathered([i], slice(int(begins[i]), int(begins[i + 1]))) for i, count in enumerate(step.counts) if count > 1
        ]
        lengths = torch.tensor(step.pasts) + counts
        return cls(
            pages=long_tables[rows.to(device), (positions // P).to(device)],
            offsets=(positions % P).to(device),
            parts=parts,
            tables=tables,
            begins=begins.int().to(device),
            lengths=lengths.int().to(device),
            most_queries=max(step.counts),
            most_keys=tables.shape[1] * P,
        )

    @classmethod
    def of_singles(cls, tables: Tensor, positions: Tensor, page_size: int) -> "Places":
        """For a token of each sequence, computed on the device alone."""
        N, width = tables.shape
        pages = tables.long().gather(1, (positions // page_size)[:, None])[:, 0]
        begins = torch.arange(N + 1, dtype=torch.int32, device=tables.device)
        part = Gathered(slice(0, N), tables.long(), positions[:, None])
        lengths = (positions + 1).int()
        return cls(pages, positions % page_size, [part], tables, begins, lengths, 1, width * page_size)


def attend_paged(query: Tensor, pages: Tensor, places: Places, scaling: float, window: int | None) -> Tensor:
    """What queries (N, H, D) see, (N, H, D), by FlashAttention over the pages."""
    from torch.nn.attention.varlen import varlen_attn_out

    keys, values = pages.transpose(2, 3)  # each (pages, page_size, H, D), contiguous
    query = query.contiguous()
    return varlen_attn_out(
        torch.empty_like(query), query, keys, values, places.begins, places.begins, places.most_queries,
        places.most_keys, scale=scaling, window_size=(-1 if window is None else window - 1, 0),
        seqused_k=places.lengths, block_table=places.tables,
        num_splits=1,  # with more, FlashAttention 2 writes wrong rows of tables without a word (pytorch #194167)
    )  # fmt: skip


def attend_gathered(query: Tensor, pages: Tensor, of: Gathered, scaling: float, window: int | None) -> Tensor:
    """What queries (B, H, T, D) see of the keys and values that are copied together for them, (B, H, T, D)."""
    keys, values = (part[of.table].transpose(1, 2).flatten(2, 3) for part in pages)  # each (B, H, pages * P, D)
    seen = torch.arange(keys.shape[2], device=query.device)
    at = of.positions[:, None, :, None]
    hidden = seen > at if window is None else (seen > at) | (seen <= at - window)
    # What no token has been written to may hold anything, NaN too, which no mask takes out of a product.
    unwritten = (seen > of.positions[:, -1:])[:, None, :, None]
    keys, values = keys.masked_fill(unwritten, 0), values.masked_fill(unwritten, 0)
    return scaled_dot_product_attention(query, keys, values, attn_mask=~hidden, scale=scaling)
