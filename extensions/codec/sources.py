"""What is compressed: a folder of image files, or an array of images."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import Protocol

import numpy as np

from ade_base.files import Rows, image_paths, read_file
from ade_base.pictures.limits import ImageError
from ade_base.pictures.read import IMAGE_SUFFIXES
from extensions.codec.errors import CodingError
from extensions.codec.names import MAX_PARTS, is_safe
from extensions.codec.pictures import Picture, read_picture, to_webp


class Source(Protocol):
    """Images in a fixed order.

    Attributes:
        count: number of images.
        names: of files, relative to their folder; ``None`` for an array.
        shape: of an array, ``(N, H, W, C)``; ``None`` for files.
        left_out: files that cannot be read, which are not among the images, and why.
    """

    count: int
    names: list[str] | None
    shape: list[int] | None
    left_out: list[tuple[Path, str]]

    def read(self, index: int) -> Picture:
        """One image."""
        ...


class FolderSource:
    """The image files below a folder, in the order of their paths.

    Files that cannot be read are left out. Each file is read once at the start to find them,
    because the images are fixed once an archive is begun.

    Raises:
        CodingError: there are none, or none can be read.
    """

    shape: list[int] | None = None

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        names: list[str] = []
        self.left_out: list[tuple[Path, str]] = []
        for name in image_paths(folder):
            try:
                read_file(folder / name)  # whole: one with a bad sector can be opened
                names.append(name)
            except OSError as error:
                self.left_out.append((folder / name, error.strerror or str(error)))
        if not names and self.left_out:
            path, reason = self.left_out[0]
            raise CodingError(f"{folder}: no image can be read; {path}: {reason}")
        if not names:
            raise CodingError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        for name in names:
            if not is_safe(name):
                raise CodingError(
                    f"{folder / name}: names in an archive have no backslash, at most 4,096 "
                    f"characters and at most {MAX_PARTS - 1} folders: rename or move the file"
                )
        self.names: list[str] | None = names
        self.count = len(names)
        self._names = names

    def read(self, index: int) -> Picture:
        path = self._folder / self._names[index]
        try:
            return read_picture(read_file(path))
        except OSError as error:
            raise CodingError(f"{path}: {error.strerror}") from error
        except ImageError as error:
            raise CodingError(f"{path}: {error}: repeat the command") from error


class ArraySource:
    """A ``.npy`` file of uint8 ``(N, H, W, 1)`` or ``(N, H, W, 3)``, which is not read as a whole.

    Raises:
        CodingError: the file is not such an array.
    """

    names: list[str] | None = None

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
            raise CodingError(f"{path} must be a regular file")
        try:
            array = Rows(path)
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise CodingError(f"{path} is not an array: {error}") from error
        if array.dtype != np.uint8 or len(array.shape) != 4:
            got = f"{array.dtype} {array.shape}"
            raise CodingError(f"{path} must be an array of uint8 (N, H, W, C), got {got}")
        if not math.prod(array.shape):
            raise CodingError(f"{path} holds no images: its shape is {array.shape}")
        if array.shape[3] not in (1, 3):
            raise CodingError(
                f"{path} must have images with 1 or 3 channels, got the shape {array.shape}"
            )
        if max(array.shape[1:3]) > 4000:
            height, width = array.shape[1:3]
            raise CodingError(
                f"{path}: images may have at most 4,000 pixels per side, got {height} x {width}"
            )
        self._array = array
        self.count = len(array)
        self.shape: list[int] | None = list(array.shape)
        self.left_out: list[tuple[Path, str]] = []

    def read(self, index: int) -> Picture:
        pixels = self._array[index]
        return Picture(pixels, to_webp(pixels), False)


def open_source(path: Path) -> Source:
    """A folder or a ``.npy`` file.

    Raises:
        CodingError: it is neither, or holds no images.
    """
    if path.is_dir():
        return FolderSource(path)
    if path.suffix == ".npy":
        return ArraySource(path)
    raise CodingError(f"{path} is neither a folder of images nor an array (.npy)")
