"""The file format: a header, chunks, and an end.

    magic, length of the header, SHA-256 of the header, header (JSON)
    for each chunk: b"ADEc", number of its first image, number of images, length, SHA-256, CRC-32
        of these, content
    the first line once more, which is read if the first is damaged
    b"ADEe", number of images, 0, 0, SHA-256 of everything before, CRC-32 of these

All numbers are little-endian. A chunk can be found and checked without those before it, so a
damaged one loses its own images alone. A file without an end is unfinished or truncated.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ade_base.pictures.read import MAX_FILE_BYTES
from extensions.codec.chunks import MAX_IMAGES, MAX_PAYLOAD
from extensions.codec.errors import CodingError

MAGIC = b"\x89ADE\r\n\x1a\n"
FORMAT_VERSION = 1
_HEADER = struct.Struct("<I32s")
_MAX_HEADER = 2**20
_MAX_IMAGES = 2**32  # times the bytes of the largest image, below 2**63: the size of a file
_RECORD = struct.Struct("<4sQIQ32s")
_CRC = struct.Struct("<I")
_RECORD_BYTES = _RECORD.size + _CRC.size
_CHUNK, _END = b"ADEc", b"ADEe"
_BLOCK = 2**20
_PAGE = 2**12  # what a disk cannot read is lost page by page
_FIELDS: dict[str, type] = {
    "format_version": int,
    "kind": str,
    "images": int,
    "image_shape": list,
    "bundle": dict,
    "fingerprint": dict,
    "input": str,
}


@dataclass(frozen=True)
class Chunk:
    """Where a chunk is, and which images it holds."""

    first: int
    count: int
    offset: int
    length: int
    digest: bytes


@dataclass(frozen=True)
class Contents:
    """What a scan of an archive found.

    Attributes:
        header: the fields of the header.
        chunks: whose records are valid, in order; their content is not checked yet.
        is_complete: whether the archive has an end.
        is_intact: whether the SHA-256 of the whole is right.
    """

    header: dict[str, Any]
    chunks: list[Chunk]
    is_complete: bool
    is_intact: bool

    def lost(self) -> list[range]:
        """Images of the header's number that no chunk holds."""
        gaps, position = [], 0
        for chunk in self.chunks:
            if chunk.first > position:
                gaps.append(range(position, chunk.first))
            position = chunk.first + chunk.count
        if self.header["images"] > position:
            gaps.append(range(position, self.header["images"]))
        return gaps


def header_bytes(header: dict[str, Any]) -> bytes:
    """What an archive begins with."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return MAGIC + _HEADER.pack(len(text), hashlib.sha256(text).digest()) + text


def write_header(file: IO[bytes], header: dict[str, Any]) -> None:
    """Write what an archive begins with, durably."""
    file.write(header_bytes(header))
    _sync(file)


def write_chunk(file: IO[bytes], first: int, count: int, payload: bytes) -> None:
    """Write a chunk at the end of the file, durably."""
    file.seek(0, os.SEEK_END)
    digest = hashlib.sha256(payload).digest()
    file.write(_record(_CHUNK, first, count, len(payload), digest) + payload)
    _sync(file)


def write_end(file: IO[bytes], images: int) -> None:
    """Complete an archive; a copy of the header before its end replaces one that is damaged."""
    start = _read_header(file, Path())[1]
    file.seek(0)
    header = file.read(start)
    file.seek(0, os.SEEK_END)
    file.write(header)
    digest = _digest(file, file.seek(0, os.SEEK_END))
    file.write(_record(_END, images, 0, 0, digest))
    _sync(file)


def read_chunk(file: IO[bytes], chunk: Chunk) -> bytes | None:
    """The content of a chunk, or ``None`` if it is damaged or the disk cannot read it."""
    file.seek(chunk.offset)
    try:
        payload = file.read(chunk.length)
    except OSError as error:
        _check_damage(error)
        return None
    return payload if hashlib.sha256(payload).digest() == chunk.digest else None


def scan(file: IO[bytes], path: Path) -> Contents:
    """Find the chunks of an archive.

    Args:
        file: opened for reading.
        path: for messages.

    Raises:
        CodingError: the file is not an archive, has another format version, or its header is
            damaged.
    """
    try:
        header, start = _read_header(file, path)
    except (CodingError, OSError) as error:
        if isinstance(error, OSError):
            error.filename = str(path)
        copy = _copy_of_header(file, path)
        if copy is None:
            raise
        header, start = copy, 0
    size = os.fstat(file.fileno()).st_size
    chunks: list[Chunk] = []
    position = start
    while position < size:
        record = _parse(_read(file, position, _RECORD_BYTES))
        if record is None:
            position = _next_record(file, position + 1, size)
            continue
        kind, first, count, length, digest = record
        position += _RECORD_BYTES
        if kind == _END:
            try:
                is_intact = _digest(file, position - _RECORD_BYTES) == digest and position == size
            except OSError as error:
                _check_damage(error)
                is_intact = False
            return Contents(header, chunks, True, is_intact)
        expected = chunks[-1].first + chunks[-1].count if chunks else 0
        fits = expected <= first and first + count <= header["images"] and 0 < count <= MAX_IMAGES
        if not fits or length > MAX_PAYLOAD + 4 * MAX_FILE_BYTES:
            continue  # no encoder writes it
        if position + length > size:
            position = _next_record(file, position, size)
            continue
        chunks.append(Chunk(first, count, position, length, digest))
        position += length
    return Contents(header, chunks, False, False)


def _record(kind: bytes, first: int, count: int, length: int, digest: bytes) -> bytes:
    record = _RECORD.pack(kind, first, count, length, digest)
    return record + _CRC.pack(zlib.crc32(record))


def _parse(data: bytes) -> tuple[bytes, int, int, int, bytes] | None:
    if len(data) < _RECORD_BYTES or data[:4] not in (_CHUNK, _END):
        return None
    if _CRC.unpack_from(data, _RECORD.size)[0] != zlib.crc32(data[: _RECORD.size]):
        return None
    record: tuple[bytes, int, int, int, bytes] = _RECORD.unpack_from(data)
    return record


def _next_record(file: IO[bytes], position: int, size: int) -> int:
    """Where the next valid record begins; ``size`` if there is none."""
    overlap = _RECORD_BYTES - 1
    block = 2**12  # grows, since a hostile file may have a record every few bytes
    while position < size:
        data = _read(file, position, block + overlap)
        found = 0
        while (found := data.find(b"ADE", found)) >= 0 and found < block:
            if _parse(data[found : found + _RECORD_BYTES]) is not None:
                return position + found
            found += 1
        position += block
        block = min(2 * block, _BLOCK)
    return size


def _read(file: IO[bytes], position: int, length: int) -> bytes:
    """Read bytes of a file, with zeros for pages that the disk cannot read."""
    file.seek(position)
    try:
        return file.read(length)
    except OSError as error:
        _check_damage(error)
    pages = []
    end = position + length
    while position < end:
        size = min(end, (position // _PAGE + 1) * _PAGE) - position
        try:
            pages.append(os.pread(file.fileno(), size, position))
        except OSError as error:
            _check_damage(error)
            pages.append(bytes(size))
        position += size
    return b"".join(pages)


def _check_damage(error: OSError) -> None:
    """Raise the error again unless a part of the disk is damaged, because others may pass."""
    if error.errno != errno.EIO:
        raise error


def _copy_of_header(file: IO[bytes], path: Path) -> dict[str, Any] | None:
    """The copy of the header before the end; ``None`` if it is missing or damaged."""
    size = file.seek(0, os.SEEK_END)
    most = len(MAGIC) + _HEADER.size + _MAX_HEADER + _RECORD_BYTES
    tail = _read(file, max(0, size - most), most)
    start = tail.rfind(MAGIC)
    if start < 0:
        return None
    try:
        header, length = _read_header(io.BytesIO(tail[start:]), path)
    except CodingError:
        return None
    # A header at another place is that of an archive which this one contains.
    return header if start + length + _RECORD_BYTES == len(tail) else None


def _read_header(file: IO[bytes], path: Path) -> tuple[dict[str, Any], int]:
    file.seek(0)
    begin = file.read(len(MAGIC) + _HEADER.size)
    if begin[: len(MAGIC)] != MAGIC[: len(begin)] or not begin:
        raise CodingError(f"{path} is not an archive of ade compress")
    if len(begin) < len(MAGIC) + _HEADER.size:
        raise CodingError(f"{path} is truncated: its header is incomplete")
    length, digest = _HEADER.unpack_from(begin, len(MAGIC))
    text = file.read(length) if length <= _MAX_HEADER else b""
    if hashlib.sha256(text).digest() != digest:
        raise CodingError(f"{path} is damaged or truncated in its header, so nothing can be read")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CodingError(f"{path}: its header is not JSON") from error
    version = header.get("format_version") if isinstance(header, dict) else None
    if version != FORMAT_VERSION:
        raise CodingError(f"{path}: format_version must be {FORMAT_VERSION}, got {version!r:.20}")
    for name, kind in _FIELDS.items():
        if type(header.get(name)) is not kind:
            raise CodingError(f"{path}: its header has no valid field {name}")
    if header["kind"] not in ("files", "array") or not 0 < header["images"] < _MAX_IMAGES:
        raise CodingError(f"{path}: its header has no valid field kind or images")
    return header, file.tell()


def _digest(file: IO[bytes], length: int) -> bytes:
    """The SHA-256 of the first bytes of a file, which stays behind them."""
    file.seek(0)
    digest = hashlib.sha256()
    while length > 0 and (block := file.read(min(length, _BLOCK))):
        digest.update(block)
        length -= len(block)
    return digest.digest()


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
