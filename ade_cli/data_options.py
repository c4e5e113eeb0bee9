"""The two options that name a data set, and how a run remembers them."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from serving.engine.bundle import Bundle
from training.data import DataError, Dataset
from training.datasets import NAMES, load_dataset
from training.datasets.files import contents, is_split_by_name


def add_data_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--data",
        required=required,
        metavar="NAME_OR_DIR",
        help=f"{', '.join(NAMES)}, or a folder of images (searched recursively)"
        + ("" if required else "; default: what the run was trained on"),
    )
    parser.add_argument("--root", metavar="DIR", help="folder of a named data set")


def say(line: str) -> None:
    """Progress goes to standard error, so that standard output holds results alone."""
    print(line, file=sys.stderr, flush=True)


def percent(share: float | None) -> str:
    """The share of images that is rejected; ``None`` is no verdict."""
    return "no verdict" if share is None else f"{share:.0%}"


def was_trained_on(bundle: Bundle, name: str, splits: dict[str, str] | None = None) -> bool:
    """Whether a data set is the one that a bundle's model was trained on, so that its own held-out
    parts are to be used.

    Args:
        bundle: its manifest names the data set and says how it was split.
        name: of the data set, or of a folder.
        splits: of a named data set; ``None`` for a folder. Those by files' names say how many there
            are too: a file more or less moves no other.
    """
    data = bundle.manifest["data"]
    if data.get("name") != name:
        return False
    by_name = is_split_by_name(data.get("splits", {})) and (
        splits is None or is_split_by_name(splits)
    )
    same = by_name or data.get("splits") == splits
    if not same:
        say(
            f"warning: {bundle.name} was trained on data called {name} too, split in another way: make sure that nothing "
            "of this was trained on"
        )
    return same


def readable(paths: Sequence[Path]) -> Iterator[bytes]:
    """Files one after another; those that cannot be read are named and left out."""
    for path, content in zip(paths, contents(paths), strict=True):
        if isinstance(content, OSError):
            say(f"left out {path}: {content.strerror}")
        else:
            yield content


def source_of(args: argparse.Namespace) -> dict[str, str | None]:
    """What a run remembers of the two options, in ``data.json``."""
    return {
        "data": args.data if args.data in NAMES else str(Path(args.data).resolve()),
        "root": args.root and str(Path(args.root).resolve()),
    }


def check_outside(out: Path, data: str) -> None:
    """Make sure that what is written is not taken for data later.

    Raises:
        DataError: the folder to be written lies in the folder of the data.
    """
    if data not in NAMES and out.resolve().is_relative_to(Path(data).resolve()):
        raise DataError(
            f"--out must lie outside of {data}: its pictures would be taken for images of yours"
        )


def dataset_of(
    args: argparse.Namespace,
    run: Path | None,
    image_size: int | None = None,
    cached: bool = True,
    fits: Callable[[int], object] = lambda side: None,
) -> Dataset:
    """The data set that the options name, or the one that a run was trained on; decoded images may
    be kept in the run.

    ``fits`` is asked of the images' size before they are all decoded, and raises where it will not
    do.
    """
    data, root = args.data, args.root
    if data is None:
        source = run / "data.json" if run else None
        if source is None or not source.is_file():
            raise DataError(f"--data is needed: {run} does not say what it was trained on")
        stored = json.loads(source.read_text())
        data, root = stored["data"], stored["root"]
    return load_dataset(
        data,
        root,
        image_size,
        cache=run / "cache" if run and cached and data != "cifar10" else None,
        report=say,
        fits=fits,
    )
