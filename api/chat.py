"""/v1/chat/completions: a request to prompts, what the engine writes to messages and deltas."""

import contextlib
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from qwen import QwenError, QWenTokenizer
from qwen.chatml import encode_messages
from qwen.engine import Request, Update
from qwen.react import ACTION, INPUT, THOUGHT, ReactParser
from qwen.sampling import Choice
from qwen.tools import STOP_WORD, Tool, is_result, read_tool, render_messages

from .errors import ApiError
from .grammar import Constraint
from .protocol import ChatRequest, FunctionName, NamedTool
from .replies import Replies, logger, stream_choices
from .server import Server

FORCED_THOUGHT = "I need to use a tool."


@dataclass(frozen=True)
class ChatPlan:
    """What a request comes down to."""

    requests: Sequence[Request]
    tools: Sequence[Tool]  # that may be called; none: the reply is text
    prefix: str  # what the reply begins with already, for its parser
    older_form: bool  # calls are told as function_call
    most_calls: int | None


def plan_chat(server: Server, body: ChatRequest) -> ChatPlan:
    """Check and translate a request. Takes up to a second where a grammar is made: call it in a thread.

    Raises:
        ApiError, QwenError: the request can't be served.
    """
    tokenizer = server.ready.tokenizer
    if len(body.messages) > server.settings.max_messages:
        raise ApiError(400, f"messages: at most {server.settings.max_messages} here", "messages", "invalid_value")
    if getattr(server.ready.model.generation_config, "chat_format", "chatml") == "raw":
        raise ApiError(400, "this is a base model, which does not chat: use /v1/completions", "model")
    with naming("functions" if body.functions else "tools"):
        offered, choice = read_tools(body)
    tools = [] if choice == "none" else offered
    messages = [message.plain() for message in body.messages]
    with naming("messages"):
        turns = render_messages(messages, tools)
    is_open, prefix = is_result(messages[-1]), f"{THOUGHT}\n" if is_result(messages[-1]) else ""
    forced = [tool for tool in tools if choice in ("required", tool.name)] if choice not in ("auto", "none") else []
    if forced:
        prefix = ACTION if len(forced) > 1 else f"{ACTION} {forced[0].name}\n{INPUT}"
        if not is_open:
            turns.append({"role": "assistant", "content": THOUGHT})
        turns[-1]["content"] += f" {FORCED_THOUGHT}\n{prefix}"
        is_open = True
    prompt = encode_messages(tokenizer, turns, add_generation_prompt=not is_open, continue_final_message=is_open)
    max_tokens = server.fit(prompt, body.max_completion_tokens or body.max_tokens, "messages")
    top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    samplings = [server.sampling(body, top_logprobs, number) for number in range(body.n or 1)]
    stop_words = [*body.stops, *([STOP_WORD] if tools else [])]
    with naming("response_format" if not tools else "functions" if body.functions else "tools"):
        requests = [
            Request(
                prompt, max_tokens, sampling, stop_words, server.stop_ids,
                make_constraint(server, body, tools, forced, prefix),
            )
            for sampling in samplings
        ]  # fmt: skip
    if server.settings.log_prompts:
        logger.info("prompt: %s", json.dumps(messages, ensure_ascii=False))
    older_form = bool(body.functions)
    return ChatPlan(requests, tools, prefix, older_form, 1 if older_form or body.parallel_tool_calls is False else None)


@contextlib.contextmanager
def naming(param: str) -> Iterator[None]:
    """Tell a mistake in this parameter as the client's."""
    try:
        yield
    except QwenError as error:
        raise ApiError(400, str(error), param, "invalid_value") from error


def read_tools(body: ChatRequest) -> tuple[list[Tool], str]:
    """The tools of a request and which to call: auto, none, required, or a name."""
    specs = body.functions or [spec.function for spec in body.tools or []]
    tools = [read_tool(spec.model_dump(exclude_none=True)) for spec in specs]
    names = [tool.name for tool in tools]
    param = "functions" if body.functions else "tools"
    if twice := {name for name in names if names.count(name) > 1}:
        raise ApiError(400, f"{param}: the name {twice.pop()!r} is there twice", param, "invalid_value")
    choice = body.tool_choice or body.function_call or "auto"
    if isinstance(choice, NamedTool):
        choice = choice.function
    if isinstance(choice, FunctionName):
        param = "tool_choice" if body.tool_choice else "function_call"
        if choice.name not in names:
            raise ApiError(400, f"{param}: there is no {choice.name!r} among {names}", param, "invalid_value")
        return tools, choice.name
    return tools, choice


def make_constraint(
    server: Server, body: ChatRequest, tools: Sequence[Tool], forced: Sequence[Tool], prefix: str
) -> Constraint | None:
    """The grammar that a reply is held to, if any."""
    if forced:
        return server.grammars.call(forced, prefix)
    specs = body.functions or [spec.function for spec in body.tools or []]
    strict = [tool.name for tool, spec in zip(tools, specs, strict=False) if spec.strict]
    if strict:
        return server.grammars.strict(tools, strict, prefix)
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    schema = {"type": "object"} if wanted.type == "json_object" else wanted.json_schema.schema_ or {}
    return server.grammars.json(schema)


# ---- replies ----


class ChoiceReader:
    """One choice of a response, as the deltas that streams send; other responses are their sum."""

    def __init__(self, tokenizer: QWenTokenizer, plan: ChatPlan, index: int) -> None:
        self.tokenizer = tokenizer
        self.plan, self.index = plan, index
        self.parser = ReactParser(plan.tools, most_calls=plan.most_calls) if plan.tools else None
        self.pending = [] if self.parser is None else self.parser.push(plan.prefix)
        self.calls = 0
        self.message: dict[str, Any] = {"role": "assistant", "content": None}
        self.logprobs: list[dict[str, Any]] = []
        self.finish_reason: str | None = None

    def read(self, update: Update) -> list[dict[str, Any]]:
        """The chunks' choices that an update makes."""
        deltas = self._deltas(update)
        # The token that ends a reply is no part of it.
        choices = update.choices if update.finish_reason != "stop" else ()
        logprobs = [describe_choice(self.tokenizer, choice) for choice in choices if choice.logprob is not None]
        self.logprobs += logprobs
        if logprobs and not deltas:
            deltas = [{"content": ""}]
        for delta in deltas:
            self._add(delta)
        chunks = [self.chunk(delta) for delta in deltas]
        if logprobs:
            chunks[0]["logprobs"] = {"content": logprobs, "refusal": None}
        if update.finish_reason is not None:
            self.finish_reason = self._reason(update.finish_reason)
            chunks.append(self.chunk({}, self.finish_reason))
        return chunks

    def chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": self.index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}

    def _deltas(self, update: Update) -> list[dict[str, Any]]:
        if self.parser is None:
            return [{"content": update.text}] if update.text else []
        parsed, self.pending = [*self.pending, *self.parser.push(update.text)], []
        if update.finish_reason is not None:
            parsed += self.parser.close()
        deltas = []
        for part in parsed:
            if part.text:
                deltas.append({"content": part.text})
            if part.call is not None:
                function = {"name": part.name} if part.name is not None else {}
                deltas.append(self._call(part.call, {**function, "arguments": part.arguments}))
        return deltas

    def _call(self, number: int, function: dict[str, str]) -> dict[str, Any]:
        self.calls = number + 1
        if self.plan.older_form:
            return {"function_call": function}
        begins = {"id": f"call_{uuid4().hex[:24]}", "type": "function"} if "name" in function else {}
        return {"tool_calls": [{"index": number, **begins, "function": function}]}

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
            else:
                function = calls[call["index"]]["function"]
                calls[call["index"]]["function"] = {
                    **function,
                    "arguments": function["arguments"] + call["function"]["arguments"],
                }

    def _reason(self, reason: str) -> str:
        if reason == "length":
            return "length"
        if self.calls:
            return "function_call" if self.plan.older_form else "tool_calls"
        return "stop"

    def whole(self) -> dict[str, Any]:
        """The choice of a response that is not streamed."""
        message = dict(self.message)
        if message["content"] is None and not self.calls:
            message["content"] = ""
        wanted = self.plan.requests[self.index].sampling.top_logprobs is not None
        logprobs = {"content": self.logprobs, "refusal": None} if wanted else None
        message.setdefault("refusal", None)
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish_reason}


def describe_token(tokenizer: Any, token: int, logprob: float) -> dict[str, Any]:
    """A token as text, as far as it is text, and as bytes."""
    value = tokenizer.decoder.get(token, b"")
    data = value if isinstance(value, bytes) else value.encode()
    return {"token": data.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(data)}


def describe_choice(tokenizer: Any, choice: Choice) -> dict[str, Any]:
    top = [describe_token(tokenizer, token, logprob) for token, logprob in choice.top]
    return {**describe_token(tokenizer, choice.token, choice.logprob), "top_logprobs": top}


async def collect_chat(server: Server, plan: ChatPlan, replies: Replies) -> dict[str, Any]:
    """The response that is sent in one piece."""
    readers = [ChoiceReader(replies.engine.tokenizer, plan, index) for index in range(len(plan.requests))]
    async for step in replies:
        if step is not None:
            number, update = step
            readers[number].read(update)
    response = server.head("chat.completion", "chatcmpl")
    return {**response, "choices": [reader.whole() for reader in readers], "usage": replies.usage()}


async def stream_chat(
    server: Server, plan: ChatPlan, replies: Replies, include_usage: bool
) -> AsyncIterator[dict[str, Any] | None]:
    """The response's chunks; None where a comment shall keep the connection alive."""
    head = server.head("chat.completion.chunk", "chatcmpl") | ({"usage": None} if include_usage else {})
    readers = [ChoiceReader(replies.engine.tokenizer, plan, index) for index in range(len(plan.requests))]
    for reader in readers:
        yield {**head, "choices": [reader.chunk({"role": "assistant", "content": ""})]}
    async for chunk in stream_choices(head, readers, replies, include_usage):
        yield chunk
