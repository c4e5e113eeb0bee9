"""The processes that decode untrusted image files.

A process starts with the first file, ends when it has been idle, and is replaced when it dies.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from ade_base.errors import UserError
from ade_base.pictures.convert import DecodedImage
from ade_base.pictures.decoder_process import ANSWER, READY, REQUEST, fill, receive
from ade_base.pictures.limits import ImageError, Structure

MEMORY_BYTES = 384 * 2**20  # an image of 16 million pixels takes up to 340 MiB, a HEIC of 51 375
CPU_SECONDS = 2.0  # per 16 million pixels, which take up to one second
WALL_SECONDS = 10.0  # on a busy machine, processor time alone would be no limit
START_SECONDS = 30.0
END_SECONDS = 5.0  # to wait for the exit code of a process that has closed its connection
IDLE_SECONDS = 60.0
MAX_TEXT_BYTES = 2**16
PROGRAM = "ade_base.pictures.decoder_process"
_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "HOME")

_idle: list[_Decoder] = []


class DecoderError(UserError, RuntimeError):
    """No process that decodes can be started: a fault of the machine, not of the file."""


class _Died(Exception):
    """The process ended, hangs, or gave an invalid answer."""


class _Decoder:
    """One process, which decodes one file at a time."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        root = str(Path(__file__).parents[2])
        # The process parses untrusted files: it must not have the secrets of the environment.
        # More threads and malloc arenas would count against its memory limit.
        environment = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
        environment |= {
            "PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)]),
            "OPENBLAS_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
        }
        command = [
            sys.executable,
            "-P",
            "-m",
            PROGRAM,
            str(MEMORY_BYTES),
            str(CPU_SECONDS),
            str(IDLE_SECONDS),
        ]
        with theirs:
            try:
                self._process = subprocess.Popen(
                    command, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, env=environment
                )
            except OSError as error:  # callers would mistake it for an error of their file
                ours.close()
                raise DecoderError(
                    f"the process that decodes images cannot be started: {error}"
                ) from error
        self._connection = ours
        self.pid = self._process.pid
        self.is_used = False
        try:
            ours.settimeout(START_SECONDS)
            is_ready = receive(ours, 1) == READY
        except (OSError, EOFError):
            is_ready = False
        if not is_ready:
            raise DecoderError(
                f"the process that decodes images did not start (exit code {self.end()})"
            )

    def decode(self, data: bytes, structure: Structure) -> DecodedImage:
        """Decode like :func:`ade_base.pictures.convert.decode`, in this process.

        Raises:
            ImageError: the file is invalid.
            _Died: the process failed.
        """
        deadline = time.monotonic() + WALL_SECONDS
        try:
            self._connection.settimeout(WALL_SECONDS)
            self._connection.sendall(REQUEST.pack(len(data)))
            self._connection.sendall(data)
            head = receive(self._connection, ANSWER.size, deadline)
            is_image, length, height, width = ANSWER.unpack(head)
            if length > MAX_TEXT_BYTES or height * width != is_image * structure.scaled_pixels:
                raise ValueError(f"an answer of {length} bytes and {height} x {width} pixels")
            said = json.loads(receive(self._connection, length, deadline))
            if not is_image:
                code, message = said
                self.is_used = True
                raise ImageError(str(code), str(message))
            notes, (columns, rows) = said
            if {columns, rows} != {structure.width, structure.height}:
                raise ValueError(f"an image of another size, {columns} x {rows}")
            pixels = np.empty((height, width, 3), np.uint8)
            fill(self._connection, pixels.data.cast("B"), deadline)
            self.is_used = True
            return DecodedImage(pixels, [str(note) for note in notes], (columns, rows))
        except ImageError:
            raise
        except (OSError, EOFError, ValueError, TypeError) as error:
            raise _Died from error

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def end(self, patience: float = 0.1) -> int:
        """Kill the process unless it ends within ``patience`` seconds; returns its exit code."""
        self._connection.close()
        try:
            return self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def decode_apart(data: bytes, structure: Structure) -> DecodedImage:
    """Decode a file in another process, within limits of memory and time.

    Thread-safe: each call uses a process of its own.

    Args:
        data: the whole file.
        structure: its structure.

    Raises:
        ImageError: the file is damaged, or exceeds a limit.
        DecoderError: the process cannot be started.
    """
    while True:
        decoder = _take()
        try:
            decoded = decoder.decode(data, structure)
        except ImageError:
            _idle.append(decoder)
            raise
        except _Died as died:
            closed = isinstance(died.__cause__, (EOFError, ConnectionError))
            code = decoder.end(END_SECONDS if closed else 0)
            if code == 0 and decoder.is_used:  # its idle time ended just as the file was sent
                continue
            if code == -signal.SIGPROF:
                raise ImageError(
                    "too_large",
                    f"the image takes more than {CPU_SECONDS * structure.effort:.2g} seconds to "
                    "decode",
                ) from None
            # Not a code to try again after: each time, the file would keep a process busy.
            if isinstance(died.__cause__, TimeoutError):
                raise ImageError(
                    "too_large",
                    f"the image was not decoded within {WALL_SECONDS:g} seconds",
                    is_transient=True,
                ) from None
            raise ImageError(
                "not_an_image",
                f"the image is damaged: its decoder ended (exit code {code})",
                # Killed perhaps for want of memory, or asked to end before it ignored that.
                is_transient=code in (-signal.SIGKILL, -signal.SIGTERM, -signal.SIGHUP),
            ) from None
        except BaseException:
            decoder.end()
            raise
        _idle.append(decoder)
        return decoded


def _take() -> _Decoder:
    """Return an idle process or start a new one."""
    while _idle:
        try:
            decoder = _idle.pop()
        except IndexError:  # another thread took the last one
            break
        if decoder.is_alive():
            return decoder
        decoder.end()
    return _Decoder()


# A forked process must not use the decoders of its parent.
if hasattr(os, "register_at_fork"):  # Windows, where clients run, has no such processes
    os.register_at_fork(after_in_child=_idle.clear)
