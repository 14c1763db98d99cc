"""/api/chat, generate, tags, show, version, ps: Ollama's protocol, to the inner request and back."""

import time
from datetime import UTC, datetime
from typing import Any, Literal

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from pydantic import Field, field_validator
from starlette.requests import Request as HttpRequest

from .completions import plan_completion
from .messages import read_input, read_pieces
from .parameters import Body, Loose, Stops
from .plan import ChatPlan
from .protocol import CompletionRequest
from .reading import Piece, ReplyReader
from .replies import Replies
from .server import Server
from .streams import StreamForm, line, schema_headers, stream_response, until_left, whole_response
from .translation import plan_inner

VERSION = "0.13.0"  # of Ollama's own, whose protocol this is
FORM = StreamForm("application/x-ndjson", line, b"", b"", lambda error: line(error.body_for("/api/")))
NAMES = {"response_format": "format", "max_tokens": "options.num_predict", "stop": "options.stop"}


class Options(Loose):
    """Settings that concern the loading of a model (num_ctx, num_thread) are passed over, as Ollama does."""

    num_predict: int | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_k: int | None = Field(None, ge=-1)
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    stop: Stops = None
    repeat_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)


def no_images(images: list[Any] | None) -> list[Any] | None:
    if images:
        raise ValueError("this model reads text alone, no images")
    return images


class Call(Loose):
    function: dict[str, Any]


class Message(Loose):
    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = ""
    images: list[Any] | None = None
    tool_calls: list[Call] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    _images = field_validator("images")(no_images)


class Base(Body):
    model: str
    format: Literal["json", ""] | dict[str, Any] | None = None
    options: Options | None = None
    stream: bool | None = Field(None, description="default true")
    think: bool | str | None = Field(None, description="without effect: the model has no hidden thoughts")
    keep_alive: Any = Field(None, description="without effect: the model stays")


class OllamaChat(Base):
    messages: list[Message] = []
    tools: list[dict[str, Any]] | None = None


class OllamaGenerate(Base):
    prompt: str | None = ""
    system: str | None = None
    raw: bool | None = None
    images: list[Any] | None = None
    context: list[int] | None = Field(None, max_length=0)
    template: Literal[""] | None = None
    _images = field_validator("images")(no_images)


class ShowRequest(Body):
    model: str | None = None
    name: str | None = None
    verbose: bool | None = None


def sampling_fields(body: Base) -> dict[str, Any]:
    options = body.options or Options()
    fields = options.model_dump(exclude_none=True, exclude={"num_predict", "repeat_penalty"})
    limit = options.num_predict
    fields["max_tokens"] = limit if limit is not None and limit > 0 else None
    fields["repetition_penalty"] = options.repeat_penalty
    if body.format == "json":
        fields["response_format"] = {"type": "json_object"}
    elif isinstance(body.format, dict):
        fields["response_format"] = {"type": "json_schema", "json_schema": {"schema": body.format}}
    return fields


def inner_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages of the inner request: calls get ids, which Ollama's lack, and results those of their calls."""
    inner: list[dict[str, Any]] = []
    open_calls: list[tuple[str, str]] = []  # ids and names that no result has come for
    for number, message in enumerate(messages):
        if message.role == "tool":
            names = [name for _, name in open_calls]
            place = names.index(message.tool_name) if message.tool_name in names else 0
            call_id = open_calls.pop(place)[0] if open_calls else message.tool_call_id or "none"
            inner.append({"role": "tool", "tool_call_id": call_id, "content": message.content or ""})
            continue
        entry: dict[str, Any] = {"role": message.role, "content": message.content or ""}
        if message.tool_calls:
            ids = [f"call_{number}_{i}" for i in range(len(message.tool_calls))]
            open_calls = [(id_, call.function.get("name")) for id_, call in zip(ids, message.tool_calls, strict=True)]
            entry["tool_calls"] = [
                {"id": id_, "function": call.function} for id_, call in zip(ids, message.tool_calls, strict=True)
            ]
        inner.append(entry)
    return inner


class LineBuilder:
    """One reply as Ollama's lines; a reply in one piece is their sum."""

    def __init__(self, model: str, plan: ChatPlan, replies: Replies, is_chat: bool) -> None:
        self.model, self.replies, self.reader, self.is_chat = model, replies, ReplyReader(plan), is_chat
        self.started, self.first = time.monotonic_ns(), 0
        self.text, self.calls, self.open = "", [], None
        self.last: dict[str, Any] = {}

    def _line(self, text: str, calls: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
        now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        said: dict[str, Any] = {"response": text}
        if self.is_chat:
            said = {"message": {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})}}
        return {"model": self.model, "created_at": now, **said, "done": False, **more}

    def _close(self) -> list[dict[str, Any]]:
        """The line of a call that is complete."""
        if self.open is None:
            return []
        name, arguments = self.open
        call = {"function": {"index": len(self.calls), "name": name, "arguments": read_input(arguments)}}
        self.calls.append(call)
        self.open = None
        return [self._line("", [call])]

    def read(self, piece: Piece) -> list[dict[str, Any]]:
        self.first = self.first or time.monotonic_ns()
        lines: list[dict[str, Any]] = []
        if piece.text:
            self.text += piece.text
            lines.append(self._line(piece.text))
        if piece.name is not None:
            lines += self._close()
            self.open = (piece.name, "")
        if piece.arguments and self.open is not None:
            self.open = (self.open[0], self.open[1] + piece.arguments)
        if piece.finish_reason is not None:
            lines += self._close()
            usage, now = self.replies.usage(), time.monotonic_ns()
            self.last = self._line(
                "", done=True, done_reason="length" if piece.finish_reason == "length" else "stop",
                total_duration=now - self.started, load_duration=0, prompt_eval_count=usage["prompt_tokens"],
                prompt_eval_duration=self.first - self.started, eval_count=usage["completion_tokens"],
                eval_duration=now - self.first,
            )  # fmt: skip
            lines.append(self.last)
        return lines

    def whole(self) -> dict[str, Any]:
        return self.last | {
            name: value for name, value in self._line(self.text, self.calls).items() if name in ("message", "response")
        }


def details() -> dict[str, Any]:
    return {"parent_model": "", "format": "safetensors", "family": "qwen", "families": ["qwen"],
            "parameter_size": "7B", "quantization_level": ""}  # fmt: skip


def add_ollama_routes(app: FastAPI, server: Server, errors: dict) -> None:
    def named(name: str) -> str:
        server.check_model(name.removesuffix(":latest"))
        return name

    async def respond(body: Base, plan: ChatPlan, http: HttpRequest, is_chat: bool) -> Response:
        replies = Replies(server.ready, plan.requests, server.settings.keep_alive)
        builder, headers = LineBuilder(body.model, plan, replies, is_chat), schema_headers(plan.left_out)
        lines = read_pieces(builder, replies)
        if body.stream is not False:
            return await stream_response(until_left(lines, replies), FORM, headers)

        async def collect() -> dict[str, Any]:
            async for _ in lines:
                pass
            return builder.whole()

        return await whole_response(http, replies, collect, headers)

    def loaded(body: Base, is_chat: bool) -> Response:
        """Whoever asks nothing wants the model to be loaded, which it is."""
        said = {"message": {"role": "assistant", "content": ""}} if is_chat else {"response": ""}
        now = datetime.now(UTC).isoformat()
        return JSONResponse({"model": body.model, "created_at": now, **said, "done": True, "done_reason": "load"})

    @app.post("/api/chat", responses=errors)
    async def chat(body: OllamaChat, http: HttpRequest) -> Response:
        named(body.model)
        if not body.messages:
            return loaded(body, is_chat=True)
        fields = {"messages": inner_messages(body.messages), "tools": body.tools or None}
        return await respond(body, await plan_inner(server, fields | sampling_fields(body), NAMES), http, is_chat=True)

    @app.post("/api/generate", responses=errors)
    async def generate(body: OllamaGenerate, http: HttpRequest) -> Response:
        named(body.model)
        if not body.prompt:
            return loaded(body, is_chat=False)
        fields = sampling_fields(body)
        if body.raw:
            raw = plan_completion(server, CompletionRequest(prompt=body.prompt, **{"max_tokens": -1, **{
                name: value for name, value in fields.items() if value is not None}}))  # fmt: skip
            return await respond(body, ChatPlan(raw.requests, left_out=raw.left_out), http, is_chat=False)
        system = [{"role": "system", "content": body.system}] if body.system else []
        fields["messages"] = [*system, {"role": "user", "content": body.prompt}]
        return await respond(body, await plan_inner(server, fields, NAMES), http, is_chat=False)

    def card() -> dict[str, Any]:
        modified = datetime.fromtimestamp(server.started, UTC).isoformat()
        model = server.ready.model
        size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
        name = server.settings.model_name
        return {"name": name, "model": name, "modified_at": modified, "size": size,
                "digest": server.fingerprint.removeprefix("fp_"), "details": details()}  # fmt: skip

    @app.get("/api/tags", responses=errors)
    async def tags() -> dict[str, Any]:
        return {"models": [card()]}

    @app.get("/api/ps", responses=errors)
    async def running() -> dict[str, Any]:
        entry = card()
        return {"models": [{**entry, "expires_at": "2318-01-01T00:00:00Z", "size_vram": entry["size"],
                            "context_length": server.ready.context}]}  # fmt: skip

    @app.post("/api/show", responses=errors)
    async def show(body: ShowRequest) -> dict[str, Any]:
        named(body.model or body.name or server.settings.model_name)
        config, entry = server.ready.model.config, card()
        return {
            "modelfile": "", "parameters": "", "license": "", "template": server.ready.tokenizer.chat_template,
            "modified_at": entry["modified_at"], "details": details(), "capabilities": ["completion", "tools"],
            "model_info": {
                "general.architecture": "qwen", "qwen.context_length": server.ready.context,
                "qwen.embedding_length": config.hidden_size, "qwen.block_count": config.num_hidden_layers,
                "qwen.attention.head_count": config.num_attention_heads,
            },
        }  # fmt: skip

    @app.get("/api/version")
    async def version() -> dict[str, str]:
        return {"version": VERSION}
