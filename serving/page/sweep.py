"""Deletes the page's files after an hour, because it may run for months."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Collection
from pathlib import Path

from serving.page.files import KEPT_S, UPLOADS
from serving.page.routes import report
from serving.page.uploads import ALL_BYTES, ALL_FILES

MAX_BYTES = 2**30  # of disk
# A quota that is full must not make the sweep delete files of others. Each file takes up to a block
# more than its bytes, and its folder takes another.
MAX_UPLOAD_BYTES = ALL_BYTES + 2 * 4096 * ALL_FILES
EVERY_S = 60.0


def sweep(folder: Path, kept: Collection[str], max_bytes: int = MAX_BYTES) -> None:
    """Delete entries of a folder that are older than :data:`KEPT_S`, but not ``kept`` ones.

    If the rest takes more than ``max_bytes``, the oldest are deleted too.
    """
    found = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # others may delete it too
            if path.name not in kept:
                found.append((path.lstat().st_mtime, _disk(path), path))
    size = 0
    for changed, taken, path in sorted(found, reverse=True):
        size += taken
        if time.time() - changed < KEPT_S and size <= max_bytes:
            continue
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def _disk(path: Path) -> int:
    """Bytes on disk of a file, or of a folder with its files; a small file takes a block."""
    inside = path.iterdir() if path.is_dir() else ()
    return sum(one.lstat().st_blocks * 512 for one in (path, *inside))


def start_sweeping(folder: Path, left: Collection[str]) -> None:
    """Sweep regularly in a thread; entries that exist already, the examples, stay.

    Args:
        folder: of the page.
        left: names of entries that are not the page's own, of a page before it. Tabs that are open
            may still need them for as long as other files.
    """
    kept = {path.name for path in folder.iterdir()}.difference(left) | {UPLOADS}

    def run() -> None:
        while True:
            time.sleep(EVERY_S)
            try:
                sweep(folder, kept)
                sweep(folder / UPLOADS, (), max_bytes=MAX_UPLOAD_BYTES)
            except OSError as error:  # a later sweep may succeed
                report("old files are not deleted", error)

    threading.Thread(target=run, name="sweep", daemon=True).start()
