"""Any folder of image files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from serving.images import IMAGE_SUFFIXES, ImageError, read_image
from training.data import DataError, Dataset
from training.datasets.files import Report, cached_pixels, contents, decode_into, split_by_name


def load_folder(folder: Path, image_size: int | None, cache: Path | None, report: Report,
                fits: Callable[[int], object] = lambda side: None) -> Dataset:
    """Image files below a folder, those of another size cut to the centre square and resized.

    Arguments are those of :func:`training.datasets.load_dataset`.
    """
    files = image_files(folder)
    size = image_size or _first_size(files)
    fits(size)
    names = [p.relative_to(folder).as_posix() for p in files]
    stats = [p.stat() for p in files]
    identity = json.dumps([size, [(n, s.st_size, s.st_mtime_ns) for n, s in zip(names, stats, strict=True)]])
    pixels, skipped = cached_pixels(identity, lambda: (len(files), size, size, 3), cache,
                                    lambda out: decode_into(out, size, contents(files), report))
    return split_by_name(folder.resolve().name, names, pixels, skipped, report)


def image_files(folder: Path) -> list[Path]:
    """Image files below a folder, by their suffixes, in order.

    Raises:
        DataError: there are none.
    """
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def _first_size(files: list[Path]) -> int:
    for path in files:
        try:
            return min(read_image(path.read_bytes()).pixels.shape[:2])
        except (ImageError, OSError):
            continue
    raise DataError(f"none of {len(files)} image files can be read, the first is {files[0]}")
