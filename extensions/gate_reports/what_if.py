"""Forecasts a gate's false alarms per day and its detection at each alpha.

Needs neither PyTorch nor scikit-learn.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np

from export.gate.images import Images, digests_of, usable
from export.gate.rejection import corruptions_of, p_values, rejected, share_at
from serving.engine.engine import InferenceEngine
from serving.engine.noise import short_digest
from serving.ingest.picture import Picture
from serving.verdict.calibration import Calibration, CalibrationError
from serving.verdict.calibration_file import CalibrationPair
from serving.verdict.false_alarms import flagging_rank
from training.data import REPEATS, Report

ALPHAS = (0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
FALSE_WARNINGS = 0.05  # probability that a history like the calibration images is called unlike


@dataclass(frozen=True)
class Alarms:
    """Alarms at one alpha, for images like the calibration images; ``None`` without a verdict.

    Attributes:
        alpha: the false-alarm rate of requests.
        per_day: expected number of false alarms per day.
        low: lower end of the 95 % band of that number, for calibrations of this size.
        high: its upper end.
        rejected: share of the history that is rejected.
    """

    alpha: float
    per_day: float | None
    low: int | None
    high: int | None
    rejected: float | None


@dataclass(frozen=True)
class PathForecast:
    """The history's images of one kind: resized or not. Each kind has its own calibration.

    Attributes:
        resized: whether their size differs from the model's.
        images: their number in the history.
        per_day: their number per day, if the history is typical.
        calibrated: number of calibration images of this kind; 0 without a calibration.
        alarms: at each alpha.
        unlike: the alphas at which the rejected share of the history lies outside a band for its
            number of images, which shows that the history is unlike the calibration images. The
            bands are so wide that all of them, at all alphas and for both kinds, hold the shares of
            95 of 100 histories that are like the calibration images. Images that made the
            calibration do not count here.
        known: number of the history's images that made the calibration, or copies of such.
    """

    resized: bool
    images: int
    per_day: int
    calibrated: int
    alarms: list[Alarms]
    unlike: list[float]
    known: int = 0


@dataclass(frozen=True)
class WhatIf:
    """The answer to ``ade gate what-if``.

    Attributes:
        model: name and hash.
        calibration: name and version.
        images: of the history that were scored.
        unusable: of the history that could not be scored.
        alphas: of the columns of ``caught``.
        ways: by kind, one or two.
        caught: share of each set of OOD or corrupted images that is rejected at each alpha;
            ``None`` where there is no verdict.
    """

    model: str
    calibration: dict[str, str] | None
    images: int
    unusable: int
    alphas: list[float]
    ways: list[PathForecast]
    caught: dict[str, list[float | None]]

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return dataclasses.asdict(self)


def what_if(
    engine: InferenceEngine,
    calibrations: CalibrationPair,
    history: Images,
    ood: Mapping[str, Images],
    per_day: int,
    corrupt: int,
    report: Report = lambda line: None,
) -> WhatIf:
    """Alarms per day and detection at each alpha, by the engine that scores requests.

    Images of another size are resized as a request with ``resize`` does it, and judged by the
    calibration for that.

    Args:
        engine: with ``score``.
        calibrations: of the engine's store.
        history: images that the gate got in the past: files, or uint8 ``(H, W, C)``.
        ood: sets of OOD images by name.
        per_day: images per day.
        corrupt: number of images of the history that are corrupted in each way.
        report: called with each line of progress.

    Raises:
        CalibrationError: there is no calibration, or no image of a set can be used.
    """
    if calibrations.exact is None:
        raise CalibrationError(f"{engine.bundle.name} is not calibrated: ade calibrate does that")

    def read(name: str, images: Images) -> tuple[list[Picture], list[tuple[str, str]]]:
        return usable(name, images, engine.image_shape, report, False, calibrations.look_of)

    images, errors = read("history", history)
    unusable = len(errors)
    report(f"history: {len(images)} images")
    unlike = {name: read(name, its)[0] for name, its in ood.items()}
    found = p_values(engine, calibrations, images)
    judged = np.array([calibrations.of(image.resized) is not None for image in images])
    lost = judged & np.isnan(found)
    if lost.any():
        report(f"history: {lost.sum()} images have no finite likelihood and are not counted")
        images = [image for image, its in zip(images, lost, strict=True) if not its]
        found = found[~lost]
        unusable += int(lost.sum())
    if not images:
        raise CalibrationError("history: no image has a finite likelihood")
    ways = []
    kinds = sorted({image.resized for image in images})
    level = 1 - FALSE_WARNINGS / (len(ALPHAS) * len(kinds))  # Bonferroni
    made = digests_of(calibrations)
    digests = [short_digest(image.pixels) for image in images]
    counts = Counter(digests)  # a picture that repeats does so in use, too
    known = np.array([digest in made and counts[digest] < REPEATS for digest in digests])
    for resized in kinds:
        mine = np.array([image.resized == resized for image in images])
        count = round(per_day * int(mine.sum()) / len(images))
        judge = calibrations.of(resized)
        ways.append(_way(resized, judge, found[mine], known[mine], count, level))
    caught = {}
    changed = corruptions_of(images[:corrupt], calibrations.exact.ignored)
    for name, its in chain(changed, unlike.items()):
        report(f"{name}: {len(its)} images")
        caught[name] = rejected(engine, calibrations, its, ALPHAS, report)
    return WhatIf(
        engine.bundle.model_id,
        calibrations.label,
        len(images),
        unusable,
        list(ALPHAS),
        ways,
        caught,
    )


def _way(
    resized: bool,
    calibration: Calibration | None,
    p_values: np.ndarray,
    known: np.ndarray,
    per_day: int,
    level: float,
) -> PathForecast:
    alarms, unlike, new = [], [], p_values[~known]
    n = 0 if calibration is None else len(calibration.scores)
    for alpha in ALPHAS:
        if flagging_rank(n, alpha) == 0:
            alarms.append(Alarms(alpha, None, None, None, None))
            continue
        assert calibration is not None
        band = calibration.false_alarm_band(alpha, tested=per_day) if per_day else (0.0, 0.0)
        low, high = (round(share * per_day) for share in band)
        rate = calibration.false_alarm_rate(alpha)
        alarms.append(Alarms(alpha, per_day * rate, low, high, share_at(p_values, alpha)))
        if not len(new):
            continue
        least, most = calibration.false_alarm_band(alpha, level, len(new))
        if not least <= share_at(new, alpha) <= most:
            unlike.append(alpha)
    return PathForecast(resized, len(p_values), per_day, n, alarms, unlike, int(known.sum()))
