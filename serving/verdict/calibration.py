"""Judges whether an image looks like the training data, by one calibrated verdict.

The statistics (:mod:`serving.verdict.statistics`) are turned into normal scores and judged by a
density that was fitted to held-out images, after Morningstar et al., "Density of States Estimation
for Out-of-Distribution Detection", 2021: any rare value is unusual, including a likelihood that is
too high. The sum of semantic statistics (:mod:`serving.verdict.semantic`) is added to its score.

The verdict is conformal: whatever the score, an image that is exchangeable with the calibration
images is flagged at ``alpha`` with probability at most ``alpha``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ade_base.errors import UserError
from ade_base.messages import show
from ade_base.pictures.ignored import Ignored
from ade_base.pictures.view import Look
from ade_client.contract import Unusual
from serving.verdict.conformal import SLACK, conformal_p_values
from serving.verdict.density import FARTHEST, LEVELS, Mixture, NormalScores, places
from serving.verdict.encoder import (
    DISTANCES,
    PATCH,
    PICTURE,
    POOLED,
    SEEN,
    UNUSUAL,
    EncoderMemory,
)
from serving.verdict.false_alarms import false_alarm_band, flagging_rank
from serving.verdict.lesson import LESSON, Lesson
from serving.verdict.semantic import (
    COORDINATES,
    DISTANCE,
    ENERGY,
    FEATURES,
    SEMANTIC_PREFIX,
    KnownImages,
)
from serving.verdict.statistics import PIXEL_PREFIX

CORRUPTED_PREFIX = "corrupted: "  # of the arrays of corrupted images' scores
MAX_NAMES = 1000  # of statistics; a model has some dozens
MAX_NAME = 100  # characters of one
MAX_SHOWN = 5  # of them, in a message
# Between the larger of two networks' normal scores, 0, and their sum.
SOFTNESS = 2.0
ESTIMATOR = "elbo"  # of the bits per dimension that verdicts use


class CalibrationError(UserError, ValueError):
    """A calibration that cannot be made or read."""


@dataclass(frozen=True)
class Verdict:
    """How unusual one image is.

    Attributes:
        ood_score: of :meth:`Calibration.ood_scores`, nats; a higher score is more unusual.
        p_value: of :func:`serving.verdict.conformal.conformal_p_values`.
        beyond: the same of the calibration scores above this one, ``#{...} / (n + 1)``: a random
            number between this and ``p_value`` is uniform on (0, 1) for images like the calibration
            images.
        explain: every statistic, the most unusual first.
        calibrated: number of calibration images.
        patches: p-values of the patches, float32 ``(P,)``, see
            :meth:`serving.verdict.patches.PatchMemory.p_values`; ``None`` without an encoder.
    """

    ood_score: float
    p_value: float
    beyond: float
    explain: tuple[Unusual, ...]
    calibrated: int = 0
    patches: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Calibration:
    """The density of statistics, and the scores of the calibration images under it.

    Attributes:
        estimator: estimator of the bits per dimension, :data:`ESTIMATOR`.
        resize: ``fit`` if calibration images went through that resizing.
        names: of the ``S`` statistics, those that vary; semantic ones come last.
        normal: turns each statistic into a normal score.
        mixture: the density of all but the semantic ones.
        scores: float64 ``(n,)``, of the calibration images, sorted.
        reference: float32 ``(n, S)``, their statistics, each column sorted by itself.
        baseline: a mixture on the statistics of the pixels alone, for comparison: it needs no
            model.
        known: the known images of the semantic statistics; ``None`` without them.
        encoder: what the encoder of originals knows; ``None`` without it.
        lesson: what known bad pictures taught; ``None`` without it. Its coordinate is the last.
        ignored: what is filled before anything looks at a picture; ``None`` for nothing.
        corrupted: float64 ``(m,)`` by the name of a corruption, OOD scores of calibration images
            that were corrupted so, to show what each alpha would catch; empty in calibrations of
            versions before.
        digests: uint64, the first 8 bytes of the SHA-256 of the pixels of each calibration image;
            empty in calibrations of versions before.
        fitted_digests: uint64, the same as ``digests`` of the images that the density was fitted
            to; empty in calibrations of versions before.
    """

    estimator: str
    resize: str | None
    names: tuple[str, ...]
    normal: NormalScores
    mixture: Mixture
    scores: np.ndarray
    reference: np.ndarray
    baseline: Mixture
    known: KnownImages | None = None
    encoder: EncoderMemory | None = None
    lesson: Lesson | None = None
    ignored: Ignored | None = None
    corrupted: Mapping[str, np.ndarray] = field(default_factory=dict)
    digests: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    fitted_digests: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    @property
    def bpd(self) -> np.ndarray:
        """Of the calibration images, sorted."""
        return self.reference[:, self.names.index("bpd")]

    @property
    def sees_content(self) -> bool:
        """Whether the features of a network count, which depend on what images show."""
        return any(name.startswith(SEMANTIC_PREFIX) for name in self.names)

    @property
    def look(self) -> Look:
        """How it looks at pictures."""
        return Look(0 if self.encoder is None else self.encoder.look.size, self.ignored)

    @property
    def pixel_columns(self) -> list[int]:
        """Which of the statistics need no model."""
        return [i for i, name in enumerate(self.names) if name.startswith(PIXEL_PREFIX)]

    def check_statistics(self, names: Sequence[str]) -> None:
        """Check that the statistics it was fitted to are still computed.

        Raises:
            CalibrationError: they are not; the error names them.
        """
        needed = {
            *(name for name in self.names if name != LESSON),
            *([DISTANCE] if self.known else []),
            *([PICTURE] if self.encoder else []),
        }
        missing = sorted(needed - set(names))
        if missing:
            more = f" and {len(missing) - MAX_SHOWN} more" if len(missing) > MAX_SHOWN else ""
            network = _network_of(missing[-1])
            raise CalibrationError(
                f"the calibration was fitted to statistics that this version does not compute"
                f"{f' without {network}' if network else ''}: "
                f"{', '.join(missing[:MAX_SHOWN])}{more}; ade calibrate makes another"
            )

    def check_values(self) -> None:
        """Check that all arrays fit together and are usable.

        Raises:
            CalibrationError: they do not; the error names the first such array.
        """
        if self.estimator != ESTIMATOR:
            raise CalibrationError(f"estimator must be {ESTIMATOR}, got {show(self.estimator)}")
        if self.resize not in (None, "fit"):
            raise CalibrationError(f"resize must be empty or fit, got {show(self.resize)}")
        for name in self.names:  # messages and answers have them
            if len(name) > MAX_NAME or not name.isprintable():
                raise CalibrationError(
                    f"names must have at most {MAX_NAME} printable characters, got {show(name)}"
                )
        size, pixels, n = len(self.names), len(self.pixel_columns), self.scores.size
        semantic = [name.startswith(SEMANTIC_PREFIX) for name in self.names]
        owned = {
            **dict.fromkeys(COORDINATES, self.known),
            **dict.fromkeys(SEEN, self.encoder),
            LESSON: self.lesson,
        }
        if semantic != sorted(semantic) or any(
            owned.get(name) is None for name in self.names[size - sum(semantic) :]
        ):
            raise CalibrationError("semantic statistics must come last, with known images")
        problem = (
            (self.known and self.known.problem())
            or (self.encoder and self.encoder.problem())
            or (self.ignored and self.ignored.problem())
        )
        if not problem and self.lesson is not None:
            problem = self.lesson.problem(self.sizes)
            if self.names[-1] != LESSON or LESSON in self.names[:-1]:
                problem = problem or f"{LESSON} must be the last of the names"
        if problem:
            raise CalibrationError(problem)
        if PATCH in self.names and (self.encoder is None or self.encoder.patches is None):
            raise CalibrationError(f"{PATCH} needs known patches")
        if self.known is not None and ENERGY in self.names and self.known.usual.shape[1] < 2:
            raise CalibrationError(f"known_usual lacks {ENERGY}")
        for name, array, shape in (
            ("grid", self.normal.grid, (LEVELS, size)),
            ("spread", self.normal.spread, (size,)),
            ("scores", self.scores, (n,)),
            ("reference", self.reference, (n, size)),
            *self.mixture.shapes("mixture", size - sum(semantic)),
            *self.baseline.shapes("baseline", pixels),
        ):
            if array.shape != shape or array.dtype.kind != "f" or not np.isfinite(array).all():
                raise CalibrationError(
                    f"{name} must be finite numbers of shape {shape}, got {array.dtype} "
                    f"{array.shape}"
                )
        for name, scores in self.corrupted.items():
            if scores.ndim != 1 or scores.dtype.kind != "f" or not np.isfinite(scores).all():
                raise CalibrationError(f"the scores of {show(name)} must be finite numbers")
        if any(
            its.dtype != np.uint64 or its.ndim != 1 for its in (self.digests, self.fitted_digests)
        ):
            raise CalibrationError("digests must be one uint64 for each image")
        if not n or "bpd" not in self.names or not (self.normal.spread > 0).all():
            raise CalibrationError("it has no scores, no bpd, or a spread that is not positive")
        for name, array in (
            ("grid", self.normal.grid),
            ("scores", self.scores),
            ("reference", self.reference),
        ):
            if (np.diff(array, axis=0) < 0).any():
                raise CalibrationError(f"{name} must be sorted")

    @property
    def sizes(self) -> dict[str, int]:
        """The number of values of each statistic that a lesson can see."""
        found = {}
        if self.encoder is not None:
            found[POOLED] = len(self.encoder.spread)
            if self.encoder.patches is not None:
                found[UNUSUAL] = len(self.encoder.patches.mean)
        if self.known is not None:
            found[FEATURES] = self.known.directions.shape[1]
        return found

    def rows(self, statistics: Mapping[str, np.ndarray]) -> np.ndarray:
        """float32 ``(N, S)`` from arrays by name."""
        if self.known is not None:
            statistics = {**statistics, **self.known.coordinates(statistics)}
        if self.encoder is not None:
            measured = self.encoder.measured(statistics)
            statistics = {**measured, **self.encoder.coordinates(measured)}
        if self.lesson is not None:
            statistics = {**statistics, LESSON: self.lesson.coordinate(statistics)}
        return np.stack([statistics[name] for name in self.names], axis=1)

    def scores_of(self, statistics: Mapping[str, np.ndarray]) -> np.ndarray:
        """The OOD scores, ``(N,)``, nats, of images with these statistics by name."""
        return self.ood_scores(self.normal(self.rows(statistics)))

    def caught(self, alpha: float) -> dict[str, float]:
        """The share of corrupted images that is rejected at ``alpha``, by the corruption's name.

        Empty if it was not measured, or if so few calibration images cannot reject any.
        """
        if self.too_small(alpha) is not None:
            return {}
        return {
            name: float((conformal_p_values(self.scores, scores) <= alpha).mean())
            for name, scores in self.corrupted.items()
            if len(scores)
        }

    def ood_scores(self, normal: np.ndarray) -> np.ndarray:
        """The OOD score, ``(N,)``, nats, of normal scores ``(N, S)``.

        This is minus the log-density of the statistics of the generative model and the pixels. With
        semantic statistics it is at least the known images' floor, and the weighted sum of their
        normal scores is added. Inside the density, one or two among dozens would hardly count. Of
        two networks, each gives the mean of its normal scores, and the one that finds an image more
        unusual counts more. A lesson's normal score is added with a weight of its own.
        """
        width = self.mixture.means.shape[1]
        scores = density = self.mixture.negative_log_density(normal[:, :width])
        semantic = np.clip(normal[:, width:], -FARTHEST, FARTHEST)
        lesson = 0.0
        if self.lesson is not None:
            semantic, lesson = semantic[:, :-1], self.lesson.weight * semantic[:, -1]
        seen = np.array([name in SEEN for name in self.names[width:]], bool)[: semantic.shape[1]]
        memory = self.encoder.pooled if self.encoder is not None else self.known
        if memory is not None and (seen.all() or not seen.any()):
            scores = np.maximum(density, memory.floor) + memory.weight * semantic.sum(1)
        elif memory is not None:
            means = [semantic[:, its].mean(1) / SOFTNESS for its in (seen, ~seen)]
            both = memory.weight * SOFTNESS * np.logaddexp(*means)
            scores = np.maximum(density, memory.floor) + both
        scores = scores + lesson
        # Minus infinity would be accepted.
        return np.where(np.isfinite(density) & np.isfinite(scores), scores, np.inf)

    def verdicts(self, statistics: Mapping[str, np.ndarray]) -> list[Verdict]:
        """A verdict for each image.

        Args:
            statistics: of :func:`serving.verdict.statistics.compute_statistics`.
        """
        if self.encoder is not None:
            statistics = self.encoder.measured(statistics)
        rows = self.rows(statistics)
        normal = self.normal(rows)
        scores = self.ood_scores(normal)
        memory = None if self.encoder is None else self.encoder.patches
        patches = None if memory is None else memory.p_values(statistics[DISTANCES])
        p_values = conformal_p_values(self.scores, scores)
        at_most = np.searchsorted(self.scores, scores + SLACK, "right")
        beyond = (len(self.scores) - at_most) / (len(self.scores) + 1)
        two_sided = self._two_sided(rows)
        verdicts = []
        for row in range(len(rows)):
            order = np.lexsort((-np.abs(normal[row]), two_sided[row]))
            explain = tuple(
                map(
                    Unusual,
                    [self.names[i] for i in order],
                    rows[row, order].tolist(),
                    two_sided[row, order].tolist(),
                )
            )
            verdicts.append(
                Verdict(
                    float(scores[row]),
                    float(p_values[row]),
                    float(beyond[row]),
                    explain,
                    len(self.scores),
                    None if patches is None else patches[row],
                )
            )
        return verdicts

    def _two_sided(self, rows: np.ndarray) -> np.ndarray:
        """p-values of each statistic by itself, ``(N, S)``."""
        below, at_most = places(self._columns, rows)
        count = len(self.reference)
        return np.minimum(1.0, 2 * (1 + np.minimum(at_most, count - below)) / (count + 1))

    @cached_property
    def _columns(self) -> np.ndarray:
        return np.ascontiguousarray(self.reference.T)

    def false_alarm_rate(self, alpha: float) -> float:
        """The false-alarm rate to expect at ``alpha``; 0 if nothing can be rejected.

        Of equal scores at the threshold none is rejected. A picture that repeats among the
        calibration images must repeat as often in use: otherwise the rate is higher.
        """
        n = len(self.scores)
        k = flagging_rank(n, alpha)
        if not 0 < k <= n:
            return float(k > n)
        return (1 + int((self.scores > self.scores[n - k]).sum())) / (n + 1)

    def false_alarm_band(
        self, alpha: float, level: float = 0.95, tested: int | None = None
    ) -> tuple[float, float]:
        """The band of the realised rate, see :func:`serving.verdict.false_alarms.false_alarm_band`.

        If a picture that repeats is at the threshold, the rate may be any smaller one, and the band
        begins at 0. It must repeat as often in use, as for :meth:`false_alarm_rate`.
        """
        n = len(self.scores)
        low, high = false_alarm_band(n, alpha, level, tested)
        is_tied = self.false_alarm_rate(alpha) < flagging_rank(n, alpha) / (n + 1)
        return (0.0 if is_tied else low), high

    @property
    def smallest_p_value(self) -> float:
        """Smallest attainable p-value, 1/(n + 1)."""
        return 1 / (len(self.scores) + 1)

    def too_small(self, alpha: float) -> str | None:
        """A note if nothing can be flagged at this false-alarm rate."""
        if alpha >= self.smallest_p_value:
            return None
        return (
            f"nothing can be flagged at alpha {alpha:g}: {len(self.scores)} images calibrated the "
            f"verdict, and the smallest p-value is {self.smallest_p_value:.2g}"
        )

    def summary(self) -> dict[str, Any]:
        """Its entry in a manifest."""
        inside = self.mixture.means.shape[1]
        semantic = len(self.names) - inside
        return {
            "statistic": f"density of {inside} statistics"
            + (f", {semantic} semantic ones" if semantic else ""),
            "estimator": self.estimator,
            "resize": self.resize,
            "components": len(self.mixture.means),
            "images": len(self.scores),
            "median_bpd": float(np.median(self.bpd)),
            "smallest_p_value": self.smallest_p_value,
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        return {
            "estimator": np.array(self.estimator),
            "resize": np.array(self.resize or ""),
            "names": np.array(self.names),
            "grid": self.normal.grid,
            "spread": self.normal.spread,
            "scores": self.scores,
            "reference": self.reference,
            **self.mixture.arrays("mixture"),
            **self.baseline.arrays("baseline"),
            **({} if self.known is None else self.known.arrays()),
            **({} if self.encoder is None else self.encoder.arrays()),
            **({} if self.lesson is None else self.lesson.arrays()),
            **({} if self.ignored is None else self.ignored.arrays()),
            **{CORRUPTED_PREFIX + name: scores for name, scores in self.corrupted.items()},
            **({"digests": self.digests} if self.digests.size else {}),
            **({"fitted_digests": self.fitted_digests} if self.fitted_digests.size else {}),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str = "") -> Calibration:
        """Rebuild from :meth:`arrays`, with names after a prefix."""

        def of(name: str) -> np.ndarray:
            return arrays[prefix + name]

        def digests(name: str) -> np.ndarray:
            return of(name) if prefix + name in arrays else np.empty(0, np.uint64)

        start = prefix + CORRUPTED_PREFIX
        names = of("names")
        # An array without values takes no bytes of its file, however long it is.
        if max(names.shape, default=0) > MAX_NAMES:
            raise CalibrationError(f"names must be at most {MAX_NAMES}, got {names.shape}")
        return cls(
            str(of("estimator")),
            str(of("resize")) or None,
            tuple(map(str, names)),
            NormalScores(of("grid"), of("spread")),
            Mixture.from_arrays(arrays, f"{prefix}mixture"),
            of("scores"),
            of("reference"),
            Mixture.from_arrays(arrays, f"{prefix}baseline"),
            KnownImages.from_arrays(arrays, prefix),
            EncoderMemory.from_arrays(arrays, prefix),
            Lesson.from_arrays(arrays, prefix),
            Ignored.from_arrays(arrays, prefix),
            {name.removeprefix(start): arrays[name] for name in arrays if name.startswith(start)},
            digests("digests"),
            digests("fitted_digests"),
        )


def _network_of(statistic: str) -> str | None:
    """The file of the network that a statistic comes from; ``None`` if it is the model's."""
    if not statistic.startswith(SEMANTIC_PREFIX):
        return None
    return "encoder.onnx" if statistic in SEEN else "features.onnx"
