"""uvicorn's protocol with bounds on what a connection may send before it is answered.

uvicorn keeps heads of any size, and all requests that come before the answer to an earlier one,
with a hundred times the memory of their text. It stops reading only until the next answer, so a
client that reads its answers could fill the memory.
"""

from __future__ import annotations

from typing import Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_AHEAD = 128  # of a connection; a single read may bring thousands
MAX_AHEAD_BYTES = 2**18  # of memory for their heads and bodies, and of the last one's body alone
FIELD_BYTES = 100  # of memory for a field, beside its text
MAX_HEAD_BYTES = 64 * 2**10
MAX_FIELDS = 128  # of a head with its trailers; each takes time and memory, however short
MANY_PARTS, LEAST_PART = 1000, 64  # of a body: so many may not have fewer bytes on average
_HEAD_BYTES = "ade.head_bytes"  # in the scope: of memory


class PipeliningProtocol(HttpToolsProtocol):
    """Ends a connection with too long a head, or with too much that waits for an earlier answer."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._most_head_bytes = MAX_HEAD_BYTES
        self._num_fields = self._head_bytes = 0  # of the present head and its trailers, so far
        self._num_parts = self._body_bytes = 0  # of the present body
        self.parts_too_small = False  # whether a body came in parts that are too small
        self._num_pending = 0  # bytes since the last complete head or part of a body

    def connection_lost(self, exc: Exception | None) -> None:
        # uvicorn keeps the timer after a reset, and the timer all that the connection sent.
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._num_pending += len(data)
        super().data_received(data)
        if self._num_pending > self._most_head_bytes:  # a long head, or trailers after a body
            self.refuse_head()

    def on_message_begin(self) -> None:
        ahead = sum(
            cast(dict[str, Any], cycle.scope)[_HEAD_BYTES] + len(cycle.body)
            for cycle, _ in self.pipeline
        )
        if len(self.pipeline) >= MAX_AHEAD or ahead > MAX_AHEAD_BYTES:
            raise _PipelineTooLong
        super().on_message_begin()
        self._num_fields = self._head_bytes = self._num_parts = self._body_bytes = 0

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_fields += 1
        self._head_bytes += len(name) + len(value) + 4  # with ": " and the end of the line
        if self.has_long_head():
            raise _LongHead
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._num_pending = 0
        memory = self._head_bytes + FIELD_BYTES * self._num_fields
        cast(dict[str, Any], self.scope)[_HEAD_BYTES] = memory
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_pending = 0
        super().on_body(body)
        self._num_parts += 1
        self._body_bytes += len(body)
        # Each takes as long as a kilobyte, be it a single byte.
        parts_too_small = self._num_parts > MANY_PARTS and (
            self._body_bytes < LEAST_PART * self._num_parts
        )
        if parts_too_small:
            self.parts_too_small = True
            raise _PipelineTooLong
        if self.pipeline and len(self.cycle.body) > MAX_AHEAD_BYTES:
            raise _PipelineTooLong

    def has_long_head(self) -> bool:
        """Whether the present head is too long, as far as it has been parsed."""
        return self._head_bytes > self._most_head_bytes or self._num_fields > MAX_FIELDS

    def refuse_head(self) -> None:
        """End the connection because of a long head."""
        self.transport.abort()


class _LongHead(Exception):
    """Ends the parsing of what was read, and then the connection."""


class _PipelineTooLong(Exception):
    """The same, for other reasons."""
