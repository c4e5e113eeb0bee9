"""The options that name a data set, and their record in the folder of a run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from ade_base.messages import visible
from ade_cli.paths import given, say_what_is_not_followed
from training.data import DataError, Dataset
from training.datasets import NAMES, load_dataset


def add_data_arguments(
    parser: argparse.ArgumentParser,
    required: bool,
    otherwise: str = "default: what the run was trained on",
) -> None:
    """Add the options that name a data set; ``otherwise`` is the help where none is required."""
    parser.add_argument(
        "--data",
        required=required,
        type=given,
        metavar="NAME_OR_DIR",
        help=f"{', '.join(NAMES)}, or a folder of images (searched recursively)"
        + ("" if required else f"; {otherwise}"),
    )
    parser.add_argument("--root", metavar="DIR", help="the folder that holds a named data set")


def add_image_size(parser: argparse.ArgumentParser) -> None:
    """Add the option for the size at which images are read."""
    parser.add_argument(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="pixels per side (default: the data set's own, or those of a folder's first image)",
    )


def say(line: str) -> None:
    """Print a line to standard error, so that standard output holds only results."""
    print(visible(line), file=sys.stderr, flush=True)


def source_of(args: argparse.Namespace) -> dict[str, str | None]:
    """The options as a run's ``data.json`` records them."""
    return {
        "data": args.data if args.data in NAMES else str(Path(args.data).resolve()),
        "root": args.root and str(Path(args.root).resolve()),
    }


def check_outside(out: Path, data: str) -> None:
    """Check that written pictures will not be read as data later.

    Raises:
        DataError: the output folder lies in the folder of the data.
    """
    if data not in NAMES and out.resolve().is_relative_to(Path(data).resolve()):
        raise DataError(
            f"--out must lie outside of {data}: its pictures would be read as images of the data"
        )


def dataset_of(
    args: argparse.Namespace,
    run: Path | None,
    image_size: int | None = None,
    cached: bool = True,
    fits: Callable[[int], object] = lambda side: None,
) -> Dataset:
    """Load the data set that the options name, or the one that a run was trained on.

    Args:
        args: with ``data`` and ``root``.
        run: folder of the run, for its ``data.json`` and its cache.
        image_size: height and width, pixels.
        cached: whether decoded images are kept in the run's folder.
        fits: called with the image size before images are decoded; raises if it is unsuitable.

    Raises:
        DataError: no data set is named, or it cannot be used.
    """
    data, root = args.data, args.root
    if data is None:
        source = run / "data.json" if run else None
        if source is None or not source.is_file():
            raise DataError(f"--data is required: {run} does not record where its images are")
        try:
            stored = json.loads(source.read_text())
            data, root = stored["data"], root or stored["root"]
        except (ValueError, LookupError, TypeError) as error:
            raise DataError(f"{source} is damaged: {error!r}") from error
    if data not in NAMES:
        say_what_is_not_followed(Path(data))
    return load_dataset(
        data,
        root,
        image_size,
        cache=run / "cache" if run and cached and data != "cifar10" else None,
        report=say,
        fits=fits,
    )


def dataset_of_run(args: argparse.Namespace, run: Path, image_size: int) -> Dataset:
    """The same for a run or a bundle; nothing is written to a bundle, so it gets no cache."""
    return dataset_of(args, run, image_size, cached=(run / "data.json").is_file())
