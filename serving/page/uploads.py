"""Replaces Gradio's ``POST /gradio_api/upload``: keeps a quota, and takes only image files."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO
from urllib.parse import quote, unquote

from fastapi import Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from ade_base.pictures.read import IMAGE_SUFFIXES, MAX_FILE_BYTES, is_image_name
from serving.page.files import KEPT_S, UPLOADS, RequestRefused, inbox

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

SUFFIXES = IMAGE_SUFFIXES | {".zip"}
CLIENT_BYTES, CLIENT_FILES = 256 * 2**20, 4000
MOST_IMAGES = 2000  # that one run scores
TOO_MANY = f"At most {MOST_IMAGES:,} images at once: `ade score` takes folders of any size."
ALL_BYTES, ALL_FILES = 2**30, 20_000
FILES_AT_ONCE = 1000  # as many as Gradio's frontend sends in a request
HEADER_BYTES = 8192  # of the headers of a part
STALL_S = 30.0  # without receiving a byte
SLOWEST = 64 * 2**10  # bytes per second on average: a slow upload holds part of the quota


@dataclass
class _Kept:
    """A client's files on the page, oldest first, and what it is sending."""

    files: dict[Path, tuple[int, float]] = field(default_factory=dict)  # bytes, and time of arrival
    sending: int = 0  # bytes
    arriving: int = 0  # files

    @property
    def size(self) -> int:
        return self.sending + sum(size for size, _ in self.files.values())


class Quota:
    """Limits how much each client may keep on the page, and all clients together.

    A client that sends more loses its own oldest files. Nobody loses a file to another client: when
    all together hold too much, new uploads are refused until older ones expire.
    """

    def __init__(self) -> None:
        self._clients: dict[str, _Kept] = {}
        self._files = 0  # of all clients, with those that are arriving

    @contextlib.contextmanager
    def sending(self, client: str, size: int) -> Iterator[Callable[[], None]]:
        """Reserve room for an upload of ``size`` bytes while it arrives.

        Yields:
            A function to call before each of its files is created, which raises the same error.

        Raises:
            RequestRefused: there is no room for it.
        """
        self._expire()
        if size > CLIENT_BYTES:
            raise RequestRefused(413, f"At most {CLIENT_BYTES >> 20} MiB at once.")
        kept = self._clients.setdefault(client, _Kept())
        if kept.sending + size > CLIENT_BYTES:
            raise self._busy()
        dropped, left = [], kept.size + size
        for path, (its_size, _) in kept.files.items():
            if left <= CLIENT_BYTES:
                break
            dropped.append(path)
            left -= its_size
        if sum(one.size for one in self._clients.values() if one is not kept) + left > ALL_BYTES:
            raise self._full()
        for path in dropped:
            self._drop(kept, path)
        arriving = 0

        def add_file() -> None:
            nonlocal arriving
            while kept.files and len(kept.files) + kept.arriving >= CLIENT_FILES:
                self._drop(kept, next(iter(kept.files)))
            if kept.arriving >= CLIENT_FILES:
                raise self._busy()
            if self._files >= ALL_FILES:
                raise self._full()
            arriving += 1
            kept.arriving += 1
            self._files += 1

        kept.sending += size
        try:
            yield add_file
        finally:
            kept.sending -= size
            kept.arriving -= arriving
            self._files -= arriving

    def keep(self, client: str, files: list[Path]) -> None:
        """Count files that have arrived; :meth:`sending` had reserved room for them until now."""
        kept = self._clients.setdefault(client, _Kept())
        kept.files |= {path: (path.stat().st_size, time.monotonic()) for path in files}
        self._files += len(files)

    def _busy(self) -> RequestRefused:
        return RequestRefused(
            429, "Other uploads of yours are still under way: try again when they are done."
        )

    def _full(self) -> RequestRefused:
        return RequestRefused(
            503,
            f"The page holds as many uploads as it may; they are kept for {KEPT_S / 60:.0f} "
            "minutes: try again later.",
        )

    def _drop(self, kept: _Kept, path: Path) -> None:
        del kept.files[path]
        self._files -= 1
        shutil.rmtree(path.parent, ignore_errors=True)

    def _expire(self) -> None:
        for client, kept in list(self._clients.items()):
            for path, (_, came) in list(kept.files.items()):
                if time.monotonic() - came > KEPT_S:
                    self._drop(kept, path)
            if not kept.files and not kept.sending:
                del self._clients[client]


class _Receiver:
    """Writes the files of a multipart body while it arrives, with one file open at a time.

    Args:
        folder: for the files, each in a folder of its own.
        add_file: of :meth:`Quota.sending`.
    """

    def __init__(self, folder: Path, add_file: Callable[[], None]) -> None:
        self.folder = folder
        self.add_file = add_file
        self.paths: list[Path] = []  # in order of arrival, with files that are not kept
        self._name = self._value = b""
        self._disposition = b""
        self._header_bytes = self._left = 0
        self._file: BinaryIO | None = None

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._open,
            "on_part_data": self._write,
            "on_part_end": self.close,
        }

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _begin(self) -> None:
        self._name = self._value = self._disposition = b""
        self._header_bytes = 0

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > HEADER_BYTES:
            raise RequestRefused(
                400, f"The headers of a part may have at most {HEADER_BYTES} bytes."
            )

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._name += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        self._name = self._value = b""

    def _open(self) -> None:
        options = parse_options_header(self._disposition)[1]
        if options.get(b"name") != b"files" or b"filename" not in options:
            raise RequestRefused(400, 'Every part must be a file named "files".')
        if len(self.paths) == FILES_AT_ONCE:
            raise RequestRefused(413, f"At most {FILES_AT_ONCE} files in a request.")
        name = options[b"filename"].decode(errors="replace")
        path = self.folder / secrets.token_hex(16) / safe_name(name)
        self.paths.append(path)
        self._left = MAX_FILE_BYTES
        if is_accepted(name):
            self.add_file()
            path.parent.mkdir(mode=0o700)
            self._file = open(path, "xb")

    def _write(self, data: bytes, start: int, end: int) -> None:
        self._left -= end - start
        if self._left < 0:
            raise RequestRefused(413, f"A file may have at most {MAX_FILE_BYTES >> 20} MiB.")
        if self._file is not None:
            self._file.write(data[start:end])


def is_accepted(name: str) -> bool:
    """Whether the page keeps an upload of this name."""
    return is_image_name(name) or Path(name).suffix.lower() == ".zip"


def safe_name(name: str) -> str:
    """Quote a client's file name so that it is harmless in paths and URLs.

    A long name loses its beginning.

    Example:
        >>> safe_name("../img#1 (2).PNG")
        '=2E.=2Fimg=231 (2).PNG'
    """
    quoted = re.sub(r"[^\w .+@()-]", lambda letter: quote(letter[0], safe=""), name[-200:])
    kept = quoted.replace("%", "=").encode()[-200:].decode(errors="ignore") or "file"
    return f"=2E{kept[1:]}" if kept[0] == "." else kept


def own_name(path: str) -> str:
    """The name that :func:`safe_name` quoted: not fit for a path, and to be escaped where shown."""
    return unquote(Path(path).name.replace("=", "%"))


async def receive(request: Request, quota: Quota) -> Response:
    """Receive an upload.

    The answer has the paths of its files as JSON, or the reason for a refusal as text, which the
    page shows. A folder that is chosen in a browser holds other files too. Only those that the page
    reads are kept; when there are none, the upload is refused.
    """
    client = request.client.host if request.client else ""
    folder = inbox() / UPLOADS
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        with quota.sending(client, _length(request)) as add_file:
            receiver = _Receiver(folder, add_file)
            try:
                await _parse(request, receiver)
                kept = [path for path in receiver.paths if path.exists()]
                if not kept:
                    raise RequestRefused(
                        415, f"The page takes {', '.join(sorted(SUFFIXES))} files."
                    )
            except BaseException:
                for path in receiver.paths:
                    shutil.rmtree(path.parent, ignore_errors=True)
                raise
            finally:
                receiver.close()
        quota.keep(client, kept)
    except RequestRefused as error:
        return PlainTextResponse(error.message, error.status)
    return JSONResponse([str(path) for path in receiver.paths])


def _length(request: Request) -> int:
    length = request.headers.get("content-length", "")
    if not length.isdecimal():
        raise RequestRefused(411, "An upload needs the header Content-Length.")
    return int(length.lstrip("0") or "0")  # Python reads no more than 4,300 digits


async def _parse(request: Request, receiver: _Receiver) -> None:
    kind, options = parse_options_header(request.headers.get("content-type"))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise RequestRefused(400, "An upload must be multipart/form-data with a boundary.")
    stream = request.stream()
    try:
        parser = MultipartParser(options[b"boundary"], receiver.callbacks())
        loop = asyncio.get_running_loop()
        started, came = loop.time(), 0  # a length that is only announced is no reason to wait

        def patience() -> float:
            return min(STALL_S, started + STALL_S + came / SLOWEST - loop.time())

        while chunk := await asyncio.wait_for(anext(stream), patience()):  # the last one is empty
            came += len(chunk)
            parser.write(chunk)
    except FormParserError:
        raise RequestRefused(400, "The upload's multipart body is damaged.") from None
    except TimeoutError:
        raise RequestRefused(408, "The upload came too slowly.") from None
