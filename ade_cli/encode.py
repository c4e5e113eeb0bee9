"""``ade encode IMAGE… --bundle BUNDLE --out FILE``."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from ade_cli.image_files import (
    FileError,
    add_image_arguments,
    check_parent,
    files_of,
    load_engine,
    read_pixels,
)
from serving.engine.backends import BackendError
from serving.engine.bundle import BundleError
from serving.files import replacing
from serving.verdict.calibration import CalibrationError

ERRORS = (BundleError, BackendError, CalibrationError, FileError)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE.npz",
        help="path of each image; mean_i, log_scale_i, z_i of each level, coarsest first; a row an image",
    )


def run(args: argparse.Namespace) -> None:
    if args.out.suffix != ".npz":
        raise FileError(f"{args.out}: the name must end with .npz")
    check_parent(args.out)
    files = files_of(args.images)
    engine = load_engine(args.bundle, "encode")
    pixels = read_pixels(files, engine, args.resize)
    levels = engine.encode(pixels, [args.seed] * len(pixels))
    arrays = {
        f"{name}_{i}": getattr(level, name)
        for i, level in enumerate(levels)
        for name in ("mean", "log_scale", "z")
    }
    with replacing(args.out) as file:
        np.savez(file, path=np.array([str(path) for path in files]), **arrays)
    shapes = ", ".join(f"z_{i} {level.z.shape}" for i, level in enumerate(levels))
    print(f"{args.out}: {shapes}")
