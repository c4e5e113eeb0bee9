"""The two options that name a data set, and how a run remembers them."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from training.data import DataError, Dataset
from training.datasets import NAMES, load_dataset


def add_data_arguments(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument("--data", required=required, metavar="NAME_OR_DIR",
                        help=f"{', '.join(NAMES)}, or a folder of images (searched recursively)" +
                             ("" if required else "; default: what the run was trained on"))
    parser.add_argument("--root", metavar="DIR", help="where a named data set lies")


def say(line: str) -> None:
    """Progress goes to standard error, so that standard output holds results alone."""
    print(line, file=sys.stderr, flush=True)


def source_of(args: argparse.Namespace) -> dict[str, str | None]:
    """What a run remembers of the two options, in ``data.json``."""
    return {"data": args.data if args.data in NAMES else str(Path(args.data).resolve()),
            "root": args.root and str(Path(args.root).resolve())}


def dataset_of(args: argparse.Namespace, run: Path | None, image_size: int | None = None, cached: bool = True) -> Dataset:
    """The data set that the options name, or the one that a run was trained on; decoded images may be kept in the run."""
    data, root = args.data, args.root
    if data is None:
        source = run / "data.json" if run else None
        if source is None or not source.is_file():
            raise DataError(f"--data is needed: {run} does not say what it was trained on")
        stored = json.loads(source.read_text())
        data, root = stored["data"], stored["root"]
    return load_dataset(data, root, image_size, cache=run / "cache" if run and cached and data != "cifar10" else None,
                        report=say)
