"""``ade reconstruct IMAGE… --bundle BUNDLE --out DIR``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ade_base.files import replacing
from ade_base.messages import visible
from ade_base.pictures.read import IMAGE_SUFFIXES
from ade_base.pictures.show import psnr, write_png
from ade_cli.help_texts import KIND
from ade_cli.image_files import (
    FileError,
    add_image_arguments,
    check_folder,
    files_of,
    load_engine,
    read_pixels,
)
from ade_cli.paths import given_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    parser.add_argument("--kind", choices=["mean", "density"], default="mean", help=KIND)
    parser.add_argument(
        "--out",
        type=given_path,
        required=True,
        metavar="DIR",
        help="folder for one PNG per image, named like the image, in the subfolders of the images; "
        "no file is replaced",
    )


def run(args: argparse.Namespace) -> None:
    if args.out.suffix.lower() in IMAGE_SUFFIXES:
        raise FileError(f"--out must be a folder, got {args.out}")
    check_folder(args.out)
    for folder in filter(Path.is_dir, args.images):
        if args.out.resolve().is_relative_to(folder.resolve()):
            raise FileError(
                f"--out must lie outside of {folder}: its pictures would be read as images of the "
                "data"
            )
    outputs = _outputs(args.images, args.out)
    for path in outputs.values():
        if os.path.lexists(path):
            raise FileError(f"{path} would be overwritten: choose another --out")
    engine = load_engine(args.bundle, "reconstruct")
    files, pixels = read_pixels(list(outputs), engine, args.resize)
    made = engine.reconstruct(pixels, [args.seed] * len(pixels), [args.kind] * len(pixels))
    for file, before, after in zip(files, pixels, made, strict=True):
        path = outputs[file]
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as picture:
            picture.write(write_png(after))
        decibels = psnr(before, after)
        quality = "exact" if decibels is None else f"{decibels:.2f} dB"
        print(visible(f"{path}: {quality}"))


def _outputs(images: list[Path], out: Path) -> dict[Path, Path]:
    """The picture of each file; those of a folder have its subfolders.

    Raises:
        FileError: a folder holds no images, or two files have the same picture.
    """
    first: dict[Path, Path] = {}
    for given in images:
        for file in files_of([given]):
            inside = file.relative_to(given).parent if given.is_dir() else Path()
            path = out / inside / f"{file.stem}.png"
            if path in first:
                raise FileError(
                    f"images must have different names, since their reconstructions share them, "
                    f"got {first[path]} and {file}"
                )
            first[path] = file
    return {file: path for path, file in first.items()}
