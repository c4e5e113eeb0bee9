"""uvicorn's protocol with a bound on the requests that a connection sends ahead of answers.

uvicorn keeps each of them, with a hundred times the memory of its text. It stops reading only until
the next answer, so a client that reads its answers could fill the memory.
"""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_AHEAD = 128  # of a connection; a single read may bring thousands


class PipeliningProtocol(HttpToolsProtocol):
    """Ends a connection with too many requests that wait for the answer to an earlier one."""

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_AHEAD:
            raise ConnectionAbortedError("too many requests ahead of answers")  # ends the parsing
        super().on_message_begin()
