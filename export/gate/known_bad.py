"""Pictures that the user knows to be bad: read, and checked against the good ones."""

from __future__ import annotations

from collections.abc import Sequence

from ade_base.messages import counted
from export.gate.density_fit import MIN_IMAGES
from export.gate.images import Images, Prepared, counting, prepared, report_left_out
from export.gate.pair import Parts
from serving.engine.noise import image_digest
from serving.ingest.picture import LookOf, Picture
from serving.verdict.calibration import CalibrationError
from training.data import Report

MIN_KNOWN_BAD, MAX_KNOWN_BAD = 10, 2000
NAME = "known bad pictures"


def read_known_bad(
    images: Images, image_shape: tuple[int, int, int], look_of: LookOf, report: Report
) -> list[Prepared]:
    """Those that can be used, with their names; reports the others. Empty without images.

    Raises:
        CalibrationError: too few.
    """
    found = list(counting(NAME, prepared(images, image_shape, True, look_of)))
    errors = [(name, its.message) for name, its in found if not isinstance(its, Picture)]
    report_left_out(NAME, errors, report)
    usable = [(name, its) for name, its in found if isinstance(its, Picture)]
    if found:
        check_enough(len(usable))
    return list(usable)


def others_than(parts: Parts, bad: Sequence[Prepared], report: Report) -> list[Picture]:
    """The known bad pictures without copies of good ones, which teach nothing; reports these.

    Raises:
        CalibrationError: too few are left.
    """
    good = {image_digest(image.pixels) for part in parts for image in part}
    kept: dict[bytes, Picture] = {}
    copies = []
    for name, image in bad:
        assert isinstance(image, Picture)
        digest = image_digest(image.pixels)
        if digest in good or digest in kept:
            whose = "a good picture" if digest in good else "another one"
            copies.append((name, f"a copy of {whose}"))
        else:
            kept[digest] = image
    report_left_out(NAME, copies, report)
    if bad:
        check_enough(len(kept))
    return list(kept.values())


def check_can_teach(parts: Parts, is_seen: bool) -> None:
    """Check that known bad pictures can teach.

    Args:
        parts: the good pictures.
        is_seen: whether a network sees the pictures.

    Raises:
        CalibrationError: no network does, or too few good pictures would calibrate.
    """
    if not is_seen:
        raise CalibrationError(
            "known bad pictures teach only what a network sees: give pictures that are larger than "
            "the model's, or features of a network"
        )
    calibrating = len(parts[1])
    if 2 * calibrating < 3 * MIN_IMAGES:
        raise CalibrationError(
            f"a third of the {calibrating} calibration images is kept to learn from known bad "
            f"pictures: too few are left, at least {MIN_IMAGES} are needed"
        )


def check_enough(count: int) -> None:
    """Check that so many known bad pictures can teach.

    Raises:
        CalibrationError: they are too few.
    """
    if count < MIN_KNOWN_BAD:
        raise CalibrationError(
            f"{NAME}: at least {MIN_KNOWN_BAD} are needed that can be read and are no copies, got "
            f"{counted(count, 'picture')}"
        )
