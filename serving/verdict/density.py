"""The density of an image's statistics: a mixture of Gaussians on normal scores."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import NormalDist

import numpy as np

LEVELS = 257  # of the quantiles that a normal score is read from
FARTHEST = 6.0  # limit of a normal score: one extreme statistic must not hide the others
_QUANTILES = np.array([NormalDist().inv_cdf((i + 0.5) / LEVELS) for i in range(LEVELS)])


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
        first, last = places(self._columns, rows)
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


def places(columns: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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

    def negative_log_density(self, scores: np.ndarray) -> np.ndarray:
        """Minus the log-density, ``(N,)``, nats, of ``(N, d)``.

        Row by row: products of matrices vary with their size.
        """
        return np.array([self._of_row(row) for row in np.clip(scores, -FARTHEST, FARTHEST)])

    def _of_row(self, row: np.ndarray) -> float:
        white = self.whiteners @ (row - self.means)[:, :, None]
        terms = self.log_weights - 0.5 * np.square(white).sum((1, 2))
        top = terms.max()
        return float(-top - math.log(np.exp(terms - top).sum()))

    def shapes(self, name: str, dims: int) -> list[tuple[str, np.ndarray, tuple[int, ...]]]:
        """Each array, its name after ``name``, and the shape that ``dims`` statistics give it."""
        k = self.log_weights.size
        return [
            (f"{name}_log_weights", self.log_weights, (k,)),
            (f"{name}_means", self.means, (k, dims)),
            (f"{name}_whiteners", self.whiteners, (k, dims, dims)),
        ]

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """All arrays, their names after ``name``."""
        return {
            f"{name}_log_weights": self.log_weights,
            f"{name}_means": self.means,
            f"{name}_whiteners": self.whiteners,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], name: str) -> Mixture:
        """Rebuild from :meth:`arrays`."""
        return cls(
            arrays[f"{name}_log_weights"], arrays[f"{name}_means"], arrays[f"{name}_whiteners"]
        )
