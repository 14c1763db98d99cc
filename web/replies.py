"""One reply for a browser: from its question to the engine, and back as text that grows."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from transformers import GenerationConfig

from api.errors import ApiError
from api.replies import Replies
from qwen import QwenError
from qwen.chat import reply_config, reply_stops
from qwen.chatml import Message, Turn, build_prompt, encode_messages, history_window
from qwen.engine import Engine, Request
from qwen.sampling import Sampling
from qwen.tools import STOP_WORD, Tool, call_tool, parse_reply, render_messages

POLL = 0.3  # seconds after which a reply that waits looks for its place again
REDRAW = 0.05  # seconds between two updates: eyes need no more


@dataclass(frozen=True)
class Settings:
    """What a user chooses. temperature 0 is greedy; top_k 0 and top_p 1 keep all; seed None is a new one each time."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    max_new_tokens: int
    seed: int | None = None


@dataclass(frozen=True)
class Step:
    """A tool's call and its result, on the way to an answer."""

    thought: str
    name: str
    arguments: str
    observation: str


@dataclass(frozen=True)
class Question:
    """What a reply is asked for. `prefix` is the beginning of the reply, to go on from; system None the checkpoint's
    message; `steps` are the tool calls made for this question so far."""

    query: str
    history: Sequence[Turn] = ()
    system: str | None = None
    prefix: str = ""
    tools: Sequence[Tool] = ()
    steps: Sequence[Step] = ()


@dataclass(frozen=True)
class Progress:
    """What a reply has more of since the last one. `place` counts from 1 while it waits for others; `rate` is in tokens
    per second. With tools, the last one says what the whole text comes to: an answer, or a call with its result, which
    is None where the user is to give it."""

    text: str = ""
    place: int | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    rate: float = 0.0
    dropped_turns: int = 0
    finish_reason: str | None = None
    answer: str | None = None
    call: dict[str, Any] | None = None


class PageError(QwenError):
    """An error that the page tells in its own language: the text `error_{key}`, with values."""

    def __init__(self, message: str, key: str, **values: Any) -> None:
        super().__init__(message)
        self.key, self.values = key, values


class ServerClosing(QwenError):
    """The server ends: the page asks the next one."""


@dataclass
class Replier:
    """Asks the engine for browsers."""

    engine: Engine
    config: GenerationConfig = field(init=False)

    def __post_init__(self) -> None:
        self.config = reply_config(self.engine.model, None, {})

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
        )

    async def reply(self, question: Question, settings: Settings) -> AsyncIterator[Progress]:
        """The reply as it grows; the last progress has a finish_reason (stop, stop_word, length, tool).

        The engine is told at once when the reader leaves.

        Raises:
            QwenError: prompt too long, too many wait, out of memory: in a sentence.
        """
        ids, dropped_turns = await asyncio.to_thread(self._encode, question)
        request = self._request(ids, question, settings)
        try:
            replies = Replies(self.engine, [request], keep_alive=POLL)
            try:
                async for progress in self._follow(replies, question, dropped_turns):
                    yield progress
            finally:
                replies.cancel()
        except ApiError as error:
            if error.status == 503:
                raise ServerClosing(str(error)) from error
            if error.status == 429:
                raise PageError(str(error), "busy") from error
            raise QwenError(str(error)) from error

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.engine.tokenizer.encode_text(text))

    def _encode(self, question: Question) -> tuple[list[int], int]:
        """The prompt, up to and with the beginning of the reply, and how many turns did not fit."""
        tokenizer, config = self.engine.tokenizer, self.config
        history, window = list(question.history), config.max_window_size
        if not question.tools:
            prompt = build_prompt(tokenizer, question.query, history, question.system, window, config.chat_format)
            return [*prompt.ids, *tokenizer.encode_text(question.prefix)], prompt.dropped_turns
        system = tokenizer.default_system if question.system is None else question.system
        kept = [turn for turn, _ in history_window(tokenizer, history, system, window)]
        messages: list[Message] = [{"role": "system", "content": system}]
        for query, reply in kept:
            messages += [{"role": "user", "content": query}, {"role": "assistant", "content": reply}]
        messages.append({"role": "user", "content": question.query})
        for step in question.steps:
            call = {"name": step.name, "arguments": step.arguments}
            messages.append({"role": "assistant", "content": step.thought, "function_call": call})
            messages.append({"role": "function", "content": step.observation})
        goes_on = bool(question.steps)
        ids = encode_messages(tokenizer, render_messages(messages, question.tools), not goes_on, goes_on)
        return [*ids, *tokenizer.encode_text(question.prefix)], len(history) - len(kept)

    def _request(self, prompt: Sequence[int], question: Question, settings: Settings) -> Request:
        context = self.engine.context
        if len(prompt) >= context:
            tokens, most = f"{len(prompt):,}", f"{context - 1:,}"
            message = f"the prompt has {tokens} tokens and the model reads at most {most}: shorten it"
            raise PageError(message, "too_long", tokens=tokens, most=most)
        eos = self.config.eos_token_id
        stop_words = [STOP_WORD] if question.tools else []
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
            reply_stops(self.engine.tokenizer, self.config, stop_words),
            [eos] if isinstance(eos, int) else eos or [],
            strip=not question.prefix,  # the blank between two words belongs to what goes on
        )

    async def _follow(self, replies: Replies, question: Question, dropped_turns: int) -> AsyncIterator[Progress]:
        """What the engine says about one reply, several tokens at a time."""
        [job] = replies.jobs
        text, told, tokens, first, drawn = "", "", 0, 0.0, 0.0
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
            if update.finish_reason is None and now - drawn < REDRAW:
                continue
            drawn = now
            rate = (tokens - 1) / (now - first) if now > first else 0.0
            progress = seen(text=text[len(told) :], tokens=tokens, rate=rate, finish_reason=update.finish_reason)
            told = text
            if progress.finish_reason and question.tools:
                progress = await asyncio.to_thread(self._conclude, progress, question, text)
            yield progress

    def _conclude(self, progress: Progress, question: Question, text: str) -> Progress:
        """What a whole reply of a model with tools comes to."""
        opened = "Thought:\n" if question.steps else ""
        answer, calls = parse_reply(opened + question.prefix + text, question.tools, any_name=True, most_calls=1)
        if not calls:
            return replace(progress, answer=answer)
        [call] = calls
        by_hand = any(tool.name == call.name and tool.function is None for tool in question.tools)
        observation = None if by_hand else call_tool(question.tools, call)
        made = {"thought": answer, "name": call.name, "arguments": call.arguments, "observation": observation}
        return replace(progress, finish_reason="tool", call=made)

    def _place(self, job: object) -> int | None:
        """A job's place in the queue, from 1; None if it is read or written already."""
        waiting = [other for other in list(self.engine.waiting) if not other.cancelled]
        return waiting.index(job) + 1 if job in waiting else None
