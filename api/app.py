"""The app: routes, and what guards them."""

import asyncio
from typing import Any

from fastapi import Depends, FastAPI, Response
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest

from .chat import collect_chat, stream_chat
from .completions import CompletionPlan, collect_completion, plan_completion, stream_completion
from .errors import ApiError, add_error_handlers
from .gate import OPEN_PATHS, Gate
from .messages import add_messages_routes
from .ollama import add_ollama_routes
from .parameters import StreamOptions
from .plan import ChatPlan, plan_chat
from .protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from .replies import Replies, UsageWanted
from .responses import add_responses_routes
from .server import Server
from .streams import EVENTS, schema_headers, stream_response, until_left, whole_response
from .tokenizing import detokenize, tokenize, tokenizer_info


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
        415: "the body is compressed in a way that is not read here",
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
        title="Qwen-7B", description="A server of Qwen-7B for clients of OpenAI.", redoc_url=None, dependencies=keys,
        redirect_slashes=False,
    )  # fmt: skip
    add_error_handlers(app)
    add_generation_routes(app, server)
    others: dict[int | str, Any] = {status: {"description": error["description"]} for status, error in ERRORS.items()}
    add_messages_routes(app, server, others)  # their errors have forms of their own
    add_ollama_routes(app, server, others)
    add_responses_routes(app, server, ERRORS)
    add_plain_routes(app, server)
    tidy_description(app)
    app.add_middleware(Gate, server=server)
    if server.settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(server.settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],  # the clients' own vary: authorization, x-stainless-*, x-api-key, anthropic-*
            expose_headers=["x-request-id", "x-schema-not-held", "retry-after"],
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
    async def respond(
        plan: ChatPlan | CompletionPlan, body: ChatRequest | CompletionRequest, http: HttpRequest, collect: Any,
        stream: Any,
    ) -> Response:  # fmt: skip
        replies = Replies(server.ready, plan.requests, server.settings.keep_alive)
        headers = schema_headers(plan.left_out)
        if body.stream:
            wanted = body.stream_options or StreamOptions()
            usage = UsageWanted(bool(wanted.include_usage), bool(wanted.continuous_usage_stats))
            chunks = until_left(stream(server, plan, replies, usage), replies)
            return await stream_response(chunks, EVENTS, headers)
        return await whole_response(http, replies, lambda: collect(server, plan, replies), headers)

    @app.post("/v1/chat/completions", responses={**ERRORS, **STREAM})
    async def chat_completions(body: ChatRequest, http: HttpRequest) -> Response:
        server.check_model(body.model)
        plan = await asyncio.to_thread(plan_chat, server, body)
        return await respond(plan, body, http, collect_chat, stream_chat)

    @app.post("/v1/completions", responses={**ERRORS, **STREAM})
    async def completions(body: CompletionRequest, http: HttpRequest) -> Response:
        server.check_model(body.model)
        plan = await asyncio.to_thread(plan_completion, server, body)
        return await respond(plan, body, http, collect_completion, stream_completion)

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

    @app.get("/", response_class=PlainTextResponse, include_in_schema=False)
    async def root() -> str:
        return "Qwen-7B is served here: see /docs"

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
    async def tokens_of(body: TokenizeRequest) -> dict[str, Any]:
        server.check_model(body.model)
        return await asyncio.to_thread(tokenize, server, body)

    @app.post("/detokenize", responses=ERRORS)
    async def text_of(body: DetokenizeRequest) -> dict[str, str]:
        server.check_model(body.model)
        return detokenize(server, body)

    @app.get("/tokenizer_info", responses=ERRORS)
    async def info() -> dict[str, Any]:
        return tokenizer_info(server)
