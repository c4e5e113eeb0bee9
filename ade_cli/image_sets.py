"""Sets of images that are given on the command line: folders and files of arrays."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from ade_base.files import Rows
from ade_cli.data_options import say
from ade_cli.paths import say_what_is_not_followed
from export.gate.images import readable
from training.data import NOT_ARRAYS, DataError
from training.datasets.files import shuffled
from training.datasets.folder import image_files

NPY, ZIP = b"\x93NUMPY", b"PK\x03\x04"  # first bytes of an .npy and of an .npz file


def name_of(path: Path) -> str:
    """The name of a set of images: that of a file without its ending, or of a folder."""
    return Path(os.path.abspath(path)).name if path.is_dir() else path.stem


class GivenImages:
    """The images of a folder or of a file of arrays; can be iterated any number of times.

    Args:
        path: a folder (searched recursively), an ``.npy``, or an ``.npz`` of one array of images.
        limit: at most this many of them, always the same ones.
        keep: of a folder, which files to use.

    Raises:
        DataError: there is no such path, or it holds no images.
    """

    def __init__(
        self, path: Path, limit: int | None, keep: Callable[[Path], bool] = lambda file: True
    ) -> None:
        if not path.exists():
            raise DataError(f"there is no {path}")
        self._path, self._limit, self._keep = path, limit, keep
        # Read here too: the images of other sets may take long before these are needed.
        if path.is_dir():
            say_what_is_not_followed(path)
            image_files(path)
        else:
            _array(path)

    def __iter__(self) -> Iterator[bytes | np.ndarray]:
        if self._path.is_dir():
            files = [path for path in image_files(self._path) if self._keep(path)]
            return readable(shuffled(files)[: self._limit], say)
        images = _array(self._path)
        return (images[i] for i in shuffled(range(len(images)))[: self._limit])


def _array(path: Path) -> np.ndarray | Rows:
    """Read the images of an ``.npy``, or of an ``.npz`` that holds one array, whatever its name."""
    if not path.is_file():  # opening a pipe would wait for a writer
        raise DataError(f"{path} must be a folder of images or a regular file")
    try:
        with open(path, "rb") as file:
            begin = file.read(len(NPY))
            file.seek(0)
            is_of_arrays = begin.startswith((NPY, ZIP))
            found: list[np.ndarray | Rows] = []
            if begin == NPY:  # it may be larger than memory, and few images may be used
                found = [Rows(path)]
            elif is_of_arrays:
                found = list(np.load(file, allow_pickle=False).values())
    except NOT_ARRAYS as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if not is_of_arrays:
        raise DataError(
            f"{path} must be a folder of images, an .npy or an .npz file; its content is neither"
        )
    arrays = [one for one in found if isinstance(one, np.ndarray | Rows)]  # of an .npz, or bytes
    images = [one for one in arrays if one.dtype == np.uint8 and len(one.shape) == 4]
    if len(images) != 1:
        raise DataError(
            f"{path} must hold one array of images, uint8 (N, H, W, C), got "
            f"{', '.join(f'{one.dtype} {one.shape}' for one in arrays) or 'none'}"
        )
    return images[0]
