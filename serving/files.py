"""Files on disk: which of a folder are images, and their contents, in bounded time and memory."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from serving.images import IMAGE_SUFFIXES, MAX_FILE_BYTES


def image_paths(folder: Path) -> Iterator[str]:
    """Image files below a folder by their suffixes, relative to it, in a fixed order; one directory's names at a time.

    Whether they can be read is not known yet: a name may belong to a pipe, a device or a broken link. Links to folders are
    not followed.
    """
    for directory, folders, names in os.walk(folder):
        folders.sort()
        below = Path(directory).relative_to(folder)
        for name in sorted(names):
            if Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield (below / name).as_posix()


def read_file(path: Path, limit: int = MAX_FILE_BYTES) -> bytes:
    """The content of a regular file, whose size is checked before anything is read. Links are followed.

    Raises:
        OSError: it cannot be read; with ``EINVAL`` it is a pipe, a device or the like, with ``EFBIG`` it has more than
            ``limit`` bytes.
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
