"""Files on disk: which of a folder are images, their contents in bounded time and memory, and
writing all or nothing.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

from serving.images import IMAGE_SUFFIXES, MAX_FILE_BYTES

LOCK = ".lock"  # in a folder that one process at a time works in


def image_paths(folder: Path) -> Iterator[str]:
    """Image files below a folder by their suffixes, relative to it, in a fixed order; one
    directory's names at a time.

    Whether they can be read is not known yet: a name may belong to a pipe, a device or a broken
    link. Links to folders are not followed.
    """
    for directory, folders, names in os.walk(folder):
        folders.sort()
        below = Path(directory).relative_to(folder)
        for name in sorted(names):
            if Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield (below / name).as_posix()


def read_file(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """The content of a regular file, whose size is checked before anything is read. Links are
    followed.

    Raises:
        OSError: it cannot be read; with ``EINVAL`` it is a pipe, a device or the like, with
            ``EFBIG`` it has more than ``limit`` bytes.
    """
    # Opening a pipe would otherwise wait for somebody to write to it.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "not a regular file")
        content = file.read(limit + 1) if found.st_size <= limit else b""  # it may grow meanwhile
        size = max(found.st_size, len(content))
        if size > limit:
            raise OSError(errno.EFBIG, f"an image file may have {limit} bytes, this one has {size}")
        return content


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
def replacing(path: Path, text: bool = False) -> Iterator[IO[Any]]:
    """A new file to write to, which takes the place of ``path`` at the end of the block; removed
    where the block fails.

    It is made under a name that nobody can guess in the same folder: a link that somebody left at
    ``path`` is replaced, not followed.

    Args:
        path: may exist.
        text: UTF-8 with line ends as they are written, instead of bytes.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
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


@contextmanager
def new_folder(path: Path, taken: Callable[[str], Exception]) -> Iterator[Path]:
    """A folder to fill, which becomes ``path`` at the end of the block; removed where the block
    fails.

    Of several processes that make the same folder at the same time, the first to finish does; the
    others raise.

    Args:
        path: must not exist.
        taken: makes the error to raise where it exists, or was made by another process meanwhile,
            from a message.
    """
    if os.path.lexists(path):
        raise taken(f"{path} exists: take a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    temporary.mkdir()
    try:
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
