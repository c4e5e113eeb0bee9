"""Does this image look like the training data? A calibrated verdict from its bits per dimension.

Too few bits are as odd as too many: a flat picture has a higher likelihood than any photograph (Nalisnick et al.,
"Do Deep Generative Models Know What They Don't Know?", 2019). The statistic is therefore two-sided, and its p-value
is conformal: whatever the statistic, an image that is exchangeable with the calibration images is flagged at
``alpha`` with probability at most ``alpha``.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

MIN_IMAGES = 20


class CalibrationError(ValueError):
    """A calibration that cannot be made or read."""


@dataclass(frozen=True)
class Verdict:
    """How strange one image is.

    Attributes:
        ood_score: the statistic; higher is stranger.
        p_value: ``(1 + #{calibration scores >= this one}) / (n + 1)``.
    """

    ood_score: float
    p_value: float


@dataclass(frozen=True)
class Calibration:
    """Held-out images' bits per dimension, and the statistic fitted to other held-out images.

    Attributes:
        estimator: of the bits per dimension, such as ``elbo``; served verdicts use the same.
        center: median bpd of the images that the statistic was fitted on.
        below: spread below the median (to the 16th percentile), bpd.
        above: spread above it (to the 84th).
        bpd: float64 ``(n,)``, of the calibration images, sorted: the reference histogram.
    """

    estimator: str
    center: float
    below: float
    above: float
    bpd: np.ndarray

    @classmethod
    def fit(cls, select_bpd: np.ndarray, calibrate_bpd: np.ndarray, estimator: str = "elbo") -> Calibration:
        """Fit the statistic on one set of images and calibrate it on another.

        Args:
            select_bpd: ``(m,)``, bpd of images that were neither trained on nor are in the other set.
            calibrate_bpd: ``(n,)``.
            estimator: of both.

        Raises:
            CalibrationError: too few images, or scores that are not finite or all alike.
        """
        for name, values in (("fitting", select_bpd), ("calibration", calibrate_bpd)):
            if len(values) < MIN_IMAGES:
                raise CalibrationError(f"{name} needs at least {MIN_IMAGES} images, got {len(values)}")
            if not np.isfinite(values).all():
                raise CalibrationError(f"{name}: {int((~np.isfinite(values)).sum())} scores are not finite")
        low, center, high = np.quantile(select_bpd, [0.16, 0.5, 0.84])
        if not low < center < high:
            raise CalibrationError("the images' scores do not vary: a statistic cannot be fitted to them")
        return cls(estimator, float(center), float(center - low), float(high - center),
                   np.sort(np.asarray(calibrate_bpd, np.float64)))

    def scores(self, bpd: np.ndarray) -> np.ndarray:
        """The statistic: distance from the median in spreads of that side; ``(N,)``."""
        gap = np.asarray(bpd, np.float64) - self.center
        return np.where(gap < 0, -gap / self.below, gap / self.above)

    def verdicts(self, bpd: np.ndarray) -> list[Verdict]:
        """A verdict for each bpd of the calibrated estimator."""
        reference = np.sort(self.scores(self.bpd))
        scores = self.scores(bpd)
        at_least = len(reference) - np.searchsorted(reference, scores, side="left")
        p_values = (1 + at_least) / (len(reference) + 1)
        return [Verdict(float(s), float(p)) for s, p in zip(scores, p_values, strict=True)]

    def summary(self) -> dict[str, Any]:
        """What a manifest says of it."""
        return {"statistic": "two-sided bpd", "estimator": self.estimator, "images": len(self.bpd),
                "median_bpd": self.center, "smallest_p_value": 1 / (len(self.bpd) + 1)}

    def to_bytes(self) -> bytes:
        """An ``.npz`` file."""
        out = io.BytesIO()
        np.savez_compressed(out, estimator=np.array(self.estimator), spread=np.array(
            [self.center, self.below, self.above]), bpd=self.bpd)
        return out.getvalue()

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read what :meth:`to_bytes` made.

        Raises:
            CalibrationError: the file is of another kind.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                center, below, above = (float(v) for v in arrays["spread"])
                return cls(str(arrays["estimator"]), center, below, above, arrays["bpd"])
        except (ValueError, KeyError, OSError) as error:
            raise CalibrationError(f"{path} is no calibration: {error}") from error
