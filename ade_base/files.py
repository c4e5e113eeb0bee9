"""File access: listing images, reading in bounded time and memory, writing atomically."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import secrets
import shutil
import stat
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock, Timeout

from ade_base.messages import printable
from ade_base.pictures.read import MAX_FILE_BYTES, is_image_name

LOCK = ".lock"  # in a folder that one process at a time works in
# Without O_NONBLOCK, opening a pipe would wait for a writer. Windows, where clients run, lacks it.
FLAGS = os.O_RDONLY
for _name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
    FLAGS |= getattr(os, _name, 0)
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def image_paths(folder: Path) -> Iterator[str]:
    """Yield the image files below a folder, relative to it, in a fixed order.

    Files are recognised by their names and not opened: a path may be a pipe, a device or a broken
    link. Links to folders are not followed. Only one directory's names are in memory at a time.

    Raises:
        OSError: a folder cannot be read: its images must not be missing in silence.
    """

    def fail(error: OSError) -> None:
        raise error

    for directory, folders, names in os.walk(folder, onerror=fail):
        folders.sort()
        below = Path(directory).relative_to(folder)
        for name in sorted(names):
            if is_image_name(name):
                yield (below / name).as_posix()


def linked_folders(folder: Path) -> list[Path]:
    """Links to folders below a folder, which :func:`image_paths` does not follow, in order."""
    return sorted(
        path
        for directory, folders, _ in os.walk(folder)
        for path in (Path(directory, name) for name in folders)
        if path.is_symlink()
    )


def read_file(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """Read a regular file of at most ``limit`` bytes. Links are followed.

    Raises:
        OSError: it cannot be read. ``EINVAL``: it is a pipe, a device or the like. ``EFBIG``: it
            has more than ``limit`` bytes.
    """
    with _opened(path, limit) as descriptor, open(descriptor, "rb", closefd=False) as file:
        try:
            content = file.read(limit + 1)  # the file may grow
        except OSError as error:
            error.filename = str(path)
            raise
        _check_size(path, len(content), limit)
        return content


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _opened(path: Path, limit: int) -> Iterator[int]:
    descriptor = os.open(path, FLAGS)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        _check_size(path, found.st_size, limit)
        yield descriptor
    finally:
        os.close(descriptor)


def _check_size(path: Path, size: int, limit: int) -> None:
    if size > limit:
        reason = f"a file may have at most {limit} bytes, this one has {size}"
        raise OSError(errno.EFBIG, reason, str(path))


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock file for this process alone, until the block or the process ends.

    Args:
        path: the lock file; its folder is made where it does not exist.
        wait: until another process releases the lock, instead of raising.

    Raises:
        filelock.Timeout: another process holds the lock.
        OSError: the file cannot be locked, such as on a file system without locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout:
        raise
    except OSError as error:
        reason = f"the file cannot be locked: {error.strerror}"
        raise OSError(error.errno, reason, str(path)) from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def only_writer(out: Path, taken: Callable[[str], Exception]) -> Iterator[None]:
    """Keep other processes from writing the same file.

    Args:
        out: the file. A lock file beside it, ``.OUT.ade-lock``, is removed at the end of the block.
        taken: turns a message into the error to raise if another process is writing the file.
    """
    lock = out.with_name(f".{out.name}.ade-lock")
    try:
        with locked(lock):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
    except Timeout:
        raise taken(f"{out} is being written by another process") from None
    except OSError as error:
        if error.filename == str(lock):
            error.filename = str(out)
        raise


@contextmanager
def alone_in(folder: Path, taken: Callable[[str], Exception]) -> Iterator[None]:
    """Keep other processes out of a folder, which may be a mount point: nothing is written beside.

    Args:
        folder: which holds the lock file :data:`LOCK` from then on.
        taken: turns a message into the error to raise if another process works in the folder.
    """
    try:
        with locked(folder / LOCK):
            yield
    except Timeout:
        raise taken(f"{folder} is in use by another process") from None


@contextmanager
def naming(path: Path, temporary: Path) -> Iterator[None]:
    """Name ``path`` in errors that name its temporary file or folder, and in those of a full disk.

    The latter name no file, or the source of a copy as those of ``shutil``.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, error.strerror, str(path)) from error
        if error.errno in NO_ROOM and error.filename is None or error.filename == str(temporary):
            error.filename = str(path)
        raise


@contextmanager
def replacing(path: Path, text: bool = False) -> Iterator[IO[Any]]:
    """Write a new file that replaces ``path`` at the end of the block, or nothing if it fails.

    The temporary file has a random name in the same folder. A link at ``path`` is replaced, not
    followed.

    Args:
        path: may exist.
        text: open the file for UTF-8 text, with unchanged line ends, instead of bytes.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with naming(path, temporary):
            with (
                open(temporary, "x", encoding="utf-8", newline="")
                if text
                else open(temporary, "x+b") as file
            ):
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; names of files in it need not be UTF-8."""
    with replacing(path) as file:
        file.write(printable(text).encode())


@contextmanager
def new_folder(path: Path, taken: Callable[[str], Exception]) -> Iterator[Path]:
    """Fill a new folder that becomes ``path`` at the end of the block, or nothing if it fails.

    If several processes create the same folder at the same time, the first to finish wins and the
    others raise.

    Args:
        path: must not exist.
        taken: turns a message into the error to raise if ``path`` exists at the start or the end.
    """
    if os.path.lexists(path):
        raise taken(f"{path} exists: take a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    with naming(path, temporary):
        temporary.mkdir()
    try:
        with naming(path, temporary):
            yield temporary
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise taken(
                f"{path} was made by another process meanwhile: it stays as it is"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class Rows:
    """The rows of an ``.npy`` file, each read when it is used.

    A file that is mapped into memory would end the process (SIGBUS) if it were truncated, or if its
    disk failed, while it is read.

    Args:
        path: of a regular file.

    Raises:
        ValueError, EOFError, zipfile.BadZipFile: it is not an array.
    """

    def __init__(self, path: Path) -> None:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)  # reads the header alone
        if not isinstance(mapped, np.memmap):
            raise ValueError("it holds several arrays")
        self.path, self.shape, self.dtype = path, mapped.shape, mapped.dtype
        self._first = mapped.offset
        self._size = math.prod(self.shape[1:]) * self.dtype.itemsize
        # In Fortran's order, rows are in pieces.
        self._whole = None if mapped.flags.c_contiguous else np.load(path, allow_pickle=False)
        self._file = os.open(path, FLAGS)  # this file, whatever has its name later
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self._whole is not None:
            return np.ascontiguousarray(self._whole[index])
        try:
            row = os.pread(self._file, self._size, self._first + index * self._size)
        except OSError as error:
            error.filename = str(self.path)
            raise
        if len(row) < self._size:
            raise OSError(errno.EIO, "the file was cut off while it was read", str(self.path))
        return np.frombuffer(row, self.dtype).reshape(self.shape[1:])


def preallocated(
    file: IO[bytes],
    shape: tuple[int, ...],
    where: str | Path,
    full: Callable[[str], Exception],
) -> np.ndarray:
    """Map an ``.npy`` file of uint8 zeros, all of whose blocks exist on disk.

    Without them, a write to the map kills the process once the disk is full.

    Args:
        file: empty, open for reading and writing.
        shape: of the array.
        where: the file's folder, for the error.
        full: turns a message into the error to raise if there is no room for the array.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    file.flush()
    first, size = file.tell(), math.prod(shape)
    try:
        os.posix_fallocate(file.fileno(), 0, first + size)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise full(f"{where}: no room for {size / 2**30:.1f} GiB of images") from error
    return np.memmap(file, np.uint8, "r+", first, shape)
