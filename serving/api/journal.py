"""Logs one line of JSON per request that a worker answered, in a file of bounded size."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import orjson

SUFFIX = ".requests.jsonl"
MAX_BYTES = 20_000_000
OLD_FILES = 2


class Journal:
    """Appends to ``FOLDER/NAME.requests.jsonl``.

    A line has the time, the operation, the request's id (the model server answers it as
    ``x-request-id``), the status, an error's code and message, how many images were computed in the
    batch, and milliseconds by stage. No pixels.
    """

    def __init__(self, folder: Path, name: str) -> None:
        path = folder / f"{name}{SUFFIX}"
        open_log = functools.partial(
            RotatingFileHandler, path, maxBytes=MAX_BYTES, backupCount=OLD_FILES, encoding="utf-8"
        )
        # Logs that were removed or cannot be written must not keep a worker from being replaced.
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._handler = open_log()
        except OSError:
            self._handler = open_log(delay=True)  # each write tries again, and reports why it fails

    def write(self, entries: Iterable[dict[str, Any]]) -> None:
        """Append a line for each entry; the time is added."""
        now = datetime.now(UTC).isoformat(timespec="microseconds")
        lines = "\n".join(_line({"time": now, **entry}) for entry in entries)
        self._handler.emit(logging.LogRecord("journal", logging.INFO, "", 0, lines, None, None))


def _line(entry: dict[str, Any]) -> str:
    try:
        return orjson.dumps(entry).decode()
    except TypeError:  # half of a surrogate pair, in the name of a field
        return json.dumps(entry)


def last_errors(folder: Path, count: int = 5) -> list[dict[str, Any]]:
    """The newest requests of a folder's journals that were answered with an error, oldest first."""
    found = []
    for path in folder.glob(f"*{SUFFIX}"):
        with open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if '"code"' in line:
                    try:
                        found.append(json.loads(line))
                    except ValueError:  # a line that is being written
                        continue
    return sorted(found, key=lambda entry: str(entry.get("time")))[-count:]
