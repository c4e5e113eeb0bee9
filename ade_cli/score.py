"""``ade score IMAGES --bundle BUNDLE``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

from ade_base.brand import rounded
from ade_base.extensions import Engine, added, engine_help, load
from ade_base.system import available_cores
from ade_cli.help_texts import BUNDLE
from ade_cli.image_files import FileError, check_parent
from ade_cli.paths import given, given_bundle, say_what_is_not_followed
from ade_cli.progress import progress_bar
from ade_client.contract import DEFAULT
from serving.bulk import (
    FORMATS,
    BulkError,
    BulkOptions,
    FileScorer,
    Summary,
    check_out,
    score_folder,
)
from serving.engine.bundle import open_bundle

NO_VERDICT = 3  # exit status
LOCAL = "local"
ENGINES: dict[str, Engine] = {LOCAL: Engine("", None), **added("score_engines")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Score image files: bits per dimension, p-value and decision. Scores of files are "
        "printed as JSON lines; those of a folder are written to a table, and the same command "
        f"resumes an interrupted one. Exit status: 0; 2 for an error; {NO_VERDICT} if no image got "
        "a verdict."
    )
    parser.set_defaults(address=None)  # of engines on clusters
    parser.add_argument(
        "images",
        nargs="+",
        type=given,
        metavar="IMAGES",
        help="files, or one folder (searched recursively)",
    )
    parser.add_argument("--bundle", type=given_bundle, required=True, help=BUNDLE)
    parser.add_argument(
        "--out",
        type=given,
        metavar="FILE",
        help=f"file for the scores of a folder: {', '.join(FORMATS)}",
    )
    parser.add_argument(
        "--alpha",
        type=float,
        default=0.01,
        help="false-alarm rate of the verdict (default: %(default)s)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=1,
        metavar="K",
        help="draws for the bound on the likelihood; more tighten it (default: %(default)s)",
    )
    parser.add_argument(
        "--resize",
        choices=["fit"],
        help="resize images of another size: this changes the likelihood",
    )
    parser.add_argument(
        "--calibration",
        default=DEFAULT,
        metavar="NAME",
        help="which of the bundle's calibrations decides (default: the one named default, or "
        "else the bundle's own)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=available_cores(),
        metavar="N",
        help="number of processes, with --out (default: one per core)",
    )
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=LOCAL,
        help=f"what runs the processes: {engine_help(ENGINES)} (default: %(default)s)",
    )


def extra(args: argparse.Namespace) -> str | None:
    """The extra of pyproject.toml that these arguments need, if any."""
    return ENGINES[args.engine].extra


def resumed(args: argparse.Namespace) -> str:
    """How an interrupted command is continued, for the user."""
    return "" if args.out is None else ": the same command resumes from here"


def run(args: argparse.Namespace) -> int:
    if not 0 < args.alpha <= 1:
        raise BulkError(f"--alpha must be above 0 and at most 1, got {args.alpha}")
    for name in ("samples", "workers"):
        if getattr(args, name) < 1:
            raise BulkError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.out is not None and args.engine == LOCAL:  # before anything is read
        check_parent(Path(args.out))
        check_out(Path(args.out))
    options = BulkOptions(args.alpha, args.samples, args.resize, args.calibration)
    scorer = FileScorer(open_bundle(args.bundle), None, options)
    judge = scorer.calibrations.of(args.resize == "fit") or scorer.calibrations.exact
    if judge is not None:
        warnings = [judge.too_small(args.alpha)]
        if judge.resize == "fit" and args.resize is None:
            warnings.append(
                "this bundle was calibrated on images of any size: without --resize fit, images "
                "whose size differs from the model's get an error"
            )
        for warning in filter(None, warnings):
            print(f"warning: {warning}", file=sys.stderr)
    if args.engine != LOCAL:
        return _score_elsewhere(args, scorer)
    if args.address is not None:
        names = [name for name, engine in ENGINES.items() if engine.on_clusters]
        raise BulkError(f"--address is for --engine {', '.join(names)}")
    images = [Path(image) for image in args.images]
    if args.out is None:
        if any(path.is_dir() for path in images):
            raise BulkError(f"a folder's scores need --out FILE ({', '.join(FORMATS)})")
        rows = scorer(args.images)
        for row in rows:
            print(json.dumps(row))
        if all("error" in row for row in rows):
            raise BulkError("no image could be scored")
        return _status({row["decision_reason"] for row in rows if "error" not in row})
    for path in images:
        if not path.exists():
            raise FileError(f"{path}: there is no such file or folder")
    out = Path(args.out)
    if len(images) != 1 or not images[0].is_dir():
        raise BulkError(
            f"--out is for the scores of one folder, got {', '.join(map(str, args.images))}: "
            "without it, scores of files are printed as JSON lines"
        )
    if out.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise BulkError(
            "a Parquet file needs pyarrow: pip install pyarrow, or write .csv or .jsonl"
        )
    say_what_is_not_followed(images[0])
    with progress_bar() as progress:
        summary = score_folder(scorer, images[0], out, args.workers, progress)
    return _report(args, summary)


def _score_elsewhere(args: argparse.Namespace, scorer: FileScorer) -> int:
    if len(args.images) != 1 or args.out is None:
        raise BulkError(
            f"--engine {args.engine} scores one folder or manifest, and needs --out DIR"
        )
    try:
        score = load(ENGINES[args.engine].code)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"--engine {args.engine}", name=error.name) from None
    if Path(args.images[0]).is_dir():
        say_what_is_not_followed(Path(args.images[0]))
    with progress_bar() as progress:
        summary = score(scorer, args.images[0], args.out, args.workers, args.address, progress)
    return _report(args, summary)


def _report(args: argparse.Namespace, summary: Summary) -> int:
    """Print the summary; returns the exit status."""
    print(
        f"{args.out}: {summary.no_verdict} without a verdict, {summary.rejected} rejected, "
        f"{summary.accepted} accepted at alpha {args.alpha:g}; {summary.errors} could not be scored"
    )
    if not summary.scored:
        raise BulkError(
            f"no image could be scored: the reasons are in the column notes of {args.out}"
        )
    judged = summary.rejected + summary.accepted
    if judged:
        print(
            f"of {judged} images like the calibration images, about "
            f"{rounded(args.alpha * judged)} would be rejected"
        )
    return _status({None} if judged else {f"see the column decision_reason of {args.out}"})


def _status(reasons: set[str | None]) -> int:
    """Return the exit status: 0, or :data:`NO_VERDICT` with a warning."""
    if None in reasons:
        return 0
    print(
        "warning: no image got a verdict, so none is accepted: "
        f"{'; '.join(sorted(filter(None, reasons)))}",
        file=sys.stderr,
    )
    return NO_VERDICT
