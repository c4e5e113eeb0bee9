"""What is in a folder of images: how many, how large, which are broken, which are there twice."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from serving.images import file_size
from training.data import PARTS, Dataset
from training.datasets.files import part_of

SMALLEST, LARGEST = 16, 64  # sides that a model of a fitting is made for
STEP = 8  # networks halve three times
SHOWN = 20  # of broken files and of duplicates, in the report
FEW = 1000  # images, below which little can be learned


@dataclass(frozen=True)
class Survey:
    """What was found.

    Attributes:
        files: image files.
        sizes: how many have each width and height, the most frequent first; ``unreadable`` is one
            of them.
        broken: files that cannot be used, and why.
        twice: groups of files with the same pixels at the model's size; in each the first is kept.
        leaking: held-out files that have the pixels of one that is trained on, or of an earlier
            one: left out.
        parts: usable files of each part, ``leaking`` ones not counted.
        warnings: in sentences.
    """

    files: int
    sizes: dict[str, int]
    broken: list[str]
    twice: list[list[str]]
    leaking: list[str]
    parts: dict[str, int]
    warnings: list[str]


def picture_sizes(files: Sequence[Path]) -> Counter[tuple[int, int] | None]:
    """Width and height of every image file, by their headers; ``None`` counts those that have none."""
    return Counter(file_size(path) if path.is_file() else None for path in files)


def choose_image_size(sizes: Counter[tuple[int, int] | None]) -> int:
    """The side of the model's images: that of half the pictures or more, as far as a small model
    goes.
    """
    sides = sorted(min(size) for size, count in sizes.items() if size for _ in range(count))
    if not sides:
        return SMALLEST
    usual = sides[len(sides) // 2]
    return max(SMALLEST, min(LARGEST, usual // STEP * STEP))


def survey(sizes: Counter[tuple[int, int] | None], dataset: Dataset) -> Survey:
    """Look at a folder whose images were read.

    Args:
        sizes: of :func:`picture_sizes`.
        dataset: of that folder, at the model's size.
    """
    names = dataset.files
    groups: dict[bytes, list[tuple[str, str]]] = defaultdict(list)
    for part in PARTS:  # the training part first: what is held out must not be in it
        for row, name in enumerate(names[part]):
            pixels = np.ascontiguousarray(dataset.parts[part].images[row])
            groups[hashlib.sha256(pixels.data).digest()].append((part, name))
    twice = [[name for _, name in group] for group in groups.values() if len(group) > 1]
    leaking = [name for group in groups.values() for part, name in group[1:] if part != "train"]
    parts = {
        part: len(names[part]) - sum(part_of(name.rsplit("/", 1)[-1]) == part for name in leaking)
        for part in PARTS
    }
    warnings = []
    if parts["train"] < FEW:
        warnings.append(
            f"{parts['train']} images to train on are few: the model will know them by heart, and its verdict "
            f"will be rough. {FEW} or more are better."
        )
    if leaking:
        warnings.append(
            f"Held-out files that are copies of others, left out of calibration and tests: {len(leaking)}."
        )
    if dataset.skipped:
        warnings.append(f"Files that could not be read: {len(dataset.skipped)}.")
    side = dataset.image_size
    other = sum(count for size, count in sizes.items() if size not in (None, (side, side)))
    if other:
        warnings.append(
            f"Images that are not {side} x {side}, whose centre squares were resized: {other}."
        )
    return Survey(
        sum(sizes.values()),
        {
            "unreadable" if size is None else f"{size[0]} x {size[1]}": n
            for size, n in sizes.most_common()
        },
        dataset.skipped,
        twice,
        leaking,
        parts,
        warnings,
    )


def summary_lines(found: Survey) -> list[str]:
    """For people, a line each."""
    sizes = ", ".join(f"{size}: {count}" for size, count in list(found.sizes.items())[:4])
    more = f" and {len(found.sizes) - 4} other sizes" if len(found.sizes) > 4 else ""
    return [
        f"{found.files} image files; {sizes}{more}",
        ", ".join(f"{part} {count}" for part, count in found.parts.items()),
        *found.warnings,
    ]


def as_dict(found: Survey) -> dict[str, Any]:
    """Plain values for JSON."""
    return dict(vars(found))
