"""A private channel between processes of one user: a Unix domain socket, one JSON object per line.

A client sends one line and reads lines until the last: any number of ``{"say": TEXT}``, then
``{"result": OBJECT}`` or ``{"error": TEXT}``. The socket is in a folder of mode 0700 and has mode
0600; both sides also ask the kernel who is at the other end.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ade_base.errors import UserError

MAX_LINE = 2**20  # bytes
READ_S = 10.0  # for the line of a client
RETRY_S = 0.5  # after a client that could not be accepted
DESCRIBE_S = 10.0  # for an answer that is there at once unless a process hangs
_CREDENTIALS = struct.Struct("3i")  # process, user and group
Say = Callable[[str], None]
Handle = Callable[[dict[str, Any], Say], dict[str, Any]]


class ChannelError(UserError, RuntimeError):
    """Nobody answers, or the answer is an error, which is the message."""


class RefusedError(ChannelError):
    """The answer is an error: the other process runs."""


def peer_is_own_user(connection: socket.socket) -> bool:
    """Whether a process of this user is at the other end of a Unix domain socket."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(found)[1] == os.getuid())


def ask(
    path: Path,
    message: dict[str, Any],
    say: Say = lambda text: None,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Send a message and wait for the result.

    Args:
        path: the socket.
        message: what to do.
        say: gets the lines about progress.
        seconds: for each line of the answer; no limit unless given.

    Raises:
        ChannelError: nobody answers; :class:`RefusedError`: the answer is an error.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(seconds)
        for answer in _answers(connection, path, message, seconds):
            if "say" in answer:
                say(answer["say"])
            elif "error" in answer:
                raise RefusedError(answer["error"])
            else:
                return dict(answer["result"])
    raise ChannelError("the other process ended before it answered")


def _answers(
    connection: socket.socket, path: Path, message: dict[str, Any], seconds: float | None
) -> Iterator[dict[str, Any]]:
    try:
        connection.connect(str(path))
        if not peer_is_own_user(connection):
            raise ChannelError(f"another user listens at {path}")
        connection.sendall(encode(message))
        with connection.makefile("rb") as lines:
            yield from map(json.loads, lines)
    except TimeoutError:
        raise ChannelError(f"no answer at {path} within {seconds:g} s") from None
    except OSError as error:
        raise ChannelError(f"no answer at {path}: {error.strerror}") from None
    except ValueError as error:
        raise ChannelError(f"the answer at {path} cannot be read: {error}") from None


def encode(message: dict[str, Any]) -> bytes:
    """A line."""
    return json.dumps(message).encode() + b"\n"


class Listener:
    """Answers at a socket, each client in a thread of its own.

    Args:
        path: of the new socket.
        handle: computes the result of a message; gets a function that reports progress.
        expected: exceptions whose text is for the client. Others are printed here.
    """

    def __init__(self, path: Path, handle: Handle, expected: tuple[type[Exception], ...]) -> None:
        self._handle = handle
        self._expected = expected
        self._is_closed = False
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        path.chmod(0o600)
        self._socket.listen()
        threading.Thread(target=self._accept, name="control", daemon=True).start()

    def close(self) -> None:
        """Accept no further clients."""
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                if self._is_closed:
                    return
                time.sleep(RETRY_S)  # there are too many open files for a moment
                continue
            try:
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()
            except RuntimeError:  # there are too many threads or processes for a moment
                connection.close()

    def _answer(self, connection: socket.socket) -> None:
        def send(message: dict[str, Any]) -> None:
            with contextlib.suppress(OSError):  # the client is gone; what it asked for is done
                connection.sendall(encode(message))

        with connection:
            if not peer_is_own_user(connection):
                return
            connection.settimeout(READ_S)
            try:
                with connection.makefile("rb") as lines:
                    message = json.loads(lines.readline(MAX_LINE))
            except (OSError, ValueError) as error:
                send({"error": f"the message cannot be read: {error}"})
                return
            try:
                send({"result": self._handle(message, lambda text: send({"say": text}))})
            except self._expected as error:
                send({"error": str(error)})
            except Exception:
                traceback.print_exc(file=sys.stderr)
                send({"error": "internal error: the output of ade serve has the reason"})
