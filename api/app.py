"""The app: routes, who may call them, and how responses and streams leave."""

import asyncio
import hmac
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Depends, FastAPI, Response
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen.chatml import encode_messages
from qwen.tools import render_messages

from .chat import collect_chat, plan_chat, stream_chat
from .completions import collect_completion, plan_completion, stream_completion
from .errors import ApiError, add_error_handlers
from .protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from .replies import Replies, cancelled_on_leaving
from .server import Server

OPEN_PATHS = ("/health", "/docs", "/openapi.json")  # for whoever watches the server, without a key
BODY_SECONDS = 60.0  # for a client to send its request


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorBody


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "the request can't be served; param names what is at fault",
        401: "the API key is missing or wrong",
        404: "no such path or model",
        413: "the body is too large",
        429: "too many requests wait already",
        500: "the reply failed",
        503: "loading, or shutting down",
        504: "the reply took too long",
    }.items()
}
STREAM = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}


def create_app(server: Server) -> FastAPI:
    """The app that serves `server`."""
    keys = [Depends(HTTPBearer(auto_error=False))] if server.settings.credentials else []  # for the page at /docs
    app = FastAPI(
        title="Qwen-7B", description="An OpenAI-compatible server for Qwen-7B.", redoc_url=None, dependencies=keys
    )
    add_error_handlers(app)
    add_generation_routes(app, server)
    add_plain_routes(app, server)
    tidy_description(app)
    app.add_middleware(Gate, server=server)
    if server.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(server.settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )
    return app


def tidy_description(app: FastAPI) -> None:
    """Errors have OpenAI's form and status 400, never FastAPI's own 422; some paths need no key."""
    for path, operations in app.openapi()["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if path in OPEN_PATHS:
                operation.pop("security", None)


def add_generation_routes(app: FastAPI, server: Server) -> None:
    @app.post("/v1/chat/completions", responses={**ERRORS, **STREAM})
    async def chat_completions(body: ChatRequest, http: HttpRequest) -> Response:
        server.check_model(body.model)
        plan = await asyncio.to_thread(plan_chat, server, body)
        return await respond(server, plan, body, http, collect_chat, stream_chat)

    @app.post("/v1/completions", responses={**ERRORS, **STREAM})
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        server.check_model(body.model)
        plan = await asyncio.to_thread(plan_completion, server, body)
        return await respond(server, plan, body, http, collect_completion, stream_completion)

    @app.post("/v1/embeddings", responses=ERRORS, include_in_schema=False)
    async def embeddings() -> Response:
        raise ApiError(
            404,
            "Qwen-7B is a generative model without an embedding head: there is no /v1/embeddings",
            code="unknown_url",
        )


def add_plain_routes(app: FastAPI, server: Server) -> None:
    def card() -> dict[str, Any]:
        return {"id": server.settings.model_name, "object": "model", "created": server.started, "owned_by": "qwen",
                "max_model_len": server.ready.context}  # fmt: skip

    @app.get("/v1/models", responses=ERRORS)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    async def model(name: str) -> dict[str, Any]:
        server.check_model(name)
        return card()

    @app.get("/health", responses=ERRORS)
    async def health() -> dict[str, str]:
        _ = server.ready
        return {"status": "ok"}

    @app.get("/metrics", responses=ERRORS, response_class=Response)
    async def metrics() -> Response:
        return Response(server.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/tokenize", responses=ERRORS)
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        server.check_model(body.model)
        return await asyncio.to_thread(tokenize_body, server, body)

    @app.post("/detokenize", responses=ERRORS)
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        server.check_model(body.model)
        tokenizer = server.ready.tokenizer
        if unknown := [token for token in body.tokens if token not in tokenizer.decoder]:
            raise ApiError(400, f"tokens: {unknown[0]} is no token of this vocabulary", "tokens", "invalid_value")
        return {"prompt": tokenizer.decode(body.tokens)}


def tokenize_body(server: Server, body: TokenizeRequest) -> dict[str, Any]:
    tokenizer = server.ready.tokenizer
    if body.prompt is not None:
        tokens = tokenizer.encode_text(body.prompt)
    else:
        tokens = encode_messages(tokenizer, render_messages([message.plain() for message in body.messages]))
    return {"tokens": tokens, "count": len(tokens), "max_model_len": server.ready.context}


# ---- responses ----


async def respond(
    server: Server, plan: Any, body: ChatRequest | CompletionRequest, http: HttpRequest,
    collect: Callable, stream: Callable,
) -> Response:  # fmt: skip
    """Queue a plan's requests; answer in one piece or as a stream, and end them when the client hangs up."""
    replies = Replies(server.ready, plan.requests, server.settings.keep_alive)
    if body.stream:
        include_usage = bool(body.stream_options and body.stream_options.include_usage)
        events = server_sent_events(stream(server, plan, replies, include_usage), replies)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    with cancelled_on_leaving(http, replies):
        return JSONResponse(await collect(server, plan, replies))


async def server_sent_events(chunks: AsyncIterator[dict[str, Any] | None], replies: Replies) -> AsyncIterator[bytes]:
    """Chunks as server-sent events, comments in between, and [DONE]; what fails on the way is an event too."""
    try:
        async for chunk in chunks:
            yield b": waiting\n\n" if chunk is None else event(chunk)
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        yield event(error.body)
    finally:
        replies.cancel()


def event(data: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode("utf-8", "replace")


# ---- the gate ----


class Gate:
    """Checks the key, reads the body up to its limit, and counts, before anything else sees a request."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server = app, server
        self.credentials = [credential.encode() for credential in server.settings.credentials]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499  # the client has gone before there was an answer

        async def count(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            body = await self.admit(scope, receive)
            if isinstance(body, ApiError):
                await body.response()(scope, receive, count)
            elif body is not None:
                await self.app(scope, replay(body, receive), count)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.server.metrics.requests.labels(path, str(status)).inc()

    async def admit(self, scope: Scope, receive: Receive) -> bytes | ApiError | None:
        """The body of a request that may come in, or why it may not; None where the client hung up before its end."""
        try:
            self.check_key(scope)
            return await asyncio.wait_for(self.read_body(scope, receive), BODY_SECONDS)
        except ApiError as error:
            return error
        except TimeoutError:
            return ApiError(408, f"the body did not arrive in {BODY_SECONDS:g} seconds", code="body_too_slow")

    def check_key(self, scope: Scope) -> None:
        if not self.credentials or scope["path"] in OPEN_PATHS or scope["method"] == "OPTIONS":
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        # All are compared, in constant time, so that the answer's delay tells nothing.
        if not any([hmac.compare_digest(given, credential) for credential in self.credentials]):
            raise ApiError(401, "send the API key as Authorization: Bearer KEY", code="invalid_api_key")

    async def read_body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None where the client hung up before it ended."""
        limit = self.server.settings.max_body
        too_large = ApiError(413, f"the body is larger than {limit:,} bytes", code="body_too_large")
        length = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if length.isdigit() and int(length) > limit:
            raise too_large
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > limit:
                raise too_large
            if not message.get("more_body"):
                return body


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read already, and then what comes after it."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message
