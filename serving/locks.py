"""Locks on files and folders, each held by one process at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

LOCK = ".lock"


def lock(file: IO[Any], wait: bool = False) -> bool:
    """Lock an open file until it is closed or the process ends; returns whether that succeeded.

    Args:
        file: an open file.
        wait: wait until another process releases the lock.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: there the user must see to it
        return True
    return True


@contextmanager
def claim(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Lock a folder for the block, or until the process ends; yields whether that succeeded.

    Args:
        folder: created if missing.
        wait: wait until another process releases the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as file:
        yield lock(file, wait)
