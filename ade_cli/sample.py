"""``ade sample --bundle BUNDLE --out FILE``."""

from __future__ import annotations

import argparse
import secrets
from pathlib import Path

from ade_cli.image_files import FileError, check_parent, load_engine
from serving.api.errors import ApiError
from serving.api.operations.sample import MAX_DRAWN_SEED
from serving.api.requests import RawRequest
from serving.api.service import Service
from serving.engine.backends import BackendError
from serving.engine.bundle import BundleError
from serving.files import replacing
from serving.verdict.calibration import CalibrationError

ERRORS = (BundleError, BackendError, CalibrationError, FileError, ApiError)
FORMATS = {".png": "png", ".npy": "npy"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draw samples into one picture (.png, whose text reproduces it) or an array (.npy), "
        "the same as the service's."
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--n", type=int, default=16, help="at most 256 (default: %(default)s)")
    parser.add_argument("--seed", type=int, help="drawn, and printed, unless given")
    parser.add_argument(
        "--index", type=int, default=0, help="number of the first sample (default: %(default)s)"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s")
    parser.add_argument(
        "--kind", choices=["mean", "density"], default="mean", help="default: %(default)s"
    )


def run(args: argparse.Namespace) -> None:
    if args.out.suffix not in FORMATS:
        raise ApiError(
            422, "bad_parameter", f"{args.out}: the name must end with {' or '.join(FORMATS)}"
        )
    check_parent(args.out)
    seed = secrets.randbelow(MAX_DRAWN_SEED) if args.seed is None else args.seed
    values = {
        "n": args.n,
        "seed": seed,
        "index": args.index,
        "temperature": args.temperature,
        "kind": args.kind,
        "format": FORMATS[args.out.suffix],
    }
    (answer,) = Service("sample", load_engine(args.bundle, "sample")).answer(
        [RawRequest("application/json", values)]
    )
    if answer.error is not None:
        raise answer.error
    with replacing(args.out) as file:
        file.write(answer.body)
    print(f"{args.out}: {args.n} samples of seed {seed}")
