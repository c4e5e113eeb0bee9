"""Loaders of data sets, one per file; each returns a :class:`training.data.Dataset`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ade_base.extensions import DataSet, added, load
from training.data import DataError, Dataset, Report
from training.datasets.folder import first_size, image_files, load_folder

_SETS: dict[str, DataSet] = {
    "cifar10": DataSet("training.datasets.cifar10:load_cifar10", 32, True),
    **added("datasets"),
}
NAMES = tuple(_SETS)


def image_size_of(data: str, root: str | None, image_size: int | None = None) -> int:
    """Image size with which :func:`load_dataset` would load a data set, without loading it.

    Args:
        data: as for :func:`load_dataset`.
        root: as for :func:`load_dataset`.
        image_size: as for :func:`load_dataset`.

    Returns:
        Height and width, pixels.

    Raises:
        DataError: the data set does not exist or cannot be used.
    """
    _check(data, root, image_size)
    if data not in NAMES:
        files = image_files(Path(data))
        return image_size or first_size(files)
    return _named_size(data, image_size)


def load_dataset(
    data: str,
    root: str | None,
    image_size: int | None = None,
    cache: Path | None = None,
    report: Report = lambda line: None,
    fits: Callable[[int], object] = lambda side: None,
) -> Dataset:
    """Load a data set by name, or a folder of images.

    Args:
        data: one of :data:`NAMES`, or the path of a folder of images (searched recursively).
        root: the folder that holds a named data set.
        image_size: height and width, pixels; other images are cropped to their centre square and
            resized with antialiasing. The default is the data set's own size, or that of a folder's
            first image.
        cache: folder for the decoded pixels; without one they are kept in a temporary file.
        report: called with each line of progress.
        fits: called with the image size before images are decoded; raises if it is unsuitable.

    Raises:
        DataError: the data set does not exist or cannot be used.
    """
    path = _check(data, root, image_size)
    if data not in NAMES:
        return load_folder(path, image_size, cache, report, fits)
    fits(_named_size(data, image_size))
    loaded: Dataset = load(_SETS[data].code)(path, image_size, cache, report)
    return loaded


def _named_size(data: str, image_size: int | None) -> int:
    return image_size or _SETS[data].size


def _check(data: str, root: str | None, image_size: int | None) -> Path:
    """Check what names a data set; returns the folder of its files.

    Raises:
        DataError: the data set does not exist, or has another image size.
    """
    if image_size is not None and image_size < 2:
        raise DataError(f"the image size must be at least 2 pixels, got {image_size}")
    if data not in NAMES:
        if not Path(data).is_dir():
            raise DataError(
                f"data must be a folder or one of {', '.join(NAMES)}, got {data!r}, "
                "which is neither"
            )
        if root is not None:
            raise DataError(
                f"root goes with a named data set ({', '.join(NAMES)}), and {data!r} is a folder"
            )
        return Path(data)
    if root is None:
        raise DataError(f"the data set {data} needs root, the folder that holds it")
    size = _SETS[data].size
    if _SETS[data].is_fixed and image_size not in (None, size):
        raise DataError(
            f"images of {data} have {size} pixels per side, got image size {image_size}"
        )
    path = Path(root)
    if not path.exists():
        raise DataError(f"root does not exist: {path}")
    return path
