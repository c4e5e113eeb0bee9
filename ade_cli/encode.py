"""``ade encode IMAGE… --bundle BUNDLE --out FILE``."""

from __future__ import annotations

import argparse
import os
from itertools import compress

import numpy as np

from ade_base.files import replacing
from ade_cli.image_files import (
    NONE_USABLE,
    FileError,
    add_image_arguments,
    check_parent,
    files_of,
    left_out,
    load_engine,
    read_pixels,
)
from ade_cli.paths import given_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    parser.add_argument(
        "--out",
        type=given_path,
        required=True,
        metavar="FILE.npz",
        help="new file for the arrays, one row per image: path, and mean_i, log_scale_i and z_i "
        "for each level i, coarsest first",
    )


def run(args: argparse.Namespace) -> None:
    if args.out.suffix != ".npz":
        raise FileError(f"--out must end with .npz, got {args.out}")
    if os.path.lexists(args.out):
        raise FileError(f"{args.out} exists already: delete it, or choose another file")
    check_parent(args.out)
    files = files_of(args.images)
    engine = load_engine(args.bundle, "encode")
    files, pixels = read_pixels(files, engine, args.resize)
    levels = engine.encode(pixels, [args.seed] * len(pixels))
    arrays = {
        f"{name}_{i}": getattr(level, name)
        for i, level in enumerate(levels)
        for name in ("mean", "log_scale", "z")
    }
    finite = np.logical_and.reduce(
        [np.isfinite(a).reshape(len(files), -1).all(1) for a in arrays.values()]
    )
    for path in compress(files, ~finite):
        left_out(path, "its latents are not finite numbers")
    if not finite.any():
        raise FileError(NONE_USABLE)
    arrays = {name: array[finite] for name, array in arrays.items()}
    with replacing(args.out) as file:
        np.savez(file, path=np.array([str(path) for path in compress(files, finite)]), **arrays)
    shapes = ", ".join(f"z_{i} {arrays[f'z_{i}'].shape}" for i in range(len(levels)))
    print(f"{args.out}: {shapes}")
