"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}, whatever goes wrong.

Under /v1/messages they have Anthropic's form, under /api Ollama's.
"""

import itertools
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette._utils import get_route_path
from starlette.exceptions import HTTPException

from qwen.errors import QwenError, first_line

from .tolerance import refusal

ANTHROPIC_TYPES = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)  # of the request that is being answered


class ApiError(Exception):
    """What a client is told, with an HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after = status, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status) or ("server_error" if self.status >= 500 else "invalid_request_error")
        # What was quoted from a request may not be encodable: lone surrogates.
        message = str(self).encode("utf-8", "replace").decode()
        param = self.param and self.param.encode("utf-8", "replace").decode()
        body = {"error": {"message": message, "type": kind, "param": param, "code": self.code}}
        return {**body, "request_id": request_id.get()} if request_id.get() else body

    def response(self, path: str = "") -> JSONResponse:
        """The answer, in the form of the protocol that the path belongs to."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body_for(path), self.status, headers)

    def body_for(self, path: str) -> dict[str, Any]:
        """The body, in the form of the protocol that the path belongs to."""
        error = self.body["error"]
        if path.startswith("/v1/messages"):
            kind = ANTHROPIC_TYPES.get(self.status) or ("api_error" if self.status >= 500 else "invalid_request_error")
            return {
                "type": "error",
                "error": {"type": kind, "message": error["message"]},
                "request_id": request_id.get(),
            }
        return {"error": error["message"]} if path.startswith("/api/") else self.body


def is_name(part: str | int) -> bool:
    """Whether a part of a location is a parameter's, and not pydantic's word for one of the types it may have."""
    if isinstance(part, int):
        return True
    return part.isidentifier() and part.islower() and part not in ("str", "int", "float", "bool", "none", "json")


def locate(location: Sequence[str | int]) -> str:
    """A parameter's name as messages[0].content, of where pydantic found something wrong."""
    name = ""
    for part in filter(is_name, location[1:] if location[:1] == ("body",) else location):
        if isinstance(part, int):
            name += f"[{part}]" if name else ""
        else:
            name += f".{part}" if name else part
    return name


def unknown_error(location: Sequence[str | int]) -> ApiError:
    """A field that nobody here knows, or that is known and not supported."""
    name, parent = str(location[-1]), locate(location[:-1])
    if not parent and (reason := refusal(name)):
        return ApiError(400, f"{name} is not supported: {reason}", name, "unsupported_parameter")
    param = f"{parent}.{name}" if parent else name
    return ApiError(400, f"unrecognized request argument: {param}", param, "unknown_parameter")


def validation_error(errors: Sequence[dict[str, Any]]) -> ApiError:
    """The first thing that is wrong with a request, as a sentence that names the parameter."""
    # Of the ways in which a value could have been meant, the one that led furthest is the likeliest.
    place = tuple(itertools.takewhile(is_name, errors[0]["loc"]))
    error = max((e for e in errors if e["loc"][: len(place)] == place), key=lambda e: len(e["loc"]))
    param = locate(error["loc"]) or None
    if error["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {error['ctx']['error']}")
    if error["type"] == "extra_forbidden":
        return unknown_error(error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":  # of several parameters: the message begins with one of them
        return ApiError(400, f"{param}: {message}" if param else message, param or message.split()[0], "invalid_value")
    if param is None:
        return ApiError(400, "the body is not a JSON object; is Content-Type application/json?")
    code = "missing_required_parameter" if error["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{param}: {message}", param, code)


def body_error(cause: BaseException | None) -> str | None:
    """Why a body could not be read as JSON at all, of what the reader raised."""
    if isinstance(cause, UnicodeDecodeError):
        return f"the body is not UTF-8: byte 0x{cause.object[cause.start]:02x} at {cause.start}"
    if isinstance(cause, RecursionError):
        return "the body's JSON is nested too deep"
    if isinstance(cause, ValueError) and "digits" in str(cause):
        return "the body has a number of more digits than are read"
    return None


def add_error_handlers(app: FastAPI) -> None:
    """Every error of the app in the form of its path's protocol."""

    def tell(request: Request, error: ApiError) -> JSONResponse:
        return error.response(get_route_path(request.scope))

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        return tell(request, error)

    @app.exception_handler(QwenError)
    async def on_qwen_error(request: Request, error: QwenError) -> JSONResponse:
        return tell(request, ApiError(400, str(error)))

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return tell(request, validation_error(error.errors()))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        code, path = None, get_route_path(request.scope)
        message = body_error(error.__cause__) or str(error.detail)
        if error.status_code == 404:
            message, code = f"there is no {request.method} {path} here; see /docs", "unknown_url"
        elif error.status_code == 405:
            message = f"{path} takes no {request.method}; see /docs"
        response = tell(request, ApiError(error.status_code, message, code=code))
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def on_error(request: Request, error: Exception) -> JSONResponse:
        return tell(request, ApiError(500, f"the server failed: {type(error).__name__}: {first_line(error)}"))
