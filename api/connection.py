"""The server's end of a connection, below the app: broken HTTP and requests that never begin."""

import asyncio
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError

HEADER_SECONDS = 30.0  # for a client to send its request's head


class Connection(H11Protocol):
    """uvicorn's, which answers broken HTTP as any other mistake, and does not wait for ever for a request's head."""

    head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._end_wait()
        elif self.head_timer is None:  # the next request on a connection that is kept has begun
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_wait()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._end_wait()

    def _await_head(self) -> None:
        self.head_timer = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _end_wait(self) -> None:
        if self.head_timer is not None:
            self.head_timer.cancel()
            self.head_timer = None

    def _give_up(self) -> None:
        message = f"the request's head did not arrive in {HEADER_SECONDS:g} seconds"
        self._refuse(ApiError(408, message, code="head_too_slow"))

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "this is not HTTP/1.1: the request line or a header is malformed"))

    def _refuse(self, error: ApiError) -> None:
        """Answer outside of any request, and hang up."""
        response = error.response()
        headers = [*response.raw_headers, (b"connection", b"close")]
        events: list[Any] = [
            h11.Response(status_code=error.status, headers=headers),
            h11.Data(data=response.body),
            h11.EndOfMessage(),
        ]
        try:
            for event in events:
                self.transport.write(self.conn.send(event) or b"")
        except h11.LocalProtocolError:  # in the middle of an answer
            logging.getLogger("qwen.api").info("a connection broke off: what came is not HTTP")
        self.transport.close()
