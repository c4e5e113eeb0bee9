"""Files that the page showed or was given go after an hour: it may run for months."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Collection
from pathlib import Path

from serving.page.files import KEPT_S, UPLOADS

MAX_BYTES = 2**30  # of disk
EVERY_S = 60.0


def sweep(
    folder: Path, kept: Collection[str], max_age: float = KEPT_S, max_bytes: int = MAX_BYTES
) -> None:
    """Remove what lies in a folder for longer than ``max_age`` seconds, but for names that are
    ``kept``.

    If the rest takes more than ``max_bytes``, the oldest goes too.
    """
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # others may remove it too
            if path.name not in kept:
                found.append((path.lstat().st_mtime, _disk(path), path))
    size = 0
    for changed, taken, path in sorted(found, reverse=True):
        size += taken
        if time.time() - changed < max_age and size <= max_bytes:
            continue
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _disk(path: Path) -> int:
    """Bytes that a file, or a folder with its files, takes: small files take a block each."""
    inside = path.iterdir() if path.is_dir() else ()
    return sum(one.lstat().st_blocks * 512 for one in (path, *inside))


def start_sweeping(folder: Path) -> None:
    """Sweep now and then, in a thread of its own; what lies there already (examples) stays."""
    kept = {path.name for path in folder.iterdir()}

    def run() -> None:
        while True:
            time.sleep(EVERY_S)
            sweep(folder, kept)
            sweep(folder / UPLOADS, ())

    threading.Thread(target=run, name="sweep", daemon=True).start()
