"""What is compressed: a folder of image files, or an array of images."""

from __future__ import annotations

import hashlib
import math
import zipfile
from pathlib import Path
from typing import Protocol

import numpy as np

from ade_base.files import Rows, image_paths, read_file
from ade_base.pictures.read import IMAGE_SUFFIXES
from extensions.codec.chunks import MAX_PARTS
from extensions.codec.errors import CodingError
from extensions.codec.pictures import Picture, read_picture


class Source(Protocol):
    """Images in a fixed order.

    Attributes:
        kind: ``files`` or ``array``.
        count: number of images.
        identity: differs for other files or another array, but does not cover their content.
        left_out: files that cannot be read, which are not among the images, and why.
    """

    kind: str
    count: int
    identity: str
    left_out: list[tuple[Path, str]]

    def name(self, index: int) -> str | None:
        """A file's path relative to the folder; ``None`` for images of an array."""
        ...

    def read(self, index: int) -> Picture:
        """One image."""
        ...


class FolderSource:
    """The image files below a folder, in the order of their paths.

    Files that cannot be read are left out. Each file is read once at the start to find them,
    because the number of images is fixed once an archive is begun.

    Raises:
        CodingError: there are none, or none can be read.
    """

    kind = "files"

    def __init__(self, folder: Path, keep_metadata: bool) -> None:
        self._folder = folder
        self._keep_metadata = keep_metadata
        self._names: list[str] = []
        self.left_out: list[tuple[Path, str]] = []
        for name in image_paths(folder):
            try:
                read_file(folder / name)  # whole: one with a bad sector can be opened
                self._names.append(name)
            except OSError as error:
                self.left_out.append((folder / name, error.strerror or str(error)))
        self.count = len(self._names)
        if not self.count and self.left_out:
            path, reason = self.left_out[0]
            raise CodingError(f"{folder}: no image can be read; {path}: {reason}")
        if not self.count:
            raise CodingError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        for name in self._names:
            too_deep = name.count("/") >= MAX_PARTS
            if "\\" in name or len(name) > 4096 or too_deep:  # others take "\\" for a folder
                raise CodingError(
                    f"{folder / name}: names in an archive have no backslash, at most 4,096 "
                    f"characters and at most {MAX_PARTS - 1} folders: rename or move the file"
                )
        listed = "\n".join([str(keep_metadata), *self._names])
        self.identity = hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest()

    def name(self, index: int) -> str | None:
        return self._names[index]

    def read(self, index: int) -> Picture:
        path = self._folder / self._names[index]
        try:
            data = read_file(path)
        except OSError as error:
            raise CodingError(f"{path}: {error.strerror}") from error
        return read_picture(self._names[index], data, self._keep_metadata)


class ArraySource:
    """A ``.npy`` file of uint8 ``(N, H, W, 1)`` or ``(N, H, W, 3)``, which is not read as a whole.

    Raises:
        CodingError: the file is not such an array.
    """

    kind = "array"

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
        self.left_out: list[tuple[Path, str]] = []
        self.identity = hashlib.sha256(repr(array.shape).encode()).hexdigest()

    def name(self, index: int) -> str | None:
        return None

    def read(self, index: int) -> Picture:
        return Picture(self._array[index])


def open_source(path: Path, keep_metadata: bool = False) -> Source:
    """A folder or a ``.npy`` file.

    Raises:
        CodingError: it is neither, or holds no images.
    """
    if path.is_dir():
        return FolderSource(path, keep_metadata)
    if path.suffix == ".npy":
        return ArraySource(path)
    raise CodingError(f"{path} is neither a folder of images nor an array (.npy)")
