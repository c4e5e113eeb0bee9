"""Files that one process holds at a time."""

from __future__ import annotations

import fcntl
from typing import IO, Any


def lock(file: IO[Any], wait: bool = False) -> bool:
    """Whether a file is this process's from now on, until it is closed or the process ends, however that ends.

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
