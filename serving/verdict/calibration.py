"""Judges whether an image looks like the training data, by one calibrated verdict.

The statistics (:mod:`serving.verdict.statistics`) are turned into normal scores and judged by a
density that was fitted to held-out images, after Morningstar et al., "Density of States Estimation
for Out-of-Distribution Detection", 2021: any rare value is unusual, including a likelihood that is
too high. The sum of semantic statistics (:mod:`serving.verdict.semantic`) is added to its score.

The verdict is conformal: whatever the score, an image that is exchangeable with the calibration
images is flagged at ``alpha`` with probability at most ``alpha``.
"""

from __future__ import annotations

import hashlib
import io
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from statistics import NormalDist
from typing import Any
from zipfile import BadZipFile

import numpy as np

from serving.files import read_file
from serving.images import coder_version
from serving.verdict.semantic import DISTANCE, ENERGY, SEMANTIC_PREFIX, KnownImages
from serving.verdict.statistics import PIXEL_PREFIX

LEVELS = 257  # of the quantiles that a normal score is read from
RESIZED_PREFIX = "resized_"  # of the arrays of a second calibration
CORRUPTED_PREFIX = "corrupted: "  # of the arrays of corrupted images' scores
ESTIMATOR = "elbo"  # of the bits per dimension that verdicts use
DEFAULT = "default"  # the name of a bundle's own calibration
VERSION_DIGITS = 12  # of the file's SHA-256
ZIP = b"PK\x03\x04"  # the beginning of an .npz file
MAX_CALIBRATION_BYTES = 256 * 2**20  # of a file
FARTHEST = 6.0  # limit of a normal score: one extreme statistic must not hide the others


class CalibrationError(ValueError):
    """A calibration that cannot be made or read."""


@dataclass(frozen=True)
class Unusual:
    """One statistic of an image; ``p_value`` is two-sided, by this statistic alone."""

    statistic: str
    value: float
    p_value: float


@dataclass(frozen=True)
class Verdict:
    """How unusual one image is.

    Attributes:
        ood_score: of :meth:`Calibration.surprise`, nats; a higher score is more unusual.
        p_value: ``(1 + #{calibration scores >= this one}) / (n + 1)``.
        uniform: the same with ties broken at random: uniform on (0, 1) for images like the
            calibration images.
        explain: every statistic, the most unusual first.
        calibrated: number of calibration images.
    """

    ood_score: float
    p_value: float
    uniform: float
    explain: tuple[Unusual, ...]
    calibrated: int = 0


@dataclass(frozen=True)
class NormalScores:
    """A transform that makes each statistic standard normal over the images it was fitted to.

    Attributes:
        grid: float32 ``(LEVELS, S)``, quantiles of each statistic at the levels ``(i + 1/2) /
            LEVELS``.
        spread: float32 ``(S,)``, the distance beyond the grid's ends that adds one to a normal
            score.
    """

    grid: np.ndarray
    spread: np.ndarray

    @classmethod
    def fit(cls, rows: np.ndarray) -> NormalScores:
        """Fit to float32 ``(m, S)``; every statistic must vary."""
        grid = np.quantile(rows, (np.arange(LEVELS) + 0.5) / LEVELS, axis=0)
        low, high = np.quantile(rows, [0.16, 0.84], axis=0)
        spread = np.where(high > low, (high - low) / 2, rows.std(0, dtype=np.float64))
        return cls(grid.astype(np.float32), spread.astype(np.float32))

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Turn float32 ``(N, S)`` into normal scores, float64 ``(N, S)``.

        Equal values of the grid share the middle of their scores.
        """
        first, last = _places(self._columns, rows)
        below, above = np.clip(first - 1, 0, LEVELS - 1), np.clip(first, 0, LEVELS - 1)
        column = np.arange(rows.shape[1])
        low = self.grid[below, column]
        step = (self.grid[above, column] - low).astype(np.float64)
        inside = below + np.where(step > 0, (rows - low) / np.where(step > 0, step, 1), 0)
        place = np.where(last > first, (first + last - 1) / 2, inside)
        beyond = np.maximum(rows - self.grid[-1], 0) - np.maximum(self.grid[0] - rows, 0)
        return np.interp(place, np.arange(LEVELS), _QUANTILES) + beyond / self.spread

    @cached_property
    def _columns(self) -> np.ndarray:
        return np.ascontiguousarray(self.grid.T)


def _places(columns: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the entries of each sorted column, ``(S, n)``, below and at most given values.

    The values and both counts are ``(N, S)``.
    """
    below = [
        column.searchsorted(values, "left") for column, values in zip(columns, rows.T, strict=True)
    ]
    at_most = [
        column.searchsorted(values, "right") for column, values in zip(columns, rows.T, strict=True)
    ]
    return np.stack(below, axis=1), np.stack(at_most, axis=1)


_QUANTILES = np.array([NormalDist().inv_cdf((i + 0.5) / LEVELS) for i in range(LEVELS)])


@dataclass(frozen=True)
class Mixture:
    """A mixture of ``k`` Gaussians on normal scores of ``d`` statistics.

    Attributes:
        log_weights: ``(k,)``, with the Gaussians' normalisation.
        means: ``(k, d)``.
        whiteners: ``(k, d, d)``: ``whitener @ (z - mean)`` is standard normal.
    """

    log_weights: np.ndarray
    means: np.ndarray
    whiteners: np.ndarray

    def surprise(self, scores: np.ndarray) -> np.ndarray:
        """Minus the log-density, ``(N,)``, nats, of ``(N, d)``.

        Row by row: products of matrices vary with their size.
        """
        return np.array([self._surprise(row) for row in np.clip(scores, -FARTHEST, FARTHEST)])

    def _surprise(self, row: np.ndarray) -> float:
        white = self.whiteners @ (row - self.means)[:, :, None]
        terms = self.log_weights - 0.5 * np.square(white).sum((1, 2))
        top = terms.max()
        return float(-top - math.log(np.exp(terms - top).sum()))


@dataclass(frozen=True)
class Joined:
    """Images that feedback added to a calibration, with the values that removing them takes out.

    Computed again on another machine, or with another version of a library, the values of the same
    file may differ.

    Attributes:
        files: hexadecimal SHA-256 of each image file.
        rows: float32 ``(J, S)``, their statistics.
        scores: float64 ``(J,)``, their OOD scores.
        digests: uint64 ``(J,)``, the first 8 bytes of the SHA-256 of their pixels.
    """

    files: tuple[str, ...]
    rows: np.ndarray
    scores: np.ndarray
    digests: np.ndarray

    def and_more(self, more: Joined) -> Joined:
        """These images followed by others."""
        return Joined(
            (*self.files, *more.files),
            np.concatenate([self.rows, more.rows]),
            np.concatenate([self.scores, more.scores]),
            np.concatenate([self.digests, more.digests]),
        )

    def file_of(self, digest: int) -> str | None:
        """The file as which an image with these pixels joined; ``None`` if none did."""
        places = np.flatnonzero(self.digests == np.uint64(digest))
        return self.files[places[0]] if len(places) else None

    def without(self, files: Sequence[str]) -> Joined | None:
        """The images that are not in ``files``; ``None`` if that leaves none."""
        kept = [place for place, file in enumerate(self.files) if file not in files]
        if not kept:
            return None
        files = tuple(self.files[place] for place in kept)
        return Joined(files, self.rows[kept], self.scores[kept], self.digests[kept])

    def shapes(self, size: int) -> list[tuple[str, np.ndarray, Any]]:
        """The arrays with the shapes that they must have, for ``size`` statistics."""
        count = len(self.files)
        return [
            ("joined_rows", self.rows, (count, size)),
            ("joined_scores", self.scores, (count,)),
        ]

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        return {
            "joined_files": np.array(self.files),
            "joined_rows": self.rows,
            "joined_scores": self.scores,
            "joined_digests": self.digests,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str) -> Joined | None:
        """Rebuild from :meth:`arrays`; ``None`` if there are none."""
        if f"{prefix}joined_files" not in arrays:
            return None
        return cls(
            tuple(map(str, arrays[f"{prefix}joined_files"])),
            arrays[f"{prefix}joined_rows"],
            arrays[f"{prefix}joined_scores"],
            arrays[f"{prefix}joined_digests"],
        )


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
        corrupted: float64 ``(m,)`` by the name of a corruption, OOD scores of calibration images
            that were corrupted so, to show what each alpha would catch; empty in calibrations of
            versions before.
        digests: uint64, the first 8 bytes of the SHA-256 of the pixels of each calibration image
            that has not joined; empty in calibrations of versions before.
        joined: the images that feedback added; ``None`` if there are none, or a version before
            added them.
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
    corrupted: Mapping[str, np.ndarray] = field(default_factory=dict)
    digests: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    joined: Joined | None = None
    fitted_digests: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    @property
    def bpd(self) -> np.ndarray:
        """Of the calibration images, sorted."""
        return self.reference[:, self.names.index("bpd")]

    @property
    def pixel_columns(self) -> list[int]:
        """Which of the statistics need no model."""
        return [i for i, name in enumerate(self.names) if name.startswith(PIXEL_PREFIX)]

    def check_statistics(self, names: Sequence[str]) -> None:
        """Check that the statistics it was fitted to are still computed.

        Raises:
            CalibrationError: they are not; the error names them.
        """
        missing = sorted({*self.names, *([DISTANCE] if self.known else [])} - set(names))
        if missing:
            raise CalibrationError(
                f"the calibration was fitted to statistics that this version does not compute"
                f"{' without features.onnx' if missing[-1].startswith(SEMANTIC_PREFIX) else ''}: "
                f"{', '.join(missing)}; ade calibrate makes another"
            )

    def check_values(self) -> None:
        """Check that all arrays fit together and are usable.

        Raises:
            CalibrationError: they do not; the error names the first such array.
        """
        if self.estimator != ESTIMATOR:
            raise CalibrationError(f"estimator must be {ESTIMATOR}, got {self.estimator!r}")
        if self.resize not in (None, "fit"):
            raise CalibrationError(f"resize must be empty or fit, got {self.resize!r}")
        size, pixels, n = len(self.names), len(self.pixel_columns), self.scores.size
        semantic = [name.startswith(SEMANTIC_PREFIX) for name in self.names]
        if semantic != sorted(semantic) or (any(semantic) and self.known is None):
            raise CalibrationError("semantic statistics must come last, with known images")
        problem = self.known and self.known.problem()
        if problem:
            raise CalibrationError(problem)
        if self.known is not None and ENERGY in self.names and self.known.usual.shape[1] < 2:
            raise CalibrationError(f"known_usual lacks {ENERGY}")
        for name, array, shape in (
            ("grid", self.normal.grid, (LEVELS, size)),
            ("spread", self.normal.spread, (size,)),
            ("scores", self.scores, (n,)),
            ("reference", self.reference, (n, size)),
            *_shapes("mixture", self.mixture, size - sum(semantic)),
            *_shapes("baseline", self.baseline, pixels),
            *([] if self.joined is None else self.joined.shapes(size)),
        ):
            if array.shape != shape or array.dtype.kind != "f" or not np.isfinite(array).all():
                raise CalibrationError(
                    f"{name} must be finite numbers of shape {shape}, got {array.dtype} "
                    f"{array.shape}"
                )
        for name, scores in self.corrupted.items():
            if scores.ndim != 1 or scores.dtype.kind != "f" or not np.isfinite(scores).all():
                raise CalibrationError(f"the scores of {name!r} must be finite numbers")
        digests = [(its, (its.size,)) for its in (self.digests, self.fitted_digests)]
        if self.joined is not None:
            digests.append((self.joined.digests, (len(self.joined.files),)))
        if any(its.dtype != np.uint64 or its.shape != shape for its, shape in digests):
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

    def joined_by(
        self, statistics: Mapping[str, np.ndarray], files: Sequence[str], digests: Sequence[int]
    ) -> Calibration:
        """The same density with more calibration images.

        Args:
            statistics: of :func:`serving.verdict.statistics.compute_statistics`, for images to
                which nothing was fitted.
            files: hexadecimal SHA-256 of each image file.
            digests: the first 8 bytes of the SHA-256 of each image's pixels.
        """
        rows = self.rows(statistics)
        scores = self.surprise(self.normal(rows))
        new = Joined(tuple(files), rows, scores, np.array(digests, np.uint64))
        return replace(
            self,
            scores=np.sort(np.concatenate([self.scores, scores])),
            reference=np.sort(np.concatenate([self.reference, rows]), axis=0),
            joined=new if self.joined is None else self.joined.and_more(new),
        )

    def left_by(self, statistics: Mapping[str, np.ndarray], files: Sequence[str]) -> Calibration:
        """The same density without images that had joined.

        Args:
            statistics: used only for images that a version before added, without their values.
            files: hexadecimal SHA-256 of each image file, as it joined.

        Raises:
            CalibrationError: an image is not among the calibration images, or none would be left.
        """
        rows = self.rows(statistics)
        scores = self.surprise(self.normal(rows))
        if self.joined is not None:
            places = {file: place for place, file in enumerate(self.joined.files)}
            for row, file in enumerate(files):
                if file in places:
                    rows[row] = self.joined.rows[places[file]]
                    scores[row] = self.joined.scores[places[file]]
        left = _without(self.scores, scores)
        columns = [_without(*pair) for pair in zip(self.reference.T, rows.T, strict=True)]
        if not len(left):
            raise CalibrationError("a calibration needs at least one image")
        return replace(
            self,
            scores=left,
            reference=np.stack(columns, axis=1),
            joined=None if self.joined is None else self.joined.without(files),
        )

    def rows(self, statistics: Mapping[str, np.ndarray]) -> np.ndarray:
        """float32 ``(N, S)`` from arrays by name."""
        if self.known is not None:
            statistics = {**statistics, **self.known.coordinates(statistics)}
        return np.stack([statistics[name] for name in self.names], axis=1)

    def scores_of(self, statistics: Mapping[str, np.ndarray]) -> np.ndarray:
        """The OOD scores, ``(N,)``, nats, of images with these statistics by name."""
        return self.surprise(self.normal(self.rows(statistics)))

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

    def surprise(self, normal: np.ndarray) -> np.ndarray:
        """The OOD score, ``(N,)``, nats, of normal scores ``(N, S)``.

        This is minus the log-density of the statistics of the generative model and the pixels. With
        semantic statistics it is at least the known images' floor, and the weighted sum of their
        normal scores is added. Inside the density, one or two among dozens would hardly count.
        """
        width = self.mixture.means.shape[1]
        scores = density = self.mixture.surprise(normal[:, :width])
        if self.known is not None:
            semantic = np.clip(normal[:, width:], -FARTHEST, FARTHEST).sum(1)
            scores = np.maximum(density, self.known.floor) + self.known.weight * semantic
        # Minus infinity would be accepted.
        return np.where(np.isfinite(density) & np.isfinite(scores), scores, np.inf)

    def verdicts(
        self, statistics: Mapping[str, np.ndarray], ties: Sequence[float]
    ) -> list[Verdict]:
        """A verdict for each image.

        Args:
            statistics: of :func:`serving.verdict.statistics.compute_statistics`.
            ties: one per image, uniform on [0, 1), to break ties with.
        """
        rows = self.rows(statistics)
        normal = self.normal(rows)
        scores = self.surprise(normal)
        p_values = conformal_p_values(self.scores, scores)
        above = len(self.scores) - np.searchsorted(self.scores, scores, "right")
        equal = p_values * (len(self.scores) + 1) - above
        uniform = (above + np.asarray(ties) * equal) / (len(self.scores) + 1)
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
                    float(uniform[row]),
                    explain,
                    len(self.scores),
                )
            )
        return verdicts

    def _two_sided(self, rows: np.ndarray) -> np.ndarray:
        """p-values of each statistic by itself, ``(N, S)``."""
        below, at_most = _places(self._columns, rows)
        count = len(self.reference)
        return np.minimum(1.0, 2 * (1 + np.minimum(at_most, count - below)) / (count + 1))

    @cached_property
    def _columns(self) -> np.ndarray:
        return np.ascontiguousarray(self.reference.T)

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
            **_arrays("mixture", self.mixture),
            **_arrays("baseline", self.baseline),
            **({} if self.known is None else self.known.arrays()),
            **{CORRUPTED_PREFIX + name: scores for name, scores in self.corrupted.items()},
            **({"digests": self.digests} if self.digests.size else {}),
            **({"fitted_digests": self.fitted_digests} if self.fitted_digests.size else {}),
            **({} if self.joined is None else self.joined.arrays()),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str = "") -> Calibration:
        """Rebuild from :meth:`arrays`, with names after a prefix."""

        def of(name: str) -> np.ndarray:
            return arrays[prefix + name]

        def digests(name: str) -> np.ndarray:
            return of(name) if prefix + name in arrays else np.empty(0, np.uint64)

        start = prefix + CORRUPTED_PREFIX

        return cls(
            str(of("estimator")),
            str(of("resize")) or None,
            tuple(map(str, of("names"))),
            NormalScores(of("grid"), of("spread")),
            _mixture(f"{prefix}mixture", arrays),
            of("scores"),
            of("reference"),
            _mixture(f"{prefix}baseline", arrays),
            KnownImages.from_arrays(arrays, prefix),
            {name.removeprefix(start): arrays[name] for name in arrays if name.startswith(start)},
            digests("digests"),
            Joined.from_arrays(arrays, prefix),
            digests("fitted_digests"),
        )


@dataclass(frozen=True)
class Calibrations:
    """Calibrations for images of the model's size and for resized ones; ``None`` means no verdict.

    Attributes:
        exact: for images of the model's size.
        resized: for images that a request resized; may be the same object.
        name: the name that requests give.
        version: the first digits of its file's SHA-256; empty if it was not read from a file.
        model: :attr:`serving.engine.bundle.Bundle.networks` of the bundle; empty in a bundle's own
            file, which the manifest ties to them.
        data: describes the calibration images; empty in a bundle's own file.
        joined: SHA-256 of the image files that feedback added.
        webp: version of libwebp that computed the statistics; empty in files of versions before.
        is_broken: whether their file exists but cannot be used, so that there is no verdict.
    """

    exact: Calibration | None = None
    resized: Calibration | None = None
    name: str = DEFAULT
    version: str = ""
    model: str = ""
    data: str = ""
    joined: tuple[str, ...] = field(default=())
    webp: str = ""
    is_broken: bool = False

    def of(self, resized: bool) -> Calibration | None:
        """The one for an image that was or was not resized."""
        return self.resized if resized else self.exact

    @property
    def label(self) -> dict[str, str] | None:
        """Its name and version in answers; ``None`` without any calibration."""
        return None if self.exact is None else {"name": self.name, "version": self.version}

    def check(self, statistics: Sequence[str]) -> None:
        """Check that verdicts can be computed with calibrations that were read from a file.

        Args:
            statistics: names of the statistics that are computed.

        Raises:
            CalibrationError: they cannot.
        """
        for calibration in filter(None, (self.exact, self.resized)):
            calibration.check_statistics(statistics)

    def other_coder(self) -> str | None:
        """A warning if the statistics were computed with another version of libwebp than here."""
        if self.webp in ("", coder_version()):
            return None
        return (
            f"{self.name} was calibrated with libwebp {self.webp}, but this is {coder_version()}: "
            "verdicts may be slightly off until you run ade calibrate again"
        )

    def to_bytes(self) -> bytes:
        """An ``.npz`` file. One calibration for both paths is stored once, with ``resize`` set.

        Raises:
            CalibrationError: the file has no calibration for images of the model's size.
        """
        if self.exact is None:
            raise CalibrationError(
                "a calibration of resized images goes with one of images of the model's size"
            )
        second = {} if self.resized is None or self.resized is self.exact else self.resized.arrays()
        out = io.BytesIO()
        arrays: dict[str, Any] = {
            **self.exact.arrays(),
            **{RESIZED_PREFIX + name: its for name, its in second.items()},
        }
        if self.model:
            arrays |= {"model": np.array(self.model), "data": np.array(self.data)}
        if self.webp:
            arrays["webp"] = np.array(self.webp)
        if self.joined:
            arrays["joined"] = np.array(self.joined)
        np.savez_compressed(out, **arrays)
        return out.getvalue()

    @classmethod
    def load(cls, path: Path, name: str = DEFAULT) -> Calibrations:
        """Read what :meth:`to_bytes` made, or the single calibration of an older file.

        Args:
            path: a regular file. It is read once, so that the version fits the content.
            name: the name that requests give.

        Raises:
            CalibrationError: the file is not a calibration, or its arrays do not fit together.
        """
        try:
            content = read_file(path, MAX_CALIBRATION_BYTES)
            if not content.startswith(ZIP):  # NumPy would take it for a pickle
                raise ValueError(f"expected an .npz file, got {len(content)} bytes of another kind")
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                # An array whose name is damaged would not be missed where it need not be there.
                damaged = arrays.zip.testzip()
                if damaged is not None:
                    raise ValueError(f"{damaged} is damaged")
                exact = Calibration.from_arrays(arrays)
                if f"{RESIZED_PREFIX}scores" in arrays:
                    resized: Calibration | None = Calibration.from_arrays(arrays, RESIZED_PREFIX)
                else:
                    resized = exact if exact.resize == "fit" else None
                for calibration in filter(None, (exact, resized)):
                    calibration.check_values()
                return cls(
                    exact,
                    resized,
                    name,
                    version_of(content),
                    str(arrays["model"]) if "model" in arrays else "",
                    str(arrays["data"]) if "data" in arrays else "",
                    joined=tuple(map(str, arrays["joined"])) if "joined" in arrays else (),
                    webp=str(arrays["webp"]) if "webp" in arrays else "",
                )
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RuntimeError,
            OSError,
            EOFError,
            BadZipFile,
            zlib.error,
        ) as error:
            raise CalibrationError(f"{path} is not a calibration: {error}") from error


def version_of(content: bytes) -> str:
    """The version of a calibration from its file's content."""
    return hashlib.sha256(content).hexdigest()[:VERSION_DIGITS]


def _shapes(name: str, mixture: Mixture, dims: int) -> list[tuple[str, np.ndarray, Any]]:
    """The arrays of a mixture with the shapes that they must have."""
    k = mixture.log_weights.size
    return [
        (f"{name}_log_weights", mixture.log_weights, (k,)),
        (f"{name}_means", mixture.means, (k, dims)),
        (f"{name}_whiteners", mixture.whiteners, (k, dims, dims)),
    ]


def _without(values: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """Sorted values without one occurrence of each of some others.

    Raises:
        CalibrationError: one of them is not there.
    """
    places = np.searchsorted(values, np.sort(removed))
    # Equal values are neighbours: to remove a second one, remove the next.
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + 1)
    if (places >= len(values)).any() or (values[places] != np.sort(removed)).any():
        raise CalibrationError("the image is not among the calibration images")
    return np.delete(values, places)


def _arrays(name: str, mixture: Mixture) -> dict[str, np.ndarray]:
    return {
        f"{name}_log_weights": mixture.log_weights,
        f"{name}_means": mixture.means,
        f"{name}_whiteners": mixture.whiteners,
    }


def _mixture(name: str, arrays: Mapping[str, np.ndarray]) -> Mixture:
    return Mixture(
        arrays[f"{name}_log_weights"], arrays[f"{name}_means"], arrays[f"{name}_whiteners"]
    )


def conformal_p_values(reference: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Conformal p-values, ``(1 + #{reference >= score}) / (n + 1)``.

    They are never 0, and at most ``alpha`` with probability at most ``alpha``. Vovk et al.,
    "Algorithmic Learning in a Random World", 2005, for one score fitted to other data.

    Args:
        reference: ``(n,)``, sorted.
        scores: ``(N,)``.
    """
    return (1 + len(reference) - np.searchsorted(reference, scores, "left")) / (len(reference) + 1)


def simes(p_values: Sequence[float]) -> float:
    """One p-value for a group of images, ``min_i m p_(i) / i``.

    Simes, "An improved Bonferroni procedure", 1986. Valid for conformal p-values of one calibration
    set, which depend on each other positively (Bates et al., "Testing for Outliers with Conformal
    p-values", 2023).
    """
    ordered = np.sort(np.asarray(p_values, np.float64))
    return float(min(1.0, (len(ordered) * ordered / np.arange(1, len(ordered) + 1)).min()))


def benjamini_hochberg(p_values: Sequence[float], fdr: float) -> list[bool]:
    """Choose images to report: a fraction of at most ``fdr`` of them is expected to be false.

    Benjamini and Hochberg, "Controlling the False Discovery Rate", 1995.
    """
    values = np.asarray(p_values, np.float64)
    ordered = np.sort(values)
    places = np.arange(1, len(ordered) + 1)
    # Equality counts, which rounding must not hide.
    passing = np.flatnonzero(ordered * len(ordered) <= fdr * places * (1 + 1e-9))
    threshold = ordered[passing[-1]] if len(passing) else -1.0
    return [bool(v) for v in values <= threshold]
