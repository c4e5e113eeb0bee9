"""Data sets from folders of image files."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from ade_base.files import image_paths, read_file
from ade_base.pictures.limits import ImageError
from ade_base.pictures.read import IMAGE_SUFFIXES, read_image
from training.data import DataError, Dataset, Report
from training.datasets.files import cached_pixels, check_storage, decode_into, split_by_name

_MISSING = (0, 0)  # the version of a broken link, or of a file that may not be read
_UNKNOWN = (-1, -1)  # of a file that is lost now, perhaps with its storage


def load_folder(
    folder: Path,
    image_size: int | None,
    cache: Path | None,
    report: Report,
    fits: Callable[[int], object] = lambda side: None,
) -> Dataset:
    """Load the image files below a folder; see :func:`training.datasets.load_dataset`."""
    return load_files(folder, image_files(folder), image_size, cache, report, fits)


def load_files(
    folder: Path,
    files: list[Path],
    image_size: int | None,
    cache: Path | None,
    report: Report,
    fits: Callable[[int], object] = lambda side: None,
    left_out: Mapping[str, str] | None = None,
) -> Dataset:
    """Load those image files of a folder that :func:`image_files` found.

    Arguments are those of :func:`training.datasets.load_dataset`, and ``left_out``: files to leave
    out even if they can be read, relative to the folder, each with the reason.

    Raises:
        DataError: more than a few files cannot be read now.
    """
    size = image_size or first_size(files)
    fits(size)
    if image_size is None:
        report(f"images of {size} x {size} pixels, the size of the first file; all others get it")
    names = [p.relative_to(folder).as_posix() for p in files]
    versions = [_version(path) for path in files]
    source = json.dumps([str(folder.resolve()), size])
    version = json.dumps([(name, *its) for name, its in zip(names, versions, strict=True)])

    def fill(out: np.ndarray) -> tuple[dict[int, str], bool]:
        skipped, passing = decode_into(out, size, files, read_file, report)
        # A file of this version has another one once it can be read.
        failed = {names[row]: skipped[row] for row in passing if versions[row] != _MISSING}
        check_storage(failed, len(files))
        return skipped, not failed

    shape = (len(files), size, size, 3)
    pixels, skipped = cached_pixels(source, version, lambda: shape, cache, fill)
    known = left_out or {}
    skipped |= {row: known[name] for row, name in enumerate(names) if name in known}
    dataset = split_by_name(folder.resolve().name, names, pixels, skipped, report)
    return replace(dataset, folder=folder)


def image_files(folder: Path) -> list[Path]:
    """Find image files below a folder by their suffixes, in order; some may be unreadable.

    Raises:
        DataError: there are none.
    """
    files = sorted(folder / name for name in image_paths(folder))
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def _version(path: Path) -> tuple[int, int]:
    """Size and time of modification, or :data:`_MISSING` or :data:`_UNKNOWN`."""
    try:
        found = path.stat()
    except OSError as error:
        is_broken = error.errno in (errno.ENOENT, errno.ELOOP) and os.path.islink(path)
        return _MISSING if is_broken or error.errno == errno.EACCES else _UNKNOWN
    # A change of permissions leaves the time of modification.
    return (found.st_size, found.st_mtime_ns) if os.access(path, os.R_OK) else _MISSING


def first_size(files: list[Path]) -> int:
    """The shorter side of the first image that can be read, pixels.

    Raises:
        DataError: none can be read.
    """
    for path in files:
        try:
            width, height = read_image(read_file(path)).size
        except (ImageError, OSError, MemoryError):
            continue
        return min(width, height)
    if len(files) == 1:
        raise DataError(f"the only image file cannot be read: {files[0]}")
    raise DataError(f"none of {len(files)} image files can be read; the first is {files[0]}")
