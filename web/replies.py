"""One reply for a browser: from its question to the engine, and back as text that grows."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from transformers import GenerationConfig

from api.errors import ApiError
from api.replies import Replies
from qwen import QwenError
from qwen.chat import reply_config, reply_stops
from qwen.chatml import Turn, build_prompt
from qwen.engine import Engine, Request, Update
from qwen.sampling import Sampling

POLL = 0.3  # seconds after which a reply that waits looks for its place again


@dataclass(frozen=True)
class Settings:
    """What a user chooses. temperature 0 is greedy; top_k 0 and top_p 1 keep all; seed None is a new one each time,
    system None the checkpoint's message."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    max_new_tokens: int
    seed: int | None = None
    system: str | None = None


@dataclass(frozen=True)
class Progress:
    """A reply as far as it is. `place` counts from 1 while it waits for others; `rate` is in tokens per second."""

    text: str = ""
    place: int | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    rate: float = 0.0
    dropped_turns: int = 0
    finish_reason: str | None = None


class Replier:
    """Asks the engine for browsers, each known by its session's name and with one reply at a time."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.config: GenerationConfig = reply_config(engine.model, None, {})
        self.running: dict[str, Callable[[], None]] = {}  # session -> what stops its reply

    @property
    def defaults(self) -> Settings:
        """The checkpoint's own settings."""
        sampling = Sampling.from_config(self.config)
        return Settings(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            max_new_tokens=min(self.config.max_new_tokens or 512, self.engine.context - 1),
            system=self.engine.tokenizer.default_system,
        )

    async def reply(
        self, session: str, query: str, history: Sequence[Turn], settings: Settings
    ) -> AsyncIterator[Progress]:
        """The reply as it grows; the last one has a finish_reason (stop, stop_word, length, cancelled).

        The engine is told at once when the reader leaves, or when `stop` is called.

        Raises:
            QwenError: prompt too long, too many wait, out of memory: in a sentence.
        """
        config = self.config
        prompt = await asyncio.to_thread(
            build_prompt, self.engine.tokenizer, query, history, settings.system, config.max_window_size,
            config.chat_format,
        )  # fmt: skip
        request = self._request(prompt.ids, settings)
        try:
            replies = Replies(self.engine, [request], keep_alive=POLL)
            self.running[session] = partial(end, replies, asyncio.get_running_loop())
            try:
                async for progress in self._follow(replies, prompt.dropped_turns):
                    yield progress
            finally:
                replies.cancel()
                self.running.pop(session, None)
        except ApiError as error:
            raise QwenError(str(error)) from error

    async def _follow(self, replies: Replies, dropped_turns: int) -> AsyncIterator[Progress]:
        """What the engine says about one reply."""
        [job] = replies.jobs
        text, tokens, first = "", 0, 0.0
        seen = partial(Progress, prompt_tokens=len(job.request.prompt), dropped_turns=dropped_turns)
        yield seen(place=self._place(job))
        async for step in replies:
            if step is None:
                if not tokens:
                    yield seen(place=self._place(job))
                continue
            update = step[1]
            now = time.monotonic()
            first = first or now
            text, tokens = text + update.text, max(tokens, update.completion_tokens)
            rate = (tokens - 1) / (now - first) if now > first else 0.0
            yield seen(text=text, tokens=tokens, rate=rate, finish_reason=update.finish_reason)

    def _request(self, prompt: Sequence[int], settings: Settings) -> Request:
        context = self.engine.context
        if len(prompt) >= context:
            raise QwenError(
                f"the prompt has {len(prompt):,} tokens and the model reads at most {context - 1:,}: shorten it"
            )
        eos = self.config.eos_token_id
        return Request(
            prompt,
            min(settings.max_new_tokens, context - len(prompt)),
            Sampling(
                temperature=settings.temperature,
                top_p=settings.top_p,
                top_k=settings.top_k,
                repetition_penalty=settings.repetition_penalty,
                seed=settings.seed,
            ),
            reply_stops(self.engine.tokenizer, self.config, None),
            [eos] if isinstance(eos, int) else eos or [],
        )

    def _place(self, job: object) -> int | None:
        """A job's place in the queue, from 1; None if it is read or written already."""
        waiting = [other for other in list(self.engine.waiting) if not other.cancelled]
        return waiting.index(job) + 1 if job in waiting else None

    def stop(self, session: str) -> None:
        """End a session's reply, if there is one; what it has so far stays."""
        if session in self.running:
            self.running[session]()


def end(replies: Replies, loop: asyncio.AbstractEventLoop) -> None:
    """Free the engine of a reply at once, and let its reader know; for any thread."""
    replies.cancel()
    loop.call_soon_threadsafe(replies.updates.put_nowait, (0, Update(finish_reason="cancelled")))
