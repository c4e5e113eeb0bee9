"""STL-10 from its official binary files, resized from 96 to 48 pixels by default."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ade_base.pictures.show import resize_centre
from ade_base.system import available_cores
from training.data import DataError, Dataset, ImageSet, Report, split_tail
from training.datasets.source import Source

SIZE, DEFAULT_SIZE = 96, 48
CALIBRATING = 3 / 8  # of the test images, if the others are unlabelled: 3,000
FOLDERS, ARCHIVES = ("stl10_binary",), ("stl10_binary.tar.gz",)


def load_stl10(root: Path, image_size: int | None, cache: Path | None, report: Report) -> Dataset:
    """Load the 100,000 unlabelled images, or else the 5,000 labelled ones, and the test images.

    Unlabelled images show more kinds of things than test images. So that both are from one
    population, the images that calibrate are then test images, too.

    Raises:
        DataError: files are missing or damaged.
    """
    size = image_size or DEFAULT_SIZE
    source = Source(root, FOLDERS, ARCHIVES)
    name, labels = "unlabeled", None
    content = source.read("unlabeled_X.bin")
    if content is None:
        name, content = "train", source.read("train_X.bin")
        labels = source.read("train_y.bin")
    test = source.read("test_X.bin")
    if content is None or test is None:
        raise DataError(
            f"{root} does not hold STL-10: unlabeled_X.bin or train_X.bin, and test_X.bin, "
            f"in it, in {FOLDERS[0]} or in {ARCHIVES[0]}"
        )
    test_labels = source.read("test_y.bin")
    report(f"resizing STL-10 to {size} pixels")
    images, test_images = _images(content, f"{name}_X.bin", size), _images(test, "test_X.bin", size)
    parts, splits = split_tail(name, ImageSet(images, _classes(labels)))
    count = round(CALIBRATING * len(test_images)) if name == "unlabeled" else 0
    tested = ImageSet(test_images, _classes(test_labels))
    if count:
        parts["calibrate"], splits["calibrate"] = tested.slice(0, count), f"test[0:{count}]"
    parts["test"] = tested.slice(count, len(tested))
    splits["test"] = f"test[{count}:{len(tested)}]"
    return Dataset("stl10", parts, splits, is_resized=size != SIZE)


def _classes(content: bytes | None) -> np.ndarray | None:
    """Classes counted from 0; the files count them from 1."""
    return None if content is None else np.frombuffer(content, np.uint8).astype(np.int64) - 1


def _images(content: bytes, name: str, size: int) -> np.ndarray:
    if not content or len(content) % (3 * SIZE * SIZE):
        raise DataError(
            f"the size of {name} must be a multiple of {3 * SIZE * SIZE} bytes, got {len(content)}"
        )
    # Each channel is stored column by column.
    stored = np.frombuffer(content, np.uint8).reshape(-1, 3, SIZE, SIZE).transpose(0, 3, 2, 1)
    out = np.empty((len(stored), size, size, 3), np.uint8)

    def shrink(row: int) -> None:
        out[row] = resize_centre(stored[row], size, size)

    with ThreadPoolExecutor(available_cores()) as pool:
        list(pool.map(shrink, range(len(stored))))
    return out
