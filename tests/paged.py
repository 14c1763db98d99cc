"""Runs a model step by step over pages, without an engine."""

from collections.abc import Sequence

import torch

from qwen import QWenLMHeadModel
from qwen.long_context import dynamic_ntk_alpha
from qwen.paged_attention import PagedStep
from qwen.pages import pool_for


class Steps:
    """Rows of ids that are read in any portions; `logits` (tokens, V) of each row's portions."""

    def __init__(self, model: QWenLMHeadModel, rows: Sequence[Sequence[int]]) -> None:
        self.model, self.pool = model, pool_for(model, 4096)
        lengths = torch.tensor([len(row) for row in rows])
        self.alphas = dynamic_ntk_alpha(lengths, model.config.seq_length).tolist()
        self.sequences = [self.pool.begin(list(row), share=False) for row in rows]
        self.logits: list[list[torch.Tensor]] = [[] for _ in rows]

    @property
    def left(self) -> list[int]:
        """How many tokens each row still has; empty at the end."""
        left = [len(sequence.ids) - sequence.length for sequence in self.sequences]
        return left if any(left) else []

    @torch.inference_mode()
    def run(self, counts: Sequence[int]) -> None:
        """The next `counts` tokens of each row in one step."""
        some = [i for i, count in enumerate(counts) if count]
        if not some:
            return
        sequences, sizes = [self.sequences[i] for i in some], [counts[i] for i in some]
        for sequence, size in zip(sequences, sizes, strict=True):
            self.pool.extend(sequence, size)
        step = PagedStep.of(self.pool, sequences, sizes)
        ids = [t for s, size in zip(sequences, sizes, strict=True) for t in s.ids[s.length : s.length + size]]
        logits = self.model(
            torch.tensor([ids], device=self.model.device),
            position_ids=step.positions()[None].to(self.model.device),
            past_key_values=step,
            ntk_alpha=step.per_token([self.alphas[i] for i in some])[None],
            use_cache=True,
        ).logits[0]
        for i, sequence, size, own in zip(some, sequences, sizes, logits.split(sizes), strict=True):
            self.pool.written(sequence, size)
            self.logits[i].append(own)
