"""What the endpoints share: the engine once it is there, and the settings."""

import hashlib
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers

from qwen.engine import Engine, Request
from qwen.sampling import Sampling

from .errors import ApiError
from .grammar import Constraint, Grammars
from .metrics import Metrics
from .parameters import SamplingRequest


@dataclass(frozen=True)
class Settings:
    """What the operator decides."""

    model_name: str = "Qwen-7B-Chat"
    aliases: Sequence[str] = ()  # other names that clients may ask for
    credentials: Sequence[str] = ()  # accepted Authorization headers; none: everybody is served
    cors_origins: Sequence[str] = ()
    max_body: int = 8 * 2**20  # bytes
    max_messages: int = 1024
    max_n: int = 8
    max_new_tokens: int = 1024  # of a reply whose request does not say
    keep_alive: float = 15.0  # seconds between comments in a stream that has nothing to say
    log_prompts: bool = False
    max_stored: int = 256  # responses that are kept for /v1/responses
    lenient: bool = False  # unknown parameters are passed over
    log_json: bool = False  # a line of JSON for each request
    root_path: str = ""  # what a proxy puts before the paths


@dataclass
class Server:
    """The engine, or why it is not there yet, and what was configured."""

    settings: Settings = field(default_factory=Settings)
    metrics: Metrics = field(default_factory=Metrics)
    engine: Engine | None = None
    grammars: Grammars | None = None
    fingerprint: str = ""
    started: int = field(default_factory=lambda: int(time.time()))

    def attach(self, engine: Engine) -> None:
        """From now on, serve."""
        config = engine.model.config
        self.grammars = Grammars(engine.tokenizer, config.vocab_size)
        described = f"{config.to_json_string()} {engine.model.dtype} {torch.__version__} {transformers.__version__}"
        self.fingerprint = f"fp_{hashlib.sha256(described.encode()).hexdigest()[:10]}"
        self.engine = engine

    @property
    def ready(self) -> Engine:
        """The engine; while it is loading, or closing, clients are told to come again."""
        if self.engine is None:
            raise ApiError(503, "the model is loading: try again", code="loading", retry_after=5)
        if self.engine.closing is not None:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=30)
        return self.engine

    def check_model(self, name: str | None) -> None:
        names = (self.settings.model_name, *self.settings.aliases)
        if name is not None and name not in names:
            message = f"there is no model {name!r} here, only {', '.join(map(repr, names))}"
            raise ApiError(404, message, "model", "model_not_found")

    def head(self, kind: str, prefix: str) -> dict[str, Any]:
        """The fields that every response begins with."""
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.settings.model_name,
            "system_fingerprint": self.fingerprint,
        }

    def fit(self, prompt: Sequence[int], max_tokens: int | None, param: str, limit_param: str = "max_tokens") -> int:
        """How many tokens a reply may have.

        Raises:
            ApiError: prompt and reply do not fit into the context; it has the numbers.
        """
        context, code = self.ready.context, "context_length_exceeded"
        if not prompt:
            raise ApiError(400, f"{param} is empty", param, "invalid_value")
        if max_tokens is not None and max_tokens >= context:
            message = f"{limit_param} is {max_tokens:,}, more than the context of {context:,} tokens holds"
            raise ApiError(400, message, limit_param, code)
        if len(prompt) + (1 if max_tokens is None else max_tokens) > context:
            wanted = "" if max_tokens is None else f", and {max_tokens:,} more were asked for"
            message = f"the prompt is too long for the context of {context:,} tokens: it has {len(prompt):,}{wanted}"
            raise ApiError(400, message, param, code)
        return min(self.settings.max_new_tokens, context - len(prompt)) if max_tokens is None else max_tokens

    def request(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        body: SamplingRequest,
        *,
        number: int,
        stops: Sequence[str],
        strip: bool,
        top_logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        constraint: Constraint | None = None,
    ) -> Request:
        """Choice `number` of a request, for the engine.

        Raises:
            ApiError: a setting is out of this server's or this model's range.
        """
        named = body.stop_token_ids or []
        self.check_tokens(named, "stop_token_ids")
        ends = list(named) if body.ignore_eos else [*self.stop_ids, *named]
        return Request(
            prompt,
            max_tokens,
            self.sampling(body, top_logprobs, number, ends, max_tokens),
            stops,
            ends,
            constraint,
            strip and not body.include_stop_str_in_output,
            prompt_logprobs,
            bool(body.include_stop_str_in_output),
        )

    def check_tokens(self, tokens: Iterable[int], param: str) -> None:
        """ApiError unless all are tokens of the model."""
        vocab_size = self.ready.model.config.vocab_size
        if too_high := [token for token in tokens if token >= vocab_size]:
            message = f"{param}: there is no token {too_high[0]}, only 0 to {vocab_size - 1}"
            raise ApiError(400, message, param, "invalid_value")

    def sampling(
        self, body: SamplingRequest, top_logprobs: int | None, number: int, ends: Sequence[int], max_tokens: int
    ) -> Sampling:
        """The settings of choice `number`: what the request says, else what the checkpoint does."""
        if body.n is not None and body.n > self.settings.max_n:
            raise ApiError(400, f"n is {body.n}, and at most {self.settings.max_n} here", "n", "invalid_value")
        if body.min_tokens and body.min_tokens > max_tokens:
            message = f"min_tokens is {body.min_tokens:,}, more than the {max_tokens:,} tokens of the longest reply"
            raise ApiError(400, message, "min_tokens", "invalid_value")
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
        self.check_tokens(bias, "logit_bias")
        own = Sampling.from_config(self.ready.model.generation_config)
        given = {
            name: getattr(body, name)
            for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty",
                         "frequency_penalty", "min_tokens")
            if getattr(body, name) is not None
        }  # fmt: skip
        return replace(
            own,
            **given,
            top_k=own.top_k if body.top_k is None else max(body.top_k, 0),
            logit_bias=bias,
            seed=None if body.seed is None else body.seed + number,
            top_logprobs=top_logprobs,
            ends=ends if body.min_tokens else (),
            bad_words=self.encode_words(body.bad_words or []),
        )

    def encode_words(self, words: Sequence[str]) -> list[list[int]]:
        """Each word as tokens, at the beginning of a text and after a blank."""
        if "" in words:
            raise ApiError(400, "bad_words: a word is empty", "bad_words", "invalid_value")
        encode = self.ready.tokenizer.encode_text
        forms = [encode(form) for word in words for form in (word, f" {word.lstrip()}")]
        return [ids for ids in forms if ids]

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end every reply."""
        eos = self.ready.model.generation_config.eos_token_id
        tokenizer = self.ready.tokenizer
        ids = [tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id]
        return [*ids, *([eos] if isinstance(eos, int) else eos or [])]
