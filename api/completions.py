"""/v1/completions: prompts go on as they are, without roles."""

import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from qwen import QWenTokenizer
from qwen.engine import Request, Update
from qwen.sampling import Choice

from .chat import describe_token
from .errors import ApiError
from .protocol import CompletionRequest
from .replies import Replies, logger, stream_choices
from .server import Server

DEFAULT_TOKENS = 16  # as OpenAI documents


@dataclass(frozen=True)
class CompletionPlan:
    requests: Sequence[Request]
    prompts: int
    echo: bool
    logprobs: int | None


def plan_completion(server: Server, body: CompletionRequest) -> CompletionPlan:
    """Check and translate a request.

    Raises:
        ApiError: it can't be served.
    """
    tokenizer, vocab_size = server.ready.tokenizer, server.ready.model.config.vocab_size
    prompts = [tokenizer.encode_text(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts]
    if not 1 <= len(prompts) <= server.settings.max_messages:
        raise ApiError(400, f"prompt: from 1 to {server.settings.max_messages} here", "prompt", "invalid_value")
    if too_high := [token for prompt in prompts for token in prompt if token >= vocab_size]:
        message = f"prompt: there is no token {too_high[0]}, only 0 to {vocab_size - 1}"
        raise ApiError(400, message, "prompt", "invalid_value")
    wanted = DEFAULT_TOKENS if body.max_tokens is None else body.max_tokens
    requests = [
        Request(
            prompt,
            server.fit(prompt, wanted, "prompt"),
            server.sampling(body, body.logprobs, number),
            body.stops,
            server.stop_ids,
            strip=False,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
        for prompt in prompts
        for number in range(body.n or 1)
    ]
    if server.settings.log_prompts:
        logger.info("prompt: %r", body.prompt)
    return CompletionPlan(requests, len(prompts), bool(body.echo), body.logprobs)


class CompletionReader:
    """One choice: the pieces that streams send, whose sum is the choice of a response in one piece."""

    def __init__(self, tokenizer: QWenTokenizer, plan: CompletionPlan, index: int) -> None:
        self.tokenizer, self.plan, self.index = tokenizer, plan, index
        self.offset = 0  # in the text, of the next token
        self.is_begun = False

    def read(self, update: Update) -> list[dict[str, Any]]:
        """What an update adds: one piece, or none."""
        text, entries = "", []
        prompt = self.plan.requests[self.index].prompt
        if self.plan.echo and not self.is_begun:
            text = self.tokenizer.decode(prompt)
            if self.plan.logprobs is not None:
                entries = self._entries([Choice(prompt[0]), *update.prompt_choices])
        self.is_begun = True
        text += update.text
        if self.plan.logprobs is not None and update.finish_reason != "stop":
            entries += self._entries(update.choices)
        if not text and not entries and update.finish_reason is None:
            return []
        logprobs = None if self.plan.logprobs is None else merge_entries(entries)
        reason = "stop" if update.finish_reason == "stop_word" else update.finish_reason
        return [{"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": reason}]

    def _entries(self, choices: Sequence[Choice]) -> list[tuple]:
        """Token, log-probability, likeliest tokens and place in the text, for each choice."""
        entries = []
        for choice in choices:
            token = describe_token(self.tokenizer, choice.token, choice.logprob or 0.0)["token"]
            top = {describe_token(self.tokenizer, t, p)["token"]: p for t, p in choice.top}
            entries.append((token, choice.logprob, top if choice.logprob is not None else None, self.offset))
            self.offset += len(token)
        return entries


def merge_entries(entries: Sequence[tuple]) -> dict[str, list]:
    columns = [list(column) for column in zip(*entries, strict=True)] or [[], [], [], []]
    return dict(zip(("tokens", "token_logprobs", "top_logprobs", "text_offset"), columns, strict=True))


def merge_pieces(pieces: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The whole of a choice's pieces."""
    logprobs = [piece["logprobs"] for piece in pieces if piece["logprobs"] is not None]
    merged = (
        {name: list(itertools.chain(*(part[name] for part in logprobs))) for name in logprobs[0]} if logprobs else None
    )
    return {**pieces[-1], "text": "".join(piece["text"] for piece in pieces), "logprobs": merged}


async def collect_completion(server: Server, plan: CompletionPlan, replies: Replies) -> dict[str, Any]:
    """The response that is sent in one piece."""
    readers = [CompletionReader(replies.engine.tokenizer, plan, index) for index in range(len(plan.requests))]
    pieces: list[list[dict[str, Any]]] = [[] for _ in readers]
    async for step in replies:
        if step is not None:
            number, update = step
            pieces[number] += readers[number].read(update)
    choices = [merge_pieces(parts) for parts in pieces]
    return {**server.head("text_completion", "cmpl"), "choices": choices, "usage": replies.usage(plan.prompts)}


async def stream_completion(
    server: Server, plan: CompletionPlan, replies: Replies, include_usage: bool
) -> AsyncIterator[dict[str, Any] | None]:
    """The response's chunks; None where a comment shall keep the connection alive."""
    head = server.head("text_completion", "cmpl") | ({"usage": None} if include_usage else {})
    readers = [CompletionReader(replies.engine.tokenizer, plan, index) for index in range(len(plan.requests))]
    async for chunk in stream_choices(head, readers, replies, include_usage, plan.prompts):
        yield chunk
