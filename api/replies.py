"""Replies as asyncio sees them: what the engine's thread delivers, counted, and ended when the client hangs up."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request as HttpRequest

from qwen import QwenError
from qwen.engine import Closed, Engine, QueueFull, Request, Update, describe_error

from .errors import ApiError

logger = logging.getLogger("qwen.api")


class Replies:
    """The replies to some requests, decoded together; iterate over (number of the request, what it adds)."""

    def __init__(self, engine: Engine, requests: Sequence[Request], keep_alive: float) -> None:
        self.engine, self.requests, self.keep_alive = engine, requests, keep_alive
        self.completion_tokens = [0] * len(requests)
        self.cached_tokens = 0  # of the first prompt
        loop = asyncio.get_running_loop()
        self.updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        try:
            self.jobs = engine.submit(
                requests,
                lambda number, update: loop.call_soon_threadsafe(self.updates.put_nowait, (number, update)),
            )
        except QueueFull:
            message = f"the server is busy: {engine.limits.max_queue} requests wait already"
            raise ApiError(429, message, code="queue_full", retry_after=5) from None
        except Closed:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=30) from None

    async def __aiter__(self) -> AsyncIterator[tuple[int, Update] | None]:
        """What comes, and None where nothing has come for a while.

        Raises:
            ApiError: a reply failed.
        """
        unfinished = len(self.requests)
        while unfinished:
            try:
                number, update = await asyncio.wait_for(self.updates.get(), self.keep_alive)
            except TimeoutError:
                yield None
                continue
            if update.error is not None:
                raise reply_error(update.error)
            unfinished -= update.finish_reason is not None
            self.completion_tokens[number] = update.completion_tokens
            if number == 0:
                self.cached_tokens = update.cached_tokens
            yield number, update

    def usage(self, prompts: int = 1) -> dict[str, Any]:
        """The tokens of a response so far; its requests are as many replies to each of the prompts."""
        prompt_tokens = sum(len(request.prompt) for request in self.requests[:: len(self.requests) // prompts])
        completion_tokens = sum(self.completion_tokens)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def cancel(self) -> None:
        self.engine.cancel(self.jobs)


class Reader(Protocol):
    """Makes the choices that a response's chunks carry of one reply's updates."""

    def read(self, update: Update) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class UsageWanted:
    """Where a stream tells its usage: at the end, or in every chunk."""

    at_end: bool = False
    always: bool = False

    def field(self, replies: Replies, prompts: int = 1) -> dict[str, Any]:
        """The field of a chunk before the last."""
        if self.always:
            return {"usage": replies.usage(prompts)}
        return {"usage": None} if self.at_end else {}


async def stream_choices(
    head: dict[str, Any], readers: Sequence[Reader], replies: Replies, usage: UsageWanted, prompts: int = 1
) -> AsyncIterator[dict[str, Any] | None]:
    """A stream's chunks, each with one choice; at last the usage. None where a comment shall keep it alive."""
    async for step in replies:
        if step is None:
            yield None
            continue
        number, update = step
        for choice in readers[number].read(update):
            yield {**head, "choices": [choice], **usage.field(replies, prompts)}
    if usage.at_end:
        yield {**head, "choices": [], "usage": replies.usage(prompts)}


def reply_error(error: Exception) -> ApiError:
    if isinstance(error, TimeoutError):
        return ApiError(504, str(error), code="timeout")
    if isinstance(error, Closed):
        return ApiError(503, str(error), code="shutting_down", retry_after=30)
    if isinstance(error, ConnectionError):
        return ApiError(499, str(error))  # which nobody reads
    if not isinstance(error, QwenError):
        logger.error("a reply failed", exc_info=error)
    return ApiError(500, f"the reply failed: {describe_error(error)}", code="reply_failed")


@contextlib.contextmanager
def cancelled_on_leaving(http: HttpRequest, replies: Replies) -> Iterator[None]:
    """End the replies when the client hangs up, or when this block is left early."""

    async def watch() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        replies.cancel()
        replies.updates.put_nowait((0, Update(error=ConnectionError("the client has gone"))))

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        replies.cancel()
