"""/v1/chat/completions: OpenAI's form of replies. Its requests are the inner ones (protocol.py, plan.py)."""

from collections.abc import AsyncIterator, Sequence
from typing import Any

from qwen import QWenTokenizer
from qwen.engine import Update
from qwen.sampling import Choice

from .plan import ChatPlan
from .reading import Piece, ReplyReader
from .replies import Replies, UsageWanted, stream_choices
from .scores import describe_choice, prompt_scores
from .server import Server


class ChoiceReader:
    """One choice of a response, as the deltas that streams send; other responses are their sum."""

    def __init__(self, tokenizer: QWenTokenizer, plan: ChatPlan, index: int) -> None:
        self.tokenizer, self.plan, self.index = tokenizer, plan, index
        self.reader = ReplyReader(plan)
        self.message: dict[str, Any] = {"role": "assistant", "content": plan.echo or None}
        self.logprobs: list[dict[str, Any]] = []
        self.prompt_choices: list[Choice] = []
        self.finish_reason: str | None = None
        self.stop: str | int | None = None

    def begin(self) -> list[dict[str, Any]]:
        """The chunks' choices before the reply."""
        chunks = [self.chunk({"role": "assistant", "content": ""})]
        return chunks + ([self.chunk({"content": self.plan.echo})] if self.plan.echo else [])

    def read(self, update: Update) -> list[dict[str, Any]]:
        """The chunks' choices that an update makes."""
        self.prompt_choices += update.prompt_choices
        return [self._chunk_of(piece) for piece in self.reader.read(update)]

    def _chunk_of(self, piece: Piece) -> dict[str, Any]:
        if piece.finish_reason is not None:
            older = self.plan.older_form and piece.finish_reason == "tool_calls"
            self.finish_reason, self.stop = "function_call" if older else piece.finish_reason, piece.stop
        delta: dict[str, Any] = {"content": piece.text} if piece.text or (piece.scored and piece.call is None) else {}
        if piece.call is not None:
            delta |= self._call(piece)
        self._add(delta)
        chunk = self.chunk(delta, self.finish_reason)
        if piece.scored:
            scores = [describe_choice(self.tokenizer, choice) for choice in piece.scored]
            self.logprobs += scores
            chunk["logprobs"] = {"content": scores, "refusal": None}
        return chunk

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        end = {"stop_reason": self.stop} if self.stop is not None else {}
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": finish_reason, **end}

    def _call(self, piece: Piece) -> dict[str, Any]:
        field = "input" if piece.custom else "arguments"
        named = {} if piece.name is None else {"name": piece.name}
        if self.plan.older_form:
            return {"function_call": {**named, "arguments": piece.arguments}}
        kind = "custom" if piece.custom else "function"
        begins = {"id": piece.call_id, "type": kind} if named else {}
        return {"tool_calls": [{"index": piece.call, **begins, kind: {**named, field: piece.arguments}}]}

    def _add(self, delta: dict[str, Any]) -> None:
        """Add a delta to the whole message."""
        if "content" in delta:
            self.message["content"] = (self.message["content"] or "") + delta["content"]
        if "function_call" in delta:
            whole = self.message.setdefault("function_call", {"arguments": ""})
            whole.update(delta["function_call"], arguments=whole["arguments"] + delta["function_call"]["arguments"])
        for call in delta.get("tool_calls", ()):
            calls = self.message.setdefault("tool_calls", [])
            if "id" in call:
                calls.append({name: value for name, value in call.items() if name != "index"})
                continue
            for kind, field in (("function", "arguments"), ("custom", "input")):
                if kind in call:
                    whole = calls[call["index"]][kind]
                    calls[call["index"]][kind] = {**whole, field: whole[field] + call[kind][field]}

    def whole(self) -> dict[str, Any]:
        """The choice of a response that is not streamed."""
        message = dict(self.message)
        if message["content"] is None and not self.reader.ids:
            message["content"] = ""
        wanted = self.plan.requests[self.index].sampling.top_logprobs is not None
        logprobs = {"content": self.logprobs, "refusal": None} if wanted else None
        message.setdefault("refusal", None)
        end = {"stop_reason": self.stop} if self.stop is not None else {}
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason,
                **end}  # fmt: skip


def choice_readers(plan: ChatPlan, replies: Replies) -> Sequence[ChoiceReader]:
    return [ChoiceReader(replies.engine.tokenizer, plan, index) for index in range(len(plan.requests))]


async def collect_chat(server: Server, plan: ChatPlan, replies: Replies) -> dict[str, Any]:
    """The response that is sent in one piece."""
    readers = choice_readers(plan, replies)
    async for step in replies:
        if step is not None:
            number, update = step
            readers[number].read(update)
    response = {**server.head("chat.completion", "chatcmpl"), "choices": [reader.whole() for reader in readers]}
    if plan.requests[0].prompt_logprobs is not None:
        request = plan.requests[0]
        response["prompt_logprobs"] = prompt_scores(replies.engine.tokenizer, request, readers[0].prompt_choices)
    return {**response, "usage": replies.usage()}


async def stream_chat(
    server: Server, plan: ChatPlan, replies: Replies, usage: UsageWanted
) -> AsyncIterator[dict[str, Any] | None]:
    """The response's chunks; None where a comment shall keep the connection alive."""
    head = server.head("chat.completion.chunk", "chatcmpl") | usage.field(replies)
    readers = choice_readers(plan, replies)
    for reader in readers:
        for choice in reader.begin():
            yield {**head, "choices": [choice]}
    async for chunk in stream_choices(head, readers, replies, usage):
        yield chunk
