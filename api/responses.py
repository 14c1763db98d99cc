"""/v1/responses: OpenAI's newer protocol, to the inner request and back; a bounded number of responses is kept."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from pydantic import Field
from starlette.requests import Request as HttpRequest

from .errors import ApiError
from .messages import read_pieces
from .parameters import Body, Limit, Loose
from .plan import ChatPlan
from .reading import Piece, ReplyReader
from .replies import Replies
from .server import Server
from .streams import Chunks, StreamForm, named_event, schema_headers, stream_response, until_left, whole_response
from .translation import plan_inner

PATH = "/v1/responses"
NAMES = {"messages": "input", "max_completion_tokens": "max_output_tokens", "max_tokens": "max_output_tokens",
         "response_format": "text.format"}  # fmt: skip
# Items of tools that run at OpenAI's, and thoughts: nothing that this model could read.
PASSED_OVER = ("reasoning", "web_search_call", "file_search_call", "computer_call", "image_generation_call",
               "code_interpreter_call", "mcp_list_tools", "mcp_call", "compaction")  # fmt: skip


class Format(Loose):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class Text(Loose):
    format: Format | None = None


class ResponsesStream(Loose):
    """Without effect: chunks are not padded."""


class ResponsesRequest(Body):
    model: str | None = None
    input: str | list[dict[str, Any]] = Field(min_length=1)
    instructions: str | None = None
    max_output_tokens: Limit = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    text: Text | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    background: bool | None = None
    stream: bool | None = None
    stream_options: ResponsesStream | None = None
    metadata: dict[str, Any] | None = None
    truncation: Literal["auto", "disabled"] | None = Field(None, description="without effect: prompts are never cut")
    include: list[str] | None = Field(None, description="without effect: there is nothing more to include")
    max_tool_calls: int | None = Field(None, description="without effect: it counts tools that run at OpenAI's")
    top_logprobs: Literal[0] | None = None
    conversation: None = None
    prompt: None = None


# ---- to the inner request ----


def content_of(item: Mapping[str, Any]) -> Any:
    content = item.get("content")
    return content if content is not None else ""


def inner_messages(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items as messages of the inner request; an answer and the calls after it are one message."""
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(items):
        kind = item.get("type") or ("message" if "role" in item else None)
        if kind == "message":
            messages.append({"role": item.get("role"), "content": content_of(item)})
        elif kind in ("function_call", "custom_tool_call"):
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(inner_call(item, kind))
        elif kind in ("function_call_output", "custom_tool_call_output"):
            output = item.get("output")
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"),
                             "content": "" if output is None else output})  # fmt: skip
        elif kind not in PASSED_OVER:
            raise ApiError(400, f"input[{number}]: there are no items of the type {kind!r} here", f"input[{number}]",
                           "invalid_value")  # fmt: skip
    if not messages:
        raise ApiError(400, "input has nothing that this model can read", "input", "invalid_value")
    return messages


def inner_call(item: Mapping[str, Any], kind: str) -> dict[str, Any]:
    called = {"id": item.get("call_id") or item.get("id")}
    if kind == "custom_tool_call":
        return {**called, "type": "custom", "custom": {"name": item.get("name"), "input": item.get("input") or ""}}
    return {**called, "function": {"name": item.get("name"), "arguments": item.get("arguments")}}


def inner_tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Function and custom tools; those that run at OpenAI's are passed over, as if the model did not call them."""
    found = []
    for tool in tools:
        if tool.get("type") in ("function", "custom"):
            kind = tool["type"]
            found.append({"type": kind, kind: {name: value for name, value in tool.items() if name != "type"}})
    return found


def inner_choice(choice: str | dict[str, Any] | None) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "allowed_tools":
        tools = [{"type": t.get("type"), t.get("type"): t} for t in choice.get("tools") or [] if isinstance(t, dict)]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}
    if choice.get("type") in ("function", "custom"):
        return {"type": choice["type"], choice["type"]: {"name": choice.get("name")}}
    return None  # a tool that is not here


def inner_fields(body: ResponsesRequest, items: list[dict[str, Any]]) -> dict[str, Any]:
    head = [{"role": "system", "content": body.instructions}] if body.instructions else []
    wanted = body.text.format if body.text else None
    tools = inner_tools(body.tools or [])
    shape = None
    if wanted is not None and wanted.type != "text":
        schema = {"name": wanted.name or "reply", "schema": wanted.schema_, "strict": wanted.strict}
        shape = {"type": wanted.type, **({"json_schema": schema} if wanted.type == "json_schema" else {})}
    return {
        "messages": head + inner_messages(items),
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "tools": tools or None,
        "tool_choice": inner_choice(body.tool_choice) if tools else None,
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": shape,
    }


# ---- and back ----


class ResponseBuilder:
    """One response, as the events that streams send; the response in one piece is what they come to."""

    def __init__(self, server: Server, body: ResponsesRequest, plan: ChatPlan, replies: Replies, stored: bool) -> None:
        self.replies, self.reader = replies, ReplyReader(plan)
        self.events = 0
        settings = plan.requests[0].sampling
        self.response: dict[str, Any] = {
            "id": f"resp_{uuid4().hex}", "object": "response", "created_at": int(time.time()), "status": "in_progress",
            "background": bool(body.background), "error": None, "incomplete_details": None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
            "model": body.model or server.settings.model_name, "output": [],
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id, "reasoning": {"effort": None, "summary": None},
            "store": stored, "temperature": settings.temperature, "top_p": settings.top_p,
            "text": {"format": body.text.format.model_dump(by_alias=True, exclude_none=True)
                     if body.text and body.text.format else {"type": "text"}},
            "tool_choice": body.tool_choice or "auto", "tools": body.tools or [],
            "truncation": body.truncation or "disabled", "usage": None, "metadata": body.metadata or {},
        }  # fmt: skip

    @property
    def output(self) -> list[dict[str, Any]]:
        return self.response["output"]

    def event(self, kind: str, **fields: Any) -> dict[str, Any]:
        number, self.events = self.events, self.events + 1
        return {"type": f"response.{kind}", "sequence_number": number, **fields}

    def whole(self, kind: str) -> dict[str, Any]:
        """An event with the response as it is now."""
        return self.event(kind, response={**self.response, "output": [dict(item) for item in self.output]})

    def begin(self) -> list[dict[str, Any]]:
        return [self.whole("created"), self.whole("in_progress")]

    def read(self, piece: Piece) -> list[dict[str, Any]]:
        """The events of a piece."""
        events: list[dict[str, Any]] = []
        if piece.text:
            events += self._text(piece.text)
        if piece.name is not None:
            events += self._close()
            kind, field = ("custom_tool_call", "input") if piece.custom else ("function_call", "arguments")
            events += self._open({"id": f"{kind[:2]}_{uuid4().hex}", "type": kind, "status": "in_progress",
                                  "call_id": piece.call_id, "name": piece.name, field: ""})  # fmt: skip
        if piece.arguments:
            field, event = ("input", "custom_tool_call_input") if piece.custom else (
                "arguments", "function_call_arguments")  # fmt: skip
            self.output[-1][field] += piece.arguments
            events.append(self.event(f"{event}.delta", **self._place(), delta=piece.arguments))
        return events + (self._end(piece) if piece.finish_reason is not None else [])

    def _place(self) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}

    def _open(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        self.output.append(item)
        return [self.event("output_item.added", output_index=len(self.output) - 1, item=dict(item))]

    def _text(self, text: str) -> list[dict[str, Any]]:
        events = []
        if not self.output:
            events += self._open({"id": f"msg_{uuid4().hex}", "type": "message", "status": "in_progress",
                                  "role": "assistant", "content": []})  # fmt: skip
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            events.append(self.event("content_part.added", **self._place(), content_index=0, part=dict(part)))
            self.output[-1]["content"] = [part]
        self.output[-1]["content"][0]["text"] += text
        if text:
            delta = self.event("output_text.delta", **self._place(), content_index=0, delta=text, logprobs=[])
            events.append(delta)
        return events

    def _close(self, status: str = "completed") -> list[dict[str, Any]]:
        if not self.output:
            return []
        item, place = self.output[-1], self._place()
        item["status"] = status
        if item["type"] == "message":
            [part] = item["content"]
            events = [
                self.event("output_text.done", **place, content_index=0, text=part["text"], logprobs=[]),
                self.event("content_part.done", **place, content_index=0, part=dict(part)),
            ]
        elif item["type"] == "custom_tool_call":
            events = [self.event("custom_tool_call_input.done", **place, input=item["input"])]
        else:
            done = {"arguments": item["arguments"], "name": item["name"]}
            events = [self.event("function_call_arguments.done", **place, **done)]
        index = place["output_index"]
        return [*events, self.event("output_item.done", output_index=index, item=dict(item))]

    def _end(self, piece: Piece) -> list[dict[str, Any]]:
        status = "incomplete" if piece.finish_reason == "length" else "completed"
        events = [] if self.output else self._text("")
        events += self._close(status)
        usage = self.replies.usage()
        self.response |= {"status": status, "usage": {
            "input_tokens": usage["prompt_tokens"], "input_tokens_details": usage["prompt_tokens_details"],
            "output_tokens": usage["completion_tokens"], "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage["total_tokens"],
        }}  # fmt: skip
        if status == "incomplete":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        return [*events, self.whole(status)]

    def fail(self, error: ApiError) -> dict[str, Any]:
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self.response |= {"status": "failed", "error": {"code": code, "message": str(error)}}
        return self.whole("failed")


# ---- what is kept ----


@dataclass
class Kept:
    """A response, all items that led to it, and what still writes it."""

    items: list[dict[str, Any]]
    builder: ResponseBuilder
    task: asyncio.Task[None] | None = None

    @property
    def conversation(self) -> list[dict[str, Any]]:
        return [*self.items, *self.builder.output]


class Store:
    """The newest responses, at most `most`; the oldest go first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.kept: OrderedDict[str, Kept] = OrderedDict()

    def add(self, kept: Kept) -> None:
        self.kept[kept.builder.response["id"]] = kept
        while len(self.kept) > self.most:
            self.kept.popitem(last=False)

    def get(self, name: str, param: str | None = None) -> Kept:
        if name not in self.kept:
            message = f"there is no response {name!r} here: the newest {self.most} are kept, until the server ends"
            code = "previous_response_not_found" if param else "response_not_found"
            raise ApiError(400 if param else 404, message, param, code)
        return self.kept[name]


def add_responses_routes(app: FastAPI, server: Server, errors: dict) -> None:
    store = Store(server.settings.max_stored)

    def read_items(body: ResponsesRequest) -> list[dict[str, Any]]:
        """All items, those of the response before included."""
        before = []
        if body.previous_response_id is not None:
            before = store.get(body.previous_response_id, "previous_response_id").conversation
        new = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
        kept = {item.get("id"): item for item in before}
        return before + [
            kept.get(item.get("id"), item) if item.get("type") == "item_reference" else item for item in new
        ]

    @app.post(PATH, responses=errors)
    async def create(body: ResponsesRequest, http: HttpRequest) -> Response:
        server.check_model(body.model)
        stored = body.store is not False and store.most > 0
        if body.background and not stored:
            raise ApiError(400, "background needs a response that is stored", "background", "invalid_value")
        items = read_items(body)
        plan = await plan_inner(server, inner_fields(body, items), NAMES)
        replies = Replies(server.ready, plan.requests, server.settings.keep_alive)
        builder, headers = ResponseBuilder(server, body, plan, replies, stored), schema_headers(plan.left_out)
        kept = Kept(items, builder)
        if stored:
            store.add(kept)

        async def events() -> Chunks:
            for event in builder.begin():
                yield event
            async for event in read_pieces(builder, replies):
                yield event

        async def write() -> None:
            try:
                async for _ in events():
                    pass
            except ApiError as error:
                builder.fail(error)

        if body.background and not body.stream:
            kept.task = asyncio.create_task(write())
            return JSONResponse(builder.response, headers=headers)
        if body.stream:
            form = StreamForm("text/event-stream", named_event, b": waiting\n\n", b"",
                              lambda error: named_event(builder.fail(error)))  # fmt: skip
            return await stream_response(until_left(events(), replies), form, headers)

        async def collect() -> dict[str, Any]:
            async for _ in events():
                pass
            return builder.response

        return await whole_response(http, replies, collect, headers)

    @app.get(f"{PATH}/{{name}}", responses=errors)
    async def retrieve(name: str) -> dict[str, Any]:
        return store.get(name).builder.response

    @app.get(f"{PATH}/{{name}}/input_items", responses=errors)
    async def input_items(name: str) -> dict[str, Any]:
        items = [{"id": f"item_{i}", "type": "message", **item} for i, item in enumerate(store.get(name).items)][::-1]
        ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"]}
        return {"object": "list", "data": items, "has_more": False, **ends}

    @app.delete(f"{PATH}/{{name}}", responses=errors)
    async def delete(name: str) -> dict[str, Any]:
        cancel_kept(store.get(name))
        del store.kept[name]
        return {"id": name, "object": "response", "deleted": True}

    @app.post(f"{PATH}/{{name}}/cancel", responses=errors)
    async def cancel(name: str) -> dict[str, Any]:
        kept = store.get(name)
        if not kept.builder.response["background"]:
            raise ApiError(400, "only a response with background: true can be cancelled", "background")
        cancel_kept(kept)
        return kept.builder.response


def cancel_kept(kept: Kept) -> None:
    """End what still writes a response."""
    if kept.task is not None and not kept.task.done():
        kept.task.cancel()
        kept.builder.replies.cancel()
        kept.builder.response["status"] = "cancelled"
