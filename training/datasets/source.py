"""Reading the files of a published data set, unpacked or still in the archive."""

from __future__ import annotations

import io
import pickle
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from training.data import DataError


class Source:
    """Files by name, in a folder, in the folder that an archive unpacks to, or in the archive.

    Args:
        root: the folder, or the archive.
        folders: names of the folders that archives unpack to.
        archives: names of the archives.
    """

    def __init__(self, root: Path, folders: tuple[str, ...], archives: tuple[str, ...]) -> None:
        self._folders = [root, *(root / folder for folder in folders)]
        self._archives = (
            [root]
            if root.is_file()
            else [root / name for name in archives if (root / name).is_file()]
        )

    def read(self, name: str) -> bytes | None:
        """The content of a file, or ``None`` if there is no file of that name.

        Raises:
            DataError: the archive is damaged.
        """
        for folder in self._folders:
            if (folder / name).is_file():
                return (folder / name).read_bytes()
        for archive in self._archives:
            try:
                with tarfile.open(archive) as tar:
                    for member in tar:
                        if member.isfile() and member.name.rsplit("/", 1)[-1] == name:
                            file = tar.extractfile(member)
                            return file.read() if file else None
            except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
                raise DataError(f"{archive} cannot be read as an archive: {error}") from error
        return None


class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays, which official batches consist of, and refuses everything else."""

    _ALLOWED = frozenset(
        {("numpy", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module.split(".")[0], name) in self._ALLOWED:
            return super().find_class(module, name)
        raise DataError(f"a batch must hold arrays only, got {module}.{name}")


def unpickle_arrays(content: bytes, name: str) -> dict[str, Any]:
    """Unpickle a dictionary of arrays and lists; its keys become strings.

    Raises:
        DataError: the pickle is damaged, or holds anything else.
    """
    try:
        values = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
    except (
        pickle.UnpicklingError,
        EOFError,
        ValueError,
        LookupError,
        AttributeError,
        TypeError,
        ImportError,
    ) as error:
        raise DataError(f"{name} is not a batch of arrays: {error}") from error
    if not isinstance(values, dict):
        raise DataError(f"{name} must be a dictionary of arrays, got a {type(values).__name__}")
    return {
        key.decode() if isinstance(key, bytes) else str(key): value for key, value in values.items()
    }


def classes(values: Any, name: str) -> np.ndarray:
    """Check the classes of images, and return them as int64 ``(N,)``.

    Args:
        values: an array or a list.
        name: of the file, for errors.

    Raises:
        DataError: they are not one whole number for each image.
    """
    try:
        labels = np.asarray(values)
    except ValueError as error:  # a list of lists of different lengths
        raise DataError(f"{name}: the labels are not an array: {error}") from error
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise DataError(
            f"{name}: the labels must be whole numbers (N,), got {labels.dtype} {labels.shape}"
        )
    return labels.astype(np.int64)


def planar(values: np.ndarray, size: int, name: str) -> np.ndarray:
    """Convert rows of planes, ``(N, 3 * size * size)``, to images, ``(N, size, size, 3)``."""
    if values.dtype != np.uint8 or values.ndim != 2 or values.shape[1] != 3 * size * size:
        raise DataError(
            f"{name} must hold uint8 rows of {3 * size * size} values, "
            f"got {values.dtype} {values.shape}"
        )
    return np.ascontiguousarray(values.reshape(-1, 3, size, size).transpose(0, 2, 3, 1))
