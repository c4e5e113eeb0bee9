"""The image files among uploads of the tab *Score many*, also those in zips, within bounds."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import gradio as gr

from ade_base.pictures.read import MAX_FILE_BYTES, header_pixels, is_image_name
from serving.ingest.requests import MAX_REQUEST_PIXELS
from serving.page.inputs import read
from serving.page.runs import is_outdated
from serving.page.uploads import MOST_IMAGES, TOO_MANY, own_name

AT_ONCE = 32  # files a request
BATCH_BYTES = 16 * 2**20
MOST_ENTRIES = 10_000  # in zips, including files that are not images
MOST_EXTRA = 2**20  # bytes of the extra fields of a zip's entries
ENTRY_MARK = b"PK\x01\x02"  # signature of an entry in a zip's directory
MOST_BYTES = 256 * 2**20  # unpacked
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def contents(paths: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield the name and bytes of each image file, also of those in ``.zip`` files.

    Only one file is in memory at a time.

    Raises:
        gr.Error: a file is too large, a zip is damaged, or all of them are too many.
    """
    size = 0
    for count, (name, data) in enumerate(_unchecked(paths), 1):
        size += len(data)
        if count > MOST_IMAGES:
            raise gr.Error(TOO_MANY)
        if size > MOST_BYTES:
            raise gr.Error(
                f"At most {MOST_BYTES >> 20} MiB at once: `ade score` takes folders of any size."
            )
        yield name, data


def _unchecked(paths: list[str]) -> Iterator[tuple[str, bytes]]:
    packed = entries = 0
    for path in dict.fromkeys(paths):
        if is_outdated():
            return
        name, data = own_name(path), read(path)
        if Path(path).suffix.lower() != ".zip":
            yield name, data
            continue
        packed, entries = packed + len(data), entries + data.count(ENTRY_MARK)
        # Before the directory is parsed, which takes a hundred times its size in memory.
        if entries > MOST_ENTRIES or packed > MOST_BYTES:
            raise gr.Error(
                f"At most {MOST_ENTRIES} files in zips at once, and {MOST_BYTES >> 20} MiB of zips."
            )
        yield from _unzipped(data, name)


def _unzipped(zipped: bytes, shown: str) -> Iterator[tuple[str, bytes]]:
    """Unpack the images of a zip file, each up to :data:`MAX_FILE_BYTES`.

    Other entries are skipped, including zip files and what macOS adds.

    Args:
        zipped: its content.
        shown: its name, for messages.
    """
    # Python copies the rest of an entry's extra fields for each of them.
    marks = (mark.start() for mark in re.finditer(ENTRY_MARK, zipped))
    if sum(int.from_bytes(zipped[at + 30 : at + 32], "little") for at in marks) > MOST_EXTRA:
        raise gr.Error(f"{shown} has too much metadata: create the zip again.")
    try:
        with zipfile.ZipFile(io.BytesIO(zipped)) as archive:
            for info in archive.infolist():
                if is_image_name(info.filename):
                    name = info.filename[-200:]  # it may have 64 KiB
                    yield name, _unpacked(archive, info, f"{name} in {shown}")
    except (gr.Error, MemoryError):
        raise
    except Exception:  # zipfile raises struct.error, zlib.error, RuntimeError, …
        raise gr.Error(
            f"{shown} cannot be unpacked: it is damaged, encrypted or not a zip file."
        ) from None


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo, shown: str) -> bytes:
    """Unpack an entry, named ``shown`` in messages."""
    if info.compress_type not in METHODS:
        # Python unpacks other methods without a limit, whatever the declared size.
        raise gr.Error(
            f"{shown} is compressed by another method than deflate: create the zip again."
        )
    with archive.open(info) as file:
        data = b"" if info.file_size > MAX_FILE_BYTES else file.read(MAX_FILE_BYTES + 1)
    if max(info.file_size, len(data)) > MAX_FILE_BYTES:  # the declared size may be too small
        raise gr.Error(
            f"{shown} is too large: an image file may have at most {MAX_FILE_BYTES >> 20} MiB "
            "unpacked."
        )
    return data


def batches(named: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    """Group files into requests that the service takes, of at most :data:`AT_ONCE` files.

    A single file may be too large for one; the service says so.
    """
    batch: list[tuple[str, bytes]] = []
    size = pixels = 0
    for name, data in named:
        more = header_pixels(data)
        if batch and (
            len(batch) == AT_ONCE
            or size + len(data) > BATCH_BYTES
            or pixels + more > MAX_REQUEST_PIXELS
        ):
            yield batch
            batch, size, pixels = [], 0, 0
        batch.append((name, data))
        size, pixels = size + len(data), pixels + more
    if batch:
        yield batch
