"""What the endpoints share: the engine once it is there, and the settings."""

import hashlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from qwen.engine import Engine
from qwen.sampling import Sampling

from .errors import ApiError
from .grammar import Grammars
from .metrics import Metrics
from .protocol import SamplingRequest


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

    def fit(self, prompt: Sequence[int], max_tokens: int | None, param: str) -> int:
        """How many tokens a reply may have.

        Raises:
            ApiError: prompt and reply do not fit into the context; it has the numbers.
        """
        context = self.ready.context
        if not prompt:
            raise ApiError(400, f"{param} is empty", param, "invalid_value")
        if len(prompt) + (1 if max_tokens is None else max_tokens) > context:
            wanted = "" if max_tokens is None else f", and {max_tokens:,} more were asked for"
            message = f"the prompt is too long for the context of {context:,} tokens: it has {len(prompt):,}{wanted}"
            raise ApiError(400, message, param, "context_length_exceeded")
        return min(self.settings.max_new_tokens, context - len(prompt)) if max_tokens is None else max_tokens

    def sampling(self, body: SamplingRequest, top_logprobs: int | None, number: int) -> Sampling:
        """The settings of choice `number`: what the request says, else what the checkpoint does."""
        config = self.ready.model.generation_config
        if body.n is not None and body.n > self.settings.max_n:
            raise ApiError(400, f"n: at most {self.settings.max_n} here", "n", "invalid_value")
        vocab_size = self.ready.model.config.vocab_size
        bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
        if too_high := [token for token in bias if token >= vocab_size]:
            message = f"logit_bias: there is no token {too_high[0]}, only 0 to {vocab_size - 1}"
            raise ApiError(400, message, "logit_bias", "invalid_value")

        def first(*values: float | None) -> Any:
            return next(value for value in values if value is not None)

        own = Sampling.from_config(config)
        return Sampling(
            temperature=first(body.temperature, own.temperature),
            top_k=first(body.top_k, own.top_k),
            top_p=first(body.top_p, own.top_p),
            min_p=own.min_p,
            repetition_penalty=first(body.repetition_penalty, own.repetition_penalty),
            presence_penalty=first(body.presence_penalty, 0.0),
            frequency_penalty=first(body.frequency_penalty, 0.0),
            logit_bias=bias,
            seed=None if body.seed is None else body.seed + number,
            top_logprobs=top_logprobs,
        )

    @property
    def stop_ids(self) -> list[int]:
        """Tokens that end every reply."""
        eos = self.ready.model.generation_config.eos_token_id
        tokenizer = self.ready.tokenizer
        ids = [tokenizer.im_end_id, tokenizer.im_start_id, tokenizer.eod_id]
        return [*ids, *([eos] if isinstance(eos, int) else eos or [])]
