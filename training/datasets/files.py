"""Decoding of image files to one array of squares, with a cache, and the split by name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np

from ade_base.files import LOCK, locked, preallocated, read_file, write_text
from ade_base.messages import commonest, counted
from ade_base.pictures.limits import ImageError
from ade_base.pictures.read import read_image
from ade_base.pictures.show import resize_centre
from ade_base.system import available_cores
from training.data import PARTS, DataError, Dataset, ImageSet, Report, Rows

# The hash of a name, modulo 100, is below the bound of its part and not below the one before.
_BOUNDS = {"train": 80, "select": 84, "calibrate": 92, "test": 100}
_BY_NAME = "by hash of the file name"
_CHUNK = 1000
_REPORT_S = 10.0  # between two lines of progress
_PREPROCESSING = 1  # part of a cache's key: raise it when decoding or resizing gives other pixels
# Errors of read_file for pipes and the like, and for files that are too large. Others may pass,
# such as those of a network.
_PERMANENT_ERRORS = (errno.EINVAL, errno.EFBIG)
RETRY_S = 2.0  # until files are read again whose errors may pass
A_FEW = 5  # files, or 1 % of all, may fail without a failure of the storage
Item = TypeVar("Item")


def part_of(name: str) -> str:
    """The part of a file by a stable hash of its name, so that adding files moves no other."""
    bucket = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") % 100
    return next(part for part, bound in _BOUNDS.items() if bucket < bound)


def is_split_by_name(splits: dict[str, str]) -> bool:
    """Whether a data set was split by the names of its files, according to its ``splits``."""
    return splits.get("train", "").endswith(_BY_NAME)


def shuffled(items: Sequence[Item]) -> list[Item]:
    """Shuffle items in a fixed order, so that the first ones are a sample of all.

    The first files of a folder are often of one class.
    """
    return [items[i] for i in np.random.Generator(np.random.Philox(key=0)).permutation(len(items))]


def cached_pixels(
    source: str,
    version: str,
    shape: Callable[[], tuple[int, int, int, int]],
    cache: Path | None,
    fill: Callable[[np.ndarray], tuple[dict[int, str], bool]],
) -> tuple[np.ndarray, dict[int, str]]:
    """Map an array of pixels, which is filled unless the cache has it.

    Processes that start together fill it once: the others wait. Once it is filled, arrays of other
    versions of the same source are removed, but not by one of several nodes of ``torchrun``.
    Processes on the same machine that have mapped them can still read them.

    Args:
        source: what the pixels are of, and their size.
        version: of its content; the same version is not filled again.
        shape: returns ``(N, H, W, C)``; called only if the array must be filled.
        cache: folder of the array's file; ``None`` for a temporary file.
        fill: writes the pixels and returns the unusable rows, each with the reason, and whether to
            keep the pixels in the cache.

    Returns:
        uint8 pixels, and the unusable rows, each with the reason.

    Raises:
        DataError: the disk is full.
    """
    if cache is None:
        with tempfile.TemporaryFile() as file:
            pixels = preallocated(file, shape(), tempfile.gettempdir(), _no_room)
        return pixels, fill(pixels)[0]
    all_versions = f"images-{_short_hash(source)}-"
    name = all_versions + _short_hash(f"{_PREPROCESSING} {version}")
    done, stored = cache / f"{name}.json", cache / f"{name}.npy"
    if (found := _stored(done, stored)) is not None:
        return found
    with locked(cache / LOCK, wait=True):
        if (found := _stored(done, stored)) is not None:
            return found
        partial = cache / "images.tmp"  # one name: what a killed process left is replaced
        try:
            with open(partial, "w+b") as file:
                pixels = preallocated(file, shape(), cache, _no_room)
                skipped, is_kept = fill(pixels)
                if not is_kept:
                    return pixels, skipped
                os.fsync(file.fileno())
            partial.replace(stored)
        finally:
            partial.unlink(missing_ok=True)
        write_text(done, json.dumps(skipped))
        # Another node may use another version, because its copies of the files have other times.
        is_alone = int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1
        for old in cache.glob(f"{all_versions}*") if is_alone else ():
            if old not in (done, stored):
                old.unlink()
        return np.load(stored, mmap_mode="r"), skipped


def _stored(done: Path, stored: Path) -> tuple[np.ndarray, dict[int, str]] | None:
    """A cache's array and unusable rows; ``None`` if they are missing or damaged."""
    try:
        unusable = json.loads(done.read_text())
        return np.load(stored, mmap_mode="r"), {int(row): why for row, why in unusable.items()}
    except (FileNotFoundError, ValueError, EOFError, AttributeError):
        return None


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _no_room(message: str) -> DataError:
    return DataError(f"{message}; a smaller image size needs less")


def decode_into(
    pixels: np.ndarray,
    size: int,
    files: Sequence[Item],
    read: Callable[[Item], bytes],
    report: Report,
) -> tuple[dict[int, str], set[int]]:
    """Decode image files into the rows of an array, on all cores.

    Files whose errors may pass are read once more at the end.

    Args:
        pixels: uint8 ``(N, size, size, 3)``, written to.
        size: height and width, pixels.
        files: one per row.
        read: returns the content of a file; called by the thread that decodes it, so that memory
            holds no more files than there are threads.
        report: called with each line of progress, and of what was converted in how many files.

    Returns:
        The unusable rows in order, each with the reason, and those of them that may be readable
        another time.
    """
    skipped: dict[int, str] = {}
    passing: set[int] = set()

    def decode(row: int, file: Item) -> list[str]:
        try:
            image = read_image(read(file))
            pixels[row] = resize_centre(image.pixels, size, size)
            return image.notes
        except ImageError as error:
            skipped[row] = str(error)
            if error.is_transient:
                passing.add(row)
        except OSError as error:
            skipped[row] = error.strerror or str(error)
            if error.errno not in _PERMANENT_ERRORS:
                passing.add(row)
        except MemoryError:
            skipped[row] = "there is no memory to decode it"
            passing.add(row)
        return []

    notes: Counter[str] = Counter()
    numbered, reported = enumerate(files), time.monotonic()
    with ThreadPoolExecutor(available_cores()) as pool:
        while chunk := list(islice(numbered, _CHUNK)):
            for its in pool.map(lambda item: decode(*item), chunk):
                notes.update(its)
            is_last = chunk[-1][0] + 1 == len(pixels)
            if is_last or time.monotonic() - reported >= _REPORT_S:
                report(f"read {chunk[-1][0] + 1} of {len(pixels)} images")
                reported = time.monotonic()
        if again := sorted(passing):
            time.sleep(RETRY_S)
            passing.clear()
            for row in again:
                del skipped[row]
            for its in pool.map(decode, again, [files[row] for row in again]):
                notes.update(its)
    for note, count in notes.most_common():
        report(f"{count} files: {note}")
    return dict(sorted(skipped.items())), passing  # threads finish in any order


def read_again(path: Path) -> bytes:
    """Read a file that was read before.

    Raises:
        DataError: it cannot be read now.
    """
    try:
        return read_file(path)
    except OSError as error:
        raise DataError(
            f"{path} was read before and cannot be read now: {error.strerror}; call the same "
            "command again once it can be read"
        ) from error


def is_transient(error: OSError, path: Path) -> bool:
    """Whether the error of a file that was listed may be that of its storage, which may be lost."""
    if error.errno == errno.ENOENT:
        return not os.path.islink(path)
    return error.errno not in (*_PERMANENT_ERRORS, errno.ELOOP, errno.EACCES)


def check_storage(failed: Mapping[str, str], files: int) -> None:
    """Check that files could not be read because of themselves, and not because of their storage.

    An outage makes all files of a time fail, which are often all of a class.

    Args:
        failed: files with errors that may pass, each with the reason.
        files: the number of all.

    Raises:
        DataError: more than :data:`A_FEW` files and more than 1 % of all have failed.
    """
    if len(failed) > max(A_FEW, files // 100):
        raise DataError(
            f"{len(failed)} of {files} files cannot be read now{unusable_hint(failed)}: call the "
            "same command again once they can be read, or remove them"
        )


def unusable_hint(skipped: Mapping[str, str]) -> str:
    """The commonest reason why files cannot be used, to be added to a message."""
    return f", such as {commonest(list(skipped.items()))}" if skipped else ""


def few_names_hint(files: Sequence[str]) -> str:
    """That files of one name are in one part, to be added to an error, if names are repeated."""
    names = len({file.rsplit("/", 1)[-1] for file in files})
    if names == len(files):
        return ""
    return (
        f". Files of one name are in one part: these have {counted(names, 'name')}; put the names "
        "of their folders into them"
    )


def split_by_name(
    name: str, files: list[str], pixels: np.ndarray, skipped: dict[int, str], report: Report
) -> Dataset:
    """Split files into parts by the hashes of their names.

    Args:
        name: of the data set.
        files: their paths inside it; the last component is hashed.
        pixels: one row per file.
        skipped: rows to leave out, each with the reason.
        report: called with a line for each file that is left out.

    Raises:
        DataError: no file is left to train on.
    """
    for row, why in skipped.items():
        report(f"skipped {files[row]}: {why}")
    rows: dict[str, list[int]] = {part: [] for part in PARTS}
    for row, file in enumerate(files):
        if row not in skipped:
            rows[part_of(file.rsplit("/", 1)[-1])].append(row)
    if not rows["train"]:
        raise DataError(
            f"{name}: no image is left to train on: {len(skipped)} of {len(files)} files are "
            "unusable"
            + unusable_hint({files[row]: why for row, why in skipped.items()})
            + few_names_hint(files)
        )
    rows = {part: shuffled(r) for part, r in rows.items()}
    splits = {part: f"{name}: {len(r)} files {_BY_NAME}" for part, r in rows.items()}
    return Dataset(
        name=name,
        parts={part: ImageSet(Rows(pixels, r)) for part, r in rows.items()},
        splits=splits,
        skipped={files[row]: why for row, why in sorted(skipped.items())},
        files={part: [files[row] for row in r] for part, r in rows.items()},
    )
