"""The logs of replicas, in files of their own.

Otherwise warnings and tracebacks would only be in the folder of Ray.
"""

from __future__ import annotations

import contextlib
import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path

from serving.api.journal import MAX_BYTES, OLD_FILES
from serving.ingest.forms import quieten_parser


def open_log(folder: str, name: str) -> Path:
    """Write the warnings of this process to ``FOLDER/NAME.log``.

    Args:
        folder: created if it is missing; ``~`` is the home of Ray's user.
        name: of the replica.

    Returns:
        The folder.
    """
    path = Path(folder).expanduser()
    # A folder that cannot be written must not keep a replica from starting.
    with contextlib.suppress(OSError):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    handler = RotatingFileHandler(
        path / f"{name}.log",
        maxBytes=MAX_BYTES,
        backupCount=OLD_FILES,
        encoding="utf-8",
        delay=True,
    )
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logging.getLogger().addHandler(handler)
    quieten_parser()
    return path
