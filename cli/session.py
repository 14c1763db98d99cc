"""A chat's whole state, and how it asks the model."""

import contextlib
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from qwen.chat import Reply, reply_config
from qwen.chatml import Turn
from qwen.errors import first_line

from .display import Display
from .texts import Texts

SEEDS = 2**32

Interruptible = Callable[[], contextlib.AbstractContextManager[threading.Event | None]]


@dataclass
class Stats:
    """Tokens and times of the session and of its last reply (seconds; the rate is in tokens per second)."""

    replies: int = 0
    tokens_read: int = 0
    tokens_written: int = 0
    last_tokens: int = 0
    last_first: float = 0.0
    last_rate: float = 0.0

    def add(self, reply: Reply, first: float, total: float) -> None:
        """Count a reply whose first token came after `first` seconds and whose last came after `total`."""
        self.replies += 1
        self.tokens_read += reply.prompt_tokens
        self.tokens_written += reply.completion_tokens
        self.last_tokens, self.last_first = reply.completion_tokens, first
        self.last_rate = (reply.completion_tokens - 1) / (total - first) if total > first else 0.0


@dataclass
class ChatSession:
    """One chat. `config` is the one object that holds its generation settings: every reply is generated with it."""

    model: Any
    tokenizer: Any
    display: Display
    texts: Texts
    seed: int = field(default_factory=lambda: secrets.randbelow(SEEDS))
    system: str | None = None  # None becomes the checkpoint's default
    interruptible: Interruptible = contextlib.nullcontext  # gives the event that stops a reply
    config: GenerationConfig = field(init=False)
    history: list[Turn] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)
    stopped: bool = False  # the last reply was stopped by the user
    failures: int = 0
    leaving: bool = False

    def __post_init__(self) -> None:
        self.config = self.own_config()
        self.system = self.tokenizer.default_system if self.system is None else self.system

    def own_config(self) -> GenerationConfig:
        """The checkpoint's settings, in a new object."""
        return reply_config(self.model, None, {})

    def ask(self, query: str) -> None:
        """Answer a message and remember the turn; after an error the history is as it was."""
        reply = self._generate(query, self.history)
        if reply is not None:
            self.history.append((query, str(reply)))

    def regenerate(self) -> None:
        """Answer the last message anew; after an error its old answer stays."""
        query = self.history[-1][0]
        reply = self._generate(query, self.history[:-1])
        if reply is not None:
            self.history[-1] = (query, str(reply))

    def fail(self, message: str) -> None:
        """Say in one sentence what went wrong."""
        self.failures += 1
        self.display.say(self.texts("error", message=message), style="red")

    def _generate(self, query: str, history: list[Turn]) -> Reply | None:
        torch.manual_seed(self.seed)
        self.seed = (self.seed + 1) % SEEDS
        self.stopped = False
        reply, first, total = None, 0.0, 0.0
        started = time.perf_counter()
        try:
            with self.interruptible() as cancel, self.display.reply() as shown:
                replies = self.model.chat_stream(
                    self.tokenizer, query, history, self.system, generation_config=self.config, cancel=cancel
                )
                with contextlib.closing(replies):
                    for reply in replies:
                        total = time.perf_counter() - started
                        first = first or total
                        shown.update(reply)
        except (RuntimeError, ValueError, MemoryError) as error:  # QwenError, torch's (memory, CUDA), transformers'
            no_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)
            self.fail(self.texts("no_memory") if no_memory else first_line(error))
            return None
        self.stats.add(reply, first, total)
        self._remark(reply, len(history))
        return reply

    def _remark(self, reply: Reply, turns: int) -> None:
        """Say what the reply itself does not show: how it ended and what it was not given."""
        notes = []
        if not reply:
            notes.append(self.texts("empty_reply"))
        if reply.dropped_turns:
            window = self.config.max_window_size
            notes.append(self.texts("dropped", count=reply.dropped_turns, total=turns, window=window))
        if reply.finish_reason == "cancelled":
            self.stopped = True
            notes.append(self.texts("stopped"))
        elif reply.finish_reason == "length":
            limit = self.config.max_new_tokens
            by_tokens = limit is not None and reply.completion_tokens >= limit
            notes.append(self.texts("cut_tokens", limit=limit) if by_tokens else self.texts("cut"))
        for note in notes:
            self.display.say(note, style="dim")
        self.display.end_turn()
