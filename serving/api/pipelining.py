"""uvicorn's protocol with a bound on the requests that a connection sends ahead of answers.

uvicorn keeps each of them, with a hundred times the memory of its text. It stops reading only until
the next answer, so a client that reads its answers could fill the memory.
"""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_AHEAD = 128  # of a connection; a single read may bring thousands
MAX_AHEAD_BYTES = 2**20  # of their bodies, and of that of the last one alone


class PipeliningProtocol(HttpToolsProtocol):
    """Ends a connection with too many requests that wait for the answer to an earlier one."""

    def on_message_begin(self) -> None:
        bodies = sum(len(cycle.body) for cycle, _ in self.pipeline)
        if len(self.pipeline) >= MAX_AHEAD or bodies > MAX_AHEAD_BYTES:
            raise _TooMuchAhead
        super().on_message_begin()

    def on_body(self, body: bytes) -> None:
        super().on_body(body)
        if self.pipeline and len(self.cycle.body) > MAX_AHEAD_BYTES:
            raise _TooMuchAhead


class _TooMuchAhead(Exception):
    """Ends the parsing of what was read, and then the connection."""
