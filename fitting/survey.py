"""Survey of a folder of images: how many, of which sizes, which are broken or duplicates."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ade_base.files import read_file
from ade_base.messages import printable
from ade_base.pictures.read import file_size
from ade_base.system import available_cores
from export.gate.images import counting
from export.gate.split import MAX_CALIBRATING, MAX_FITTED
from training.data import PARTS, REPEATS, Dataset
from training.datasets.files import unusable_hint

SMALLEST, LARGEST = 16, 64  # sides of a fitting's models, pixels
STEP = 8  # networks halve the size three times
FEW_NAMES = 20  # of the files of a part, if names are repeated
NAMED = 3  # of the files that have changed
FEW = 1000  # training images, below which little can be learned
CHUNK = 1000  # files whose sizes are read together
UNREADABLE = "unreadable"
# Files by width and height, or None if unreadable.
Sizes = Counter[tuple[int, int] | None]


@dataclass(frozen=True)
class Survey:
    """What a folder of images holds.

    Attributes:
        files: number of image files.
        sizes: number of files by ``width x height`` or ``unreadable``, the most frequent first.
        broken: files that cannot be used, each with the reason.
        twice: groups of files with the same pixels at the model's size.
        leaking: held-out files with the pixels of a training file; they are left out, unless there
            are so many of a picture that it will repeat in use.
        content: SHA-256 of the parts, names and pixels of all usable files.
        parts: number of usable files in each part, without those of ``leaking``.
        fitted: number of pictures that the verdict's density will be fitted to: calibration leaves
            out copies of each other and of those that calibrate.
        warnings: sentences for the user.
    """

    files: int
    sizes: dict[str, int]
    broken: dict[str, str]
    twice: list[list[str]]
    leaking: list[str]
    content: str
    parts: dict[str, int]
    fitted: int
    warnings: list[str]

    def change_since(self, before: dict[str, Any]) -> str:
        """How the folder differs from a survey before, as :func:`as_dict` gave it.

        Empty if it holds the same files.
        """
        files, broken = before.get("files"), before.get("broken", {})
        if self.files != files:
            return f"{files} files then, {self.files} now"
        new = [f"{name}: {why}" for name, why in self.broken.items() if name not in broken]
        if new:
            return f"files that could be used then: {'; '.join(new[:NAMED])}"
        return "" if self.content == before.get("content") else "names or pixels differ"


def picture_sizes(files: Sequence[Path]) -> Sizes:
    """Count image files by the width and height in their headers, or ``None`` if unreadable."""

    def sizes() -> Iterator[tuple[int, int] | None]:
        with ThreadPoolExecutor(available_cores()) as pool:
            for first in range(0, len(files), CHUNK):  # the pool keeps what it is given in memory
                yield from pool.map(size_of, files[first : first + CHUNK])

    return Counter(counting("sizes", sizes()))


def are_larger(sizes: Sizes, side: int) -> bool:
    """Whether half of the files or more are not of the model's size, as requests resize them."""
    readable = sum(count for size, count in sizes.items() if size is not None)
    return 0 < readable >= 2 * sizes[side, side]


def sizes_in(before: Mapping[str, Any]) -> Sizes:
    """The sizes in a survey, as :func:`as_dict` gave it; empty without one."""
    sizes: Sizes = Counter()
    for text, count in before.get("sizes", {}).items():
        width, _, height = text.partition(" x ")
        sizes[None if text == UNREADABLE else (int(width), int(height))] = count
    return sizes


def size_of(path: Path) -> tuple[int, int] | None:
    """Width and height of an image file, or ``None`` if it cannot be read."""
    try:
        return file_size(read_file(path))
    except OSError:
        return None


def choose_image_size(sizes: Sizes) -> int:
    """Choose the side of the model's images: the median of the files' shorter sides, in limits."""
    sides = sorted(min(size) for size, count in sizes.items() if size for _ in range(count))
    if not sides:
        return SMALLEST
    median = sides[len(sides) // 2]
    return max(SMALLEST, min(LARGEST, median // STEP * STEP))


def survey(sizes: Sizes, dataset: Dataset) -> Survey:
    """Survey a folder whose images were read.

    Args:
        sizes: as :func:`picture_sizes` counted them.
        dataset: the folder's images at the model's size, with the files behind their rows.
    """
    groups: dict[bytes, list[tuple[str, str]]] = defaultdict(list)
    content = hashlib.sha256()
    for part in PARTS:  # the training part first: no held-out file may be in it
        for name, digest in zip(dataset.files[part], dataset.parts[part].digests(), strict=True):
            groups[digest].append((part, name))
            content.update(f"{part}\0{printable(name)}\0{digest.hex()}\n".encode())
    twice = [[name for _, name in group] for group in groups.values() if len(group) > 1]
    trained = [group for group in groups.values() if group[0][0] == "train"]
    copies = [[copy for copy in group if copy[0] != "train"] for group in trained]
    leaking = [copy for group in copies if len(group) < REPEATS for copy in group]
    lost = Counter(part for part, _ in leaking)
    parts = {part: len(dataset.files[part]) - lost[part] for part in PARTS}
    left_out = {name for _, name in leaking}

    def pictures(part: str, most: int) -> set[bytes]:
        named = zip(dataset.files[part], dataset.parts[part].digests(), strict=True)
        return set(islice((digest for name, digest in named if name not in left_out), most))

    fitted = len(pictures("select", MAX_FITTED) - pictures("calibrate", MAX_CALIBRATING))
    warnings = []
    if parts["train"] < FEW:
        warnings.append(
            f"Training on {parts['train']} images: the model will memorise them, and its verdict "
            f"will be rough. {FEW} or more are better."
        )
    if leaking:
        warnings.append(
            "Held-out files that are copies of training images, left out of calibration and tests: "
            f"{len(leaking)}."
        )
    for part in ("select", "calibrate"):
        names = {name.rsplit("/", 1)[-1] for name in dataset.files[part]}
        if len(names) < FEW_NAMES and len(names) < len(dataset.files[part]):
            warnings.append(
                f"The {len(dataset.files[part])} images of the part {part} have only {len(names)} "
                "different names, because files of one name are in one part: if a name means a "
                "view or a number, put the folder's name into it, such as shoe17-front.jpg."
            )
    if dataset.skipped:
        hint = unusable_hint(dataset.skipped)
        warnings.append(f"Files that cannot be used: {len(dataset.skipped)}{hint}.")
    side = dataset.image_size
    other = sum(count for size, count in sizes.items() if size not in (None, (side, side)))
    if other:
        warnings.append(
            f"Images that are not {side} x {side}, whose centre squares were resized: {other}."
        )
    return Survey(
        files=sum(sizes.values()),
        sizes={
            UNREADABLE if size is None else f"{size[0]} x {size[1]}": n
            for size, n in sizes.most_common()
        },
        broken=dataset.skipped,
        twice=twice,
        leaking=[name for _, name in leaking],
        content=content.hexdigest(),
        parts=parts,
        fitted=fitted,
        warnings=warnings,
    )


def summary_lines(found: Survey) -> list[str]:
    """Lines for the user: the number of files by size and by part, and the warnings."""
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
