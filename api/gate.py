"""Before anything else sees a request: an id for it, its key, its body; and a line in the log after it."""

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
import zlib
from collections.abc import Iterable

from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError, request_id
from .server import Server
from .tolerance import lenient

OPEN_PATHS = ("/", "/health", "/docs", "/openapi.json")  # for whoever watches the server, without a key
BODY_SECONDS = 60.0  # for a client to send its request
GIVEN_ID = re.compile(r"[\x21-\x7e]{1,128}")

logger = logging.getLogger("qwen.access")


class Gate:
    """Names the request, asks for the key, reads the body up to its limit, and counts."""

    def __init__(self, app: ASGIApp, server: Server) -> None:
        self.app, self.server = app, server
        self.credentials = [credential.encode() for credential in server.settings.credentials]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if GIVEN_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        request_id.set(name)
        lenient.set(self.server.settings.lenient)
        started, status = time.monotonic(), 499  # the client has gone before there was an answer
        is_head = scope["method"] == "HEAD"

        async def leave(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            elif is_head:
                message = {**message, "body": b""}
            await send(message)

        root = self.server.settings.root_path
        scope = {**scope, "method": "GET" if is_head else scope["method"], "root_path": root,
                 "path": below(root, tidy(scope["path"]))}  # fmt: skip
        try:
            body = await self.admit(scope, headers, receive)
            if isinstance(body, ApiError):
                await body.response(get_route_path(scope))(scope, receive, leave)
            elif body is not None:
                await self.app(scope, replay(body, receive), leave)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self.server.metrics.requests.labels(route, str(status)).inc()
            self.log(scope, status, time.monotonic() - started, name)

    def log(self, scope: Scope, status: int, seconds: float, name: str) -> None:
        client = scope["client"][0] if scope.get("client") else None
        if self.server.settings.log_json:
            logger.info(
                "%s",
                json.dumps(
                    {
                        "time": round(time.time(), 3),
                        "request_id": name,
                        "client": client,
                        "method": scope["method"],
                        "path": scope["path"],
                        "status": status,
                        "seconds": round(seconds, 4),
                    }
                ),
            )
        else:
            place = json.dumps(scope["path"])[1:-1]
            logger.info("%s %s %s %d %.3fs %s", client or "-", scope["method"], place, status, seconds, name)

    async def admit(self, scope: Scope, headers: Headers, receive: Receive) -> bytes | ApiError | None:
        """The body of a request that may come in, or why it may not; None where the client hung up before its end."""
        try:
            self.check_key(scope, headers)
            body = await asyncio.wait_for(self.read_body(headers, receive), BODY_SECONDS)
            if body and scope["method"] in ("POST", "PUT"):
                scope["headers"] = as_json(scope["headers"], headers)
            return body
        except ApiError as error:
            return error
        except TimeoutError:
            return ApiError(408, f"the body did not arrive in {BODY_SECONDS:g} seconds", code="body_too_slow")

    def check_key(self, scope: Scope, headers: Headers) -> None:
        if not self.credentials or scope["method"] == "OPTIONS" or get_route_path(scope) in OPEN_PATHS:
            return
        scheme, _, secret = headers.get("authorization", "").partition(" ")
        given = {f"{scheme.capitalize()} {secret.strip()}".encode("latin-1")}
        if "x-api-key" in headers:  # as Anthropic's clients send it
            given.add(f"Bearer {headers['x-api-key']}".encode("latin-1"))
        # All are compared, in constant time, so that the answer's delay tells nothing.
        if not any([hmac.compare_digest(one, credential) for one in given for credential in self.credentials]):
            raise ApiError(401, "send the API key as Authorization: Bearer KEY", code="invalid_api_key")

    async def read_body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body, unpacked; None where the client hung up before it ended."""
        limit = self.server.settings.max_body
        length = headers.get("content-length", "")
        if length.isdigit() and len(length) < 20 and int(length) > limit:
            raise too_large(limit, f"{int(length):,} bytes")
        parts: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise too_large(limit)
            if not message.get("more_body"):
                return unpack(b"".join(parts), headers.get("content-encoding", ""), limit)


def too_large(limit: int, size: str = "more") -> ApiError:
    return ApiError(413, f"the body is {size}, and at most {limit:,} bytes are read", code="body_too_large")


def tidy(path: str) -> str:
    """A path without the slashes that base addresses leave at its end and between its parts."""
    return re.sub(r"/{2,}", "/", path).rstrip("/") or "/"


def below(root: str, path: str) -> str:
    """The path with what a proxy puts before it, whether or not the proxy has taken it off again."""
    if not root or path.startswith(f"{root}/"):
        return path
    return f"{root}/" if path == root else f"{root}{path}"


def as_json(headers: Iterable[tuple[bytes, bytes]], named: Headers) -> list[tuple[bytes, bytes]]:
    """The headers of a body that is read as JSON, whatever curl says of it by itself.

    Not for pages in browsers: without this type they would not have to ask whether they may call this server.
    """
    headers = [(name, value) for name, value in headers if name != b"content-encoding"]
    if "origin" in named or "json" in named.get("content-type", ""):
        return headers
    return [(name, value) for name, value in headers if name != b"content-type"] + [
        (b"content-type", b"application/json")
    ]


def unpack(body: bytes, encoding: str, limit: int) -> bytes:
    """A body as it was before its Content-Encoding.

    Raises:
        ApiError: it is in another encoding, damaged, or larger than `limit` bytes.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise ApiError(415, f"Content-Encoding {encoding!r} is not read here, only gzip and deflate")
    reader = zlib.decompressobj(wbits=47)  # gzip or zlib, as it says itself
    try:
        unpacked = reader.decompress(body, limit + 1)
    except zlib.error as error:
        raise ApiError(400, f"the body is not {encoding} as its Content-Encoding says: {error}") from None
    if len(unpacked) > limit:
        raise too_large(limit, "unpacked more")
    if not reader.eof:
        raise ApiError(400, f"the body breaks off: its Content-Encoding {encoding} has no end")
    return unpacked


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read already, and then what comes after it."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message
