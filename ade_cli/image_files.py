"""Image files given on the command line, for the verbs that work without a service."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from serving.api.errors import ApiError
from serving.api.requests import prepare_image
from serving.engine.bundle import BundleError, open_bundle
from serving.engine.engine import InferenceEngine
from serving.files import image_paths, read_file


class FileError(ValueError):
    """A file that cannot be used."""


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images",
        type=Path,
        nargs="+",
        metavar="IMAGE",
        help="image files, or folders of them (searched recursively)",
    )
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--resize", choices=["fit"], help="resize images of another size")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the draw of latents (default: %(default)s)"
    )


def load_engine(folder: Path, operation: str) -> InferenceEngine:
    """An engine with one operation.

    Raises:
        BundleError: the bundle does not have it.
    """
    bundle = open_bundle(folder)
    if operation not in bundle.operations:
        raise BundleError(
            f"{bundle.name} has no {operation}: it was trained without an inference network"
        )
    return InferenceEngine(bundle, operations=[operation])


def check_parent(out: Path) -> None:
    """Make sure that a file can be written there, before there is anything to write.

    Raises:
        FileError: its folder is not there.
    """
    if not out.parent.is_dir():
        raise FileError(f"{out}: there is no folder {out.parent}")


def files_of(paths: list[Path]) -> list[Path]:
    """Files as they were given; of a folder, those below it, in order.

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
    """uint8 ``(N, H, W, C)`` of the model's shape.

    Raises:
        FileError: naming the first file that cannot be used.
    """
    pixels = []
    for path in paths:
        try:
            image = prepare_image(read_file(path), engine.image_shape, resize == "fit", 0)
        except OSError as error:
            raise FileError(f"{path}: {error.strerror}") from None
        if isinstance(image, ApiError):
            raise FileError(f"{path}: {image.message}".replace('"resize": "fit"', "--resize fit"))
        pixels.append(image.pixels)
    return np.stack(pixels)
