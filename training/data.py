"""Images to train on: CIFAR-10 or any folder, split once into the parts that everything else uses.

A part is an :class:`ImageSet`; the parts are ``train``, ``select`` (choose checkpoints, fit statistics),
``calibrate`` (seen by nothing but the calibration) and ``test`` (reported on, nothing else).
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from serving.images import ImageError, read_image

PARTS = ("train", "select", "calibrate", "test")
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
# Of 100 files, where the file name's hash puts them: below 80 train, then select, calibrate, test.
_FOLDER_BOUNDS = {"train": 80, "select": 84, "calibrate": 92, "test": 100}
_CIFAR10_SPLITS = {"train": "train[0:45000]", "select": "train[45000:47000]",
                   "calibrate": "train[47000:50000]", "test": "test[0:10000]"}


class DataError(ValueError):
    """A data set that is not there or cannot be used."""


@dataclass(frozen=True)
class ImageSet:
    """Images in memory, or chosen rows of a memory map: uint8 ``(N, H, W, C)``."""

    images: np.ndarray | _Rows

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int, seed: int, first_batch: int = 0) -> Iterator[np.ndarray]:
        """Endless batches, each epoch in an order of its own that depends on ``(seed, epoch)`` alone.

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
                    order = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64))).permutation(
                        len(self))
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
    """

    name: str
    parts: dict[str, ImageSet]
    splits: dict[str, str]
    skipped: list[str] = field(default_factory=list)

    @property
    def image_size(self) -> int:
        return int(self.parts["train"].images.shape[1])

    @property
    def channels(self) -> int:
        return int(self.parts["train"].images.shape[3])


def load_dataset(data: str, root: str | None, image_size: int | None = None, cache: Path | None = None,
                 report: Callable[[str], None] = lambda line: None) -> Dataset:
    """A data set by name or by folder.

    Args:
        data: ``cifar10``, or the path of a folder of images (searched recursively).
        root: where a named data set lies.
        image_size: pixels a side; a folder's images of another size are cropped to the centre square and
            resized with antialiasing. Taken from the first file unless given.
        cache: a folder for the decoded pixels; without one they are kept in memory.
        report: is told of progress, a line at a time.

    Raises:
        DataError: nothing usable is there.
    """
    if data == "cifar10":
        if root is None:
            raise DataError("--data cifar10 needs --root DIR, the folder that holds it")
        if image_size not in (None, 32):
            raise DataError(f"CIFAR-10 images are 32 pixels a side; image size {image_size} was asked for")
        return _cifar10(Path(root))
    if root is not None:
        raise DataError(f"--root goes with a named data set (cifar10); {data!r} is a folder")
    if not Path(data).is_dir():
        raise DataError(f"no data set and no folder is called {data!r}")
    return _folder(Path(data), image_size, cache, report)


def _cifar10(root: Path) -> Dataset:
    train, test = _cifar10_strips(root) if list(root.glob("train_*.webp")) else _cifar10_batches(root)
    parts = {"train": train[:45000], "select": train[45000:47000], "calibrate": train[47000:], "test": test}
    return Dataset("cifar10", {name: ImageSet(images) for name, images in parts.items()}, dict(_CIFAR10_SPLITS))


def _cifar10_strips(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Lossless WebP strips of 500 images, 32 wide and 16,000 high."""
    out = []
    for split, count in (("train", 50000), ("test", 10000)):
        strips = [np.asarray(Image.open(f).convert("RGB")) for f in sorted(root.glob(f"{split}_*.webp"))]
        images = np.concatenate([s.reshape(-1, 32, 32, 3) for s in strips]) if strips else np.empty((0, 32, 32, 3))
        if len(images) != count:
            raise DataError(f"{root}: {split}_*.webp hold {len(images)} images; CIFAR-10 has {count}")
        out.append(images)
    return out[0], out[1]


class _ArraysOnly(pickle.Unpickler):
    """The official archive is a pickle of arrays; nothing else in it is built."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.split(".")[0], name) in {("numpy", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype")}:
            return super().find_class(module, name)
        raise DataError(f"a CIFAR-10 batch holds {module}.{name}, which is no array")


def _cifar10_batches(root: Path) -> tuple[np.ndarray, np.ndarray]:
    """The official Python batches, as unpacked by hand or by torchvision."""
    folder = root if (root / "data_batch_1").is_file() else root / "cifar-10-batches-py"
    if not (folder / "data_batch_1").is_file():
        raise DataError(f"{root} holds no CIFAR-10: neither train_*.webp strips nor cifar-10-batches-py/data_batch_1")

    def read(name: str) -> np.ndarray:
        with open(folder / name, "rb") as file:
            rows = _ArraysOnly(file, encoding="bytes").load()[b"data"]
        return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)

    train = np.concatenate([read(f"data_batch_{i}") for i in range(1, 6)])
    return np.ascontiguousarray(train), np.ascontiguousarray(read("test_batch"))


def part_of(name: str) -> str:
    """The part that a file of this name belongs to: a stable hash, so that adding files moves none."""
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    return next(part for part, bound in _FOLDER_BOUNDS.items() if bucket < bound)


def _folder(folder: Path, image_size: int | None, cache: Path | None, report: Callable[[str], None]) -> Dataset:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    if image_size is None:
        image_size = _first_size(files)
    names = [p.name for p in files]
    listing = json.dumps([image_size, [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns)
                                       for p in files]])
    key = hashlib.sha256(listing.encode()).hexdigest()[:16]
    shape = (len(files), image_size, image_size, 3)
    done = cache / f"images-{key}.json" if cache else None
    if cache and done and done.is_file():
        pixels = np.load(cache / f"images-{key}.npy", mmap_mode="r")
        skipped = dict(json.loads(done.read_text()))
    else:
        # Each of several processes writes a file of its own; the last to finish is kept, and all are the same.
        temporary = cache / f"images-{key}.{os.getpid()}.tmp" if cache else None
        if cache and temporary:
            cache.mkdir(parents=True, exist_ok=True)
            pixels = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
        else:
            pixels = np.empty(shape, np.uint8)
        skipped = _decode_all(files, pixels, image_size, report)
        if cache and done and temporary:
            pixels.flush()
            os.replace(temporary, cache / f"images-{key}.npy")
            temporary.write_text(json.dumps(skipped))
            os.replace(temporary, done)
    skipped = {int(i): why for i, why in skipped.items()}
    for i, why in skipped.items():
        report(f"skipped {files[i]}: {why}")
    rows: dict[str, list[int]] = {part: [] for part in PARTS}
    for i, name in enumerate(names):
        if i not in skipped:
            rows[part_of(name)].append(i)
    if not rows["train"]:
        raise DataError(f"{folder}: {len(files)} files, {len(skipped)} of them unusable, and none left to train on")
    splits = {part: f"{folder.name}: {len(r)} files by hash of the file name" for part, r in rows.items()}
    return Dataset(folder.name, {part: ImageSet(_Rows(pixels, r)) if cache else ImageSet(pixels[r])
                                 for part, r in rows.items()}, splits,
                   [f"{files[i].relative_to(folder)}: {why}" for i, why in sorted(skipped.items())])


class _Rows:
    """Chosen rows of a memory map, read when asked for."""

    def __init__(self, pixels: np.ndarray, rows: list[int]) -> None:
        self._pixels = pixels
        self._rows = np.asarray(rows, np.int64)
        self.shape = (len(rows), *pixels.shape[1:])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.asarray(self._pixels[self._rows[index]])


def _first_size(files: list[Path]) -> int:
    for path in files:
        try:
            return min(read_image(path.read_bytes()).pixels.shape[:2])
        except (ImageError, OSError):
            continue
    raise DataError(f"none of {len(files)} image files can be read, the first is {files[0]}")


def _decode_all(files: list[Path], pixels: np.ndarray, size: int, report: Callable[[str], None]) -> dict[int, str]:
    skipped: dict[int, str] = {}

    def decode(i: int) -> None:
        try:
            image = read_image(files[i].read_bytes()).pixels
        except (ImageError, OSError) as error:
            skipped[i] = str(error)
            return
        if image.shape[:2] != (size, size):
            height, width = image.shape[:2]
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            square = Image.fromarray(image[top:top + side, left:left + side])
            image = np.asarray(square.resize((size, size), Image.Resampling.LANCZOS))
        pixels[i] = image

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for count, _ in enumerate(pool.map(decode, range(len(files))), 1):
            if count % 10000 == 0 or count == len(files):
                report(f"read {count} of {len(files)} images")
    return skipped
