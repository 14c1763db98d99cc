"""/v1/messages and /v1/messages/count_tokens: Anthropic's protocol, to the inner request and back."""

import asyncio
import json
from typing import Any, Literal
from uuid import uuid4

from fastapi import FastAPI, Response
from pydantic import Field, field_validator
from starlette.requests import Request as HttpRequest

from .errors import ApiError
from .parameters import Body, Loose
from .plan import ChatPlan, build_chat_prompt, read_tools
from .reading import Piece, ReplyReader
from .replies import Replies
from .server import Server
from .streams import (
    Chunks,
    StreamForm,
    named_event,
    schema_headers,
    stream_response,
    until_left,
    whole_response,
)
from .translation import inner_request, plan_inner, renamed

PATH = "/v1/messages"
NAMES = {"messages": "messages", "response_format": "output_format", "stop": "stop_sequences"}
FORM = StreamForm(
    "text/event-stream", named_event, named_event({"type": "ping"}), b"",
    lambda error: named_event(error.body_for(PATH)),
)  # fmt: skip
READ = ("text", "tool_use", "tool_result", "thinking", "redacted_thinking")


class Block(Loose):
    """A block of a message's content; the model's thoughts of another turn are passed over."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: "str | list[Block] | None" = None
    is_error: bool | None = None

    @field_validator("type")
    @classmethod
    def check_type(cls, type_: str) -> str:
        if type_ not in READ:
            raise ValueError(f"the block is of the type {type_!r}: this model reads text and tools' results alone")
        return type_


class Message(Loose):
    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class Tool(Loose):
    type: str | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(Loose):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Loose):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Loose):
    format: OutputFormat | None = None


class CountRequest(Body):
    model: str
    messages: list[Message] = Field(min_length=1)
    system: str | list[Block] | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: dict[str, Any] | None = Field(None, description="without effect: the model has no hidden thoughts")
    output_format: OutputFormat | None = None
    output_config: OutputConfig | None = None
    context_management: dict[str, Any] | None = Field(None, description="without effect: nothing is cleared")
    mcp_servers: list[Any] | None = Field(None, max_length=0)
    container: None = None


class MessagesRequest(CountRequest):
    max_tokens: int = Field(ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    stop_sequences: list[str] | None = None
    stream: bool | None = None


# ---- to the inner request ----


def block_text(content: str | list[Block] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(block.text or "" for block in content if block.type == "text")


def inner_messages(message: Message) -> list[dict[str, Any]]:
    """A message as those of the inner request: results of tools, then the text; or text and calls."""
    if isinstance(message.content, str) or message.role == "system":
        return [{"role": message.role, "content": block_text(message.content)}]
    if message.role == "assistant":
        calls = [
            {"id": block.id, "function": {"name": block.name or "", "arguments": block.input or {}}}
            for block in message.content
            if block.type == "tool_use"
        ]
        text = "".join(block.text or "" for block in message.content if block.type == "text")
        return [{"role": "assistant", "content": text, "tool_calls": calls or None}]
    results = []
    for block in message.content:
        if block.type == "tool_result":
            text = block_text(block.content)
            text = f"Error: {text}" if block.is_error and not text.startswith("Error") else text
            results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": text})
    has_text = any(block.type == "text" for block in message.content)
    return results + ([{"role": "user", "content": block_text(message.content)}] if has_text or not results else [])


def inner_fields(body: CountRequest) -> dict[str, Any]:
    system = [{"role": "system", "content": block_text(body.system)}] if body.system else []
    # Tools of other types run at Anthropic's, or have no schema: nobody can call them here.
    tools = [
        {"function": {"name": tool.name, "description": tool.description, "parameters": tool.input_schema,
                      "strict": tool.strict}}
        for tool in body.tools or []
        if tool.input_schema is not None
    ]  # fmt: skip
    choice = body.tool_choice or ToolChoice(type="auto")
    named = {"type": "function", "function": {"name": choice.name or ""}}
    choices = {"auto": "auto", "any": "required", "none": "none", "tool": named}
    wanted = body.output_format or (body.output_config and body.output_config.format)
    return {
        "messages": system + [part for message in body.messages for part in inner_messages(message)],
        "tools": tools or None,
        "tool_choice": choices[choice.type] if tools else None,
        "parallel_tool_calls": False if choice.disable_parallel_tool_use else None,
        "response_format": wanted and {"type": "json_schema", "json_schema": {"schema": wanted.schema_}},
    }


def sampling_fields(body: MessagesRequest) -> dict[str, Any]:
    names = ("max_tokens", "temperature", "top_p", "top_k")
    return {**{name: getattr(body, name) for name in names}, "stop": body.stop_sequences or None}


# ---- and back ----


class MessageBuilder:
    """One message, as the events that streams send; a message in one piece is their sum."""

    def __init__(self, model: str, plan: ChatPlan, replies: Replies) -> None:
        self.replies, self.reader = replies, ReplyReader(plan)
        self.arguments = ""  # of the call that is being read
        self.message: dict[str, Any] = {
            "id": f"msg_{uuid4().hex[:24]}", "type": "message", "role": "assistant", "model": model, "content": [],
            "stop_reason": None, "stop_sequence": None, "usage": self.usage(),
        }  # fmt: skip

    def usage(self) -> dict[str, int]:
        usage = self.replies.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {"input_tokens": usage["prompt_tokens"] - cached, "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": cached, "output_tokens": usage["completion_tokens"]}  # fmt: skip

    @property
    def content(self) -> list[dict[str, Any]]:
        return self.message["content"]

    def read(self, piece: Piece) -> list[dict[str, Any]]:
        """The events of a piece."""
        events: list[dict[str, Any]] = []
        if piece.name is not None:
            events += self._close()
            events += self._open({"type": "tool_use", "id": piece.call_id, "name": piece.name, "input": {}})
        if piece.arguments:
            self.arguments += piece.arguments
            events.append(self._delta({"type": "input_json_delta", "partial_json": piece.arguments}))
        if piece.text:
            if not self.content:
                events += self._open({"type": "text", "text": ""})
            self.content[-1]["text"] += piece.text
            events.append(self._delta({"type": "text_delta", "text": piece.text}))
        return events + (self._end(piece) if piece.finish_reason is not None else [])

    def _open(self, block: dict[str, Any]) -> list[dict[str, Any]]:
        self.content.append(block)
        return [{"type": "content_block_start", "index": len(self.content) - 1, "content_block": dict(block)}]

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.content) - 1, "delta": delta}

    def _close(self) -> list[dict[str, Any]]:
        if not self.content:
            return []
        if self.content[-1]["type"] == "tool_use":
            self.content[-1]["input"], self.arguments = read_input(self.arguments), ""
        return [{"type": "content_block_stop", "index": len(self.content) - 1}]

    def _end(self, piece: Piece) -> list[dict[str, Any]]:
        events = [] if self.content else self._open({"type": "text", "text": ""})
        events += self._close()
        reasons = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}
        reason = reasons[piece.finish_reason or "stop"] if piece.stop is None else "stop_sequence"
        end = {"stop_reason": reason, "stop_sequence": piece.stop}
        self.message |= {**end, "usage": self.usage()}
        return [*events, {"type": "message_delta", "delta": end, "usage": self.usage()}, {"type": "message_stop"}]


def read_input(arguments: str) -> dict[str, Any]:
    """A call's arguments as an object; what is none, or breaks off, stands in `_raw`."""
    try:
        value = json.loads(arguments or "{}", strict=False)
    except ValueError:
        return {"_raw": arguments}
    return value if isinstance(value, dict) else {"_raw": arguments}


async def read_pieces(builder: Any, replies: Replies) -> Chunks:
    """The events that a builder makes of the replies' pieces."""
    async for step in replies:
        if step is None:
            yield None
            continue
        for piece in builder.reader.read(step[1]):
            for event in builder.read(piece):
                yield event


def add_messages_routes(app: FastAPI, server: Server, errors: dict) -> None:
    @app.post(PATH, responses=errors)
    async def messages(body: MessagesRequest, http: HttpRequest) -> Response:
        server.check_model(body.model)
        plan = await plan_inner(server, inner_fields(body) | sampling_fields(body), NAMES)
        replies = Replies(server.ready, plan.requests, server.settings.keep_alive)
        builder, headers = MessageBuilder(body.model, plan, replies), schema_headers(plan.left_out)
        pieces = read_pieces(builder, replies)
        if body.stream:

            async def stream() -> Chunks:
                yield {"type": "message_start", "message": {**builder.message, "content": []}}
                async for event in pieces:
                    yield event

            return await stream_response(until_left(stream(), replies), FORM, headers)

        async def collect() -> dict[str, Any]:
            async for _ in pieces:
                pass
            return builder.message

        return await whole_response(http, replies, collect, headers)

    @app.post(f"{PATH}/count_tokens", responses=errors)
    async def count_tokens(body: CountRequest) -> dict[str, int]:
        server.check_model(body.model)
        with renamed(NAMES):
            request = inner_request(inner_fields(body))
            prompt, _, _ = await asyncio.to_thread(build_chat_prompt, server, request, read_tools(request))
        return {"input_tokens": len(prompt)}

    @app.post(f"{PATH}/batches", include_in_schema=False)
    async def batches() -> Response:
        raise ApiError(404, "there are no batches here: send the messages one by one, many at once", code="unknown_url")
