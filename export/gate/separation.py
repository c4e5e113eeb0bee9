"""How well scores separate OOD images from in-distribution (ID) images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from export.gate.measuring import Measured
from serving.verdict.calibration import Calibration
from serving.verdict.calibration_file import CalibrationPair
from serving.verdict.conformal import conformal_p_values
from serving.verdict.false_alarms import flagging_rank

COMBINED, RAW_BPD, NO_MODEL = "combined", "bpd, raw", "pixels alone"
NO_FEATURES = "without features"  # only of bundles with a network that tells things apart
ALPHAS = (0.1, 0.05, 0.01)


@dataclass(frozen=True)
class Figures:
    """How one score separates one set of OOD images from in-distribution (ID) images.

    Attributes:
        auroc: probability that an OOD image scores higher than an ID image.
        standard_error: of the AUROC.
        aupr: average precision, with OOD images as positives.
        fpr95: false-alarm rate at the threshold that finds 95 % of the OOD images.
        flagged: share of the OOD images that is flagged at each of :data:`ALPHAS`, ``None`` where
            there is no verdict; for the combined score only.
    """

    auroc: float
    standard_error: float
    aupr: float
    fpr95: float
    flagged: tuple[float | None, ...] | None = None


@dataclass(frozen=True)
class Judged:
    """Images, each judged by the calibration for its kind: of the model's size, or resized.

    Attributes:
        scores: of :func:`scores_of`, those that all kinds of these images have.
        p_values: float64 ``(N,)``, NaN for a kind without a calibration.
        resized: bool ``(N,)``.
        calibrations: by kind; ``None`` if the bundle has no calibration for resized images, whose
            scores are then by the calibration for images of the model's size.
    """

    scores: dict[str, np.ndarray]
    p_values: np.ndarray
    resized: np.ndarray
    calibrations: dict[bool, Calibration | None]

    @classmethod
    def of(cls, calibrations: CalibrationPair, images: Measured) -> Judged:
        """Judge images; there must be a calibration for those of the model's size."""
        found: dict[str, np.ndarray] = {}
        p_values = np.full(len(images.resized), np.nan)
        by_kind: dict[bool, Calibration | None] = {}
        for kind in np.unique(images.resized).tolist():
            calibration = calibrations.of(kind)
            judging = calibration or calibrations.exact
            assert judging is not None
            rows = images.resized == kind
            scores = scores_of(judging, {k: v[rows] for k, v in images.statistics.items()})
            for name, values in scores.items():
                found.setdefault(name, np.full(len(rows), np.nan))[rows] = values
            if calibration is not None:
                p_values[rows] = conformal_p_values(calibration.scores, scores[COMBINED])
            by_kind[kind] = calibration
        whole = {name: values for name, values in found.items() if not np.isnan(values).any()}
        return cls(whole, p_values, images.resized, by_kind)

    @property
    def calibrated(self) -> int:
        """Number of calibration images, for the kind that has fewer; 0 without a calibration."""
        return min(0 if its is None else len(its.scores) for its in self.calibrations.values())

    def flagged(self) -> tuple[float | None, ...]:
        """The share that is flagged at each alpha; ``None`` if a kind gets no verdict."""
        return tuple(
            float((self.p_values <= alpha).mean())
            if flagging_rank(self.calibrated, alpha)
            else None
            for alpha in ALPHAS
        )


def scores_of(
    calibration: Calibration, statistics: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Scores by name; a higher score is more unusual.

    They are the combined score, the same without the features of networks if the bundle has any,
    the raw bpd, the score without a model, and the score of each single statistic, which is the
    absolute value of its normal score.
    """
    rows = calibration.rows(statistics)
    normal = calibration.normal(rows)
    found = {COMBINED: calibration.ood_scores(normal)}
    if calibration.known is not None or calibration.encoder is not None:
        lesson = calibration.lesson and replace(calibration.lesson, weight=0.0)
        others = replace(calibration, known=None, encoder=None, lesson=lesson)
        found[NO_FEATURES] = others.ood_scores(normal)
    return {
        **found,
        RAW_BPD: statistics["bpd"].astype(np.float64),
        NO_MODEL: calibration.baseline.negative_log_density(normal[:, calibration.pixel_columns]),
        **dict(zip(calibration.names, np.abs(normal).T, strict=True)),
    }


def compare_scores(id_values: np.ndarray, ood_values: np.ndarray) -> Figures:
    """Figures of one score, given its values for ID images, ``(N,)``, and OOD images, ``(M,)``."""
    truth = np.concatenate([np.zeros(len(id_values)), np.ones(len(ood_values))])
    values = np.concatenate([id_values, ood_values])
    auroc = float(roc_auc_score(truth, values))
    return Figures(
        auroc,
        _standard_error(auroc, len(id_values), len(ood_values)),
        float(average_precision_score(truth, values)),
        float((id_values >= np.quantile(ood_values, 0.05)).mean()),
    )


def _standard_error(auroc: float, num_id: int, num_ood: int) -> float:
    """Hanley and McNeil, "The meaning and use of the area under a ROC curve", 1982, eq. 2."""
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    variance = (
        auroc * (1 - auroc) + (num_ood - 1) * (q1 - auroc**2) + (num_id - 1) * (q2 - auroc**2)
    )
    return math.sqrt(max(variance, 0.0) / (num_id * num_ood))
