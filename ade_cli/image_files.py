"""Reading image files that are given on the command line."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

from ade_cli.help_texts import BUNDLE
from ade_cli.paths import given_path
from serving.api.errors import ApiError
from serving.api.requests import prepare_image
from serving.engine.bundle import open_bundle
from serving.engine.engine import InferenceEngine
from serving.engine.noise import MAX_SEED
from serving.files import image_paths, read_file
from serving.images import in_options


class FileError(ValueError):
    """A file cannot be used."""


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        type=given_path,
        nargs="+",
        metavar="IMAGE",
        help="image files, or folders of them (searched recursively)",
    )
    parser.add_argument("--bundle", type=Path, required=True, help=BUNDLE)
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
    try:
        with tempfile.NamedTemporaryFile(dir=out.parent, prefix="."):
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
        found = [path / name for name in image_paths(path)] if path.is_dir() else [path]
        if not found:
            raise FileError(f"{path} holds no images")
        files += found
    return files


def read_pixels(paths: list[Path], engine: InferenceEngine, resize: str | None) -> np.ndarray:
    """Read images of the model's shape, uint8 ``(N, H, W, C)``.

    Raises:
        FileError: a file cannot be used; the message names the first one.
    """
    pixels = []
    for path in paths:
        try:
            image = prepare_image(read_file(path), engine.image_shape, resize == "fit", 0)
        except OSError as error:
            raise FileError(f"{path}: {error.strerror}") from None
        if isinstance(image, ApiError):
            raise FileError(f"{path}: {in_options(image.message)}")
        pixels.append(image.pixels)
    return np.stack(pixels)
