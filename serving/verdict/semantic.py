"""Measures how familiar an image is to a classifier or another network that tells things apart.

The generative model's statistics see colours, edges and textures. The features of a classifier, or
of an encoder trained without labels, depend on what an image shows. Each coordinate here is one
number computed from them, higher for images unlike the known ones:

- ``semantic_distance``: minus the similarity to the tenth nearest known image, which is the cosine
  times the length of the image's own features. Networks give short features to unfamiliar images
  (Tack et al., "CSI: Novelty Detection via Contrastive Learning on Distributionally Shifted
  Instances", 2020, eq. 6; nearest neighbours as in Sun et al., "Out-of-Distribution Detection with
  Deep Nearest Neighbors", 2022).
- ``semantic_energy``: minus the logarithm of the sum of exponentials of a classifier's logits (Liu
  et al., "Energy-based Out-of-distribution Detection", 2020).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

SEMANTIC_PREFIX = "semantic_"
DISTANCE, ENERGY = f"{SEMANTIC_PREFIX}distance", f"{SEMANTIC_PREFIX}energy"
FEATURES = "features"  # the graph, its output, and the name among statistics: (N, F), the only 2-D
LOGITS = "logits"
NEIGHBOURS = 10
MAX_KNOWN = 4000
# Unit vectors are stored as integers. Sums of their products stay below 2^24, so float32 holds them
# exactly, and no answer depends on the batch.
SCALE = 2048


@dataclass(frozen=True)
class KnownImages:
    """The known images: features of the images that the density was fitted to.

    Attributes:
        vectors: int16 ``(m, F)``, unit vectors times :data:`SCALE`.
        weight: nats that one unit of the coordinates' summed normal scores adds to the OOD score.
    """

    vectors: np.ndarray
    weight: float = 0.0

    @classmethod
    def of(cls, features: np.ndarray) -> KnownImages:
        """The first :data:`MAX_KNOWN` of float32 ``(m, F)``."""
        return cls(_directions(features[:MAX_KNOWN]).astype(np.int16))

    def problem(self) -> str | None:
        """Why no verdict can be computed with it; ``None`` if one can."""
        vectors = self.vectors
        if vectors.dtype != np.int16 or vectors.ndim != 2 or len(vectors) < 2 or not vectors.size:
            return (
                "known_vectors must be int16 of shape (m, F), m at least 2, got "
                f"{vectors.dtype} {vectors.shape}"
            )
        if not 0 <= self.weight < math.inf:
            return f"known_weight must be a finite number of at least 0, got {self.weight}"
        return None

    def distances(self, features: np.ndarray, known: bool = False) -> np.ndarray:
        """``semantic_distance`` of each image, float32 ``(N,)``.

        Args:
            features: float32 ``(N, F)``.
            known: whether these are the known images, in the same order; then no image counts as
                its own neighbour.
        """
        similarities = self._similarities(features)
        if known:
            np.fill_diagonal(similarities, -np.inf)
        neighbour = min(NEIGHBOURS, len(self.vectors) - 1)
        nearest = np.partition(similarities, -neighbour, axis=1)[:, -neighbour]
        lengths = np.sqrt(np.square(features).sum(1))
        distances: np.ndarray = (-lengths * nearest / SCALE**2).astype(np.float32)
        return distances

    def nearest(self, features: np.ndarray, count: int) -> np.ndarray:
        """Rows of the nearest known images, the nearest first; int ``(N, count)``."""
        order: np.ndarray = np.argsort(-self._similarities(features), axis=1, kind="stable")
        return order[:, :count]

    def _similarities(self, features: np.ndarray) -> np.ndarray:
        """Cosines times ``SCALE**2``, float32 ``(N, m)``."""
        similarities: np.ndarray = _directions(features) @ self._columns
        return similarities

    @cached_property
    def _columns(self) -> np.ndarray:
        return np.ascontiguousarray(self.vectors.T.astype(np.float32))

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        return {"known_vectors": self.vectors, "known_weight": np.array(self.weight)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str) -> KnownImages | None:
        """Rebuild from :meth:`arrays`, with names after a prefix; ``None`` without such arrays."""
        if f"{prefix}known_vectors" not in arrays:
            return None
        return cls(arrays[f"{prefix}known_vectors"], float(arrays[f"{prefix}known_weight"].item()))


def free_energy(logits: np.ndarray) -> np.ndarray:
    """``semantic_energy``, ``(N,)``, of ``(N, K)``."""
    top = logits.max(1)
    energy: np.ndarray = -top - np.log(np.exp(logits - top[:, None]).sum(1))
    return energy


def _directions(features: np.ndarray) -> np.ndarray:
    """Unit vectors times :data:`SCALE`, rounded: float32 ``(N, F)``."""
    lengths = np.sqrt(np.square(features).sum(1, keepdims=True))
    directions: np.ndarray = np.rint(SCALE * features / np.maximum(lengths, np.float32(1e-12)))
    return directions
