"""HTTP/1.1, with what uvicorn's protocol lacks: limits on connections and on the time until a request begins; JSON errors.

A client that connects and sends nothing, or its headers a byte at a time, is disconnected after `_HEADER_SECONDS`.
"""

import asyncio
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from bardling.serve.errors import ApiError, json_text

_HEADER_SECONDS = 15.0
_FLUSH_SECONDS = 60.0  # for a client to read the rest of a response
_MAX_CONNECTIONS = 512


class Protocol(H11Protocol):
    """One connection."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > _MAX_CONNECTIONS:
            transport.abort()
        self._expect_request()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self._expect_request()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is not HTTP."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json_text(ApiError(400, msg, code="invalid_http").body()).encode()
            headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
            response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(cast(Any, self.conn.send(event)))
        self.transport.close()

    def _expect_request(self) -> None:
        """Close the connection unless a request begins in time."""
        if self._deadline is not None:
            self._deadline.cancel()
        previous = self.cycle

        def expire() -> None:
            if self.cycle is previous:
                self.transport.close()  # sends what is buffered first
                self._deadline = self.loop.call_later(_FLUSH_SECONDS, self.transport.abort)

        self._deadline = self.loop.call_later(_HEADER_SECONDS, expire)
