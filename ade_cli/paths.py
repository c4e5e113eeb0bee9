"""Arguments that name what is read."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from serving.files import linked_folders
from serving.messages import printable


def given(text: str) -> str:
    """A path or name as it was typed.

    Raises:
        argparse.ArgumentTypeError: it is empty, as of a variable that is not set: ``Path`` would
            take it for the current folder.
    """
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def given_path(text: str) -> Path:
    """The same as a path."""
    return Path(given(text))


def say_what_is_not_followed(folder: Path) -> None:
    """Report links to folders below a folder: their images are not read."""
    links = linked_folders(folder)
    if links:
        more = f" and {len(links) - 1} more" if len(links) > 1 else ""
        text = f"links to folders are not followed: {printable(str(links[0]))}{more}"
        print(text, file=sys.stderr, flush=True)
