"""The messages between the front and a worker: batches of requests, and of answers.

A message is a head in JSON, then the raw bodies. Neither side executes what the other sends, so a
worker that native code has corrupted cannot harm the front.
"""

from __future__ import annotations

import asyncio
import io
import struct
from collections.abc import Sequence
from typing import Any, BinaryIO

import orjson

LENGTH = struct.Struct(">I")  # of the head
# What the front takes from a worker, well above any batch.
MAX_HEAD_BYTES = 2**24
MAX_BODIES_BYTES = 2**29
Body = bytes | bytearray
Head = dict[str, Any]
Message = tuple[Head, list[bytes]]


def pack(head: dict[str, Any], bodies: Sequence[Body] = ()) -> list[Body]:
    """The parts of a message, to be sent in order."""
    text = orjson.dumps({**head, "sizes": [len(body) for body in bodies]})
    return [LENGTH.pack(len(text)), text, *bodies]


def read(stream: BinaryIO) -> Message | None:
    """Read the next message; ``None`` at the end of the connection."""
    length = stream.read(LENGTH.size)
    if len(length) < LENGTH.size:
        return None
    head = orjson.loads(stream.read(LENGTH.unpack(length)[0]))
    return head, [stream.read(size) for size in head["sizes"]]


def unpack(message: Body) -> Message:
    """The head and the bodies of a message that is there as a whole.

    Raises:
        ValueError: it is not one.
    """
    found = read(io.BytesIO(message))
    if found is None:
        raise ValueError("an empty message")
    return found


async def receive(stream: asyncio.StreamReader) -> Message:
    """Receive the next message.

    Raises:
        EOFError: the connection ended.
        ValueError: it is not a message, or too large.
    """
    (length,) = LENGTH.unpack(await stream.readexactly(LENGTH.size))
    if length > MAX_HEAD_BYTES:
        raise ValueError(f"a head of {length} bytes")
    head = orjson.loads(await stream.readexactly(length))
    sizes = head.get("sizes") if isinstance(head, dict) else None
    if not isinstance(sizes, list) or not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError("a head without sizes")
    if sum(sizes) > MAX_BODIES_BYTES:
        raise ValueError(f"bodies of {sum(sizes)} bytes")
    return head, [await stream.readexactly(size) for size in sizes]
