"""Makes two calibrations of the same images: for the model's size and for resized images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from PIL import Image

from ade_base.pictures.ignored import Ignored
from ade_base.pictures.view import LARGE, SMALL, Look
from export.gate.damage import damaged
from export.gate.density_fit import MIN_IMAGES, fit_calibration
from export.gate.measuring import statistics_of
from export.gate.rejection import corruptions_of, share_at
from export.gate.teach import ALPHA, KEPT, taught
from serving.engine.engine import InferenceEngine
from serving.engine.noise import image_digest, short_digest
from serving.ingest.picture import Picture, prepare_image
from serving.verdict.calibration import Calibration, CalibrationError
from serving.verdict.conformal import conformal_p_values
from serving.verdict.encoder import EncoderMemory
from serving.verdict.semantic import FEATURES, OF_NETWORK, without_classes
from training.data import Report

CORRUPTED = 200  # calibration images that are corrupted in each way, for the page's figures
LOG2_ENLARGED = (0.322, 3.0)  # 1.25 to 8 times
FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)

Looks = tuple[Look, Look]  # at images of the model's size, and at larger ones
NO_LOOKS = Look(0), Look(0)
Parts = tuple[list[Picture], list[Picture]]  # that fit the density, that calibrate


def looks(is_seen: bool, ignored: Ignored | None, detail: int = 1) -> Looks:
    """How an encoder sees images, if it does, and what of them is ignored."""
    return Look(SMALL * is_seen, ignored), Look(LARGE * detail * is_seen, ignored)


def _of_kind(parts: Parts, resized: bool) -> Parts | None:
    """The images of one kind, resized or not, if they are enough and at least half of all."""
    fit, calibrate = ([image for image in part if image.resized == resized] for part in parts)
    many = (
        2 * (len(fit) + len(calibrate)) >= sum(map(len, parts))
        and min(len(fit), len(calibrate)) >= MIN_IMAGES
    )
    return (fit, calibrate) if many else None


def exact_calibration(
    engine: InferenceEngine,
    parts: Parts,
    has_classes: bool,
    report: Report,
    sees: Looks = NO_LOOKS,
    bad: Sequence[Picture] = (),
) -> tuple[Calibration, dict[str, Any]]:
    """The calibration for images of the model's size, and its entry in the manifest.

    Args:
        engine: of the bundle.
        parts: the images.
        has_classes: whether the classes of the features' network are used.
        report: called with each line of progress.
        sees: how the encoder sees images of the model's size, and larger ones.
        bad: known bad pictures; if there are any, a third of the others does not calibrate.

    Raises:
        CalibrationError: scores that cannot be used.
    """
    chosen = _of_kind(parts, resized=False)
    own = sum(not image.resized for part in parts for image in part)
    if chosen is None and own and own < sum(map(len, parts)):
        report(
            f"images of the model's size: {own} are fewer than half of all, or too few, so larger "
            "ones, resized, calibrate with them. More than a share of alpha of them may be rejected"
        )
    look = sees[chosen is None]
    pictures = [[_seen(image, look) for image in part] for part in (*(chosen or parts), bad)]
    return _calibrated(engine, pictures, "" if chosen else "fit", "", has_classes, look, report)


def resized_calibration(
    engine: InferenceEngine,
    parts: Parts,
    has_classes: bool,
    report: Report,
    sees: Looks = NO_LOOKS,
    bad: Sequence[Picture] = (),
) -> tuple[Calibration, dict[str, Any]]:
    """The calibration for images that requests resize, and its entry in the manifest.

    Arguments and errors are those of :func:`exact_calibration`.
    """
    chosen = _of_kind(parts, resized=True) or parts
    simulated = sum(not image.resized for part in chosen for image in part)
    look = sees[2 * simulated < sum(map(len, chosen))]
    pictures = [
        [
            _seen(image if image.resized else resize_and_back(image.pixels, look), look)
            for image in part
        ]
        for part in (*chosen, bad)
    ]
    if simulated:
        report(
            f"resized images: {simulated} of them have the model's size and are enlarged first, "
            "because too few are larger. More than a share of alpha of resized requests may be "
            "rejected."
        )
    calibration, about = _calibrated(engine, pictures, "fit", "resized ", has_classes, look, report)
    return calibration, {**about, "resized_and_back": simulated}


def _calibrated(
    engine: InferenceEngine,
    pictures: Sequence[Sequence[Picture]],
    resize: str,
    kind: str,
    has_classes: bool,
    look: Look,
    report: Report,
) -> tuple[Calibration, dict[str, Any]]:
    """A calibration, and its entry in the manifest.

    Args:
        pictures: that fit the density, that calibrate and that are known to be bad.
        kind: ``"resized "`` or empty.
    """
    names = [f"{part} of {kind}images" if kind else part for part in ("fitting", "calibration")]
    to_fit, good, bad = pictures
    kept = good[::KEPT] if bad else []
    if bad:
        good = [image for number, image in enumerate(good) if number % KEPT]
    fitting = statistics_of(engine, to_fit, names[0], report)
    memory = None
    if look.size:
        memory, fitting = EncoderMemory.of(fitting, look)
    calibrating = statistics_of(engine, good, names[1], report, memory)
    known = fitting if has_classes else without_classes(fitting)
    if memory is not None and memory.patches is not None:  # it sees more than the bundle's own
        known = {name: its for name, its in known.items() if name not in OF_NETWORK}
    calibration = fit_calibration(known, calibrating, resize or None, memory)
    if FEATURES in known and not calibration.sees_content:
        report(
            f"WARNING: the features of features.onnx do not tell these {kind}images apart, so they "
            "do not count in the verdict. Is it the right network, and the right value of it "
            "(the option features-output)?"
        )
    untaught, before = calibration, list[float]()
    if bad:
        named = [(kept, f"good {kind}images for the lesson"), (bad, f"known bad {kind}images")]
        shown = [statistics_of(engine, some, name, report, memory) for some, name in named]
        calibration = taught(calibration, (known, calibrating, *shown), report)
    caught, some = {}, good[:CORRUPTED]
    for way, changed in chain(corruptions_of(some, look.ignored), damaged(some, look.ignored)):
        try:
            found = statistics_of(engine, changed, way, memory=memory)
        except CalibrationError as error:  # none has a finite likelihood
            report(f"left out {error}")
        else:
            caught[way] = np.sort(calibration.scores_of(found))
            if calibration.lesson is not None:
                scores = untaught.scores_of(found)
                before.append(share_at(conformal_p_values(untaught.scores, scores), ALPHA))
    if before:
        after = [
            share_at(conformal_p_values(calibration.scores, c), ALPHA) for c in caught.values()
        ]
        report(
            f"corrupted {kind}images, rejected at alpha {ALPHA}: {100 * np.mean(before):.0f} % "
            f"without what known bad pictures teach, {100 * np.mean(after):.0f} % with it"
        )
    digests, others = (
        np.array([short_digest(image.pixels) for image in images], np.uint64)
        for images in (good, [*to_fit, *kept, *bad])
    )
    # A picture that repeats may both calibrate and be kept.
    fitted_digests = others[~np.isin(others, digests)]
    calibration = dataclasses.replace(
        calibration,
        ignored=look.ignored,
        corrupted=caught,
        digests=digests,
        fitted_digests=fitted_digests,
    )
    about = {**calibration.summary(), "fitted_to": len(fitting["bpd"])}
    return calibration, about if calibration.lesson is None else {**about, "known_bad": len(bad)}


def _seen(image: Picture, look: Look) -> Picture:
    """The image with the view that this look gives."""
    if image.view is not None and len(image.view.pixels) == look.size:
        return image
    return dataclasses.replace(image, view=look.of(image.pixels) if look.size else None)


def resize_and_back(pixels: np.ndarray, look: Look = NO_LOOKS[1]) -> Picture:
    """Simulate an image that a request resized to the model's size from a larger picture.

    The image is enlarged 1.25 to 8 times and resized as a request does it. The factor and the
    filter depend on the pixels alone.

    Args:
        pixels: uint8 ``(H, W, C)``.
        look: how an encoder sees the larger picture, of which nothing is ignored.
    """
    rng = np.random.default_rng(int.from_bytes(image_digest(pixels)))
    scale, kind = 2 ** rng.uniform(*LOG2_ENLARGED), FILTERS[rng.integers(len(FILTERS))]
    size = (round(scale * pixels.shape[1]), round(scale * pixels.shape[0]))
    planes = [
        np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize(size, kind))
        for plane in pixels.transpose(2, 0, 1)
    ]
    image = prepare_image(
        np.stack(planes, axis=2), pixels.shape, True, lambda resized: Look(look.size)
    )
    assert isinstance(image, Picture)
    return image
