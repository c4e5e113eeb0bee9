"""Arguments that name what is read."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from pathlib import Path

from ade_base.files import linked_folders
from ade_base.messages import visible

SHIPPED_NAME = Path("pretrained", "cifar10")
SHIPPED = Path(__file__).parents[1] / SHIPPED_NAME  # of a clone, or installed with the wheel
# Pictures that people have among their images, and that nothing here reads.
OTHER_PICTURES = frozenset(
    [
        ".arw",
        ".cr2",
        ".cr3",
        ".dng",
        ".jfif",
        ".jp2",
        ".jxl",
        ".nef",
        ".orf",
        ".psd",
        ".raf",
        ".rw2",
        ".svg",
    ]
)


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


def given_bundle(text: str) -> Path:
    """The same of what is read as a bundle: the shipped one has its name in every folder."""
    path = given_path(text)
    return SHIPPED if path == SHIPPED_NAME and not path.exists() else path


def say_what_is_not_followed(folder: Path) -> bool:
    """Report what is not read below a folder: in linked folders, and in pictures of other kinds.

    Returns:
        Whether there is any.
    """
    links = linked_folders(folder)
    if links:
        more = f" and {len(links) - 1} more" if len(links) > 1 else ""
        text = f"links to folders are not followed: {visible(str(links[0]))}{more}"
        print(text, file=sys.stderr, flush=True)
    others = Counter(
        suffix
        for _, _, names in os.walk(folder)
        for name in names
        if (suffix := os.path.splitext(name)[1].lower()) in OTHER_PICTURES
    )
    if others:
        counted = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common())
        text = f"not read, convert them to PNG or JPEG first: {counted}"
        print(text, file=sys.stderr, flush=True)
    return bool(links or others)
