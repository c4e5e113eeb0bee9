"""uvicorn's protocol with bounds on what a connection may send, and on its times.

uvicorn keeps heads of any size. It keeps all requests that come before the answer to an earlier
one, with a hundred times the memory of their text. It waits forever for a request, and for a client
that does not read.
"""

from __future__ import annotations

import asyncio
import http
from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from serving.api.guard import error_answer
from serving.ingest.errors import ApiError, malformed, overloaded

CONNECT = b"CONNECT"
MAX_FIELDS = 128  # of a head with its trailers; each takes time and memory, however short


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of a port.

    Attributes:
        connections: number of connections, over all clients.
        head_bytes: size of a head.
        receive_s: seconds for a request to arrive; None for any time.
        answer_s: seconds from then on until the client has read the answer; None for any time.
    """

    connections: int = 2048
    head_bytes: int = 64 * 2**10
    receive_s: float | None = 120.0
    answer_s: float | None = 300.0


class _Parser(httptools.HttpRequestParser):
    """Ignores offered upgrades, such as those of Java's HTTP client to HTTP/2.

    httptools would take what follows the head for another protocol, the body included.
    """

    def __init__(self, protocol: BoundedProtocol) -> None:
        super().__init__(protocol)
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's own
        self._protocol = protocol

    def feed_data(self, data: Any) -> None:
        parser = self
        while True:
            try:
                super(_Parser, parser).feed_data(data)
                return
            except httptools.HttpParserUpgrade as offered:
                if parser.get_method() == CONNECT:
                    raise
                data = parser._head_without_offer() + data[offered.args[0] :]
                # After a head with `Connection: close`, the same parser would skip a byte.
                parser = self._protocol.parser = _Parser(self._protocol)

    def _head_without_offer(self) -> bytes:
        first = b"%b %b HTTP/%b" % (
            self.get_method(),
            self._protocol.url,
            self.get_http_version().encode(),
        )
        fields = [b"%b: %b" % one for one in self._protocol.headers if one[0] != b"upgrade"]
        return b"\r\n".join([first, *fields, b"", b""])


class BoundedProtocol(HttpToolsProtocol):
    """Answers one request of a connection at a time, within limits.

    What a client sends ahead of an answer is dropped, and its connection closed after that answer.

    Args:
        limits: the limits.
        connections: number of those that are open, by the port of the server.
        refusals: counts the errors that it answers, by the error's code.
        config: given by uvicorn, like the other arguments.
    """

    def __init__(
        self,
        limits: ConnectionLimits,
        connections: Counter[int | None],
        refusals: Counter[str],
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.parser = _Parser(self)
        self._limits = limits
        self._open = connections
        self._refusals = refusals
        self._port: int | None = None
        # Runs until a request has arrived, then until its answer is read.
        self._timer: asyncio.TimerHandle | None = None
        self._num_pending = 0  # bytes since the last complete head or part of a body
        self._num_fields = self._head_bytes = 0  # of the present head and its trailers, so far
        self._is_ending = False  # whether nothing more is read

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self._port = None if self.server is None else self.server[1]
        self._open[self._port] += 1
        self._expire_in(self._limits.receive_s)
        if self._open[self._port] > self._limits.connections:
            self._refuse(overloaded("too many connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._open[self._port] -= 1
        self._expire_in(None)
        # uvicorn keeps the timer after a reset, and the timer all that the connection sent.
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_ending:
            return
        if self._timer is None:  # here, because the parser skips blank lines before a head
            self._expire_in(self._limits.receive_s)
        self._num_pending += len(data)
        super().data_received(data)
        if self._num_pending > self._limits.head_bytes:  # a long head, or trailers after a body
            self._refuse(self._long_head())

    def on_message_begin(self) -> None:
        if not self._is_idle():
            raise _Refused
        super().on_message_begin()
        self._num_fields = self._head_bytes = 0
        self._expire_in(self._limits.receive_s)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_fields += 1
        self._head_bytes += len(name) + len(value) + 4  # with ": " and the end of the line
        if self._has_long_head():
            raise _Refused
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._num_pending = 0
        if self.parser.get_method() == CONNECT:
            text = "the service does not support the method CONNECT"
            self._refuse(ApiError(501, "not_implemented", text))
        elif not self.parser.should_upgrade():  # otherwise the head comes again
            super().on_headers_complete()
            self.headers = []  # trailers are no headers: RFC 9110, section 6.5.1

    def on_body(self, body: bytes) -> None:
        self._num_pending = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()
            # It pauses in a large body, and nobody would notice that the client leaves.
            self.flow.resume_reading()
            if not self._is_idle():
                self._expire_in(self._limits.answer_s)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.transport.get_write_buffer_size():
            self._expire_in(None)

    def send_400_response(self, msg: str) -> None:
        if self._has_long_head():
            self._refuse(self._long_head())
        else:
            self._refuse(malformed("the request is not valid HTTP"))

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _has_long_head(self) -> bool:
        return self._head_bytes > self._limits.head_bytes or self._num_fields > MAX_FIELDS

    def _long_head(self) -> ApiError:
        text = f"headers may have at most {self._limits.head_bytes} bytes and {MAX_FIELDS} fields"
        return ApiError(431, "headers_too_large", text)

    def _expire_in(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._expire)

    def _expire(self) -> None:
        self._timer = None
        if self._is_idle() or not self.cycle.more_body:
            self.transport.abort()
        else:
            text = f"the request took longer than {self._limits.receive_s:g} seconds to arrive"
            self._refuse(ApiError(408, "request_timeout", text))

    def _refuse(self, error: ApiError) -> None:
        if not self._is_idle():
            if not self.cycle.more_body:  # a complete request, whose answer will be the last
                self._is_ending, self.cycle.keep_alive = True, False
                return
            if self.cycle.response_started:
                self.transport.abort()
        if self.transport.is_closing():
            return
        self._refusals[error.code] += 1
        headers, body = error_answer(error)
        headers += [("content-length", str(len(body))), ("connection", "close")]
        lines = [
            f"HTTP/1.1 {error.status} {http.HTTPStatus(error.status).phrase}",
            *map(": ".join, headers),
        ]
        self.transport.write("\r\n".join([*lines, "", ""]).encode() + body)
        self.transport.close()


class _Refused(Exception):
    """Ends the parsing of what was read, and then the connection."""
