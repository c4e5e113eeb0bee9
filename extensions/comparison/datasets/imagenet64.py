"""ImageNet at 64 pixels from its official batches, as ``.npz`` or as pickles."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from training.data import NOT_ARRAYS, DataError, Dataset, ImageSet, Report, split_tail
from training.datasets.files import cached_pixels
from training.datasets.source import classes, planar, unpickle_arrays

SIZE = 64


def load_imagenet64(
    root: Path, image_size: int | None, cache: Path | None, report: Report
) -> Dataset:
    """Load ``train_data_batch_1`` to ``_10`` and ``val_data``, which becomes the test part.

    Raises:
        DataError: files are missing or damaged.
    """
    # A batch that exists in both forms is read once; 10 comes after 9.
    by_stem = {
        p.stem: p
        for suffix in ("", ".npz")
        for p in root.glob(f"train_data_batch_*{suffix}")
        if p.suffix == suffix and p.is_file()
    }
    train = sorted(by_stem.values(), key=lambda p: (len(p.stem), p.stem))
    test = [p for p in (root / "val_data.npz", root / "val_data") if p.is_file()][:1]
    if not train or not test:
        raise DataError(
            f"{root} does not hold ImageNet 64x64: train_data_batch_1 to _10 and val_data, "
            "each a pickle or an .npz file"
        )
    batches = [f"train_data_batch_{i}" for i in range(1, 11)]
    if missing := [batch for batch in batches if batch not in by_stem]:
        report(f"{root} lacks {', '.join(missing)}: training images are those of the others")
    return _assemble(train, test[0], cache, report)


def _assemble(train: list[Path], test: Path, cache: Path | None, report: Report) -> Dataset:
    version = json.dumps([[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in train])

    labels = [_labels(path) for path in train]

    def fill(pixels: np.ndarray) -> tuple[dict[int, str], bool]:
        first = 0
        for path, its in zip(train, labels, strict=True):
            images = _images(path)
            if len(images) != len(its):
                raise DataError(f"{path} holds {len(images)} images and {len(its)} labels")
            pixels[first : first + len(images)] = images
            first += len(images)
            report(f"read {first} of {len(pixels)} images")
        return {}, True

    images, _ = cached_pixels(
        "imagenet64", version, lambda: (sum(map(len, labels)), SIZE, SIZE, 3), cache, fill
    )
    parts, splits = split_tail("train", ImageSet(images, np.concatenate(labels)))
    held_out = _images(test)
    return Dataset(
        "imagenet64",
        {**parts, "test": ImageSet(held_out, _labels(test))},
        {**splits, "test": f"val[0:{len(held_out)}]"},
    )


def _read(path: Path, key: str) -> np.ndarray:
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return np.asarray(arrays[key])
        return np.asarray(unpickle_arrays(path.read_bytes(), path.name)[key])
    except NOT_ARRAYS as error:
        raise DataError(f"{path} is not a batch of ImageNet 64x64: {error}") from error


def _images(path: Path) -> np.ndarray:
    return planar(_read(path, "data"), SIZE, path.name)


def _labels(path: Path) -> np.ndarray:
    """Classes counted from 0; the files count them from 1."""
    return classes(_read(path, "labels"), path.name) - 1
