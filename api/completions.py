"""/v1/completions: prompts go on as they are, without roles."""

import codecs
import itertools
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from qwen import QWenTokenizer
from qwen.engine import Request, Update
from qwen.sampling import Choice

from .errors import ApiError
from .plan import Check, make_check, shape
from .protocol import CompletionRequest
from .replies import Replies, UsageWanted, logger, stream_choices
from .scores import prompt_scores, token_bytes, token_name, top_by_name
from .server import Server

DEFAULT_TOKENS = 16  # as OpenAI documents


@dataclass(frozen=True)
class CompletionPlan:
    requests: Sequence[Request]
    prompts: int
    echo: bool
    logprobs: int | None
    prompt_logprobs: bool
    stops: frozenset[str | int]
    left_out: Sequence[str] = ()
    check: Check | None = None


def plan_completion(server: Server, body: CompletionRequest) -> CompletionPlan:
    """Check and translate a request.

    Raises:
        ApiError: it can't be served.
    """
    tokenizer = server.ready.tokenizer
    most = server.settings.max_messages
    if not 1 <= len(body.prompt) <= most:
        raise ApiError(
            400, f"prompt: there are {len(body.prompt)}, and from 1 to {most} here", "prompt", "invalid_value"
        )
    prompts = [tokenizer.encode_text(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompt]
    for prompt in prompts:
        server.check_tokens(prompt, "prompt")
    wanted = DEFAULT_TOKENS if body.max_tokens is None else None if body.max_tokens == -1 else body.max_tokens
    scored = [count for count in (body.logprobs if body.echo else None, body.prompt_logprobs) if count is not None]
    constraint = shape(server, body)
    requests = [
        server.request(
            prompt,
            server.fit(prompt, wanted, "prompt"),
            body,
            number=number,
            stops=body.stop or [],
            strip=False,
            top_logprobs=body.logprobs,
            prompt_logprobs=max(scored, default=None),
            constraint=constraint and constraint.copy(),
        )
        for prompt in prompts
        for number in range(body.n or 1)
    ]
    if server.settings.log_prompts:
        logger.info("prompt: %r", body.prompt)
    left_out = constraint.left_out if constraint else ()
    return CompletionPlan(
        requests, len(prompts), bool(body.echo), body.logprobs, body.prompt_logprobs is not None,
        frozenset([*(body.stop or []), *(body.stop_token_ids or [])]), left_out, make_check(body, left_out),
    )  # fmt: skip


class CompletionReader:
    """One choice: the pieces that streams send, whose sum is the choice of a response in one piece."""

    def __init__(self, tokenizer: QWenTokenizer, plan: CompletionPlan, index: int) -> None:
        self.tokenizer, self.plan, self.index = tokenizer, plan, index
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.offset = 0  # in the text, of the next token
        self.text = ""
        self.is_begun = False

    def read(self, update: Update) -> list[dict[str, Any]]:
        """What an update adds: one piece, or none.

        Raises:
            ApiError: the reply is complete, and breaks its schema.
        """
        text, entries = "", []
        request, extra = self.plan.requests[self.index], {}
        if not self.is_begun and self.plan.prompt_logprobs:
            extra["prompt_logprobs"] = prompt_scores(self.tokenizer, request, update.prompt_choices)
        if self.plan.echo and not self.is_begun:
            text = self.tokenizer.decode(request.prompt)
            if self.plan.logprobs is not None:
                entries = self._entries([Choice(request.prompt[0]), *update.prompt_choices])
        self.is_begun = True
        text += update.text
        self.text += update.text
        if self.plan.logprobs is not None and update.finish_reason != "stop":
            entries += self._entries(update.choices)
        if not text and not entries and not extra and update.finish_reason is None:
            return []
        logprobs = None if self.plan.logprobs is None else merge_entries(entries)
        reason = "stop" if update.finish_reason == "stop_word" else update.finish_reason
        if reason == "stop":
            if self.plan.check and (fault := self.plan.check(self.text)):
                raise ApiError(500, fault, "response_format", "schema_not_met")
            stop = update.stop if isinstance(update.stop, str) else update.stop[-1] if update.stop else None
            extra |= {"stop_reason": stop} if stop in self.plan.stops else {}
        return [{"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": reason, **extra}]

    def _entries(self, choices: Sequence[Choice]) -> list[tuple]:
        """Token, log-probability, likeliest tokens and place in the text, for each choice."""
        entries = []
        for choice in choices:
            name, top = token_name(self.tokenizer, choice.token), top_by_name(self.tokenizer, choice)
            if top is not None and self.plan.logprobs is not None:  # the prompt may have been scored for more
                kept = [*list(top)[: self.plan.logprobs], name]
                top = {token: top[token] for token in kept}
            entries.append((name, choice.logprob, top, self.offset))
            self.offset += len(self.utf8.decode(token_bytes(self.tokenizer, choice.token)))
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
    extra = {name: piece[name] for piece in pieces for name in ("prompt_logprobs", "stop_reason") if name in piece}
    return {**pieces[-1], **extra, "text": "".join(piece["text"] for piece in pieces), "logprobs": merged}


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
    server: Server, plan: CompletionPlan, replies: Replies, usage: UsageWanted
) -> AsyncIterator[dict[str, Any] | None]:
    """The response's chunks; None where a comment shall keep the connection alive."""
    head = server.head("text_completion", "cmpl") | usage.field(replies, plan.prompts)
    readers = [CompletionReader(replies.engine.tokenizer, plan, index) for index in range(len(plan.requests))]
    async for chunk in stream_choices(head, readers, replies, usage, plan.prompts):
        yield chunk
