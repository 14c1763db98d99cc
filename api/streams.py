"""How responses leave: in one piece, or as a stream in a protocol's form, ended when the client hangs up."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import Request as HttpRequest

from .errors import ApiError
from .replies import Replies, cancelled_on_leaving

Chunks = AsyncIterator[dict[str, Any] | None]


@dataclass(frozen=True)
class StreamForm:
    """A protocol's way to write a chunk, to keep a connection alive, to end, and to tell of a failure."""

    media_type: str
    write: Callable[[dict[str, Any]], bytes]
    waiting: bytes
    end: bytes
    fail: Callable[[ApiError], bytes]


def to_json(data: Any) -> str:
    """In ASCII: many clients break lines at U+2028, U+2029 and U+0085 too."""
    return json.dumps(data, separators=(",", ":"))


def event(data: dict[str, Any]) -> bytes:
    return f"data: {to_json(data)}\n\n".encode()


def named_event(data: dict[str, Any]) -> bytes:
    """An event whose name is its type, as OpenAI's responses and Anthropic's messages have them."""
    return f"event: {data['type']}\n".encode() + event(data)


def line(data: dict[str, Any]) -> bytes:
    return f"{to_json(data)}\n".encode()


EVENTS = StreamForm(
    "text/event-stream", event, b": waiting\n\n", b"data: [DONE]\n\n", lambda error: event(error.body)
)  # fmt: skip


async def stream_response(chunks: Chunks, form: StreamForm, headers: Mapping[str, str]) -> Response:
    """A stream; what goes wrong on the way is a chunk too."""

    async def write() -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                yield form.waiting if chunk is None else form.write(chunk)
            if form.end:
                yield form.end
        except ApiError as error:
            yield form.fail(error)

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
    return StreamingResponse(write(), media_type=form.media_type, headers=headers)


async def until_left(chunks: Chunks, replies: Replies) -> Chunks:
    """The chunks; however their reading ends, so do the replies."""
    try:
        async for chunk in chunks:
            yield chunk
    finally:
        replies.cancel()


async def whole_response(
    http: HttpRequest, replies: Replies, collect: Callable[[], Awaitable[dict[str, Any]]], headers: Mapping[str, str]
) -> Response:
    """The response in one piece; the replies end when the client hangs up."""
    with cancelled_on_leaving(http, replies):
        return JSONResponse(await collect(), headers=dict(headers))


def schema_headers(left_out: Any) -> dict[str, str]:
    """Names the words of a schema that the reply was not held to."""
    words = ", ".join(word.encode("ascii", "replace").decode() for word in left_out)
    return {"x-schema-not-held": words} if words else {}
