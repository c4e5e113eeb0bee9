"""Held-out images of a folder that are not copies of training images."""

from __future__ import annotations

import numpy as np

from fitting.survey import Survey
from training.data import Dataset
from training.datasets.files import shuffled


def rows_of(dataset: Dataset, found: Survey, part: str) -> list[int]:
    """Rows of a part's images that are not copies of training images, shuffled."""
    left_out = set(found.leaking)
    return shuffled([row for row, name in enumerate(dataset.files[part]) if name not in left_out])


def held_out_images(dataset: Dataset, found: Survey, most: int) -> np.ndarray:
    """Some test images that are not copies of training images: uint8 ``(N, H, W, C)``."""
    return np.asarray(dataset.parts["test"].images[rows_of(dataset, found, "test")[:most]])
