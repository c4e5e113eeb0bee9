"""The share of images that a gate rejects, corrupted ones among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from ade_base.pictures.ignored import WHITE, Ignored
from ade_base.pictures.show import resize_centre
from ade_base.pictures.view import View
from export.gate.corruptions import ALL, corrupt
from serving.engine.engine import InferenceEngine, Score
from serving.ingest.picture import Picture
from serving.verdict.calibration_file import CalibrationPair
from training.data import Report

CHUNK = 256  # images that are scored together


def p_values(
    engine: InferenceEngine, calibrations: CalibrationPair, images: Sequence[Picture]
) -> np.ndarray:
    """float64 ``(N,)``; not a number where an image has no verdict."""
    found = []
    for first in range(0, len(images), CHUNK):
        chunk = images[first : first + CHUNK]
        scores = engine.score(
            np.stack([image.pixels for image in chunk]),
            resized=[image.resized for image in chunk],
            calibrations=[calibrations] * len(chunk),
            views=[image.view for image in chunk],
        )
        found += [
            score.verdict.p_value if isinstance(score, Score) and score.verdict else np.nan
            for score in scores
        ]
    return np.array(found)


def corruptions_of(
    images: Sequence[Picture], ignored: Ignored | None = None
) -> Iterator[tuple[str, list[Picture]]]:
    """The images corrupted in each way, after the name of the corruption; gross ones first.

    Pixels that are ignored stay as they are.
    """
    pixels = np.stack([image.pixels for image in images])
    views = [image.view.pixels for image in images if image.view is not None]
    for name, corruption in ALL.items():
        made = corrupt(pixels, corruption)
        seen = corrupt(np.stack(views), corruption) if views else None
        yield (
            name,
            [
                dataclasses.replace(
                    image,
                    pixels=_kept(ignored, image.pixels, its),
                    view=_view(image, seen, row, ignored),
                )
                for row, (image, its) in enumerate(zip(images, made, strict=True))
            ],
        )


def _kept(ignored: Ignored | None, pixels: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """Changed pixels of the model's size, with the ignored ones as they were."""
    if ignored is None:
        return changed
    width, height = ignored.size
    mask = np.uint8(255) * ignored.at(height, width)[:, :, None]
    return np.where(resize_centre(mask, *pixels.shape[:2]) >= WHITE, pixels, changed)


def _view(
    image: Picture, seen: np.ndarray | None, row: int, ignored: Ignored | None
) -> View | None:
    """The view of a corrupted image."""
    if image.view is None or seen is None:
        return image.view
    changed = seen[row]
    if ignored is not None:
        top, left, height, width = image.view.box
        box = np.s_[top : top + height, left : left + width]
        mask = ignored.at(height, width)
        changed[box][mask] = image.view.pixels[box][mask]
    return dataclasses.replace(image.view, pixels=changed)


def rejected(
    engine: InferenceEngine,
    calibrations: CalibrationPair,
    images: Sequence[Picture],
    alphas: Sequence[float],
    report: Report = lambda line: None,
) -> list[float | None]:
    """The share of images that is rejected at each alpha, of those with a finite likelihood.

    It is ``None`` where images of one kind, resized or not, have no verdict: they are not accepted
    either.
    """
    judges = [calibrations.of(resized) for resized in {image.resized for image in images}]
    smallest = max(np.inf if its is None else its.smallest_p_value for its in judges)
    if smallest > max(alphas):
        return [None] * len(alphas)
    found = p_values(engine, calibrations, images)
    finite = found[np.isfinite(found)]
    if len(finite) < len(found):
        report(f"{len(found) - len(finite)} of them have no finite likelihood and are not counted")
    return [
        share_at(finite, alpha) if alpha >= smallest and len(finite) else None for alpha in alphas
    ]


def share_at(p_values: np.ndarray, alpha: float) -> float:
    """The share of p-values at which an image is rejected at ``alpha``."""
    return float((p_values <= alpha).mean())
