"""The file format: a zip, whose members other programs can list and read.

- ``manifest.json``: format version, the bundle and processor that made the archive, the shape of an
  array (null for files), and how many images each chunk has;
- ``00000.json``, ``00001.json``, …: for each chunk the names of its images, how each is stored, and
  the SHA-256 of what must come back;
- ``00000.bin``, …: the bits of each chunk.

A zip ends with the list of its members, so an unfinished or truncated one is no archive. Until an
archive is complete, these members are files of a folder, in which each chunk is whole or absent.
"""

from __future__ import annotations

import json
import os
import shutil
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from ade_base.files import replacing
from ade_base.messages import show
from ade_base.pictures.read import MAX_FILE_BYTES
from extensions.codec.chunks import MAX_BYTES, MAX_IMAGES, Chunk
from extensions.codec.errors import CodingError, Damaged

FORMAT_VERSION = 2
_OLD_MAGIC = b"\x89ADE\r\n\x1a\n"
_MANIFEST = "manifest.json"
_MAX_JSON = 16 * 2**20
_MAX_DATA = 3 * MAX_BYTES + 4 * MAX_FILE_BYTES
_BROKEN = (zipfile.BadZipFile, RuntimeError, ValueError, EOFError, zlib.error)  # of zipfile


class Part:
    """The folder of an archive that is not complete.

    Args:
        folder: of an interrupted compression, or new.
        fields: of the manifest.

    Raises:
        CodingError: the folder is that of another archive, or something else.
    """

    def __init__(self, folder: Path, fields: dict[str, Any]) -> None:
        self._folder = folder
        self._fields = fields
        if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
            raise CodingError(f"{folder} is in the way: remove it, or take another name")
        folder.mkdir(exist_ok=True)
        manifest = folder / _MANIFEST
        if not manifest.exists():
            if any(path.suffix != ".tmp" for path in folder.iterdir()):
                raise CodingError(f"{folder} is another folder: remove it, or take another name")
            self._write(_MANIFEST, _json(fields))
        found = json.loads(manifest.read_text())
        different = [name for name in fields if found.get(name) != fields[name]]
        if different:
            raise CodingError(
                f"{folder} was started with other values of {', '.join(different)}: remove it to "
                "start again"
            )

    def chunk(self, number: int) -> Chunk | None:
        """A chunk that is written already."""
        table, data = (self._folder / name for name in _members(number))
        if not table.exists():
            return None
        return Chunk(**json.loads(table.read_text()), data=data.read_bytes())

    def add(self, number: int, chunk: Chunk) -> None:
        """Write a chunk, durably."""
        table, data = _members(number)
        fields = asdict(chunk)
        self._write(data, fields.pop("data"))
        self._write(table, _json(fields))  # the last: it says that the chunk is whole

    def finish(self, counts: list[int], out: Path) -> None:
        """Make the archive of chunks with so many images, and remove the folder.

        Raises:
            CodingError: ``out`` exists.
        """
        packed = self._folder / "archive.tmp"
        with open(packed, "wb") as file:
            with zipfile.ZipFile(file, "w") as archive:
                names = [name for i in range(len(counts)) for name in _members(i)]
                _add(archive, _MANIFEST, _json({**self._fields, "chunks": counts}))
                for name in names:
                    _add(archive, name, (self._folder / name).read_bytes())
            os.fsync(file.fileno())
        if os.path.lexists(out):
            raise CodingError(f"{out} was made by another process meanwhile: it stays as it is")
        os.rename(packed, out)
        shutil.rmtree(self._folder)

    def _write(self, name: str, content: bytes) -> None:
        with replacing(self._folder / name) as file:
            file.write(content)


class Archive:
    """A complete archive, from anywhere: nothing in it is trusted.

    Attributes:
        made_with: ``model`` and ``codec`` of the bundle.
        fingerprint: of the encoder.
        shape: of an array, ``(N, H, W, C)``; ``None`` for files.
        counts: how many images each chunk has.

    Raises:
        CodingError: the file is no archive, or one of another version.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
            raise CodingError(f"{path} must be a regular file")
        self._path = path
        with open(path, "rb") as file:
            if file.read(len(_OLD_MAGIC)) == _OLD_MAGIC:
                raise CodingError(
                    f"{path} has the archive format 1, of AV-ADE 0.2.0 before its release: restore "
                    "it with the commit 443d5eb3, and compress the images again"
                )
        try:
            self._zip = zipfile.ZipFile(path)
        except _BROKEN as error:
            raise CodingError(
                f"{path} is not an archive of ade compress, or it is truncated: {error}"
            ) from error
        try:
            self._check(self._read_manifest())
        except Exception:
            self._zip.close()
            raise

    def __enter__(self) -> Archive:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._zip.close()

    def chunk(self, number: int) -> Chunk:
        """One of the chunks.

        Raises:
            Damaged: its members are not those that were written.
        """
        table, data = _members(number)
        return Chunk.checked(self._json(table), self._read(data, _MAX_DATA), self.counts[number])

    def _read_manifest(self) -> dict[str, Any]:
        try:
            found = self._json(_MANIFEST)
        except Damaged as error:
            raise CodingError(f"{self._path} is not an archive of ade compress: {error}") from error
        version = found.get("format_version") if isinstance(found, dict) else None
        if version != FORMAT_VERSION:
            raise CodingError(
                f"{self._path}: format_version must be {FORMAT_VERSION}, got {version!r:.20}"
            )
        fields: dict[str, Any] = found
        return fields

    def _check(self, manifest: dict[str, Any]) -> None:
        """Check the manifest, and that the members are those that it promises."""
        fields: list[Any] = [manifest.get(n) for n in ("bundle", "fingerprint", "chunks", "shape")]
        made_with, fingerprint, counts, shape = fields
        valid = {
            "bundle": isinstance(made_with, dict),
            "fingerprint": isinstance(fingerprint, dict),
            "chunks": _are_sizes(counts, MAX_IMAGES),
        }
        valid["shape"] = valid["chunks"] and (shape is None or _is_shape(shape, sum(counts)))
        for name, is_valid in valid.items():
            if not is_valid:
                raise CodingError(f"{self._path}: its manifest has no valid field {name}")
        self.made_with: dict[str, Any] = made_with
        self.fingerprint: dict[str, Any] = fingerprint
        self.counts: list[int] = counts
        self.shape: tuple[int, ...] | None = None if shape is None else tuple(shape)
        expected = {_MANIFEST, *(name for i in range(len(counts)) for name in _members(i))}
        found: set[str] = set()
        for info in self._zip.infolist():
            if info.filename in found:
                raise CodingError(f"{self._path} holds {show(info.filename)} twice")
            if info.filename not in expected:
                raise CodingError(f"{self._path} holds {show(info.filename)}, which no archive has")
            found.add(info.filename)
        if expected - found:
            raise CodingError(f"{self._path} is not complete: {min(expected - found)} is missing")

    def _json(self, name: str) -> Any:
        try:
            return json.loads(self._read(name, _MAX_JSON, [zipfile.ZIP_DEFLATED]))
        except (ValueError, RecursionError) as error:
            raise Damaged(f"{name} is not JSON or damaged: {error}") from error

    def _read(self, name: str, most: int, packed: Any = ()) -> bytes:
        """A member of at most so many bytes, stored or packed in one of these ways."""
        try:
            info = self._zip.getinfo(name)
            if info.file_size > most:
                raise Damaged(f"{name} has {info.file_size:,} bytes: at most {most:,} are read")
            if info.compress_type not in (zipfile.ZIP_STORED, *packed):
                raise Damaged(f"{name} is packed in another way")
            with self._zip.open(info) as file:
                return file.read(info.file_size)  # a bomb gives no more
        except KeyError as error:
            raise Damaged(f"{name} is missing") from error
        except Damaged:
            raise
        except _BROKEN as error:
            raise Damaged(f"{name} is damaged: {error}") from error


def _members(number: int) -> tuple[str, str]:
    """The names of a chunk's table and bits."""
    return f"{number:05}.json", f"{number:05}.bin"


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    packed = zipfile.ZIP_DEFLATED if name.endswith(".json") else zipfile.ZIP_STORED
    archive.writestr(zipfile.ZipInfo(name), content, packed, 9)  # without a time: always the same


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _are_sizes(values: Any, most: int) -> bool:
    return (
        isinstance(values, list)
        and bool(values)
        and all(type(value) is int and 0 < value <= most for value in values)
    )


def _is_shape(shape: Any, images: int) -> bool:
    return (
        _are_sizes(shape, images + 4000)
        and len(shape) == 4
        and shape[0] == images
        and max(shape[1:3]) <= 4000
        and shape[3] in (1, 3)
    )
