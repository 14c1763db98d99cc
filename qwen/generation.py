"""transformers' `generate`, where it has to know about Qwen: stop words, NTK factors, long prompts, and the sampler."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation import EosTokenCriteria, LogitsProcessorList, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache import is_growing, let_grow
from .chat import ChatMixin, FiniteLogits, ReplyCriteria, StopSequences, light_criterion
from .engine import Engine, Limits, Request
from .errors import QwenError, not_finite
from .pages import kv_room
from .reply import ReplyDecoder
from .sampling import COLDEST, Sampler, Sampling, row_generators
from .settings import check_stop_words_ids

MOST_ROWS = 32  # that decode together in Python; more of them wait
ENGINE_CRITERIA = (MaxLengthCriteria, EosTokenCriteria, StopSequences, ReplyCriteria)
ENGINE_ARGUMENTS = {"attention_mask", "past_key_values", "use_cache", "logits_to_keep", "position_ids"}
PREFILL_CHUNK = 1024  # tokens: as fast as a whole prompt, on CPUs and GPUs, and a long prompt needs no more memory
WARPERS = ("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "watermarking_config")  # that only transformers has


class Processors(LogitsProcessorList):
    """What `generate` does to logits: all of it for beam search and assisted decoding, which choose by themselves; for
    the others what the sampler leaves to do, and the sampler's settings."""

    def __init__(self, every: LogitsProcessorList, rest: LogitsProcessorList, sampling: Sampling) -> None:
        super().__init__(every)
        self.rest, self.sampling = rest, sampling


class TokenReader:
    """Collects the tokens of one row of `generate`, and ends it at stop sequences or with the reply that reads it."""

    def __init__(self, stops: Sequence[Sequence[int]], reply: ReplyDecoder | None) -> None:
        self.ids: list[int] = []
        self.stops, self.reply = [list(stop) for stop in stops], reply
        self.finish_reason: str | None = None
        self.stopped_by = None

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def push(self, token: int) -> str:
        self.ids.append(token)
        ended = any(self.ids[-len(stop) :] == stop for stop in self.stops)
        if self.reply is not None:
            self.reply.push(token)
            ended = ended or self.reply.finish_reason is not None
        self.finish_reason = "stop" if ended else None
        return ""

    def close(self, reason: str) -> str:
        self.finish_reason = self.finish_reason or reason
        return ""


@dataclass
class Steps:
    """What `return_dict_in_generate` asks for, step by step; None where it does not."""

    scores: tuple | None
    logits: tuple | None
    attentions: tuple | None
    hidden_states: tuple | None

    @classmethod
    def asked_by(cls, config: GenerationConfig) -> "Steps":
        names = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
        return cls(*(() if config.return_dict_in_generate and getattr(config, name) else None for name in names))

    def add(self, scores: Tensor, logits: Tensor, outputs: CausalLMOutputWithPast) -> None:
        new = {"scores": scores, "logits": logits}
        new |= {"attentions": outputs.attentions, "hidden_states": outputs.hidden_states}
        for name, value in new.items():
            if getattr(self, name) is not None:
                setattr(self, name, (*getattr(self, name), value))


class QWenGenerationMixin(ChatMixin, GenerationMixin):
    """`generate` and the `chat` methods of QWenLMHeadModel."""

    _engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """What makes this model's replies; it is made when it is first needed, and anew for a model that has moved."""
        if self._engine is None or not self._engine.fits():
            self._engine = Engine(self, limits=Limits(
                MOST_ROWS, max_queue=10**6, kv_tokens=kv_room(self), chunk=PREFILL_CHUNK // 4, timeout=math.inf
            ))  # fmt: skip
        return self._engine

    def load_custom_generate(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse `generate(custom_generate="a directory or repository")`; a function of the caller's is taken."""
        raise QwenError("custom_generate names a directory or repository, whose code is never run: pass a function")

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *args: Any,
        stop_words_ids: list[list[int]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`, which also ends a row at any of `stop_words_ids` (default: the config's).

        Sampling after `torch.manual_seed(n)` draws in its first row what the server draws with the seed n.
        """
        if stop_words_ids is None:
            stop_words_ids = getattr(generation_config or self.generation_config, "stop_words_ids", None)
        if stop_words_ids:
            check_stop_words_ids(stop_words_ids, "generate()")
            stopping_criteria = StoppingCriteriaList([*(stopping_criteria or []), StopSequences(stop_words_ids)])
        if "max_length" in kwargs and generation_config is None:  # over the max_new_tokens of the checkpoint's settings
            kwargs.setdefault("max_new_tokens", None)
        return super().generate(inputs, generation_config, logits_processor, stopping_criteria, *args, **kwargs)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Processors,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Greedy search and sampling: by the engine, or for what only transformers does by a loop as its own, with
        our sampler.

        With a growing cache the loop also leaves out that one's bookkeeping, which costs milliseconds a token.
        """
        plain = streamer is None and not synced_gpus and not logits_processor.rest
        if plain and self._engine_can(stopping_criteria, generation_config, model_kwargs):
            mask, sampling = model_kwargs.get("attention_mask"), logits_processor.sampling
            return self._by_engine(input_ids, mask, sampling, stopping_criteria, generation_config)
        config, device = generation_config, input_ids.device
        sampler = self._begin_sampling(input_ids, model_kwargs.get("attention_mask"), logits_processor.sampling)
        outputs = self._prefill(input_ids, config, model_kwargs, is_first_iteration=not config.is_assistant)
        next_outputs = self._choose_step(config, model_kwargs)
        steps = Steps.asked_by(config)
        ends_rows = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        stopping_criteria = StoppingCriteriaList(map(light_criterion, stopping_criteria))
        unfinished = torch.ones(len(input_ids), dtype=torch.bool, device=device)
        finished = False
        while True:
            if not finished:
                logits = outputs.logits[:, -1].to(device, torch.float32, copy=True)
                scores = logits_processor.rest(input_ids, logits.clone()) if logits_processor.rest else logits
                steps.add(scores, logits, outputs)
                tokens = torch.tensor(self._choose_tokens(sampler, logits, scores), device=device)
                if ends_rows and len(tokens) > 1:
                    tokens = torch.where(unfinished, tokens, config._pad_token_tensor.to(device))
                input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
                if streamer is not None:
                    streamer.put(tokens.cpu())
                unfinished = unfinished & ~stopping_criteria(input_ids, steps.scores)
                finished = not unfinished.any()
            if not self._has_unfinished_sequences(finished, synced_gpus, device=device):
                break
            outputs = next_outputs(input_ids, outputs)
        if streamer is not None:
            streamer.end()
        if not config.return_dict_in_generate:
            return input_ids
        cache = outputs.past_key_values
        return GenerateDecoderOnlyOutput(
            sequences=input_ids, scores=steps.scores, logits=steps.logits, attentions=steps.attentions,
            hidden_states=steps.hidden_states, past_key_values=cache,
        )  # fmt: skip

    def _engine_can(
        self, criteria: StoppingCriteriaList, config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> bool:
        """Whether a call asks for nothing but tokens, of a model at inference, from the beginning of its prompts."""
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        return (
            not self.training
            and not config.return_dict_in_generate
            and not config.is_assistant
            and config.prefill_chunk_size is None
            and getattr(cache, "is_fresh", False)
            and all(type(criterion) in ENGINE_CRITERIA for criterion in criteria)
            and {name for name, value in model_kwargs.items() if value is not None} <= ENGINE_ARGUMENTS
            and (mask is None or _is_padded_left(mask))
            and _are_counted(model_kwargs.get("position_ids"), mask)
            and config.max_length <= self.engine.context  # last: asking makes the engine
        )

    def _by_engine(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        sampling: Sampling,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
    ) -> Tensor:
        """Prompts (B, T), padded on the left, and their replies behind them, padded on the right."""
        B, T = input_ids.shape
        lengths = [T] * B if mask is None else mask.long().sum(-1).tolist()
        prompts = [ids[T - length :].tolist() for ids, length in zip(input_ids, lengths, strict=True)]
        stops = [stop for c in map(light_criterion, criteria) if isinstance(c, StopSequences) for stop in c.sequences]
        given = next((criterion for criterion in criteria if isinstance(criterion, ReplyCriteria)), None)
        readers = [TokenReader(stops, reply) for reply in (given.decoders if given else [None] * B)]
        randoms = [None] * B if sampling.greedy else row_generators(B)
        requests = [
            Request(prompt, config.max_length - T, sampling, decoder=reader, random=random)
            for prompt, reader, random in zip(prompts, readers, randoms, strict=True)
        ]
        if given is None:
            self.engine.write(requests)
        else:
            self.engine.write(requests, given.cancelled, lambda number, update: given.on_step())
        width, pad = max(len(reader.ids) for reader in readers), config._pad_token_tensor
        filler = 0 if pad is None else int(pad)
        new = [reader.ids + [filler] * (width - len(reader.ids)) for reader in readers]
        return torch.cat([input_ids, input_ids.new_tensor(new).view(B, width)], dim=-1)

    def _begin_sampling(self, input_ids: Tensor, mask: Any, sampling: Sampling) -> Sampler:
        sampler = Sampler(self.config.vocab_size, input_ids.device, len(input_ids))
        padded = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape == input_ids.shape
        randoms = [None] * len(input_ids) if sampling.greedy else row_generators(len(input_ids))
        for row, (ids, random) in enumerate(zip(input_ids, randoms, strict=True)):
            sampler.begin(row, sampling, ids[mask[row].bool()] if padded else ids, random)
        return sampler

    def _choose_tokens(self, sampler: Sampler, logits: Tensor, scores: Tensor) -> list[int]:
        choices = sampler.choose(logits, range(len(logits)), scores=scores)
        for choice in choices:
            if isinstance(choice, QwenError):
                raise not_finite(self.dtype)
        return [choice.token for choice in choices]

    def _choose_step(self, config: GenerationConfig, model_kwargs: dict[str, Any]) -> Any:
        """What computes the next outputs from all ids so far and the last outputs."""
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        more = config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states)
        if is_growing(cache) and model_kwargs.get("inputs_embeds") is None and isinstance(mask, Tensor) and not more:
            return self._light_step(cache, mask)
        compiles = self._valid_auto_compile_criteria(model_kwargs, config)
        forward = self.get_compiled_call(config.compile_config) if compiles else self.__call__

        def step(input_ids: Tensor, outputs: CausalLMOutputWithPast) -> CausalLMOutputWithPast:
            nonlocal model_kwargs
            model_kwargs = self._update_model_kwargs_for_generation(outputs, model_kwargs)
            length = 1 if model_kwargs["use_cache"] else None
            inputs = self.prepare_inputs_for_generation(input_ids, next_sequence_length=length, **model_kwargs)
            return forward(**inputs, return_dict=True)

        return step

    def _light_step(self, cache: Cache, mask: Tensor) -> Any:
        unpadded = bool(mask.all())

        def step(input_ids: Tensor, outputs: CausalLMOutputWithPast) -> CausalLMOutputWithPast:
            nonlocal mask
            if not unpadded:
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
            shown = None if unpadded else mask
            return self(input_ids[:, -1:], attention_mask=shown, past_key_values=cache, use_cache=True)

        return step

    def _prefill(
        self, input_ids: Tensor, generation_config: GenerationConfig, model_kwargs: dict[str, Any], **kwargs: Any
    ) -> CausalLMOutputWithPast:
        """Choose the NTK alphas from the whole prompts, for all later steps, then read long prompts in chunks.

        All layers' widest activations for one chunk are what a prefill needs beside weights and cache.
        """
        cache = model_kwargs.get("past_key_values")
        tokens = model_kwargs["inputs_embeds"] if model_kwargs.get("inputs_embeds") is not None else input_ids
        if model_kwargs.get("ntk_alpha") is None:
            mask = model_kwargs.get("attention_mask")
            model_kwargs["ntk_alpha"] = self.transformer.choose_ntk_alpha(None, mask, tokens, cache)
        only_tokens = tokens is input_ids and not generation_config.return_dict_in_generate
        if generation_config.prefill_chunk_size is None and only_tokens and is_growing(cache):
            if tokens.shape[1] > PREFILL_CHUNK:
                generation_config = copy.copy(generation_config)
                generation_config.prefill_chunk_size = PREFILL_CHUNK
        return super()._prefill(input_ids, generation_config, model_kwargs, **kwargs)

    def _assisted_decoding(self, input_ids: Tensor, *args: Any, inputs_tensor: Any = None, **kwargs: Any) -> Any:
        """Choose the NTK alphas from the prompts alone: the first step reads guessed tokens along with them."""
        if kwargs.get("ntk_alpha") is None:
            mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
            kwargs["ntk_alpha"] = self.transformer.choose_ntk_alpha(None, mask, input_ids, cache)
        return super()._assisted_decoding(input_ids, *args, inputs_tensor=inputs_tensor, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, *args: Any
    ) -> None:
        given = model_kwargs.get("past_key_values")
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache = model_kwargs.get("past_key_values")
        let_grow(cache, len(self.transformer.h))
        if given is None and is_growing(cache):
            cache.is_fresh = True  # nobody but this call knows it

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[GenerationConfig, dict]:
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        if generation_config.do_sample and generation_config.temperature is not None:
            if generation_config.temperature < COLDEST:  # transformers refuses 0, which means greedy
                generation_config.do_sample = False
                generation_config.temperature = 1.0
        return generation_config, model_kwargs

    def _get_logits_processor(self, generation_config: GenerationConfig, *args: Any, **kwargs: Any) -> Processors:
        """What the sampler can do is left to it, unless something else comes in between."""
        make = super()._get_logits_processor
        every = LogitsProcessorList([FiniteLogits(self.dtype), *make(generation_config, *args, **kwargs)])
        neutral = copy.copy(generation_config)
        neutral.temperature, neutral.top_k, neutral.top_p, neutral.min_p = 1.0, 0, 1.0, None
        sampling = Sampling.from_config(generation_config)
        unlimited = Sampling(temperature=1.0 if generation_config.do_sample else 0.0)
        if generation_config.do_sample and any(_is_used(getattr(generation_config, name, None)) for name in WARPERS):
            return Processors(every, every, unlimited)
        rest = make(neutral, *args, **kwargs)
        if len(rest) > (sampling.repetition_penalty != 1.0):  # the penalty comes before the others
            sampling = replace(sampling, repetition_penalty=1.0)
        else:
            rest = LogitsProcessorList()
        return Processors(every, rest, sampling)


def _is_padded_left(mask: Tensor) -> bool:
    """Whether a mask (B, T) hides nothing but the beginning of each row, and no row whole."""
    return mask.ndim == 2 and bool((mask[:, 1:] >= mask[:, :-1]).all() and mask[:, -1].all())


def _are_counted(positions: Tensor | None, mask: Tensor | None) -> bool:
    """Whether positions (B, T), where given, are those of tokens that are counted from each row's first on."""
    if positions is None:
        return True
    if mask is None:
        return bool((positions == torch.arange(positions.shape[-1], device=positions.device)).all())
    return bool((positions == mask.long().cumsum(-1) - 1)[mask.bool()].all())


def _is_used(warper: Any) -> bool:
    return warper is not None and warper != 1.0 and warper != 0.0
