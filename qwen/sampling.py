"""From logits to tokens: the one sampler, for a batch of rows with settings and random numbers of their own.

`generate`, `chat`, the terminal, the page, the server and the evaluation choose with it. So the same checkpoint,
prompt, settings and seed give the same text in all of them, whatever other rows are in the batch.

No vocabulary is sorted: the likeliest tokens are looked at first, and all of them only where top-p needs more. The host
waits once for the tokens of all rows. Nothing is computed in float64, which Apple's GPUs don't have.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, threshold_

from .errors import QwenError

COLDEST = 1e-5  # temperatures below are greedy: the division would overflow
FEW, MORE = 64, 1024  # tokens that top-k and top-p look at first; a GPU begins with the larger number
FARTHEST = -60.0  # logits below the highest by more than this, over the temperature, have no weight: e**-60 is 1e-26
GROUP = 32  # tokens of which the highest is looked at first
HALF = 2.0**-25  # random numbers are multiples of twice this
BLOCK = 512  # tokens whose probabilities are added up first: so float32 is exact enough for a whole vocabulary


@dataclass(frozen=True)
class Sampling:
    """How a row's tokens are chosen. temperature 0 is the likeliest token; top_k 0, top_p 1 and min_p 0 keep all."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0  # keeps tokens that have this share of the likeliest one's probability
    repetition_penalty: float = 1.0  # divides what is likely and multiplies what is not, of prompt and reply
    presence_penalty: float = 0.0  # taken off once, of what the reply holds
    frequency_penalty: float = 0.0  # taken off for each time
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    top_logprobs: int | None = None  # None: no log-probabilities at all
    min_tokens: int = 0  # a reply has so many before any of `ends`
    ends: Sequence[int] = ()
    bad_words: Sequence[Sequence[int]] = ()  # sequences of tokens that are not written

    @classmethod
    def from_config(cls, config: Any) -> "Sampling":
        """The settings of a transformers GenerationConfig that this sampler knows."""
        return cls(
            temperature=_given(config.temperature, 1.0) if config.do_sample else 0.0,
            top_k=_given(config.top_k, 0),
            top_p=_given(config.top_p, 1.0),
            min_p=_given(config.min_p, 0.0),
            repetition_penalty=_given(config.repetition_penalty, 1.0),
        )

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST

    @property
    def limited(self) -> bool:
        """Whether some tokens are left out of the draw."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def forbidden(self, written: Sequence[int]) -> list[int]:
        """The tokens that must not follow what a reply holds already."""
        tokens = list(self.ends) if len(written) < self.min_tokens else []
        return tokens + [
            word[-1] for word in self.bad_words if list(word[:-1]) == written[len(written) - len(word) + 1 :]
        ]


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


@dataclass(frozen=True)
class Choice:
    """A chosen token. Log-probabilities are the model's own, before settings change them."""

    token: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()


def row_generators(rows: int) -> list[torch.Generator]:
    """Random numbers for the rows of one call that names no seed.

    The first row's are those of `torch.manual_seed`; each other row has a generator of its own, seeded by the state of
    the first and its number.
    """
    state = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).digest()
    seed = int.from_bytes(state[:7], "big")
    return [torch.default_generator, *(torch.Generator().manual_seed(seed + row) for row in range(1, rows))]


class Sampler:
    """Chooses the next tokens of rows that come and go; each has a slot here while its reply lasts."""

    def __init__(self, vocab_size: int, device: torch.device, slots: int = 1) -> None:
        self.vocab_size, self.device = vocab_size, torch.device(device)
        self.settings = [Sampling()] * slots
        self.random: list[torch.Generator | None] = [None] * slots
        self.seen: Tensor | None = None  # (slots, V) bool: what prompt and reply hold, once a row has asked for it
        self.counts: Tensor | None = None  # (slots, V): how often the reply holds each token
        self.written: list[list[int] | None] = [None] * slots  # what replies hold, of rows that forbid tokens
        self._rows: tuple[tuple[int, ...], Rows] | None = None  # of the last batch

    def begin(
        self, slot: int, sampling: Sampling, prompt: Sequence[int] | Tensor, random: torch.Generator | None = None
    ) -> None:
        """A new reply in `slot`, after the ids of `prompt`.

        It draws from `random`, else from the settings' seed, else at random; `torch.default_generator` makes the draws
        those of `torch.manual_seed`, which are the same as those of a seed.
        """
        if random is None:
            random = torch.Generator()
            if sampling.seed is None:
                random.seed()
            else:
                random.manual_seed(sampling.seed % 2**64)
        self.settings[slot], self.random[slot], self._rows = sampling, random, None
        self.written[slot] = [] if sampling.min_tokens or sampling.bad_words else None
        shape = len(self.settings), self.vocab_size
        if sampling.repetition_penalty != 1.0:
            if self.seen is None:
                self.seen = torch.zeros(shape, dtype=torch.bool, device=self.device)
            self.seen[slot] = False
            self.seen[slot, torch.as_tensor(prompt, dtype=torch.long, device=self.device)] = True
        if sampling.presence_penalty or sampling.frequency_penalty:
            if self.counts is None:
                self.counts = torch.zeros(shape, device=self.device)
            self.counts[slot] = 0

    def choose(
        self,
        logits: Tensor,
        slots: Sequence[int],
        allowed: Mapping[int, Tensor] | None = None,
        scores: Tensor | None = None,
    ) -> list[Choice | QwenError]:
        """The next token of each row for `logits` (B, V) float32; row b is that of `slots[b]`.

        Args:
            allowed: for some rows the tokens (V,) bool that a grammar lets pass.
            scores: (B, V), what logits processors of a caller have made of the logits; by default the logits.

        Returns:
            A choice for each row, or a QwenError where its logits are NaN or infinite.
        """
        rows = self._rows_of(slots)
        scores = self._adjust(logits if scores is None else scores, rows)
        if allowed:
            scores = scores.clone()
            for row, mask in allowed.items():
                scores[row].masked_fill_(~mask, -torch.inf)
        scores = self._forbid(scores, slots)
        drawn = rows.drawn
        tokens = scores.argmax(-1) if len(drawn) < len(slots) else None  # of equals the first
        short = None
        if drawn:
            numbers = torch.tensor([float(torch.rand((), generator=self.random[slots[row]])) for row in drawn])
            numbers = numbers.to(self.device, non_blocking=True)
            size = FEW if self.device.type == "cpu" else MORE
            if tokens is None:
                tokens, short = draw(scores, rows, numbers, size)
            else:
                some = torch.tensor(drawn, device=self.device)
                tokens[some], few = draw(scores[some], rows.pick(some), numbers, size)
                short = None if few is None else torch.zeros_like(tokens, dtype=torch.bool).index_put((some,), few)
        found = self._to_host(logits, tokens, short, rows)
        again = [row for row in drawn if found[row][1]]
        if again:
            self._draw_again(scores, rows, again, tokens, numbers[[drawn.index(row) for row in again]])
            found = self._to_host(logits, tokens, None, rows)
        self._remember(tokens, rows)
        for slot, row in zip(slots, found, strict=True):
            if (written := self.written[slot]) is not None:
                written.append(int(row[0]))
        return [_choice(row, setting) for row, setting in zip(found, rows.settings, strict=True)]

    def _draw_again(self, scores: Tensor, rows: "Rows", again: list[int], tokens: Tensor, numbers: Tensor) -> None:
        """The rows whose likeliest tokens were too few, with more of them and at last with all; into `tokens`."""
        some = torch.tensor(again, device=self.device)
        for size in (MORE, self.vocab_size):
            tokens[some], short = draw(scores[some], rows.pick(some), numbers, size)
            if not short.any():
                return
            some, numbers = some[short], numbers[short]

    def _rows_of(self, slots: Sequence[int]) -> "Rows":
        if self._rows is None or self._rows[0] != tuple(slots):
            self._rows = tuple(slots), Rows.make([self.settings[slot] for slot in slots], slots, self.device)
        return self._rows[1]

    def _adjust(self, scores: Tensor, rows: "Rows") -> Tensor:
        """Scores (B, V) after penalties and biases."""
        if rows.repetition is not None:
            punished = torch.where(scores > 0, scores / rows.repetition, scores * rows.repetition)
            scores = torch.where(self.seen[rows.slots] & (rows.repetition != 1), punished, scores)
        if rows.presence is not None:
            counts = self.counts[rows.slots]
            scores = scores - torch.where(counts > 0, rows.frequency * counts + rows.presence, 0.0)
        if rows.bias is not None:
            row, token, value = rows.bias
            scores = scores.index_put((row, token), value, accumulate=True)
        return scores

    def _forbid(self, scores: Tensor, slots: Sequence[int]) -> Tensor:
        """Scores (B, V) without the tokens that rows must not write now; a row keeps them if it has no others left."""
        held = ((row, slot, self.written[slot]) for row, slot in enumerate(slots))
        pairs = [(row, t) for row, slot, written in held if written is not None
                 for t in self.settings[slot].forbidden(written)]  # fmt: skip
        if not pairs:
            return scores
        row, token = torch.tensor(pairs, device=self.device).unbind(-1)
        without = scores.index_put((row, token), torch.tensor(-torch.inf, device=self.device))
        return torch.where(without.isneginf().all(-1, keepdim=True), scores, without)

    def _remember(self, tokens: Tensor, rows: "Rows") -> None:
        if rows.repetition is not None:
            self.seen[rows.slots, tokens] = True
        if rows.presence is not None:
            self.counts[rows.slots, tokens] += 1

    def _to_host(self, logits: Tensor, tokens: Tensor, short: Tensor | None, rows: "Rows") -> list[list[float]]:
        """For each row token, whether too few tokens were looked at, whether its logits are finite; and, where any row
        wants them, log-probability, ids and log-probabilities of the likeliest. One copy, in float32: it holds ids
        below 2**24 exactly.
        """
        finite = logits.sum(-1).isfinite()
        parts = [torch.stack((tokens, torch.zeros_like(finite) if short is None else short, finite), dim=-1)]
        if rows.top_logprobs is not None:
            logprobs = logits.log_softmax(-1)
            values, ids = likeliest(logprobs, min(rows.top_logprobs, logits.shape[-1]))
            parts += [logprobs.gather(-1, tokens[:, None]), ids, values]
        return torch.cat([part.float() for part in parts], dim=-1).tolist()


@dataclass(frozen=True)
class Rows:
    """The settings of a batch as tensors, each (B, 1); None where no row uses them."""

    settings: list[Sampling]
    drawn: list[int]  # the rows that are not greedy
    slots: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    limited: Tensor | None
    all_limited: bool
    any_top_k: bool
    any_top_p: bool
    any_min_p: bool
    repetition: Tensor | None
    presence: Tensor | None
    frequency: Tensor | None
    bias: tuple[Tensor, Tensor, Tensor] | None  # rows, tokens and what is added there
    top_logprobs: int | None  # the most that any row wants

    @classmethod
    def make(cls, settings: Sequence[Sampling], slots: Sequence[int], device: torch.device) -> "Rows":
        def column(values: list, used: bool = True) -> Tensor | None:
            return torch.tensor(values, device=device)[:, None] if used else None

        counted = any(s.presence_penalty or s.frequency_penalty for s in settings)
        biases = [(row, token, float(value)) for row, s in enumerate(settings) for token, value in s.logit_bias.items()]
        return cls(
            settings=list(settings),
            drawn=[row for row, s in enumerate(settings) if not s.greedy],
            slots=torch.tensor(slots, device=device),
            temperature=column([1.0 if s.greedy else float(s.temperature) for s in settings]),
            top_k=column([s.top_k for s in settings]),
            top_p=column([float(s.top_p) for s in settings]),
            min_p=column([float(s.min_p) for s in settings]),
            limited=column([s.limited for s in settings], any(s.limited and not s.greedy for s in settings)),
            all_limited=all(s.limited for s in settings),
            any_top_k=any(s.top_k > 0 for s in settings),
            any_top_p=any(s.top_p < 1 for s in settings),
            any_min_p=any(s.min_p > 0 for s in settings),
            repetition=column(
                [float(s.repetition_penalty) for s in settings], any(s.repetition_penalty != 1 for s in settings)
            ),
            presence=column([float(s.presence_penalty) for s in settings], counted),
            frequency=column([float(s.frequency_penalty) for s in settings], counted),
            bias=tuple(torch.tensor(part, device=device) for part in zip(*biases, strict=True)) if biases else None,
            top_logprobs=max((s.top_logprobs for s in settings if s.top_logprobs is not None), default=None),
        )

    def pick(self, rows: Tensor) -> "Rows":
        """The columns that `draw` reads, of some rows."""
        names = ("temperature", "top_k", "top_p", "min_p", "limited")
        columns = {name: getattr(self, name) for name in names}
        return replace(self, **{name: None if x is None else x[rows] for name, x in columns.items()})


def draw(scores: Tensor, rows: Rows, numbers: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """A token (B,) for each row of scores (B, V) by its random number (B,) in [0, 1), and where `size` was too few.

    top-k and top-p look at the `size` likeliest tokens; only where all of them would stay, more are needed.
    """
    distance = (scores - scores.amax(-1, keepdim=True)).div_(rows.temperature)
    weights = threshold_(distance, FARTHEST, -torch.inf).softmax(-1)
    if rows.limited is None:
        return pick_by_number(weights, numbers), None
    kept, tokens, short = keep_likeliest(scores, weights, rows, min(size, scores.shape[-1]))
    drawn = tokens.gather(-1, pick_by_number(kept, numbers)[:, None])[:, 0]
    if rows.all_limited:
        return drawn, short
    limited = rows.limited[:, 0]
    return torch.where(limited, drawn, pick_by_number(weights, numbers)), short & limited


def keep_likeliest(scores: Tensor, weights: Tensor, rows: Rows, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What top-k, top-p and min-p leave of the weights of the `size` likeliest tokens, these tokens in ascending order,
    both (B, size), and whether more tokens are needed to tell (B,)."""
    tokens, order = _by_likelihood(*_highest(scores, size))
    weights = weights.gather(-1, tokens)
    falling = weights.gather(-1, order)
    kept = torch.ones_like(falling, dtype=torch.bool)
    whole: Tensor | float = 1.0
    too_few = None
    if rows.any_top_k:
        kept &= (torch.arange(size, device=scores.device) < rows.top_k) | (rows.top_k == 0)
        whole = torch.where(rows.top_k > 0, (falling * kept).sum(-1, keepdim=True), 1.0)
        too_few = rows.top_k[:, 0] > size
    if rows.any_top_p:  # a share of what top-k leaves: a token stays while those before it have not reached it
        kept &= (falling.cumsum(-1) - falling < rows.top_p * whole) | (rows.top_p >= 1)
    if rows.any_min_p:
        kept &= falling >= rows.min_p * falling[:, :1]
    kept[:, 0] = True  # the likeliest always stays
    short = kept.all(-1) if too_few is None else kept.all(-1) | too_few
    kept = torch.empty_like(kept).scatter_(-1, order, kept)
    return weights * kept, tokens, short & (size < scores.shape[-1])


def likeliest(scores: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The `size` highest of scores (B, V) and their tokens, the likeliest first; of equals the lowest token first."""
    tokens, order = _by_likelihood(*_highest(scores, size))
    tokens = tokens.gather(-1, order)
    return scores.gather(-1, tokens), tokens


def _by_likelihood(values: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens in ascending order, and their order by falling values; equals stay in ascending order."""
    tokens, order = tokens.sort(-1)
    return tokens, values.gather(-1, order).argsort(dim=-1, descending=True, stable=True)


def _highest(scores: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """As `topk`, in any order. It looks into the `size` groups of tokens that have the highest maxima: no other group
    can hold one of the `size` highest."""
    B, V = scores.shape
    if V % GROUP or V < 4 * GROUP * size:
        return scores.topk(size)
    groups = scores.view(B, -1, GROUP)
    best = groups.amax(-1).topk(size).indices  # (B, size)
    values, places = groups.gather(1, best[..., None].expand(-1, -1, GROUP)).flatten(1).topk(size)
    return values, best.gather(-1, places // GROUP) * GROUP + places % GROUP


def pick_by_number(weights: Tensor, numbers: Tensor) -> Tensor:
    """The tokens (B,) at the share `numbers` (B,) of the sum of weights (B, N), counted from the first on."""
    share = numbers[:, None] + HALF  # in the middle of its step: 0 would take any weight at all
    if weights.shape[-1] <= BLOCK:
        reached = weights.cumsum(-1)
        return _first_beyond(reached, share * reached[:, -1:])[:, 0]
    blocks = pad(weights, (0, -weights.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))  # (B, N / BLOCK, BLOCK)
    reached = blocks.sum(-1).cumsum(-1)
    aim = share * reached[:, -1:]
    block = _first_beyond(reached, aim)
    before = torch.where(block > 0, reached.gather(-1, (block - 1).clamp(min=0)), torch.zeros_like(aim))
    inside = blocks.gather(1, block[..., None].expand(-1, -1, BLOCK))[:, 0].cumsum(-1)
    return (block * BLOCK + _first_beyond(inside, aim - before))[:, 0]


def _first_beyond(reached: Tensor, aim: Tensor) -> Tensor:
    """Where sums (B, N) first exceed `aim` (B, 1); where rounding keeps them below, where they reach their end."""
    return ((reached <= aim) & (reached < reached[:, -1:])).sum(-1, keepdim=True)


def _choice(row: list[float], setting: Sampling) -> Choice | QwenError:
    token, _, finite, *more = row
    if not finite:
        return QwenError("the model's logits are NaN or infinite")
    if setting.top_logprobs is None:
        return Choice(int(token))
    size = len(more) // 2
    pairs = list(zip(map(int, more[1 : 1 + size]), more[1 + size :], strict=True))
    return Choice(int(token), more[0], pairs[: setting.top_logprobs])


def describe(logits: Tensor, tokens: Sequence[int], count: int) -> list[Choice]:
    """Tokens (T) that are there already, with their log-probabilities under `logits` (T, V) and the likeliest's."""
    logprobs = logits.log_softmax(-1)
    values, ids = likeliest(logprobs, min(count, logits.shape[-1]))
    own = logprobs.gather(-1, torch.tensor(tokens, device=logits.device)[:, None])
    found = torch.cat([own, ids.float(), values], dim=-1).tolist()
    size = ids.shape[-1]
    return [
        Choice(token, row[0], list(zip(map(int, row[1 : 1 + size]), row[1 + size :], strict=True)))
        for token, row in zip(tokens, found, strict=True)
    ]
