"""From the logits of one step to the next token of one request: penalties, temperature, top-k, top-p, seed.

Every request brings its own settings and its own random numbers, so its tokens do not depend on who else is served.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

FEW = 1024  # tokens that top-p looks at first: sorting 151,936 takes longer than a small model's step


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is the likeliest token; top_k 0 and top_p 1 keep all."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0  # divides what is likely and multiplies what is not, of prompt and reply
    presence_penalty: float = 0.0  # taken off once, of what the reply holds
    frequency_penalty: float = 0.0  # taken off for each time
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | None = None
    top_logprobs: int | None = None  # None: no log-probabilities at all


@dataclass(frozen=True)
class Choice:
    """A chosen token. Log-probabilities are the model's own, before settings change them."""

    token: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


class Sampler:
    """Chooses the tokens of one request, one after the other."""

    def __init__(self, sampling: Sampling, prompt: Sequence[int], vocab_size: int, device: torch.device) -> None:
        self.sampling = sampling
        self.random = random.Random(sampling.seed)
        self.seen: Tensor | None = None  # (V,) bool: for the repetition penalty
        self.counts: Tensor | None = None  # (V,): how often the reply has each token
        if sampling.repetition_penalty != 1.0:
            self.seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self.seen[torch.tensor(prompt, device=device)] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            self.counts = torch.zeros(vocab_size, device=device)
        bias = sampling.logit_bias
        self.biased = torch.tensor(list(bias), device=device, dtype=torch.long)
        self.bias = torch.tensor(list(bias.values()), device=device, dtype=torch.float32)

    def choose(self, logits: Tensor, allowed: Tensor | None = None) -> Choice:
        """The next token for `logits` (V,) float32, of those that are `allowed` (V,) where a grammar says so.

        Raises:
            FloatingPointError: the logits are NaN or infinite.
        """
        if not torch.isfinite(logits.sum()):
            raise FloatingPointError("the model's logits are NaN or infinite")
        scores = self._adjust(logits)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        token = int(scores.argmax()) if self.sampling.temperature == 0 else self._draw(scores)
        if self.seen is not None:
            self.seen[token] = True
        if self.counts is not None:
            self.counts[token] += 1
        if self.sampling.top_logprobs is None:
            return Choice(token)
        return describe(logits, token, self.sampling.top_logprobs)

    def _adjust(self, logits: Tensor) -> Tensor:
        settings, scores = self.sampling, logits
        if self.seen is not None:
            penalty = settings.repetition_penalty
            punished = torch.where(scores > 0, scores / penalty, scores * penalty)
            scores = torch.where(self.seen, punished, scores)
        if self.counts is not None:
            scores = scores - settings.frequency_penalty * self.counts - settings.presence_penalty * (self.counts > 0)
        if len(self.biased):
            scores = scores.index_add(0, self.biased, self.bias)
        return scores

    def _draw(self, scores: Tensor) -> int:
        """A token at random, by the probabilities that the settings leave."""
        probabilities, tokens = self.distribution(scores)
        reached = probabilities.double().cumsum(0)
        place = int(torch.searchsorted(reached, self.random.random() * reached[-1], right=True))
        place = min(place, len(reached) - 1)
        return place if tokens is None else int(tokens[place])

    def distribution(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """Probabilities up to a factor, and their tokens (None: all), of what top-k and top-p leave of scores (V,)."""
        probabilities, tokens = self._likeliest(scores / self.sampling.temperature)
        if self.sampling.top_p == 1:
            return probabilities, tokens
        # A token stays while those before it have not reached top_p; the likeliest always stays.
        before = probabilities.double().cumsum(0) - probabilities
        kept = max(1, int((before < self.sampling.top_p).sum()))
        return probabilities[:kept], tokens[:kept]

    def _likeliest(self, scores: Tensor) -> tuple[Tensor, Tensor | None]:
        """Probabilities and tokens, the likeliest first; as many as are needed. None stands for all, unsorted."""
        size = min(self.sampling.top_k or len(scores), len(scores))
        if size == len(scores) and self.sampling.top_p == 1:
            return scores.softmax(0), None
        top, tokens = scores.topk(size if self.sampling.top_k else min(size, FEW))
        if self.sampling.top_k:
            return top.softmax(0), tokens
        total = scores.logsumexp(0)
        if float((top - total).exp().sum()) < self.sampling.top_p:
            top, tokens = scores.sort(descending=True)
        return (top - total).exp(), tokens


def describe(logits: Tensor, token: int, count: int) -> Choice:
    """A token with its log-probability and those of the `count` likeliest."""
    logprobs = logits.log_softmax(0)
    values, tokens = logprobs.topk(count)
    return Choice(token, float(logprobs[token]), list(zip(tokens.tolist(), values.tolist(), strict=True)))
