"""Parameters that clients send and this server does not act upon: which of them pass, and why others can't.

A parameter passes where the reply is the same without it: because it never changes a reply, because its value is the
one that switches it off, or because it is null. Everything else is refused by name (`--lenient`: passed over).
"""

import logging
from collections.abc import Collection
from contextvars import ContextVar
from typing import Any

lenient: ContextVar[bool] = ContextVar("lenient", default=False)  # whether the server passes over what it doesn't know
logger = logging.getLogger("qwen.api")

# Whatever their value, the reply is what it would be without them.
WITHOUT_EFFECT = frozenset(
    "user safety_identifier prompt_cache_key prompt_cache_retention metadata store service_tier reasoning_effort "
    "reasoning verbosity prediction "  # OpenAI's
    "priority request_id rid cache_salt add_special_tokens spaces_between_special_tokens chat_template_kwargs "
    "guided_decoding_backend include_reasoning separate_reasoning stream_reasoning "  # vLLM's and SGLang's
    "cache_prompt n_keep n_discard return_progress timings_per_token "  # llama.cpp's
    "provider transforms route usage ttl keep_alive".split()  # of routers and front ends
)

# The values that ask for nothing; null does so for all. The words say why others are refused.
NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    # OpenAI's
    "audio": ((), "the model neither hears nor speaks"),
    "modalities": ((["text"], []), "the model reads and writes text alone"),
    "moderation": ((), "there is no moderation model"),
    "suffix": (("",), "the model was not trained to fill in the middle"),
    "web_search_options": ((), "the server searches nothing"),
    # vLLM's and SGLang's
    "allowed_token_ids": (([],), "use logit_bias, or structured_outputs"),
    "chat_template": ((), "prompts are ChatML, as the model was trained"),
    "custom_logit_processor": ((), "the server runs no code of clients"),
    "documents": (([],), "put them into a message"),
    "early_stopping": ((False,), "there is no beam search"),
    "frequency_ngram": ((0,), "there is no such penalty"),
    "kv_transfer_params": ((), "there is one engine"),
    "length_penalty": ((1, 0), "there is no beam search"),
    "logits_processors": (([],), "the server runs no code of clients"),
    "mm_processor_kwargs": (({},), "the model reads text alone"),
    "no_repeat_ngram_size": ((0,), "use repetition_penalty"),
    "no_stop_trim": ((False,), "use include_stop_str_in_output"),
    "return_hidden_states": ((False,), "hidden states are not returned"),
    "session_params": (({},), "shared beginnings are found without"),
    "skip_special_tokens": ((True,), "control tokens are never text"),
    "thinking": (({"type": "disabled"}, False), "the model has no hidden thoughts"),
    "truncate_prompt_tokens": ((-1, 0), "prompts are never cut"),
    "use_beam_search": ((False,), "there is no beam search"),
    "vllm_xargs": (({},), "this is not vLLM"),
    # llama.cpp's, and of its front ends
    "dry_multiplier": ((0,), "there is no such sampler"),
    "dynatemp_range": ((0,), "there is no such sampler"),
    "id_slot": ((-1,), "the server chooses"),
    "ignore_logit_bias": ((False,), "leave logit_bias out"),
    "mirostat": ((0,), "there is no such sampler"),
    "mirostat_mode": ((0,), "there is no such sampler"),
    "plugins": (([],), "there are none"),
    "repeat_penalty": ((1,), "it is called repetition_penalty here"),
    "tfs_z": ((1,), "there is no such sampler"),
    "top_a": ((0,), "there is no such sampler"),
    "top_n_sigma": ((-1, 0), "there is no such sampler"),
    "typical_p": ((1,), "there is no such sampler"),
    "xtc_probability": ((0,), "there is no such sampler"),
}


def refusal(name: str) -> str | None:
    """Why a documented parameter is not supported; None for one that nobody here knows."""
    return NEUTRAL[name][1] if name in NEUTRAL else None


def asks_for_nothing(name: str, value: Any) -> bool:
    """Whether a parameter that this server does not act upon leaves the reply as it is."""
    if value is None or name in WITHOUT_EFFECT:
        return True
    neutral = NEUTRAL.get(name, ((), ""))[0]
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral)


def pass_over(request: Any, known: Collection[str]) -> Any:
    """A request without the parameters that ask for nothing; where the server is lenient, without all others too."""
    if not isinstance(request, dict):
        return request
    kept = {name: value for name, value in request.items() if name in known or not asks_for_nothing(name, value)}
    if lenient.get() and (unknown := [name for name in kept if name not in known]):
        logger.warning("passed over: %s", ", ".join(map(ascii, unknown)))
        kept = {name: value for name, value in kept.items() if name in known}
    return kept
