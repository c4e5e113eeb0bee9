"""Measures how unusual a picture is to an encoder that sees the whole original.

Two coordinates, higher for unusual pictures: how far its pooled features are from those of known
pictures (:mod:`serving.verdict.semantic`), and how unusual its most unusual patches are
(:mod:`serving.verdict.patches`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ade_base.pictures.view import STRIDE, Look
from serving.verdict.patches import PatchMemory, most_unusual, unusual
from serving.verdict.semantic import DISTANCE, FEATURES, SEMANTIC_PREFIX, KnownImages

POOLED, PATCHES = "pooled", "patches"  # outputs of the encoder
INSIDE, DISTANCES = "inside", "patch_distances"
UNUSUAL = "unusual_patches"  # the mean values of a picture's most unusual patches
OF_ENCODER = (POOLED, PATCHES, INSIDE, DISTANCES, UNUSUAL)
SEEN = PICTURE, PATCH = f"{SEMANTIC_PREFIX}picture", f"{SEMANTIC_PREFIX}patches"
LEAST_SPREAD = 0.01  # of a feature, added
_PREFIX = "encoder_"
MAX_SIZE = 4096  # pixels per side of a view


@dataclass(frozen=True)
class EncoderMemory:
    """What an encoder knows of known pictures.

    Attributes:
        look: how it sees pictures.
        spread: float32 ``(F,)``: pooled features are divided by it.
        pooled: the known pictures by their pooled features.
        patches: patches of the known pictures; ``None`` if patches do not count.
    """

    look: Look
    spread: np.ndarray
    pooled: KnownImages
    patches: PatchMemory | None

    @classmethod
    def of(
        cls, statistics: Mapping[str, np.ndarray], look: Look
    ) -> tuple[EncoderMemory, dict[str, np.ndarray]]:
        """Of known pictures.

        Args:
            statistics: by name, the encoder's outputs among them.
            look: how it saw the pictures.

        Returns:
            The memory, and the statistics with the distances of patches instead of the patches.
        """
        rest = {name: its for name, its in statistics.items() if name not in (PATCHES, INSIDE)}
        features = statistics[POOLED]
        spread = features.std(0, dtype=np.float64).astype(np.float32) + np.float32(LEAST_SPREAD)
        pooled = KnownImages.of({FEATURES: features / spread})
        if PATCHES not in statistics:
            return cls(look, spread, pooled, None), rest
        patches, rest[DISTANCES] = PatchMemory.of(statistics[PATCHES], statistics[INSIDE])
        rest[UNUSUAL] = most_unusual(statistics[PATCHES], rest[DISTANCES])
        return cls(look, spread, pooled, patches), rest

    def calibrated(self, distances: np.ndarray | None) -> EncoderMemory:
        """With the distances of patches, ``(n, P)``, of the calibration pictures."""
        if self.patches is None or distances is None:
            return self
        largest = np.sort(distances.max(1))
        return replace(self, patches=replace(self.patches, largest=largest))

    def measured(self, statistics: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Replace the patches, which take much memory, by their distances and the unusual ones."""
        found = {name: its for name, its in statistics.items() if name not in (PATCHES, INSIDE)}
        if self.patches is not None and PATCHES in statistics:
            found[DISTANCES] = self.patches.distances(statistics[PATCHES], statistics[INSIDE])
            found[UNUSUAL] = most_unusual(statistics[PATCHES], found[DISTANCES])
        return found

    def coordinates(
        self, statistics: Mapping[str, np.ndarray], known: bool = False
    ) -> dict[str, np.ndarray]:
        """The coordinates by name, float32 ``(N,)``.

        Args:
            statistics: of :meth:`measured`.
            known: whether these are the known pictures, in the same order.
        """
        features = {FEATURES: statistics[POOLED] / self.spread}
        found = {PICTURE: self.pooled.coordinates(features, known)[DISTANCE]}
        if self.patches is not None:
            found[PATCH] = unusual(statistics[DISTANCES])
        return found

    def problem(self) -> str | None:
        """Why no verdict can be computed with it; ``None`` if one can."""
        size, spread = self.look.size, self.spread
        if not 0 < size <= MAX_SIZE or size % (2 * STRIDE):
            return f"{_PREFIX}size must be a multiple of {2 * STRIDE}, got {size}"
        shape = (self.pooled.directions.shape[-1],)
        if spread.dtype.kind != "f" or spread.shape != shape or not (spread > 0).all():
            return f"{_PREFIX}spread must be positive numbers of shape {shape}"
        return self.pooled.problem() or (None if self.patches is None else self.patches.problem())

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        inner = {**self.pooled.arrays(), **({} if self.patches is None else self.patches.arrays())}
        inner |= {"size": np.array(self.look.size), "spread": self.spread}
        return {f"{_PREFIX}{name}": its for name, its in inner.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str) -> EncoderMemory | None:
        """Rebuild from :meth:`arrays`, with names after a prefix; ``None`` without such arrays."""
        prefix += _PREFIX
        pooled = KnownImages.from_arrays(arrays, prefix)
        if pooled is None:
            return None
        look = Look(int(arrays[f"{prefix}size"].item()))
        return cls(look, arrays[f"{prefix}spread"], pooled, PatchMemory.from_arrays(arrays, prefix))
