"""Decompression of an archive, as far as it is intact."""

from __future__ import annotations

import errno
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol

import numpy as np

from ade_base.files import new_folder
from ade_base.messages import show
from extensions.codec.archive import Chunk, Contents, read_chunk, scan
from extensions.codec.chunks import MAX_PARTS, ChunkCoder
from extensions.codec.errors import CodingError, Damaged, NotDecoded
from extensions.codec.image_coder import ImageCoder
from extensions.codec.networks import Networks, codec_digest, fingerprint
from extensions.codec.pictures import Picture, write_picture
from serving.engine.bundle import Bundle

# Images without content may have 100,000 times the size of their archive. One that is made to fill
# a disk has, too: if its images exceed this ratio, it must leave this share of the disk free.
MAX_RATIO = 100
MIN_FREE, MIN_FREE_BYTES = 0.05, 10 * 2**30  # whichever is less
# FAT, exFAT and NTFS refuse ":" and others with EINVAL, and some file systems what is not UTF-8.
_NO_NAMES = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ)


@dataclass
class Result:
    """What came back.

    Attributes:
        images: number of images of the archive.
        lost: those that did not come back, by their places in the archive.
        is_truncated: whether the end of the archive is missing.
        is_intact: whether the checksum of the whole archive is right.
    """

    images: int
    lost: list[range] = field(default_factory=list)
    is_truncated: bool = False
    is_intact: bool = True

    @property
    def restored(self) -> int:
        """Number of images that came back."""
        return self.images - sum(len(lost) for lost in self.lost)


def decompress(
    archive: Path,
    out: Path,
    bundle: Bundle,
    warn: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Restore the images of an archive.

    Args:
        archive: of :func:`extensions.codec.compress.compress`.
        out: a new folder, or a new ``.npy`` file for an archive of an array.
        bundle: the one that the archive was made with.
        warn: called before the start if this processor or its software is not that of the encoder,
            and for each chunk that does not come back.
        progress: called with the number of images done and of all.

    Returns:
        What came back. A chunk that is damaged, or that this machine is too busy to decode, loses
        its own images: their files are missing, and the rows of an array are zero.

    Raises:
        CodingError: the file is not an archive, nothing in it can be decoded, it was made with
            another bundle, or ``out`` exists or is of the wrong kind.
        BundleError: the bundle's files do not match its manifest.
    """
    if archive.exists() and not archive.is_file():  # in a pipe no chunk can be found
        raise CodingError(f"{archive} must be a regular file")
    with open(archive, "rb") as file:
        contents = scan(file, archive)
        _check_target(contents, out)
        networks = Networks(bundle)
        _check_bundle(contents, bundle, archive)
        for line in _differences(contents.header["fingerprint"]):
            warn(line)
        coder = ChunkCoder(ImageCoder(networks), networks.image_shape)
        total = contents.header["images"]
        result = Result(total, contents.lost(), not contents.is_complete, contents.is_intact)
        if not contents.chunks:
            raise CodingError(f"{archive} is truncated or damaged: it holds no complete chunk")
        done, size, not_decoded = 0, 0, None
        target = _folder if contents.header["kind"] == "files" else _array
        with target(out, total) as images:
            progress(0, total)
            for chunk in contents.chunks:
                _check_room(archive, out, size)
                try:
                    size += _restore(file, chunk, coder, images)
                except (Damaged, NotDecoded) as error:
                    images.undo()
                    lost = range(chunk.first, chunk.first + chunk.count)
                    result.lost.append(lost)
                    its = f"the images {lost.start + 1} to {lost.stop} are"
                    if isinstance(error, NotDecoded):
                        not_decoded = str(error)
                        warn(f"{its} intact: {error}, with another OUT")
                    else:
                        warn(f"{its} damaged: {error}")
                done += chunk.count
                progress(done, total)
            result.lost.sort(key=lambda lost: lost.start)
            if not result.restored:
                why = not_decoded or (
                    "the archive is damaged, or this processor computes other numbers than the "
                    "encoder's"
                )
                raise CodingError(f"{archive}: no image came back: {why}")
    return result


def _restore(file: IO[bytes], chunk: Chunk, coder: ChunkCoder, images: _Target) -> int:
    """Write the images of a chunk; returns the bytes that they take.

    Raises:
        Damaged: the images written since the last call of ``keep`` are invalid.
        NotDecoded: as :func:`extensions.codec.pictures.read_stored`, or they cannot have their
            names here; they are incomplete.
    """
    payload = read_chunk(file, chunk)
    if payload is None:
        raise Damaged("a chunk cannot be read, or its checksum is wrong")
    size = 0
    for i, (name, picture) in enumerate(coder.decode(payload, chunk.count)):
        size += images.write(chunk.first + i, name, picture)
    images.keep()
    return size


class _Target(Protocol):
    def write(self, index: int, name: str | None, picture: Picture) -> int:
        """Write an image; returns its bytes on disk."""
        ...

    def undo(self) -> None:
        """Remove the images since the last call of ``keep``."""
        ...

    def keep(self) -> None: ...


class _Files:
    """Files below a folder that did not exist before."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._recent: list[Path] = []
        self._names: set[str] = set()

    def write(self, index: int, name: str | None, picture: Picture) -> int:
        safe = _safe_name(name)
        path = self._folder / safe
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as file:  # never follows a link, never replaces a file
                self._recent.append(path)
                size = file.write(write_picture(str(name), picture))
        except (FileExistsError, NotADirectoryError) as error:
            if str(safe) in self._names or isinstance(error, NotADirectoryError):
                raise Damaged("two images have the same name") from error
            raise NotDecoded(
                f"here {show(safe)} is the name of another image, too, perhaps in other letters: "
                "repeat the command on another file system"
            ) from error
        except OSError as error:
            if error.errno in _NO_NAMES:
                why = "is too long" if error.errno == errno.ENAMETOOLONG else "is not permitted"
                raise NotDecoded(
                    f"the name {show(safe)} {why} here: repeat the command on another file system"
                ) from error
            raise
        self._names.add(str(safe))
        return size

    def undo(self) -> None:
        for path in self._recent:
            path.unlink(missing_ok=True)
        self._recent = []

    def keep(self) -> None:
        self._recent = []


class _Rows:
    """The rows of an array, whose shape the first image sets."""

    def __init__(self, path: Path, count: int) -> None:
        self._path = path
        self._count = count
        self._file: IO[bytes] | None = None
        self._shape: tuple[int, ...] = ()
        self._first = 0
        self._recent: list[int] = []

    def write(self, index: int, name: str | None, picture: Picture) -> int:
        if name is not None or picture.pixels is None:
            raise Damaged("an array has no file names")
        if self._file is None:
            self._file, self._shape = open(self._path, "xb"), picture.pixels.shape
            shape = (self._count, *self._shape)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(self._file, header)
            self._first = self._file.tell()
            # Images that do not come back are zeros, which take no room on disk.
            self._file.truncate(self._first + math.prod(shape))
        if picture.pixels.shape != self._shape:
            raise Damaged("the images of an array have different shapes")
        self._recent.append(index)
        self._put(index, picture.pixels.tobytes())
        return picture.pixels.nbytes

    def _put(self, index: int, row: bytes) -> None:
        assert self._file is not None
        self._file.seek(self._first + index * math.prod(self._shape))
        self._file.write(row)

    def undo(self) -> None:
        for index in self._recent:
            self._put(index, bytes(math.prod(self._shape)))
        self._recent = []

    def keep(self) -> None:
        self._recent = []

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@contextmanager
def _folder(out: Path, count: int) -> Iterator[_Files]:
    with new_folder(out, CodingError) as temporary:
        yield _Files(temporary)


@contextmanager
def _array(out: Path, count: int) -> Iterator[_Rows]:
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(8)}.tmp")
    rows = _Rows(temporary, count)
    try:
        yield rows
        rows.close()
        if os.path.lexists(out):
            raise CodingError(f"{out} was made by another process meanwhile: it stays as it is")
        os.rename(temporary, out)
    finally:
        with suppress(OSError):
            rows.close()
        temporary.unlink(missing_ok=True)


def _safe_name(name: str | None) -> str:
    """Check that a name stays within the folder.

    Raises:
        Damaged: it does not, or is no name of a file.
    """
    if not name or "\0" in name or "\\" in name or len(name) > 4096:
        raise Damaged("an image has no valid name")
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise Damaged("the name of an image leaves the folder")
    if len(parts) > MAX_PARTS:
        raise Damaged(f"the name of an image has more than {MAX_PARTS} parts")
    try:
        os.fsencode(name)
    except UnicodeEncodeError as error:
        raise Damaged("an image has no valid name") from error
    return str(PurePosixPath(*parts))


def _check_room(archive: Path, out: Path, restored: int) -> None:
    """Stop before an archive of a few bytes has filled the disk.

    Raises:
        CodingError: the disk is nearly full, and the restored bytes are many times the archive's.
    """
    if restored > MAX_RATIO * archive.stat().st_size:
        disk = shutil.disk_usage(out.parent)
        if disk.free < min(MIN_FREE * disk.total, MIN_FREE_BYTES):
            raise CodingError(
                f"{archive} has images of more than {MAX_RATIO} times its size, which would fill "
                f"the disk of {out}: {disk.free:,} bytes are free. Give OUT on a disk with more"
            )


def _check_target(contents: Contents, out: Path) -> None:
    if os.path.lexists(out):
        raise CodingError(f"{out} exists: take another name")
    if (out.suffix == ".npy") != (contents.header["kind"] == "array"):
        raise CodingError(
            "the archive holds an array: give a file that ends with .npy"
            if contents.header["kind"] == "array"
            else f"the archive holds files: give a new folder, not {out}"
        )


def _check_bundle(contents: Contents, bundle: Bundle, archive: Path) -> None:
    made_with = contents.header["bundle"]
    if made_with.get("codec") != codec_digest(bundle):
        raise CodingError(
            f"{archive} was made with the model {show(made_with.get('model'))}, and "
            f"{bundle.folder} is {bundle.model_id} or has another codec: only the bundle that "
            "compressed the images can restore them"
        )


def _differences(encoder: dict[str, Any]) -> list[str]:
    """A warning if the encoder's processor or software was another one."""
    here = fingerprint()
    different = [name for name in here if encoder.get(name) != here[name]]
    if not different:
        return []
    listed = "; ".join(
        f"{name}: {show(encoder.get(name))}, here {show(here[name])}" for name in different
    )
    return [
        f"the archive was made with another processor or other software ({listed}). The model's "
        "numbers may differ in their last digits; then images coded by the model cannot come back "
        "here, and their checksums say so"
    ]
