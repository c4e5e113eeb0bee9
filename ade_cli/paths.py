"""Types of arguments that name what is read."""

from __future__ import annotations

import argparse
from pathlib import Path


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
