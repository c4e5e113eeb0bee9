"""Measures how unusual the patches of a picture are, in an encoder's maps.

A patch is compared with a memory of patches of known pictures, whatever their places (Roth et al.,
"Towards Total Recall in Industrial Anomaly Detection", 2022).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

MAX_PATCHES = 4000  # of the memory
CANDIDATES = 40_000  # patches that it is chosen from
PROJECTED = 64  # dimensions in which they are
LARGEST = 3  # patches of a picture that count
# Standardised values are stored as integers, in steps of 1/16. Sums of products of these stay below
# 2^24, so float32 holds them exactly: no answer depends on the batch or on the order of sums.
STEPS, MOST = 16, 127
LEAST_DEVIATION = 1e-6
_PREFIX = "patches_"


@dataclass(frozen=True)
class PatchMemory:
    """Patches of known pictures.

    Attributes:
        mean: float32 ``(F,)``, of the values of a patch.
        deviation: float32 ``(F,)``.
        known: int8 ``(m, F)``, standardised patches in steps of 1 / :data:`STEPS`.
        largest: float32 ``(n,)``, the largest distance in each calibration picture, sorted.
    """

    mean: np.ndarray
    deviation: np.ndarray
    known: np.ndarray
    largest: np.ndarray

    @classmethod
    def of(
        cls, patches: np.ndarray, inside: np.ndarray, seed: int = 0
    ) -> tuple[PatchMemory, np.ndarray]:
        """Choose patches of known pictures: those that are farthest from each other.

        Args:
            patches: ``(N, P, F)`` of the encoder.
            inside: bool ``(N, P)``, those that show the pictures.
            seed: of the choice.

        Returns:
            The memory without ``largest``, and the distances, float32 ``(N, P)``, of the known
            pictures' patches to those of other pictures; 0 outside.
        """
        rng = np.random.default_rng(seed)
        picture, place = np.nonzero(inside)
        chosen = np.sort(rng.permutation(len(picture))[:CANDIDATES])
        candidates = patches[picture[chosen], place[chosen]].astype(np.float32)
        mean = candidates.mean(0, dtype=np.float64).astype(np.float32)
        deviation = candidates.std(0, dtype=np.float64).astype(np.float32) + np.float32(
            LEAST_DEVIATION
        )
        empty = cls(mean, deviation, np.empty((0, len(mean)), np.int8), np.empty(0, np.float32))
        steps = empty._steps(candidates)
        rows = farthest_rows(steps, MAX_PATCHES, rng)
        memory = replace(empty, known=steps[rows].astype(np.int8))
        owners = picture[chosen[rows]]
        distances = [
            memory.distances(its[None], mine[None], owners == number)[0]
            for number, (its, mine) in enumerate(zip(patches, inside, strict=True))
        ]
        return memory, np.stack(distances)

    def distances(
        self, patches: np.ndarray, inside: np.ndarray, without: np.ndarray | None = None
    ) -> np.ndarray:
        """Distance of each patch to the nearest known one, float32 ``(N, P)``; 0 outside.

        Args:
            patches: ``(N, P, F)``.
            inside: bool ``(N, P)``.
            without: bool ``(m,)``, known patches that do not count.
        """
        columns, squares = self._columns
        if without is not None:
            squares = np.where(without, np.float32(2**24), squares)
        found = np.zeros(inside.shape, np.float32)
        for row, picture in enumerate(patches):
            steps = self._steps(picture)
            nearest = (
                np.square(steps).sum(1) + (squares - 2 * (steps @ columns)).min(1)
            ) / STEPS**2
            found[row] = np.where(inside[row], np.sqrt(np.maximum(nearest, 0)), 0)
        return found

    def p_values(self, distances: np.ndarray) -> np.ndarray:
        """Of distances ``(N, P)``: the share of pictures with as unusual a patch anywhere.

        ``(1 + #{largest distance of a calibration picture >= distance}) / (n + 1)``: a patch of at
        most ``alpha`` appears anywhere in at most a share ``alpha`` of good pictures.
        """
        below = np.searchsorted(self.largest, distances, "left")
        count = len(self.largest)
        return ((1 + count - below) / (count + 1)).astype(np.float32)

    def problem(self) -> str | None:
        """Why it cannot be used; ``None`` if it can."""
        size = self.mean.size
        for name, array, kind, shape in (
            ("mean", self.mean, "f", (size,)),
            ("deviation", self.deviation, "f", (size,)),
            ("known", self.known, "i", (len(self.known), size)),
            ("largest", self.largest, "f", (len(self.largest),)),
        ):
            if array.dtype.kind != kind or array.shape != shape or not np.isfinite(array).all():
                return f"{_PREFIX}{name} must be finite numbers of shape {shape}"
        if self.known.dtype != np.int8 or not self.known.size or not self.largest.size:
            return f"{_PREFIX}known must be int8, and there must be calibration pictures"
        if not (self.deviation > 0).all() or (np.diff(self.largest) < 0).any():
            return f"{_PREFIX}deviation must be positive, and {_PREFIX}largest sorted"
        return None

    def _steps(self, patches: np.ndarray) -> np.ndarray:
        """Standardised values in steps, float32."""
        values = STEPS * (patches.astype(np.float32) - self.mean) / self.deviation
        steps: np.ndarray = np.clip(np.rint(values), -MOST, MOST)
        return steps

    @cached_property
    def _columns(self) -> tuple[np.ndarray, np.ndarray]:
        known = self.known.astype(np.float32)
        return np.ascontiguousarray(known.T), np.square(known).sum(1)

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        return {
            f"{_PREFIX}{name}": getattr(self, name)
            for name in ("mean", "deviation", "known", "largest")
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str) -> PatchMemory | None:
        """Rebuild from :meth:`arrays`, with names after a prefix; ``None`` without such arrays."""
        if f"{prefix}{_PREFIX}known" not in arrays:
            return None
        return cls(
            *(
                arrays[f"{prefix}{_PREFIX}{name}"]
                for name in ("mean", "deviation", "known", "largest")
            )
        )


def unusual(distances: np.ndarray) -> np.ndarray:
    """One number per picture, ``(N,)``: the mean of its largest distances, of ``(N, P)``."""
    few = min(LARGEST, distances.shape[1])
    top: np.ndarray = np.sort(np.partition(distances, -few, axis=1)[:, -few:], axis=1).mean(1)
    return top


def most_unusual(patches: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """The mean values, float32 ``(N, F)``, of each picture's patches that :func:`unusual` counts.

    Args:
        patches: ``(N, P, F)``.
        distances: ``(N, P)``, of them.
    """
    top = np.argsort(-distances, axis=1, kind="stable")[:, :LARGEST, None]
    mean: np.ndarray = np.take_along_axis(patches, top, 1).astype(np.float32).mean(1)
    return mean


def farthest_rows(rows: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of ``(N, F)`` that are far from each other: greedy k-centre on a random projection."""
    if len(rows) <= most:
        return np.arange(len(rows))
    projection = rng.standard_normal((rows.shape[1], PROJECTED), np.float32)
    points = rows @ projection
    squares = np.square(points).sum(1)
    nearest = np.full(len(points), np.inf, np.float32)
    chosen = [int(rng.integers(len(points)))]
    while len(chosen) < most:
        last = chosen[-1]
        np.minimum(nearest, squares + squares[last] - 2 * (points @ points[last]), out=nearest)
        chosen.append(int(nearest.argmax()))
    return np.sort(chosen)
