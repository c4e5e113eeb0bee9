"""Files that the page showed or was given go after a day: it may run for months."""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Collection
from pathlib import Path

MAX_AGE_S = 24 * 3600.0
EVERY_S = 600.0


def sweep(folder: Path, kept: Collection[str], max_age: float = MAX_AGE_S) -> None:
    """Remove what lies in a folder for longer than ``max_age`` seconds, but for names that are ``kept``."""
    for path in list(folder.iterdir()):
        with contextlib.suppress(OSError):  # others may remove it too
            if path.name in kept or time.time() - path.lstat().st_mtime < max_age:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()


def start_sweeping(folder: Path) -> None:
    """Sweep now and then, in a thread of its own; what lies there already (examples) stays."""
    kept = {path.name for path in folder.iterdir()}

    def run() -> None:
        while True:
            time.sleep(EVERY_S)
            sweep(folder, kept)

    threading.Thread(target=run, name="sweep", daemon=True).start()
