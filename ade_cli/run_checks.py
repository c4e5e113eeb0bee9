"""Checks with which ``ade train``, ``ade compare`` and ``ade fit`` begin or resume runs."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from ade_base.errors import ConfigError
from ade_cli.data_options import say, source_of
from training.datasets import NAMES
from training.runs import RunError

Config = TypeVar("Config")
ADVISED = (32, 48, 64)  # pixels: image sizes that suit all recipes; the last for photographs
LARGEST = 256  # pixels: image size that is taken without being asked for


def check_one_process(instead: str) -> None:
    """Check that ``torchrun`` did not start several processes, which would train together.

    Args:
        instead: what to do instead, for the error.

    Raises:
        RunError: it did.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1:
        raise RunError(
            f"this command trains in one process, and torchrun started {count}: {instead}"
        )


def check_same_data(recorded: Mapping[Path, str], args: argparse.Namespace) -> None:
    """Check that runs were trained on the data that the options name.

    A folder that no longer exists may have been moved: if the new one has the same name, this
    prints a warning.

    Args:
        recorded: for each run, ``data`` of its ``data.json``.
        args: with ``data``, ``root`` and ``out``.

    Raises:
        RunError: a run was trained on other data.
    """
    now = str(source_of(args)["data"])
    gone = set()
    for run, before in recorded.items():
        if before == now:
            continue
        old, new = Path(before), Path(now)
        are_folders = before not in NAMES and now not in NAMES
        if are_folders and old.is_dir() and new.is_dir() and old.samefile(new):
            continue
        if not are_folders or old.exists() or old.name != new.name:
            raise RunError(
                f"{run} was trained on {before}, not on {now}: give the same --data, or another "
                "--out"
            )
        gone.add(before)
    for before in sorted(gone):
        say(
            f"warning: {before}, on which {args.out} was trained, no longer exists: it is assumed "
            f"that {now} has the same images"
        )


def check_own_size(args: argparse.Namespace, side: int) -> None:
    """Check the size of the images, which is that of the first one unless it is given.

    Args:
        args: with ``data`` and ``image_size``.
        side: height and width, pixels.

    Raises:
        ConfigError: nobody would train on images of this size on purpose.
    """
    if args.image_size is None and args.data not in NAMES and side > LARGEST:
        raise ConfigError(
            f"the first image in {args.data} has {side} pixels per side, and all would be read at "
            f"this size: give --image-size, such as {ADVISED[-1]}"
        )


def size_checked(
    args: argparse.Namespace, make: Callable[[int], Config]
) -> Callable[[int], Config]:
    """Let errors of an image size that the user did not give name its origin.

    Args:
        args: with ``data`` and ``image_size``.
        make: called with the image size; raises :class:`ConfigError` if it is unsuitable.
    """

    def checked(side: int) -> Config:
        check_own_size(args, side)
        try:
            return make(side)
        except ConfigError as error:
            if args.image_size is not None or args.data in NAMES:
                raise
            advised = min((size for size in ADVISED if size >= side), default=ADVISED[-1])
            make(advised)  # raises another error if the size is not what is wrong
            raise ConfigError(
                f"{error}, the size of the first image in {args.data}: give --image-size {advised}"
            ) from None

    return checked
