"""Limits clients at the level of connections: their number, and the time and size of heads."""

from __future__ import annotations

import asyncio
import http
from collections import Counter
from typing import Any, cast

import httptools
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
from uvicorn.server import ServerState

from handlers.front.admission import DisconnectGuard, Limits
from serving.api.guard import error_answer
from serving.api.pipelining import LEAST_PART, MANY_PARTS, MAX_FIELDS, PipeliningProtocol
from serving.ingest.errors import ApiError, malformed, overloaded

CONNECT = b"CONNECT"
_BLANK = b"\r\n\r\n"


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
        return b"\r\n".join([first, *fields]) + _BLANK


class BoundedProtocol(PipeliningProtocol):
    """uvicorn's protocol with limits.

    Without them it would wait forever for the head of a request, or for a client that does not
    read.

    Args:
        limits: the limits.
        connections: number of those that are open, by the port of the server.
        refusals: counts the errors that it answers, by the error's code.
        config: given by uvicorn, like the other arguments.
    """

    def __init__(
        self,
        limits: Limits,
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
        # Runs from the start of the connection, or of a later head, until that head is complete.
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None  # runs while the client does not read
        self._last = b""  # of what was read before, which may begin the end of a head
        self._most_head_bytes = limits.head_bytes
        self._cycles: list[RequestResponseCycle] = []  # requests without an answer, oldest first
        self._extensions: dict[str, Any] = {}  # of the latest request
        self._is_ending = False  # whether nothing more is read

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(cast(asyncio.Transport, transport))
        self.transport.set_write_buffer_limits(high=0)  # the write timer covers every unsent byte
        if self.server is not None:
            self._port = self.server[1]
        self._open[self._port] += 1
        if self._open[self._port] > self._limits.connections:
            self._refuse(overloaded("too many connections"))
        else:
            self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._open[self._port] -= 1
        self._end_head_timer()
        self._end_write_timer()
        for cycle in self._cycles:  # uvicorn itself notifies only the latest
            cycle.disconnected = True
            cycle.message_event.set()
            disconnect: Any = cycle.scope["extensions"]["ade.disconnect"]
            disconnect.note()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_ending:
            return
        if self._is_idle():
            if self._head_timer is None:
                self._last = b""
            self._await_head()  # here, because the parser skips blank lines before a head
        if self._head_timer is not None:
            end = (self._last + data).find(_BLANK)
            size = len(data) if end < 0 else end + len(_BLANK) - len(self._last)
            if self._num_pending + size > self._most_head_bytes:  # it may arrive at once
                self.refuse_head()
                return
        kept = len(_BLANK) - 1
        self._last = (self._last + data[-kept:])[-kept:]
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        # The front aborts the connection if the client does not read the answer.
        self.scope["extensions"] = self._extensions = {
            "ade.abort": {"connection": self.transport.abort},
            "ade.disconnect": DisconnectGuard(),
        }
        self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._head_timer is not None:  # not for trailers: RFC 9110, section 6.5.1
            # The parser keeps what may follow a value: RFC 9110, section 5.5.
            super().on_header(name, value.rstrip(b" \t"))

    def on_headers_complete(self) -> None:
        self._end_head_timer()
        if self.parser.get_method() == CONNECT:
            self._refuse(
                ApiError(
                    501,
                    "not_implemented",
                    "the service does not support the method CONNECT",
                )
            )
        elif not self.parser.should_upgrade():  # otherwise the head comes again
            super().on_headers_complete()
            self._extensions["ade.has_message"] = self.cycle.message_event.is_set
            self._cycles = [
                *(cycle for cycle in self._cycles if not cycle.response_complete),
                self.cycle,
            ]

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()
            if not self.pipeline:
                # It pauses in a large body, and nobody would notice that the client leaves.
                self.flow.resume_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._head_timer is not None:  # the rest of a head may be read only now
            self._end_head_timer()
            self._await_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._limits.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._end_write_timer()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        if self.has_long_head():
            self.refuse_head()
        elif self.parts_too_small:
            text = f"a body in more than {MANY_PARTS:,} parts must have {LEAST_PART} bytes or more"
            self._refuse(malformed(f"{text} in each on average: send larger chunks"))
        else:
            self._refuse(malformed("the request is not valid HTTP"))

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self._limits.head_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._is_idle():
            self.transport.abort()
        else:  # reading pauses while an earlier request is unanswered
            self._await_head()

    def _end_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _end_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def refuse_head(self) -> None:
        """Answer 431, unless an earlier request is still unanswered."""
        text = f"headers may have at most {self._most_head_bytes} bytes and {MAX_FIELDS} fields"
        self._refuse(ApiError(431, "headers_too_large", text))

    def _refuse(self, error: ApiError) -> None:
        is_bad_body = (
            not self._is_idle()
            and self.cycle.more_body
            and not self.cycle.response_started
            and not self.pipeline
        )
        is_behind = not (self._is_idle() or self.cycle.more_body or self.pipeline)
        if is_behind:  # a complete request, whose answer will be the last
            self._is_ending, self.cycle.keep_alive = True, False
            return
        if not (self._is_idle() or is_bad_body):  # an earlier request is still unanswered
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
