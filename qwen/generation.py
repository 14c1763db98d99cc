"""transformers' `generate`, where it has to know about Qwen: stop words, NTK factors, long prompts, and the sampler."""

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache import is_growing, let_grow
from .chat import ChatMixin, FiniteLogits, StopSequences, light_criterion
from .compiled import CompiledReplies
from .errors import QwenError
from .sampling import COLDEST, Sampler, Sampling, row_generators
from .settings import check_stop_words_ids

PREFILL_CHUNK = 1024  # tokens: as fast as a whole prompt, on CPUs and GPUs, and a long prompt needs no more memory
WARPERS = ("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "watermarking_config")  # that only transformers has


class Processors(LogitsProcessorList):
    """What `generate` does to logits: all of it for beam search and assisted decoding, which choose by themselves; for
    the others what the sampler leaves to do, and the sampler's settings."""

    def __init__(self, every: LogitsProcessorList, rest: LogitsProcessorList, sampling: Sampling) -> None:
        super().__init__(every)
        self.rest, self.sampling = rest, sampling


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

    compiled: CompiledReplies | None

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
        generate = partial(
            super().generate, inputs, generation_config, logits_processor, stopping_criteria, *args, **kwargs
        )
        return generate() if self.compiled is None else self.compiled.run(generate)

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
        """The loop of greedy search and sampling: as transformers' own, but for the sampler.

        With a growing cache it also leaves out that one's bookkeeping, which costs milliseconds a token.
        """
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
                raise FiniteLogits.error(self.dtype)
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
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        let_grow(model_kwargs.get("past_key_values"), len(self.transformer.h))

    def _prepare_static_cache(self, **kwargs: Any) -> Cache:
        make = super()._prepare_static_cache
        if self.compiled is None:
            return make(**kwargs)
        rows, tokens = kwargs["batch_size"], kwargs["max_cache_len"]
        return self.compiled.cache_for(rows, tokens, lambda room: make(**{**kwargs, "max_cache_len": room}))

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


def _is_used(warper: Any) -> bool:
    return warper is not None and warper != 1.0 and warper != 0.0
