"""A program that decodes image files for another process, within limits of memory and time.

A hostile file may kill it. It ends after an idle time, or with the process that started it.

    python -m ade_base.pictures.decoder_process MEMORY_BYTES CPU_SECONDS IDLE_SECONDS

It reads requests, a :data:`REQUEST` and the file, from the socket that is its standard input. It
answers with an :data:`ANSWER`, the notes or the error as JSON, and the pixels.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import signal
import socket
import struct
import sys
import time

import numpy as np
from PIL import AvifImagePlugin, PngImagePlugin

from ade_base.pictures.convert import decode
from ade_base.pictures.limits import MAX_METADATA_BYTES, ImageError
from ade_base.pictures.structure import read_structure

READY = b"\1"
REQUEST = struct.Struct("<Q")  # bytes of the file
ANSWER = struct.Struct("<?III")  # whether it was decoded, bytes of JSON, height, width


def receive(connection: socket.socket, count: int, deadline: float | None = None) -> bytearray:
    """Receive exactly ``count`` bytes, by a deadline of ``time.monotonic`` if there is one.

    Raises:
        EOFError: the other end was closed before that.
        TimeoutError: they did not come in time.
    """
    received = bytearray(count)
    fill(connection, memoryview(received), deadline)
    return received


def fill(connection: socket.socket, room: memoryview, deadline: float | None = None) -> None:
    """Fill a buffer with received bytes, as :func:`receive`."""
    while len(room):
        if deadline is not None:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("it took too long")
            connection.settimeout(left)
        count = connection.recv_into(room)
        if not count:
            raise EOFError("the connection was closed")
        room = room[count:]


def main(memory_bytes: int, cpu_seconds: float, idle_seconds: float) -> None:
    """Decode the files that arrive on the socket that is the standard input.

    Args:
        memory_bytes: memory limit, in addition to what the program itself takes. A lower limit that
            the process has already remains.
        cpu_seconds: processor time per file, after which the process is killed; larger images
            than 16 million pixels have more in proportion.
        idle_seconds: how long to wait for a file.
    """
    import resource  # Windows, where clients import this module, has none

    # They may reach a whole group, and the parent still finishes its requests; its end ends this.
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    connection = socket.socket(fileno=sys.stdin.fileno())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(
        ImportError
    ):  # an extra, whose libraries would count against the limit
        importlib.import_module("pillow_heif")
    if sys.platform == "linux":
        with open("/proc/self/statm") as sizes:
            used = int(sizes.read().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)  # such as the service's own
        if most != resource.RLIM_INFINITY:
            memory_bytes = min(memory_bytes, most - used)
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes, used + memory_bytes))
    # Unpacked texts of a PNG. Pillow's own limit is 64 MiB, and a request may have many files.
    PngImagePlugin.MAX_TEXT_MEMORY = MAX_METADATA_BYTES
    AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # more would count against the limits
    connection.settimeout(idle_seconds)
    try:
        connection.sendall(READY)
        while True:
            (length,) = REQUEST.unpack(receive(connection, REQUEST.size))
            data = bytes(receive(connection, length))
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # the signal ends the process
            head, pixels = _answer(data, memory_bytes, cpu_seconds)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.sendall(head)
            connection.sendall(pixels)
            del data, pixels
    except (EOFError, OSError):  # the parent ended, or no file arrived in time
        pass


def _answer(data: bytes, memory_bytes: int, cpu_seconds: float) -> tuple[bytes, memoryview]:
    try:
        structure = read_structure(data)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds * structure.effort)
        decoded = decode(data, structure)
    except MemoryError:
        said = ["too_large", f"the image takes more than {memory_bytes >> 20} MiB to decode"]
    except ImageError as error:
        said = [error.code, str(error)]
    else:
        text = json.dumps([decoded.notes, decoded.size]).encode()
        height, width = decoded.pixels.shape[:2]
        return ANSWER.pack(True, len(text), height, width) + text, np.ascontiguousarray(
            decoded.pixels
        ).data.cast("B")
    text = json.dumps(said).encode()
    return ANSWER.pack(False, len(text), 0, 0) + text, memoryview(b"")


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]))
