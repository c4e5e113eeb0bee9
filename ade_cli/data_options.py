"""The options that name a data set, and their record in the folder of a run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from serving.engine.bundle import Bundle
from training.data import DataError, Dataset
from training.datasets import NAMES, load_dataset
from training.datasets.files import contents, is_split_by_name, part_of


def add_data_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "--data",
        required=required,
        metavar="NAME_OR_DIR",
        help=f"{', '.join(NAMES)}, or a folder of images (searched recursively)"
        + ("" if required else "; default: what the run was trained on"),
    )
    parser.add_argument("--root", metavar="DIR", help="the folder that holds a named data set")


def say(line: str) -> None:
    """Print progress to standard error, so that standard output holds only results."""
    print(line, file=sys.stderr, flush=True)


def percent(share: float | None) -> str:
    """The share of images that is rejected; ``None`` is no verdict."""
    return "no verdict" if share is None else f"{share:.0%}"


def was_trained_on(bundle: Bundle, name: str, splits: dict[str, str] | None = None) -> bool:
    """Whether a data set is the one that a bundle's model was trained on.

    Its held-out parts must be used then. A data set of the same name but another split gives a
    warning.

    Args:
        bundle: its manifest names the data set and describes its splits.
        name: of the data set, or of a folder.
        splits: of a named data set; ``None`` for a folder. Splits by file names are equal even if
            their numbers of files differ, since an added file moves no other.
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
            f"warning: {bundle.name} was trained on a data set of the same name, {name}, with "
            "another split: check that these images were not trained on"
        )
    return same


def part_in(folder: Path, path: Path, trained_on: bool) -> str:
    """The part of a file of a folder.

    If the model was trained on the folder, it follows from the file's name, as in training.
    Otherwise it follows from the path inside the folder, because parts of files of one name would
    lack what only the others show.
    """
    return part_of(path.name if trained_on else path.relative_to(folder).as_posix())


def readable(paths: Sequence[Path]) -> Iterator[bytes]:
    """Read files one after another; prints and leaves out those that cannot be read."""
    for path, content in zip(paths, contents(paths), strict=True):
        if isinstance(content, OSError):
            say(f"left out {path}: {content.strerror}")
        else:
            yield content


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
            raise DataError(f"--data is required: {run} has no record of what it was trained on")
        stored = json.loads(source.read_text())
        data, root = stored["data"], root or stored["root"]
    return load_dataset(
        data,
        root,
        image_size,
        cache=run / "cache" if run and cached and data != "cifar10" else None,
        report=say,
        fits=fits,
    )
