"""Data sets and their parts, whatever their source.

The parts are ``train``, ``select`` (to choose checkpoints and fit statistics), ``calibrate`` (used
by the calibration only) and ``test`` (used for reported figures: nothing is fitted to it, but the
shipped model and its encoder were chosen by such figures, see docs/explanation/trials.md). A part
is an :class:`ImageSet`. The loaders are in :mod:`training.datasets`.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ade_base.errors import UserError

PARTS = ("train", "select", "calibrate", "test")
CHANNELS = 3  # of the images of every loader
# Held-out copies from which on a picture, such as a camera's black frame, counts as one that will
# repeat in use. Fewer copies are an accident: those of a training image would look better than use,
# and those of each other would make figures look surer than they are.
REPEATS = 5

Report = Callable[[str], None]  # called with each line of progress

# What NumPy raises while it loads arrays from a file that is damaged or something else.
NOT_ARRAYS = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


class DataError(UserError, ValueError):
    """A data set does not exist or cannot be used."""


class Rows:
    """Chosen rows of an array or a memory map, copied on access."""

    def __init__(self, pixels: np.ndarray, rows: list[int]) -> None:
        self._pixels = pixels
        self._rows = np.asarray(rows, np.int64)
        self.shape = (len(rows), *pixels.shape[1:])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self._pixels[self._rows[index]])


@dataclass(frozen=True)
class ImageSet:
    """Images, uint8 ``(N, H, W, C)``, and their classes, ``(N,)``, if known.

    Raises:
        DataError: there is not one class for each image.
    """

    images: np.ndarray | Rows
    labels: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.labels is not None and self.labels.shape != (len(self.images),):
            raise DataError(
                f"each image needs one label, got {len(self.images)} images and labels of shape "
                f"{self.labels.shape}"
            )

    def __len__(self) -> int:
        return len(self.images)

    def slice(self, first: int, last: int) -> ImageSet:
        """The images from ``first`` up to, but not including, ``last``."""
        labels = None if self.labels is None else self.labels[first:last]
        return ImageSet(self.images[first:last], labels)

    def take(self, rows: list[int]) -> ImageSet:
        """The images of some rows, which are copied."""
        labels = None if self.labels is None else self.labels[rows]
        return ImageSet(self.images[rows], labels)

    def digests(self) -> Iterator[bytes]:
        """SHA-256 of each image's pixels, by which copies are found."""
        for row in range(len(self)):
            yield hashlib.sha256(np.ascontiguousarray(self.images[row]).data).digest()

    def batches(self, batch_size: int, seed: int, first_image: int = 0) -> Iterator[np.ndarray]:
        """Yield batches without end.

        Args:
            batch_size: images per batch.
            seed: of the order; an epoch's order depends on ``(seed, epoch)`` alone.
            first_image: number of images to skip without reading them, as for a resumed run.
        """
        if len(self) == 0:
            raise DataError("there are no images to train on")
        index = first_image
        epoch, order = -1, np.empty(0, np.int64)
        while True:
            rows = []
            for position in range(index, index + batch_size):
                if position // len(self) != epoch:
                    epoch = position // len(self)
                    order = np.random.Generator(
                        np.random.Philox(key=np.array([seed, epoch], np.uint64))
                    ).permutation(len(self))
                rows.append(order[position % len(self)])
            yield self.images[rows]
            index += batch_size


@dataclass(frozen=True)
class Dataset:
    """A data set and its parts.

    Attributes:
        name: name of the data set, or of the folder without its parents.
        parts: images by the names of :data:`PARTS`.
        splits: description of each part, for manifests and reports.
        skipped: files that were left out, with the reasons.
        files: for a folder, the file behind each row of each part, relative to the folder.
        folder: of these files; ``None`` if the data set is not a folder of image files.
        is_resized: whether images of a named data set had another size before they were read.
    """

    name: str
    parts: dict[str, ImageSet]
    splits: dict[str, str]
    skipped: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)
    folder: Path | None = None
    is_resized: bool = False

    @property
    def image_size(self) -> int:
        return int(self.parts["train"].images.shape[1])

    @property
    def channels(self) -> int:
        return int(self.parts["train"].images.shape[3])

    def copies_of_training(self, images: ImageSet) -> int:
        """How many images have the pixels of a training image."""
        digests = list(images.digests())
        among = set(digests)  # not those of all training images, which may be millions
        copied = {digest for digest in self.parts["train"].digests() if digest in among}
        return sum(digest in copied for digest in digests)


def split_tail(name: str, images: ImageSet) -> tuple[dict[str, ImageSet], dict[str, str]]:
    """Split official training images: nine tenths to train, 4 % to select, 6 % to calibrate.

    Args:
        name: of the part in the official data set.
        images: of that part.

    Returns:
        The parts, and their descriptions as slices of ``name``.
    """
    first, second = round(0.9 * len(images)), round(0.94 * len(images))
    bounds = {"train": (0, first), "select": (first, second), "calibrate": (second, len(images))}
    return (
        {part: images.slice(a, b) for part, (a, b) in bounds.items()},
        {part: f"{name}[{a}:{b}]" for part, (a, b) in bounds.items()},
    )
