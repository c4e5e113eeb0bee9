"""What a data set is, wherever it came from: parts that everything else uses, split once.

A part is an :class:`ImageSet`; the parts are ``train``, ``select`` (choose checkpoints, fit
statistics), ``calibrate`` (seen by nothing but the calibration) and ``test`` (reported on, nothing
else). The loaders are in :mod:`training.datasets`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

PARTS = ("train", "select", "calibrate", "test")
CHANNELS = 3  # of the images of every loader


class DataError(ValueError):
    """A data set that is not there or cannot be used."""


class Rows:
    """Chosen rows of an array or of a memory map, copied when asked for."""

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
    """Images, or chosen rows of more: uint8 ``(N, H, W, C)``; their classes ``(N,)`` if known."""

    images: np.ndarray | Rows
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int, seed: int, first_batch: int = 0) -> Iterator[np.ndarray]:
        """Endless batches, each epoch in an order of its own that depends on ``(seed, epoch)``
        alone.

        ``first_batch`` skips that many without reading them, which is how a run is resumed.
        """
        if len(self) == 0:
            raise DataError("there are no images to train on")
        index = first_batch * batch_size
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
        name: as given by the user, without the path's parents.
        parts: by the names of :data:`PARTS`.
        splits: what each part is, in words for manifests and reports.
        skipped: files that were left out, and why.
        files: of a folder, the file behind each row of each part, relative to it.
    """

    name: str
    parts: dict[str, ImageSet]
    splits: dict[str, str]
    skipped: list[str] = field(default_factory=list)
    files: dict[str, list[str]] = field(default_factory=dict)

    @property
    def image_size(self) -> int:
        return int(self.parts["train"].images.shape[1])

    @property
    def channels(self) -> int:
        return int(self.parts["train"].images.shape[3])


def split_tail(name: str, images: np.ndarray) -> tuple[dict[str, ImageSet], dict[str, str]]:
    """Of the official training images the last tenth is held out: two fifths of it to select, the
    rest to calibrate.
    """
    first, second = round(0.9 * len(images)), round(0.94 * len(images))
    bounds = {"train": (0, first), "select": (first, second), "calibrate": (second, len(images))}
    return (
        {part: ImageSet(images[a:b]) for part, (a, b) in bounds.items()},
        {part: f"{name}[{a}:{b}]" for part, (a, b) in bounds.items()},
    )
