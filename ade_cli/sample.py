"""``ade sample --bundle BUNDLE --out FILE``."""

from __future__ import annotations

import argparse
import secrets

from ade_base.files import replacing
from ade_cli.help_texts import BUNDLE, KIND
from ade_cli.image_files import check_parent, load_engine
from ade_cli.paths import given_bundle, given_path
from serving.api.operations.sample import MAX_DRAWN_SEED
from serving.api.service import Service
from serving.ingest.errors import ApiError
from serving.ingest.requests import RawRequest

FORMATS = {".png": "png", ".npy": "npy"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Draw samples into a picture (.png, with text that reproduces it) or an array (.npy). The "
        "service returns the same samples."
    )
    parser.add_argument("--bundle", type=given_bundle, required=True, help=BUNDLE)
    parser.add_argument(
        "--out",
        type=given_path,
        required=True,
        metavar="FILE",
        help="file to write; an existing one is replaced",
    )
    parser.add_argument(
        "--n", type=int, default=16, help="number of samples, at most 256 (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, help="seed of the samples (default: a random one, which is printed)"
    )
    parser.add_argument(
        "--index", type=int, default=0, help="index of the first sample (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="multiplies the prior's standard deviations: below 1 samples vary less "
        "(default: %(default)s)",
    )
    parser.add_argument("--kind", choices=["mean", "density"], default="mean", help=KIND)


def run(args: argparse.Namespace) -> None:
    if args.out.suffix not in FORMATS:
        endings = " or ".join(FORMATS)
        raise ApiError(422, "bad_parameter", f"--out must end with {endings}, got {args.out}")
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
