"""Makes two calibrations of the same images: for the model's size and for resized images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from export.gate.corruptions import corrupted
from export.gate.density_fit import MIN_IMAGES, fit_calibration
from export.gate.measuring import statistics_of
from serving.engine.engine import InferenceEngine
from serving.engine.noise import image_digest, short_digest
from serving.ingest.picture import Picture, prepare_image
from serving.verdict.calibration import Calibration, CalibrationError
from serving.verdict.semantic import FEATURES, without_classes
from training.data import Report

CORRUPTED = 200  # calibration images that are corrupted in each way, for the page's figures
LOG2_ENLARGED = (0.322, 3.0)  # 1.25 to 8 times
FILTERS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS)

Parts = tuple[list[Picture], list[Picture]]  # that fit the density, that calibrate


def _of_kind(parts: Parts, resized: bool) -> Parts | None:
    """The images of one kind, resized or not, if they are enough and at least half of all."""
    fit, calibrate = ([image for image in part if image.resized == resized] for part in parts)
    many = (
        2 * (len(fit) + len(calibrate)) >= sum(map(len, parts))
        and min(len(fit), len(calibrate)) >= MIN_IMAGES
    )
    return (fit, calibrate) if many else None


def exact_calibration(
    engine: InferenceEngine, parts: Parts, has_classes: bool, report: Report
) -> tuple[Calibration, dict[str, Any]]:
    """The calibration for images of the model's size, and its entry in the manifest.

    Args:
        engine: of the bundle.
        parts: the images.
        has_classes: whether the classes of the features' network are used.
        report: called with each line of progress.

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
    pixels = [[image.pixels for image in part] for part in chosen or parts]
    return _calibrated(engine, pixels, "" if chosen else "fit", "", has_classes, report)


def resized_calibration(
    engine: InferenceEngine, parts: Parts, has_classes: bool, report: Report
) -> tuple[Calibration, dict[str, Any]]:
    """The calibration for images that requests resize, and its entry in the manifest.

    Arguments and errors are those of :func:`exact_calibration`.
    """
    chosen = _of_kind(parts, resized=True) or parts
    pixels = [
        [image.pixels if image.resized else resize_and_back(image.pixels) for image in part]
        for part in chosen
    ]
    simulated = sum(not image.resized for part in chosen for image in part)
    if simulated:
        report(
            f"resized images: {simulated} of them have the model's size and are enlarged first, "
            "because too few are larger. More than a share of alpha of resized requests may be "
            "rejected."
        )
    calibration, about = _calibrated(engine, pixels, "fit", "resized ", has_classes, report)
    return calibration, {**about, "resized_and_back": simulated}


def _calibrated(
    engine: InferenceEngine,
    pixels: Sequence[Sequence[np.ndarray]],
    resize: str,
    kind: str,
    has_classes: bool,
    report: Report,
) -> tuple[Calibration, dict[str, Any]]:
    """A calibration, and its entry in the manifest; ``kind`` is ``"resized "`` or empty."""
    fitting, calibrating = (
        statistics_of(engine, images, f"{part} of {kind}images" if kind else part, report=report)
        for part, images in zip(("fitting", "calibration"), pixels, strict=True)
    )
    known = fitting if has_classes else without_classes(fitting)
    calibration = fit_calibration(known, calibrating, resize=resize or None)
    if FEATURES in known and not calibration.sees_content:
        report(
            f"WARNING: the features of features.onnx do not tell these {kind}images apart, so they "
            "do not count in the verdict. Is it the right network, and the right value of it "
            "(the option features-output)?"
        )
    report(f"corrupting {len(pixels[1][:CORRUPTED])} {kind}images")
    caught = {}
    for way, changed in corrupted(np.stack(pixels[1][:CORRUPTED])).items():
        try:
            found = statistics_of(engine, changed, way)
        except CalibrationError as error:  # none has a finite likelihood
            report(f"left out {error}")
        else:
            caught[way] = np.sort(calibration.scores_of(found))
    fitted_digests, digests = (
        np.array([short_digest(image) for image in images], np.uint64) for images in pixels
    )
    calibration = dataclasses.replace(
        calibration, corrupted=caught, digests=digests, fitted_digests=fitted_digests
    )
    return calibration, {**calibration.summary(), "fitted_to": len(fitting["bpd"])}


def resize_and_back(pixels: np.ndarray) -> np.ndarray:
    """Simulate an image that a request resized to the model's size from a larger picture.

    The image is enlarged 1.25 to 8 times and resized as a request does it. The factor and the
    filter depend on the pixels alone.

    Args:
        pixels: uint8 ``(H, W, C)``.
    """
    rng = np.random.default_rng(int.from_bytes(image_digest(pixels)))
    scale, kind = 2 ** rng.uniform(*LOG2_ENLARGED), FILTERS[rng.integers(len(FILTERS))]
    size = (round(scale * pixels.shape[1]), round(scale * pixels.shape[0]))
    planes = [
        np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize(size, kind))
        for plane in pixels.transpose(2, 0, 1)
    ]
    image = prepare_image(np.stack(planes, axis=2), pixels.shape, True)
    assert isinstance(image, Picture)
    return image.pixels
