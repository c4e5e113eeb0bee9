"""Image files of any size to one array of squares, decoded once and kept in a cache."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import IO, TypeVar

import numpy as np

from serving.files import read_file, replacing
from serving.images import ImageError, read_image, resize_centre
from training.data import PARTS, DataError, Dataset, ImageSet, Rows

Report = Callable[[str], None]
# Of 100 names, where the name's hash puts them: below 80 train, then select, calibrate, test.
_BOUNDS = {"train": 80, "select": 84, "calibrate": 92, "test": 100}
_BY_NAME = "by hash of the file name"
_CHUNK = 1000
Item = TypeVar("Item")


def part_of(name: str) -> str:
    """The part that a file of this name belongs to: a stable hash, so that adding files moves none."""
    bucket = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") % 100
    return next(part for part, bound in _BOUNDS.items() if bucket < bound)


def is_split_by_name(splits: dict[str, str]) -> bool:
    """Whether a data set's parts, in a manifest's words, follow from the names of files."""
    return splits.get("train", "").endswith(_BY_NAME)


def shuffled(items: Sequence[Item]) -> list[Item]:
    """In an order that is always the same: the first of them are a sample, where a folder's first
    are of one class.
    """
    return [items[i] for i in np.random.Generator(np.random.Philox(key=0)).permutation(len(items))]


def cached_pixels(
    identity: str,
    shape: Callable[[], tuple[int, int, int, int]],
    cache: Path | None,
    fill: Callable[[np.ndarray], dict[int, str]],
) -> tuple[np.ndarray, dict[int, str]]:
    """An array that ``fill`` wrote, a memory map of a file.

    Args:
        identity: of the content; the same identity is not filled again.
        shape: gives ``(N, H, W, C)``; asked only where the array is to be filled.
        cache: the file's folder; ``None`` takes a temporary file.
        fill: writes the pixels and returns the rows that are unusable, and why.

    Returns:
        uint8 pixels and the unusable rows.
    """
    if cache is None:
        with tempfile.TemporaryFile() as file:
            pixels = _preallocated(file, shape(), tempfile.gettempdir())
        return pixels, fill(pixels)
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    done, stored = cache / f"images-{key}.json", cache / f"images-{key}.npy"
    if not done.is_file():
        # Several processes may write at once: the last to finish is kept, and all are the same.
        cache.mkdir(parents=True, exist_ok=True)
        with replacing(stored) as file:
            skipped = fill(_preallocated(file, shape(), cache))
        with replacing(done, text=True) as file:
            json.dump(skipped, file)
    unusable = json.loads(done.read_text())
    return np.load(stored, mmap_mode="r"), {int(row): why for row, why in unusable.items()}


def _preallocated(
    file: IO[bytes], shape: tuple[int, int, int, int], where: str | Path
) -> np.ndarray:
    """Map an ``.npy`` file of uint8 zeros, all of whose blocks exist on disk.

    Without them, a write to the map kills the process once the disk is full.

    Raises:
        DataError: the disk, or the user's quota, is full.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    file.flush()
    first, size = file.tell(), math.prod(shape)
    try:
        os.posix_fallocate(file.fileno(), 0, first + size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"{where}: no room for {size / 2**30:.1f} GiB of decoded images; "
            "a smaller image size needs less"
        ) from error
    return np.memmap(file, np.uint8, "r+", first, shape)


def decode_into(
    pixels: np.ndarray,
    size: int,
    files: Iterable[Item],
    read: Callable[[Item], bytes],
    report: Report,
) -> dict[int, str]:
    """Decode image files into the rows of an array, on all cores; returns the unusable rows, and
    why.

    ``read`` gives the content of one file. It is called by the thread that decodes it, so that no
    more files than threads are in memory.
    """
    skipped: dict[int, str] = {}

    def decode(row: int, file: Item) -> None:
        try:
            pixels[row] = resize_centre(read_image(read(file)).pixels, size, size)
        except ImageError as error:
            skipped[row] = str(error)
        except OSError as error:
            skipped[row] = error.strerror or str(error)

    numbered = enumerate(files)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while chunk := list(islice(numbered, _CHUNK)):
            list(pool.map(lambda item: decode(*item), chunk))
            if (chunk[-1][0] + 1) % (10 * _CHUNK) == 0 or len(chunk) < _CHUNK:
                report(f"read {chunk[-1][0] + 1} of {len(pixels)} images")
    return skipped


def split_by_name(
    name: str, files: list[str], pixels: np.ndarray, skipped: dict[int, str], report: Report
) -> Dataset:
    """A data set of files whose parts follow from the hashes of their names.

    Args:
        name: of the data set.
        files: their paths inside it; the last component is hashed.
        pixels: a row for each.
        skipped: rows to leave out, and why.
        report: is told of what is left out.
    """
    for row, why in skipped.items():
        report(f"skipped {files[row]}: {why}")
    rows: dict[str, list[int]] = {part: [] for part in PARTS}
    for row, file in enumerate(files):
        if row not in skipped:
            rows[part_of(file.rsplit("/", 1)[-1])].append(row)
    if not rows["train"]:
        raise DataError(
            f"{name}: {len(files)} files, {len(skipped)} of them unusable, and none left to train on"
        )
    rows = {
        part: shuffled(r) for part, r in rows.items()
    }  # so that the first of a part are of all kinds
    splits = {part: f"{name}: {len(r)} files {_BY_NAME}" for part, r in rows.items()}
    return Dataset(
        name,
        {part: ImageSet(Rows(pixels, r)) for part, r in rows.items()},
        splits,
        [f"{files[row]}: {why}" for row, why in sorted(skipped.items())],
        {part: [files[row] for row in r] for part, r in rows.items()},
    )


def contents(paths: Iterable[Path]) -> Iterator[bytes | OSError]:
    """Files one after another; one that cannot be read is its error."""
    for path in paths:
        try:
            yield read_file(path)
        except OSError as error:
            yield error
