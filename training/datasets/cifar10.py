"""CIFAR-10 from lossless strips, torchvision's layout or the official archives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from training.data import NOT_ARRAYS, DataError, Dataset, ImageSet, Report
from training.datasets.source import Source, classes, planar, unpickle_arrays

SIZE = 32
FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
ARCHIVES = ("cifar-10-python.tar.gz", "cifar-10-binary.tar.gz")
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
COUNTS = {"train": 50000, "test": 10000}
# The calibration of the shipped bundle depends on this split, which must not change.
TRAIN, SELECT = 45000, 47000


def load_cifar10(root: Path, image_size: int | None, cache: Path | None, report: Report) -> Dataset:
    """Load the 60,000 images, of which 45,000 are the training part.

    Raises:
        DataError: files are missing or incomplete.
    """
    strips = root.is_dir() and any(root.glob("train_*.webp"))
    source = Source(root, FOLDERS, ARCHIVES)
    train, test = (
        _strips(root, s) if strips else _batches(source, root, s) for s in ("train", "test")
    )
    for name, images in (("train", train), ("test", test)):
        if len(images) != COUNTS[name]:
            raise DataError(
                f"CIFAR-10 has {COUNTS[name]} {name} images, {root} holds {len(images)}"
            )
    bounds = {"train": (0, TRAIN), "select": (TRAIN, SELECT), "calibrate": (SELECT, len(train))}
    parts = {part: train.slice(a, b) for part, (a, b) in bounds.items()}
    splits = {part: f"train[{a}:{b}]" for part, (a, b) in bounds.items()}
    return Dataset(
        "cifar10",
        {**parts, "test": test},
        {**splits, "test": f"test[0:{len(test)}]"},
    )


def _strips(root: Path, split: str) -> ImageSet:
    """Read WebP files of vertically stacked images, 32 pixels wide, and ``labels.npz``."""
    strips = [_strip(f) for f in sorted(root.glob(f"{split}_*.webp")) if f.is_file()]
    images = np.concatenate(strips) if strips else np.empty((0, SIZE, SIZE, 3))
    path = root / "labels.npz"
    if not path.is_file():
        return ImageSet(images)
    try:
        with np.load(path, allow_pickle=False) as stored:
            labels = classes(stored[split], split)
    except NOT_ARRAYS as error:
        raise DataError(f"{path} must hold the array {split}: {error}") from error
    return ImageSet(images, labels)


def _strip(path: Path) -> np.ndarray:
    try:
        pixels = np.asarray(Image.open(path).convert("RGB"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    if pixels.shape[1] != SIZE or pixels.shape[0] % SIZE:
        raise DataError(
            f"{path} must be {SIZE} pixels wide and a multiple of {SIZE} high, got "
            f"{pixels.shape[1]} x {pixels.shape[0]}"
        )
    return pixels.reshape(-1, SIZE, SIZE, 3)


def _batches(source: Source, root: Path, split: str) -> ImageSet:
    images, labels = [], []
    for name in BATCHES[split]:
        if (content := source.read(name)) is not None:
            batch = unpickle_arrays(content, name)
            if missing := {"data", "labels"} - set(batch):
                raise DataError(f"{name} holds no {' and no '.join(sorted(missing))}")
            images.append(planar(np.asarray(batch["data"]), SIZE, name))
            labels.append(classes(batch["labels"], name))
        elif (content := source.read(f"{name}.bin")) is not None:
            if len(content) % (1 + 3 * SIZE * SIZE):
                raise DataError(
                    f"the size of {name}.bin must be a multiple of {1 + 3 * SIZE * SIZE} bytes, "
                    f"got {len(content)}"
                )
            rows = np.frombuffer(content, np.uint8).reshape(-1, 1 + 3 * SIZE * SIZE)
            images.append(planar(rows[:, 1:], SIZE, name))
            labels.append(rows[:, 0].astype(np.int64))
        else:
            raise DataError(
                f"{root} does not hold CIFAR-10: it has neither train_*.webp strips nor "
                f"{name} or {name}.bin, also not in {', '.join((*FOLDERS, *ARCHIVES))}"
            )
    return ImageSet(np.concatenate(images), np.concatenate(labels))
