"""The folder of the page's uploads and results, and the only way to open files in it."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from gradio.utils import get_upload_folder

from ade_base.pictures.read import MAX_FILE_BYTES

UPLOADS = "uploads"  # folder in :func:`inbox` for uploads
KEPT_S = 3600.0  # uploads, results and remembered samples


class RequestRefused(Exception):
    """A request that the page refuses, with the status and the text of the answer."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class FileRefused(ValueError):
    """A path that a client named and the page does not open.

    The message does not say whether anything is there.
    """


def inbox() -> Path:
    """Return the page's folder, which only its user can enter.

    Gradio takes it from ``GRADIO_TEMP_DIR``.
    """
    folder = Path(os.path.abspath(get_upload_folder()))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


def own_path(path: str) -> Path:
    """Resolve a path that came from a client.

    Paths outside of :func:`inbox` are refused by their text, so that the answer does not depend on
    what lies there.

    Raises:
        FileRefused: the path leads out of the folder, or to something that is not a regular file.
    """
    folder = os.path.abspath(get_upload_folder())
    refused = FileRefused(
        "The page opens only files that were dropped on it or made by it. If the service was "
        "started again meanwhile, reload the page."
    )
    if (
        "\0" in path
        or not os.path.isabs(path)
        or not os.path.abspath(path).startswith(folder + os.sep)
    ):
        raise refused
    try:
        resolved = Path(path).resolve()
        # From Python 3.13 on, a loop of links is resolved to one of its links.
        is_regular = not resolved.is_symlink() and (
            not resolved.exists() or stat.S_ISREG(resolved.stat().st_mode)
        )
    except (OSError, RuntimeError):  # the name is too long, or links form a loop
        raise refused from None
    if not is_regular or not resolved.is_relative_to(Path(folder).resolve()):
        raise refused
    return resolved


def read_file(path: str) -> bytes:
    """Read a file that a client named.

    Raises:
        FileRefused: see :func:`own_path`; or the file is larger than an upload may be.
        FileNotFoundError: it is no longer there.
    """
    # A FIFO or device may have appeared since own_path: do not wait for it.
    with open(os.open(own_path(path), os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode) or info.st_size > MAX_FILE_BYTES:
            raise FileRefused(f"A file may have at most {MAX_FILE_BYTES >> 20} MiB.")
        return file.read(MAX_FILE_BYTES)


def write_file(data: bytes, name: str) -> str:
    """Write a file for the page to show; Gradio serves it as it is, text keys included."""
    folder = Path(tempfile.mkdtemp(dir=inbox()))
    (folder / name).write_bytes(data)
    return str(folder / name)
