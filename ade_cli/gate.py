"""``ade gate what-if`` and ``ade gate feedback``: forecast alarms, and correct a calibration."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ade_cli.data_options import percent, say
from ade_cli.image_files import FileError, check_parent, files_of, load_engine
from ade_cli.image_sets import ImageSet
from export.verdict.corruptions import CORRUPTIONS, SUBTLE
from export.verdict.feedback import AUDIT, give_feedback
from export.verdict.what_if import Way, WhatIf, what_if
from serving.engine.bundle import BundleError
from serving.verdict.calibration import DEFAULT, CalibrationError
from serving.verdict.store import FOLDER
from training.data import DataError

ERRORS = (BundleError, CalibrationError, DataError, FileError)
MAX_PER_DAY = 10_000_000  # the exact band takes time in proportion


def add_arguments(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_subparsers(dest="task", metavar="TASK", required=True)
    task = tasks.add_parser(
        "what-if",
        help="alarms per day and detection at each alpha",
        description="Show for each alpha how many false alarms per day to expect, with the exact "
        "95 % band, how much of HISTORY would be rejected, and which share of corrupted and OOD "
        "images. Images of another size than the model's are resized.",
    )
    _add_bundle(task)
    task.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="HISTORY",
        help="images that the gate got in the past: a folder, or an .npy or .npz file",
    )
    task.add_argument(
        "--per-day", required=True, type=int, metavar="N", help="number of images per day"
    )
    task.add_argument(
        "--ood",
        nargs="*",
        default=[],
        type=Path,
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
    task.add_argument("--json", action="store_true", help="print JSON instead of tables")
    task.add_argument(
        "--report", type=Path, metavar="FILE", help="write an HTML page with the same figures too"
    )
    task = tasks.add_parser(
        "feedback",
        help="let accepted images join a calibration",
        description="Tell the gate what a person decided on single images. Accepted images become "
        "calibration images; nothing is trained on them. Rejected images are calibration images "
        f"no longer. Each decision is appended to BUNDLE/{FOLDER}/{AUDIT}. A service that runs "
        "with the bundle takes the calibration over within seconds.",
    )
    _add_bundle(task)
    for option, text in (
        ("--accept", "image files, or folders of them, that the gate should accept"),
        ("--reject", "image files, or folders of them, that the gate should reject"),
    ):
        task.add_argument(option, nargs="+", default=[], type=Path, metavar="FILE", help=text)
    task.add_argument(
        "--force",
        action="store_true",
        help="accept images even if so many are beyond all calibration images that images like "
        "them can no longer be rejected",
    )


def _add_bundle(task: argparse.ArgumentParser) -> None:
    task.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of a bundle")
    task.add_argument(
        "--calibration",
        default=DEFAULT,
        metavar="NAME",
        help="of the bundle's calibrations (default: the bundle's own)",
    )


def extra(args: argparse.Namespace) -> str:
    """What to install for all options."""
    return "calibrate"


def run(args: argparse.Namespace) -> None:
    if args.task == "feedback":
        _feedback(args)
    else:
        _what_if(args)


def _feedback(args: argparse.Namespace) -> None:
    if not args.accept and not args.reject:
        raise FileError("give images with --accept, --reject or both")
    done = give_feedback(
        args.bundle, args.calibration, files_of(args.accept), files_of(args.reject), say, args.force
    )
    if not done.joined + done.known + done.removed + done.rejected:
        raise FileError(f"none of {done.unusable} images can be used")
    print(
        f"{done.joined} images joined the calibration {args.calibration}, {done.known} were in it "
        f"before; {done.removed} were removed, {done.rejected} rejected ones had not joined; "
        f"{done.unusable} cannot be used"
    )
    if done.before == done.after:
        print(f"the version is still {done.after}")
    else:
        print(f"version {done.before} is now {done.after}")


def _what_if(args: argparse.Namespace) -> None:
    for name, most in (("per_day", MAX_PER_DAY), ("images", None), ("corrupted", None)):
        value = getattr(args, name)
        if value < 1 or most is not None and value > most:
            limit = "" if most is None else f" and at most {most:,}"
            raise DataError(f"--{name.replace('_', '-')} must be at least 1{limit}, got {value}")
    names = [*(path.stem for path in args.ood), *CORRUPTIONS, *SUBTLE]
    if len(set(names)) < len(names):
        raise DataError(f"sets of OOD images need different names, got {', '.join(names)}")
    if args.report is not None:
        check_parent(args.report)
        if args.report.is_dir():
            raise FileError(f"--report must be a file, and {args.report} is a folder")
    engine = load_engine(args.bundle, "score", device="cpu")
    found = what_if(
        engine,
        engine.store.usable(args.calibration),
        ImageSet(args.data, args.images),
        {path.stem: ImageSet(path, args.images) for path in args.ood},
        args.per_day,
        args.corrupted,
        report=say,
    )
    if args.report is not None:
        from export.verdict.what_if_report import write_what_if  # its template needs Jinja2

        write_what_if(found, args.report)
    text = json.dumps(found.to_dict(), indent=2) if args.json else _text(found)
    print(text.encode(errors="backslashreplace").decode())  # names of files need not be UTF-8


def _text(found: WhatIf) -> str:
    label = found.calibration or {}
    lines = [
        f"{found.model}, calibration {label.get('name')}, version {label.get('version')}: "
        f"{found.images:,} images of the history, {found.unusable:,} cannot be used"
    ]
    for way in found.ways:
        lines += ["", *_way(way)]
    header = ["rejected at alpha", *(f"{alpha:g}" for alpha in found.alphas)]
    body = [[name, *map(percent, shares)] for name, shares in found.caught.items()]
    return "\n".join([*lines, "", *_table([header, *body])])


def _way(way: Way) -> list[str]:
    what = "resized images" if way.resized else "images of the model's size"
    lines = [f"{what}: {way.images:,} of the history, {way.per_day:,} per day"]
    if not way.calibrated:
        return [*lines, "there is no calibration for them: no verdict, none is accepted"]
    body = [["alpha", "false alarms per day", "95 % band", "rejected of the history"]]
    for row in way.alarms:
        if row.per_day is None:
            body.append([f"{row.alpha:g}", "no verdict", "", ""])
        else:
            band = f"{row.low:,} to {row.high:,}"
            body.append([f"{row.alpha:g}", f"{row.per_day:,.0f}", band, f"{row.rejected:.2%}"])
    lines += [f"calibrated on {way.calibrated:,} images", *_table(body)]
    if way.unlike:
        lines.append(
            "warning: the history is not like the calibration images, see alpha "
            f"{', '.join(f'{alpha:g}' for alpha in way.unlike)}: calibrate on images like these"
        )
    return lines


def _table(rows: list[list[str]]) -> list[str]:
    """Format a table: the first column is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
