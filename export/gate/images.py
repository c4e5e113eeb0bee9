"""Images that calibrate or test a gate: decoded on several cores, and named in messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from operator import length_hint
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from ade_base.files import read_file
from ade_base.messages import commonest, counted
from ade_base.system import available_cores
from serving.engine.noise import short_digest
from serving.ingest.errors import ApiError
from serving.ingest.picture import LookOf, Picture, no_look, prepare_source
from serving.verdict.calibration import CalibrationError
from serving.verdict.calibration_file import CalibrationPair
from training.data import REPEATS, Report
from training.datasets.files import check_storage, is_transient

MAX_THREADS = 8  # each needs memory for a batch
AT_ONCE = 64  # files in memory
MAX_SHOWN = 5

Images = Iterable[bytes | np.ndarray | Picture]  # files, uint8 (H, W, C), or of the model's size
Prepared = tuple[str, Picture | ApiError]  # with the image's name
Item = TypeVar("Item")


class NamedFile(bytes):
    """The content of an image file, with its name for messages."""

    name: str

    @classmethod
    def of(cls, name: str, content: bytes) -> NamedFile:
        made = cls(content)
        made.name = name
        return made


def readable(paths: Iterable[Path], report: Report) -> Iterator[NamedFile]:
    """Read files one after another; leaves out those that cannot be read, and reports them last.

    Raises:
        DataError: more than a few files cannot be read now.
    """
    count, errors, failed = 0, list[tuple[str, str]](), dict[str, str]()
    for path in paths:
        count += 1
        try:
            content = read_file(path)
        except OSError as error:
            errors.append((str(path), error.strerror or str(error)))
            if is_transient(error, path):
                failed.update(errors[-1:])
        else:
            yield NamedFile.of(str(path), content)
    report_left_out("files", errors, report)
    check_storage(failed, count)


def thread_pool() -> ThreadPoolExecutor:
    """A thread for each core, up to :data:`MAX_THREADS`."""
    return ThreadPoolExecutor(min(available_cores(), MAX_THREADS))


def prepared(
    images: Images,
    image_shape: tuple[int, int, int],
    resize: bool,
    look_of: LookOf = no_look,
) -> Iterator[Prepared]:
    """Bring images to the model's shape as requests do, in order, on several cores.

    Args:
        images: those that are not a :class:`NamedFile` are named by their number.
        image_shape: ``(H, W, C)`` of the model.
        resize: whether to resize images of other sizes, or to return an error for them.
        look_of: how an encoder sees them.
    """

    def prepare(item: tuple[int, bytes | np.ndarray | Picture]) -> Prepared:
        index, source = item
        if isinstance(source, Picture):
            return f"image {index}", source
        name = source.name if isinstance(source, NamedFile) else f"image {index}"
        return name, prepare_source(lambda: source, image_shape, resize, look_of)

    rest = enumerate(images)
    with thread_pool() as threads:
        while few := list(islice(rest, AT_ONCE)):
            yield from threads.map(prepare, few)


def bar(name: str, total: int | None = None) -> tqdm[Any]:
    """A progress bar on a terminal; elsewhere nothing, because a bar there is many lines."""
    return tqdm(total=total, desc=name, unit="img", leave=False, disable=None, dynamic_ncols=True)


def counting(name: str, images: Iterable[Item]) -> Iterator[Item]:
    """Yield the same images, with a progress bar."""
    with bar(name, length_hint(images) or None) as shown:
        for image in images:
            yield image
            shown.update()


def usable(
    name: str,
    images: Images,
    image_shape: tuple[int, int, int],
    report: Report,
    may_be_empty: bool = False,
    look_of: LookOf = no_look,
) -> tuple[list[Picture], list[tuple[str, str]]]:
    """Images at the model's size, and why others could not be (by name); reports these.

    Args:
        name: of the images.
        images: see :func:`prepared`.
        image_shape: ``(H, W, C)`` of the model.
        report: called with a line if images are left out.
        may_be_empty: whether there may be no images.
        look_of: how an encoder sees them.

    Raises:
        CalibrationError: no image can be used.
    """
    found: list[Picture] = []
    errors: list[tuple[str, str]] = []
    for its, image in counting(name, prepared(images, image_shape, True, look_of)):
        if isinstance(image, Picture):
            found.append(image)
        else:
            errors.append((its, image.message))
    report_left_out(name, errors, report)
    if not found and (errors or not may_be_empty):
        raise none_usable(name, errors)
    return found, errors


def others(
    name: str, images: Iterable[Prepared], known: set[int], report: Report
) -> Iterator[Prepared]:
    """The images without those that made a calibration or a network, and without their copies.

    A picture counts from its :data:`training.data.REPEATS`-th copy on: it repeats in use, too.

    Args:
        name: of the images.
        images: see :func:`prepared`.
        known: short digests of those, as of :func:`digests_of`.
        report: called with a line at the end if images were left out.
    """
    copies, counts = 0, Counter[int]()
    for its, image in images:
        digest = short_digest(image.pixels) if isinstance(image, Picture) else None
        if digest is not None and digest in known:
            counts[digest] += 1
            if counts[digest] < REPEATS:
                copies += 1
                continue
        yield its, image
    if copies:
        left_out = counted(copies, "image")
        report(f"{name}: left out {left_out} that calibrated or trained, or copies of such")


def digests_of(calibrations: CalibrationPair) -> set[int]:
    """Short digests of the images that a calibration was made of, as far as its file has them.

    Pictures that occur :data:`training.data.REPEATS` times or more among those that calibrate are
    left out: such as a camera's black frame, they will occur among other images, too.
    """
    found: set[int] = set()
    for calibration in filter(None, (calibrations.exact, calibrations.resized)):
        digests, counts = np.unique(calibration.digests, return_counts=True)
        found.update(digests[counts < REPEATS].tolist(), calibration.fitted_digests.tolist())
    return found


def report_left_out(name: str, errors: Sequence[tuple[str, str]], report: Report) -> None:
    """Report images that cannot be used, with the reasons; the first few by name."""
    if errors:
        shown = "; ".join(f"{its}: {reason}" for its, reason in errors[:MAX_SHOWN])
        more = "; …" if len(errors) > MAX_SHOWN else ""
        report(f"{name}: left out {counted(len(errors), 'image')}: {shown}{more}")


def none_usable(name: str, errors: Sequence[tuple[str, str]]) -> CalibrationError:
    """The error to raise if no image can be used; it has the commonest reason."""
    which = (
        "its only image could not" if len(errors) == 1 else f"none of {len(errors)} images could"
    )
    text = f"{name}: {which} be used"
    return CalibrationError(f"{text}: {commonest(errors)}" if errors else text)
