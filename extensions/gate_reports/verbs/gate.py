"""``ade gate what-if``: forecast alarms."""

from __future__ import annotations

import argparse
import json
import os

from ade_cli.data_options import say
from ade_cli.help_texts import BUNDLE
from ade_cli.image_files import FileError, check_parent, load_engine
from ade_cli.image_sets import GivenImages, name_of
from ade_cli.paths import given_bundle, given_path
from ade_client.contract import DEFAULT
from export.gate.corruptions import CORRUPTIONS, SUBTLE
from extensions.gate_reports.what_if import what_if
from extensions.gate_reports.what_if_report import gate_of, what_if_lines, write_what_if
from training.data import DataError

MAX_PER_DAY = 10_000_000  # the exact band takes time in proportion


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    task = tasks.add_parser(
        "what-if",
        help="alarms per day and detection at each alpha",
        description="Show for each alpha how many false alarms per day to expect, with the exact "
        "95 % band, how much of HISTORY would be rejected, and which share of corrupted and OOD "
        "images. Images whose size differs from the model's are resized.",
    )
    _add_bundle(task)
    task.add_argument(
        "--data",
        required=True,
        type=given_path,
        metavar="HISTORY",
        help="images that the gate got in the past: a folder, or an .npy or .npz file",
    )
    task.add_argument(
        "--per-day", required=True, type=int, metavar="N", help="number of images per day"
    )
    task.add_argument(
        "--ood",
        action="extend",
        nargs="*",
        default=[],
        type=given_path,
        metavar="IMAGES",
        help="sets of OOD images that you expect: folders, .npy or .npz files",
    )
    task.add_argument(
        "--images",
        type=int,
        default=2000,
        metavar="N",
        help="use at most N images of each set (default: %(default)s)",
    )
    task.add_argument(
        "--corrupted",
        type=int,
        default=200,
        metavar="N",
        help="number of HISTORY's images that are corrupted in each way (default: %(default)s)",
    )
    task.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    task.add_argument(
        "--report",
        type=given_path,
        metavar="FILE",
        help="write an HTML page with the same figures too",
    )


def _add_bundle(task: argparse.ArgumentParser) -> None:
    task.add_argument("bundle", type=given_bundle, metavar="BUNDLE", help=BUNDLE)
    task.add_argument(
        "--calibration",
        default=DEFAULT,
        metavar="NAME",
        help="which of the bundle's calibrations to use (default: the bundle's own)",
    )


def run(args: argparse.Namespace) -> None:
    _what_if(args)


def _what_if(args: argparse.Namespace) -> None:
    for name, most in (("per_day", MAX_PER_DAY), ("images", None), ("corrupted", None)):
        value = getattr(args, name)
        if value < 1 or most is not None and value > most:
            limit = "" if most is None else f" and at most {most:,}"
            raise DataError(f"--{name.replace('_', '-')} must be at least 1{limit}, got {value}")
    names = [*map(name_of, args.ood), *CORRUPTIONS, *SUBTLE]
    if len(set(names)) < len(names):
        raise DataError(f"sets of OOD images need different names, got {', '.join(names)}")
    if args.report is not None:
        check_parent(args.report)
        if os.path.lexists(args.report) and not args.report.is_file():
            raise FileError(f"--report must be a new or a regular file, got {args.report}")
    engine = load_engine(args.bundle, "score", device="cpu")
    found = what_if(
        engine,
        engine.calibrations_of(args.calibration),
        GivenImages(args.data, args.images),
        {name_of(path): GivenImages(path, args.images) for path in args.ood},
        args.per_day,
        args.corrupted,
        report=say,
    )
    if args.json:
        text = json.dumps(found.to_dict(), indent=2)
    else:
        text = "\n".join([gate_of(found), "", *what_if_lines(found)]).rstrip()
    print(text)
    if args.report is not None:  # the last step: if it fails, the figures have been printed
        write_what_if(found, args.report)
