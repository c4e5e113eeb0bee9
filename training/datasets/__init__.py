"""Loaders, one file a data set: each gives a :class:`training.data.Dataset`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from training.data import DataError, Dataset
from training.datasets.cifar10 import load_cifar10
from training.datasets.files import Report
from training.datasets.folder import load_folder
from training.datasets.imagenet64 import load_imagenet64
from training.datasets.lsun import load_lsun
from training.datasets.stl10 import load_stl10

NAMES = {
    "cifar10": 32,
    "stl10": None,
    "imagenet64": 64,
    "lsun": None,
}  # and the size of the images, where it is fixed


def load_dataset(
    data: str,
    root: str | None,
    image_size: int | None = None,
    cache: Path | None = None,
    report: Report = lambda line: None,
    fits: Callable[[int], object] = lambda side: None,
) -> Dataset:
    """A data set by name or by folder.

    Args:
        data: one of :data:`NAMES`, or the path of a folder of images (searched recursively).
        root: where a named data set lies.
        image_size: pixels a side; images of another size are cropped to the centre square and
            resized with antialiasing. Unless given it is the data set's own, or that of a folder's
            first file.
        cache: a folder for the decoded pixels; without one they are kept in memory.
        report: is told of progress, a line at a time.
        fits: is asked of a size that the data set does not fix before images are decoded, and
            raises where it will not do.

    Raises:
        DataError: nothing usable is there.
    """
    if image_size is not None and image_size < 2:
        raise DataError(f"an image size must be at least 2 pixels, got {image_size}")
    if data not in NAMES:
        if root is not None:
            raise DataError(
                f"root goes with a named data set ({', '.join(NAMES)}), and {data!r} is a folder"
            )
        if not Path(data).is_dir():
            raise DataError(
                f"data must be a folder or one of {', '.join(NAMES)}, got {data!r}, "
                "which is neither"
            )
        return load_folder(Path(data), image_size, cache, report, fits)
    if root is None:
        raise DataError(f"the data set {data} needs root, the folder that holds it")
    if image_size is not None and NAMES[data] not in (None, image_size):
        raise DataError(
            f"images of {data} have {NAMES[data]} pixels per side, got an image size of {image_size}"
        )
    path = Path(root)
    if not path.exists():
        raise DataError(f"root does not exist: {path}")
    if image_size is not None:
        fits(image_size)
    if data == "cifar10":
        return load_cifar10(path)
    if data == "stl10":
        return load_stl10(path, image_size, report)
    if data == "imagenet64":
        return load_imagenet64(path, cache, report)
    return load_lsun(path, image_size, cache, report)
