"""Scores how much a picture is like pictures that its user knows to be bad.

It is one more semantic coordinate: a linear function of an encoder's features, which
:mod:`export.gate.teach` learns from known bad pictures and from good ones that do not calibrate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from serving.verdict.encoder import POOLED, UNUSUAL
from serving.verdict.semantic import FEATURES, SEMANTIC_PREFIX

LESSON = f"{SEMANTIC_PREFIX}lesson"
INPUTS = (POOLED, UNUSUAL, FEATURES)
_PREFIX = "lesson_"


@dataclass(frozen=True)
class Lesson:
    """What known bad pictures taught.

    Attributes:
        inputs: names of the statistics it sees, each ``(N, …)``, of :data:`INPUTS`.
        slopes: float64 ``(F,)``, of their values, joined in this order.
        weight: nats that one unit of the coordinate's normal score adds to the OOD score.
    """

    inputs: tuple[str, ...]
    slopes: np.ndarray
    weight: float

    def coordinate(self, statistics: Mapping[str, np.ndarray]) -> np.ndarray:
        """How much pictures are like the known bad ones, float32 ``(N,)``."""
        values = joined(statistics, self.inputs)
        # Not a matrix product, whose last digits depend on the size of the batch.
        found: np.ndarray = (values * self.slopes).sum(1).astype(np.float32)
        return found

    def problem(self, sizes: Mapping[str, int]) -> str | None:
        """Why it cannot be used; ``None`` if it can.

        Args:
            sizes: number of values by the names of statistics that pictures have.
        """
        if not self.inputs or not set(self.inputs) <= set(sizes):
            return f"{_PREFIX}inputs must be some of {', '.join(sizes) or 'no statistics'}"
        shape = (sum(sizes[name] for name in self.inputs),)
        if self.slopes.dtype != np.float64 or self.slopes.shape != shape:
            return f"{_PREFIX}slopes must be float64 of shape {shape}"
        if not np.isfinite(self.slopes).all() or not 0 <= self.weight < math.inf:
            return f"{_PREFIX}slopes and {_PREFIX}weight must be finite, the weight at least 0"
        return None

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        return {
            f"{_PREFIX}inputs": np.array(" ".join(self.inputs)),
            f"{_PREFIX}slopes": self.slopes,
            f"{_PREFIX}weight": np.array(self.weight),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str) -> Lesson | None:
        """Rebuild from :meth:`arrays`, with names after a prefix; ``None`` without such arrays."""
        if f"{prefix}{_PREFIX}slopes" not in arrays:
            return None
        inputs, slopes, weight = (
            arrays[f"{prefix}{_PREFIX}{name}"] for name in ("inputs", "slopes", "weight")
        )
        return cls(tuple(str(inputs.item()).split()), slopes, float(weight.item()))


def joined(statistics: Mapping[str, np.ndarray], inputs: tuple[str, ...]) -> np.ndarray:
    """Values of some statistics beside each other, float64 ``(N, F)``."""
    found: np.ndarray = np.concatenate([statistics[name] for name in inputs], 1).astype(np.float64)
    return np.ascontiguousarray(found)
