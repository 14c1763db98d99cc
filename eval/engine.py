"""Run a model over many prompts: batches of similar lengths, and what prompts have in common computed once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, StoppingCriteriaList

from eval.task import Prompt, Record
from qwen import QwenError, QWenTokenizer
from qwen.cache import is_growing, let_grow
from qwen.chat import ReplyCriteria, check_lengths, left_padded, new_decoder
from qwen.reply import ReplyDecoder, StopWord

MOST_ROWS = 32
LEAST_SHARED = 32  # tokens in common below which sharing them is not worth the copying
GOING_SHARE = 0.75  # of a batch's replies: when no more are unfinished, the others' rows are dropped
CPU_CACHE_BYTES = 2 * 2**30  # for keys and values of a batch
CPU_TOKENS = 512  # a CPU computes more at once no faster, and the smaller a batch, the less of it is padding
GPU_CACHE_SHARE = 0.4  # of the memory that is free once the model is loaded


@dataclass(frozen=True)
class Batch:
    """Prompts, by their number, of one family; `shared` of their first tokens are the same in the whole family."""

    members: tuple[int, ...]
    shared: int


def common_length(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with alike; at least one token of each is left out."""
    first, last = min(prompts), max(prompts)  # all others lie between these two
    longest = min(map(len, prompts)) - 1
    return next((i for i in range(longest) if first[i] != last[i]), longest)


@dataclass(frozen=True)
class BatchLimits:
    """How large a batch may be. They belong to the run: one that is resumed cuts the same batches."""

    rows: int = MOST_ROWS
    tokens: int | None = None  # that keys and values are held of: prompts, padded, and what is generated
    computed: int | None = None  # where only choices are scored: tokens behind the shared ones, padded


def batch_limits(model: Any) -> BatchLimits:
    """By the memory that is free, and by how many tokens at once the device needs to be at its best."""
    config = model.config
    width = config.num_attention_heads * config.kv_channels
    token_bytes = 2 * config.num_hidden_layers * width * model.dtype.itemsize
    room, computed = CPU_CACHE_BYTES, CPU_TOKENS
    if model.device.type == "cuda":
        devices = {parameter.device for parameter in model.parameters()}
        room = int(GPU_CACHE_SHARE * sum(torch.cuda.mem_get_info(d)[0] for d in devices if d.type == "cuda"))
        computed = None
    return BatchLimits(tokens=max(1, room // token_bytes), computed=computed)


def plan_batches(prompts: Sequence[Prompt], limits: BatchLimits, new_tokens: int) -> list[Batch]:
    """Batches within `limits`, longest prompts first within a family; `new_tokens` will be generated, 0 for choices.

    They depend on the prompts alone, not on what is done already or on how many processes share the work, so a run
    that was interrupted or spread computes the very same numbers.
    """
    families: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        families.setdefault(prompt.family, []).append(number)
    batches = []
    for members in families.values():
        shared = common_length([prompts[number].ids for number in members]) if len(members) > 1 else 0
        shared = shared if shared >= LEAST_SHARED else 0
        members = sorted(members, key=lambda number: (-len(prompts[number].ids), number))
        while members:
            rows, longest = limits.rows, len(prompts[members[0]].ids)
            if limits.tokens is not None:
                rows = min(rows, limits.tokens // (longest + new_tokens))
            if limits.computed is not None and not new_tokens:
                rows = min(rows, limits.computed // (longest - shared))
            rows = max(rows, 1)
            batches.append(Batch(tuple(members[:rows]), shared))
            members = members[rows:]
    return batches


class SharedPrefix:
    """The keys and values of a beginning that several prompts have in common."""

    def __init__(self, model: Any, ids: Sequence[int]) -> None:
        self.ids = list(ids)
        cache = new_cache(model)
        model(torch.tensor([self.ids], device=model.device), past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.layers = [(layer.keys, layer.values) for layer in cache.layers]  # each (1, H, P, D)
        self.growing = is_growing(cache)

    def spread(self, model: Any, pads: Sequence[int], room: int) -> DynamicCache:
        """A cache of a row for each of `pads`: so much padding, then the prefix without its last `pad` tokens.

        Those the row computes again, in the place where a shorter row of a left-padded batch has its padding: so the
        batch looks to the model like any other. `room` is how many tokens will follow.
        """
        cache = new_cache(model)
        P = len(self.ids)
        for layer, (keys, values) in zip(cache.layers, self.layers, strict=True):
            layer.lazy_initialization(keys.expand(len(pads), -1, -1, -1), values.expand(len(pads), -1, -1, -1))
            for buffer, part in zip(layer.reserve(P + room), (keys, values), strict=True):
                for row, pad in enumerate(pads):
                    buffer[row, :, :pad] = 0  # masked, but must be finite
                    buffer[row, :, pad:P] = part[0, :, : P - pad]
            layer.length = P
        cache.ntk_alpha = torch.ones(len(pads), device=model.device)  # see `Engine._can_share`
        return cache


def new_cache(model: Any) -> DynamicCache:
    cache = DynamicCache()
    let_grow(cache, model.config.num_hidden_layers)
    return cache


class Engine:
    """Answers batches of prompts: the log-probabilities of `choices`, or greedy replies that end at `stops`."""

    def __init__(
        self,
        model: Any,
        tokenizer: QWenTokenizer,
        choices: Sequence[str] = (),
        stops: Sequence[StopWord] = (),
        max_new_tokens: int = 512,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.choices = {choice: single_token(tokenizer, choice) for choice in choices}
        self.stops = list(stops)
        self.max_new_tokens = max_new_tokens
        self.most_rows: int | None = None  # lowered when memory runs out
        self._prefix: SharedPrefix | None = None

    @property
    def new_tokens(self) -> int:
        return 0 if self.choices else self.max_new_tokens

    @torch.inference_mode()
    def answer(self, prompts: Sequence[Sequence[int]], shared: int = 0) -> list[Record]:
        """A record for each prompt; where memory runs out, in halves, and from then on in no larger batches."""
        rows = min(self.most_rows or len(prompts), len(prompts))
        while True:
            try:
                parts = [prompts[i : i + rows] for i in range(0, len(prompts), rows)]
                return [record for part in parts for record in self._answer(part, shared)]
            except RuntimeError as error:
                from accelerate.utils.memory import should_reduce_batch_size  # imports all that quantises, too

                if rows == 1 or not should_reduce_batch_size(error):
                    raise
            rows = self.most_rows = (rows + 1) // 2
            self._prefix = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _answer(self, prompts: Sequence[Sequence[int]], shared: int) -> list[Record]:
        cache = self._shared_cache(prompts, shared)
        return self._score(prompts, cache) if self.choices else self._generate(prompts, cache)

    def _shared_cache(self, prompts: Sequence[Sequence[int]], shared: int) -> DynamicCache | None:
        """A cache that holds the common beginning of the prompts already; None where there is nothing to gain."""
        width = max(map(len, prompts))
        pads = [width - len(ids) for ids in prompts]
        if not shared or max(pads) >= shared or not self._can_share(width):
            return None
        prefix = list(prompts[0][:shared])
        if self._prefix is None or self._prefix.ids != prefix:
            self._prefix = None  # frees its memory first
            self._prefix = SharedPrefix(self.model, prefix)
        return self._prefix.spread(self.model, pads, width - shared) if self._prefix.growing else None

    def _has_own_cache(self) -> bool:
        """Whether `generate` makes a cache of a special kind, static or in Int8: neither shared nor cut into rows."""
        return getattr(self.model.generation_config, "cache_implementation", None) is not None

    def _can_share(self, width: int) -> bool:
        """Beyond the training length keys are rotated by a factor of the whole prompt's length: no two are alike."""
        config = self.model.config
        return not self._has_own_cache() and (width <= config.seq_length or not config.use_dynamic_ntk)

    def _score(self, prompts: Sequence[Sequence[int]], cache: DynamicCache | None) -> list[Record]:
        """Log-probabilities of the choices as the next token, among all tokens."""
        input_ids, mask = left_padded(prompts, self.tokenizer.im_start_id, self.model.device)
        cache = cache or new_cache(self.model)
        logits = self.model(
            input_ids[:, cache.get_seq_length() :],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        if not torch.isfinite(logits).all():
            raise QwenError(f"the model's logits are NaN or infinite in {self.model.dtype}: use --dtype bf16 or fp32")
        logprobs = logits.float().log_softmax(-1)[:, list(self.choices.values())]  # (B, choices)
        return [
            {"logprobs": dict(zip(self.choices, row, strict=True)), "prompt_tokens": len(ids)}
            for ids, row in zip(prompts, logprobs.tolist(), strict=True)
        ]

    def _generate(self, prompts: Sequence[Sequence[int]], cache: DynamicCache | None) -> list[Record]:
        decoders = [new_decoder(self.tokenizer, self.model.generation_config, self.stops, strip=False) for _ in prompts]
        self._write(prompts, decoders, cache)
        return [
            {
                "text": decoder.text,
                "finish_reason": decoder.finish_reason,
                "prompt_tokens": len(ids),
                "completion_tokens": decoder.tokens,
            }
            for ids, decoder in zip(prompts, decoders, strict=True)
        ]

    def _write(
        self, prompts: Sequence[Sequence[int]], decoders: list[ReplyDecoder], cache: DynamicCache | None
    ) -> None:
        """Greedy replies into `decoders`, in rounds: rows whose replies have ended are not computed in the next."""
        check_lengths(self.model, prompts)
        ids, mask = left_padded(prompts, self.tokenizer.im_start_id, self.model.device)
        if cache is None and not self._has_own_cache():
            cache = new_cache(self.model)
        going, left = decoders, self.max_new_tokens
        while going and left:
            width = ids.shape[1]
            enough = partial(few_are_going, going) if cache is not None else lambda: False
            ids = self.model.generate(
                ids,
                attention_mask=mask,
                past_key_values=cache,
                generation_config=self._greedy(left),
                stopping_criteria=StoppingCriteriaList([ReplyCriteria(going, width, enough)]),
            )
            left -= ids.shape[1] - width
            kept = [row for row, decoder in enumerate(going) if decoder.finish_reason is None]
            if kept and left:
                rows = torch.tensor(kept, device=ids.device)
                keep_rows(cache, rows)
                ids, mask = ids[rows], torch.cat([mask[rows], mask.new_ones(len(kept), ids.shape[1] - width)], dim=-1)
            going = [going[row] for row in kept]
        for decoder in going:
            decoder.close("length")

    def _greedy(self, new_tokens: int) -> GenerationConfig:
        return GenerationConfig(
            do_sample=False,
            repetition_penalty=1.0,
            max_new_tokens=new_tokens,
            pad_token_id=self.tokenizer.im_start_id,
        )


def few_are_going(decoders: Sequence[ReplyDecoder]) -> bool:
    """Whether so many of these replies have ended that the batch should go on without their rows."""
    going = sum(decoder.finish_reason is None for decoder in decoders)
    return going <= GOING_SHARE * len(decoders)


def keep_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Forget the other rows of the cache."""
    cache.batch_select_indices(rows)
    if getattr(cache, "ntk_alpha", None) is not None:
        cache.ntk_alpha = cache.ntk_alpha[rows]


def single_token(tokenizer: QWenTokenizer, text: str) -> int:
    ids = tokenizer.encode_text(text)
    if len(ids) != 1:
        raise QwenError(f"{text!r} is {len(ids)} tokens of this checkpoint's vocabulary, and a choice must be one")
    return ids[0]
