"""Files and folders that one process holds at a time."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

LOCK = ".lock"


def lock(file: IO[Any], wait: bool = False) -> bool:
    """Whether a file is this process's from now on, until it is closed or the process ends, however
    that ends.

    Args:
        file: open.
        wait: for whoever has it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: one process at a time is up to the user there
        return True
    return True


@contextmanager
def claim(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Whether a folder is this process's to work in; the claim ends with the process, however that
    ends.

    Args:
        folder: of a run, a fitting or a whole comparison; made where it is missing.
        wait: for whoever has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK, "w") as file:
        yield lock(file, wait)
