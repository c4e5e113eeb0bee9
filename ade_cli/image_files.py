"""Reading image files that are given on the command line."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

from ade_base.errors import UserError
from ade_base.files import image_paths, read_file
from ade_base.messages import visible
from ade_base.pictures.read import in_options
from ade_cli.help_texts import BUNDLE
from ade_cli.paths import given_bundle, given_path, say_what_is_not_followed
from ade_client.contract import MAX_SEED
from serving.engine.bundle import open_bundle
from serving.engine.engine import InferenceEngine
from serving.ingest.errors import ApiError
from serving.ingest.picture import prepare_source

NONE_USABLE = "no image could be used"


class FileError(UserError, ValueError):
    """A file cannot be used."""


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        f"{parser.description} Files that cannot be used are left out and named on standard error. "
        "Exit status: 0; 2 for an error, or if no file could be used."
    )
    parser.add_argument(
        "images",
        type=given_path,
        nargs="+",
        metavar="IMAGE",
        help="image files, or folders of them (searched recursively)",
    )
    parser.add_argument("--bundle", type=given_bundle, required=True, help=BUNDLE)
    parser.add_argument("--resize", choices=["fit"], help="resize images of another size")
    parser.add_argument(
        "--seed", type=_seed, default=0, help="seed of the latents' noise (default: %(default)s)"
    )


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) > MAX_SEED:
        raise argparse.ArgumentTypeError(f"must be from 0 to {MAX_SEED}, got {text}")
    return int(text)


def load_engine(folder: Path, operation: str, device: str = "auto") -> InferenceEngine:
    """Load an engine with one operation.

    Raises:
        BundleError: the bundle does not have the operation.
    """
    bundle = open_bundle(folder)
    bundle.check_has(operation)
    return InferenceEngine(bundle, device=device, operations=[operation])


def check_parent(out: Path) -> None:
    """Check that an output file can be made in its folder, before the work is done.

    Raises:
        FileError: the folder does not exist, or no file can be made there.
    """
    if not out.parent.is_dir():
        raise FileError(f"{out} cannot be written: there is no folder {out.parent}")
    check_writable(out)


def check_folder(out: Path) -> None:
    """Check that an output folder, or files in it, can be made, before the work is done.

    Raises:
        FileError: it is a file, or cannot be made.
    """
    if out.exists() and not out.is_dir():
        raise FileError(f"--out must be a folder, and {out} is a file")
    check_writable(out)


def check_writable(out: Path) -> None:
    """Check that a file can be made, or a folder and files in it, before the work is done.

    Args:
        out: the folders above it need not exist.

    Raises:
        FileError: it cannot.
    """
    above = out.absolute().parents
    folder = out if out.is_dir() else next(path for path in above if os.path.lexists(path))
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="."):
            pass
    except OSError as error:
        raise FileError(f"{out} cannot be written: {error.strerror}") from None


def files_of(paths: list[Path]) -> list[Path]:
    """The given files, with each folder replaced by the image files below it, in order.

    Raises:
        FileError: a folder holds no images.
    """
    files: list[Path] = []
    for path in paths:
        say_what_is_not_followed(path)
        found = [path / name for name in image_paths(path)] if path.is_dir() else [path]
        if not found:
            raise FileError(f"{path} holds no images")
        files += found
    return files


def left_out(path: Path, reason: str) -> None:
    """Print that a file is not used."""
    print(visible(f"left out {path}: {reason}"), file=sys.stderr)


def read_pixels(
    paths: list[Path], engine: InferenceEngine, resize: str | None
) -> tuple[list[Path], np.ndarray]:
    """Read images of the model's shape; prints and leaves out those that cannot be used.

    Returns:
        The files that can be used, and their pixels, uint8 ``(N, H, W, C)``.

    Raises:
        FileError: no file can be used.
    """
    files, pixels = [], []
    for path in paths:
        read = partial(read_file, path)
        image = prepare_source(read, engine.image_shape, resize == "fit")
        if isinstance(image, ApiError):
            left_out(path, in_options(image.message))
        else:
            files.append(path)
            pixels.append(image.pixels)
    if not files:
        raise FileError(NONE_USABLE)
    return files, np.stack(pixels)
