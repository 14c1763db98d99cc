"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}, whatever goes wrong."""

import itertools
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from qwen.errors import QwenError, first_line

TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}

# Documented, but not what this server can do; as long as they ask for nothing, they are accepted.
UNSUPPORTED = {
    "audio": (None, "the model neither hears nor speaks"),
    "metadata": (None, "nothing is stored"),
    "modalities": (["text"], "the model reads and writes text alone"),
    "moderation": (None, "there is no moderation model"),
    "prediction": (None, "predicted outputs are not made use of"),
    "prompt_cache_retention": (None, "the prefix cache keeps what fits into its memory"),
    "reasoning_effort": ("none", "the model has no such settings"),
    "service_tier": ("auto", "there is one tier"),
    "store": (False, "nothing is stored"),
    "suffix": (None, "the model was not trained to fill in the middle"),
    "verbosity": (None, "the model has no such setting"),
    "web_search_options": (None, "the server searches nothing"),
}


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
        return {"error": {"message": message, "type": kind, "param": param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def drop_neutral(request: Any) -> Any:
    """A request without the parameters that this server lacks, where they ask for nothing anyway."""
    if not isinstance(request, dict):
        return request
    neutral = {name: value for name, (value, _) in UNSUPPORTED.items()}
    return {
        name: value
        for name, value in request.items()
        if name not in neutral or not (value is None or value == neutral[name])
    }


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


def validation_error(errors: Sequence[dict[str, Any]]) -> ApiError:
    """The first thing that is wrong with a request, as a sentence that names the parameter."""
    # Of the ways in which a value could have been meant, the one that led furthest is the likeliest.
    place = tuple(itertools.takewhile(is_name, errors[0]["loc"]))
    error = max((e for e in errors if e["loc"][: len(place)] == place), key=lambda e: len(e["loc"]))
    param = locate(error["loc"]) or None
    if error["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {error['ctx']['error']}")
    if error["type"] == "extra_forbidden":
        name = str(error["loc"][-1])
        if name in UNSUPPORTED and len(error["loc"]) <= 2:
            return ApiError(400, f"{name} is not supported: {UNSUPPORTED[name][1]}", name, "unsupported_parameter")
        parent = locate(error["loc"][:-1])
        param = f"{parent}.{name}" if parent else name
        return ApiError(400, f"unrecognized request argument: {param}", param, "unknown_parameter")
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":  # of several parameters: the message begins with one of them
        return ApiError(400, f"{param}: {message}" if param else message, param or message.split()[0], "invalid_value")
    if param is None:
        return ApiError(400, "the body is not a JSON object; is Content-Type application/json?")
    code = "missing_required_parameter" if error["type"] == "missing" else "invalid_value"
    return ApiError(400, f"{param}: {message}", param, code)


def add_error_handlers(app: FastAPI) -> None:
    """Every error of the app in OpenAI's form."""

    @app.exception_handler(ApiError)
    async def on_api_error(request: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(QwenError)
    async def on_qwen_error(request: Request, error: QwenError) -> JSONResponse:
        return ApiError(400, str(error)).response()

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(request: Request, error: RequestValidationError) -> JSONResponse:
        return validation_error(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        code = None
        message = str(error.detail)
        if error.status_code == 404:
            message, code = f"there is no {request.method} {request.url.path} here; see /docs", "unknown_url"
        elif error.status_code == 405:
            message = f"{request.url.path} takes no {request.method}; see /docs"
        response = ApiError(error.status_code, message, code=code).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def on_error(request: Request, error: Exception) -> JSONResponse:
        return ApiError(500, f"the server failed: {type(error).__name__}: {first_line(error)}").response()
