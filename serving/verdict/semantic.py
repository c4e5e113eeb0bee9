"""Measures how close an image is to known images, in the features of a network.

The network is a classifier, or another one that separates kinds of objects.

The generative model's statistics see colours, edges and textures. The features of a classifier, or
of an encoder trained without labels, depend on what an image shows. Each coordinate here is one
number computed from them, higher for images unlike the known ones:

- ``semantic_distance``: how far the direction of the features is from that of the tenth nearest
  known image (Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", 2022). Only
  what is outside the main directions of the known images counts: within these, known images differ
  from each other, so such differences say little. What unlike images have outside them (their
  residual: Wang et al., "ViM: Out-Of-Distribution with Virtual-logit Matching", 2022) says more. A
  classifier of few classes gives its own images hardly anything outside, so all directions count.
- ``semantic_energy``: minus the logarithm of the sum of exponentials of a classifier's logits (Liu
  et al., "Energy-based Out-of-distribution Detection", 2020).

A classifier is surer of some classes than of others. So each coordinate is given in standard
deviations from the mean of the known images of the same class. Mean and standard deviation are
averaged over the classes, weighted by the image's predicted probabilities.

The known images may be of kinds that a classifier does not know. Then it can be surer of unusual
ones than of them, so they are judged by the distance alone, as with a network that has no classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

SEMANTIC_PREFIX = "semantic_"
DISTANCE, ENERGY = f"{SEMANTIC_PREFIX}distance", f"{SEMANTIC_PREFIX}energy"
COORDINATES = (DISTANCE, ENERGY)
FEATURES = "features"  # the graph and its output
LOGITS = "logits"
FREE_ENERGY, PROBABILITIES = "free_energy", "class_probabilities"
# Statistics from which the coordinates are computed. The verdict does not use them otherwise.
OF_NETWORK = (FEATURES, FREE_ENERGY, PROBABILITIES)
NEIGHBOURS = 10
MAX_KNOWN = 4000
# Main directions, and the most for each known image and for each feature. Chosen on held-out
# classes and corruptions: docs/explanation/trials.md#the-gate.
MAIN, MAIN_PER_IMAGE, MAIN_PER_FEATURE = 48, 0.4, 0.25
LEAST_OUTSIDE = 0.1  # share of known images' squared length outside them; otherwise all directions
FOLDS = 10  # for a known image's distance, main directions are found without its fold
# Unit vectors are stored as integers. Sums of their products stay below 2^24, and those of squares
# of these below 2^53. So float32 and float64 hold them exactly: no answer depends on the batch.
SCALE = 2048
SLICE = 512  # rows whose distances to all known images are computed at once
PRIOR_IMAGES = 10  # images with the overall distribution that are added to each class
SMALLEST_SPREAD = 1e-12  # of any class


def semantic_statistics(outputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a calibration needs of the outputs of a ``features`` graph.

    Args:
        outputs: ``features``, ``(N, F)``, and ``logits``, ``(N, K)``, if the network has any.

    Returns:
        ``features``; with logits also ``free_energy``, ``(N,)``, nats, and
        ``class_probabilities``, ``(N, K)``.
    """
    found = {FEATURES: outputs[FEATURES]}
    if LOGITS in outputs:
        logits = outputs[LOGITS]
        energy = free_energy(logits)
        found |= {FREE_ENERGY: energy, PROBABILITIES: np.exp(logits + energy[:, None])}
    return found


@dataclass(frozen=True)
class KnownImages:
    """The known images: features of the images that the density was fitted to.

    Attributes:
        directions: int16 ``(m, F)``, unit vectors times :data:`SCALE`.
        main: int16 ``(F, D)``, their main directions, also times :data:`SCALE`; ``D`` is 0 if all
            directions count.
        usual: float64 ``(K, C, 2)``, mean and standard deviation of each of ``C`` coordinates among
            the known images of each of ``K`` classes; ``K`` and ``C`` are 1 without classes. A
            coordinate that does not vary has infinite standard deviations.
        weight: nats that one unit of the coordinates' summed normal scores adds to the OOD score.
        floor: nats. A lower score of the density counts as this one, because differences among
            usual images would only blur what the coordinates find.
    """

    directions: np.ndarray
    main: np.ndarray
    usual: np.ndarray
    weight: float = 0.0
    floor: float = -math.inf

    @classmethod
    def of(cls, statistics: Mapping[str, np.ndarray]) -> KnownImages:
        """Of statistics by name; the first :data:`MAX_KNOWN` images become neighbours."""
        directions = _directions(statistics[FEATURES][:MAX_KNOWN]).astype(np.int16)
        found = cls(directions, _main_directions(directions), np.empty((0, 0, 2)))
        values = found._values(statistics, known=True)
        middle = values.mean(0)
        values = values - middle
        shares = _probabilities(statistics).astype(np.float64)
        count = shares.sum(0)[:, None] + PRIOR_IMAGES
        mean = shares.T @ values / count
        square = (shares.T @ np.square(values) + PRIOR_IMAGES * values.var(0)) / count
        spread = np.sqrt(np.maximum(square - np.square(mean), 0))
        # A coordinate that does not vary is zero for all images, and is left out.
        spread[:, values.std(0) < SMALLEST_SPREAD] = np.inf
        return replace(found, usual=np.stack([middle + mean, spread], 2))

    def problem(self) -> str | None:
        """Why no verdict can be computed with it; ``None`` if one can."""
        directions, main, usual = self.directions, self.main, self.usual
        if (
            directions.dtype != np.int16
            or directions.ndim != 2
            or len(directions) < 2
            or not directions.size
        ):
            return (
                "known_directions must be int16 of shape (m, F), m at least 2, got "
                f"{directions.dtype} {directions.shape}"
            )
        if main.dtype != np.int16 or main.ndim != 2 or len(main) != directions.shape[1]:
            return (
                f"known_main must be int16 of shape ({directions.shape[1]}, D), got "
                f"{main.dtype} {main.shape}"
            )
        if usual.dtype.kind != "f" or usual.ndim != 3 or usual.shape[1:] not in ((1, 2), (2, 2)):
            return (
                "known_usual must be numbers of shape (K, C, 2), C at most 2, got "
                f"{usual.dtype} {usual.shape}"
            )
        mean, spread = usual[..., 0], usual[..., 1]
        if not usual.size or not np.isfinite(mean).all() or not (spread >= SMALLEST_SPREAD).all():
            return "known_usual must be finite means and positive standard deviations"
        if not 0 <= self.weight < math.inf:
            return f"known_weight must be a finite number of at least 0, got {self.weight}"
        if not self.floor < math.inf:
            return f"known_floor must be a number below infinity, got {self.floor}"
        return None

    def coordinates(
        self, statistics: Mapping[str, np.ndarray], known: bool = False
    ) -> dict[str, np.ndarray]:
        """The coordinates by name, float32 ``(N,)``, in standard deviations.

        Args:
            statistics: those of :func:`semantic_statistics`, by name.
            known: whether these are the known images, in the same order; then no image counts as
                its own neighbour.

        Raises:
            ValueError: they come from a network with another number of classes, or without classes.
        """
        if self.usual.shape[1] < len(COORDINATES):
            statistics = without_classes(statistics)
        values, shares = self._values(statistics, known), _probabilities(statistics)
        if (shares.shape[1], values.shape[1]) != self.usual.shape[:2]:
            raise ValueError(
                f"{shares.shape[1]} classes and {values.shape[1]} coordinates do not fit known "
                f"images with {self.usual.shape[0]} and {self.usual.shape[1]}"
            )
        # Not a matrix product, whose last digits depend on the size of the batch.
        usual = np.einsum("nk,kcs->ncs", shares, self.usual, optimize=False)
        values = (values - usual[..., 0]) / usual[..., 1]
        names = COORDINATES[: values.shape[1]]
        return dict(zip(names, values.T.astype(np.float32), strict=True))

    def _values(self, statistics: Mapping[str, np.ndarray], known: bool) -> np.ndarray:
        """The coordinates before they are compared with what is usual, float64 ``(N, C)``."""
        energy = [statistics[FREE_ENERGY]] if FREE_ENERGY in statistics else []
        distances = self._distances(_directions(statistics[FEATURES]), known)
        return np.stack([distances, *energy], axis=1).astype(np.float64)

    def _distances(self, found: np.ndarray, known: bool) -> np.ndarray:
        """From directions ``(N, F)`` to the distances, float64 ``(N,)``, -1 for equal ones."""
        distances = np.empty(len(found))
        for rows in _slices(np.arange(len(found))):
            distances[rows] = _nearest(
                self._distances_to_known(found[rows], self.main, self._main_parts)
            )
        if known:
            for fold in range(FOLDS):
                of_fold = np.arange(fold, len(self.directions), FOLDS)
                others = np.delete(self.directions, of_fold, axis=0)
                main = _principal_directions(others, self.main.shape[1])
                known_parts = _parts(self.directions, main)
                for rows in _slices(of_fold):
                    apart = self._distances_to_known(found[rows], main, known_parts)
                    apart[np.arange(len(rows)), rows] = np.inf
                    distances[rows] = _nearest(apart)
        return distances

    def _distances_to_known(
        self, found: np.ndarray, main: np.ndarray, known_parts: np.ndarray
    ) -> np.ndarray:
        """Distances of directions ``(N, F)`` to each known image, float64 ``(N, m)``.

        With u and v of length one, and p and q their parts in the main directions, this is
        -u·v - |p - q|²/2: half the squared distance outside the main directions, less 1.
        """
        similarities = (found @ self._columns).astype(np.float64)
        parts = _parts(found, main)
        within = np.square(parts).sum(1)[:, None] + np.square(known_parts).sum(1)
        within -= 2 * (parts @ known_parts.T)
        distances: np.ndarray = -(2 * SCALE**2 * similarities + within) / (2 * SCALE**4)
        return distances

    @cached_property
    def _main_parts(self) -> np.ndarray:
        return _parts(self.directions, self.main)

    @cached_property
    def _columns(self) -> np.ndarray:
        return np.ascontiguousarray(self.directions.T.astype(np.float32))

    def arrays(self) -> dict[str, np.ndarray]:
        """All arrays by name."""
        return {
            "known_directions": self.directions,
            "known_main": self.main,
            "known_usual": self.usual,
            "known_weight": np.array(self.weight),
            "known_floor": np.array(self.floor),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], prefix: str) -> KnownImages | None:
        """Rebuild from :meth:`arrays`, with names after a prefix; ``None`` without such arrays."""
        if f"{prefix}known_directions" not in arrays:
            return None
        directions, main, usual, weight, floor = (
            arrays[f"{prefix}known_{name}"]
            for name in ("directions", "main", "usual", "weight", "floor")
        )
        return cls(directions, main, usual, float(weight.item()), float(floor.item()))


def without_classes(statistics: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Statistics by name, without those that come from a classifier's logits."""
    return {
        name: values
        for name, values in statistics.items()
        if name not in (FREE_ENERGY, PROBABILITIES)
    }


def _probabilities(statistics: Mapping[str, np.ndarray]) -> np.ndarray:
    """``(N, K)``; of a network without classes, that of a single one."""
    alone = np.ones((len(statistics[FEATURES]), 1), np.float32)
    return statistics.get(PROBABILITIES, alone)


def free_energy(logits: np.ndarray) -> np.ndarray:
    """Of logits ``(N, K)``, ``(N,)``, nats."""
    top = logits.max(1)
    energy: np.ndarray = -top - np.log(np.exp(logits - top[:, None]).sum(1))
    return energy


def _directions(features: np.ndarray) -> np.ndarray:
    """Unit vectors times :data:`SCALE`, rounded: float32 ``(N, F)``."""
    lengths = np.sqrt(np.square(features).sum(1, keepdims=True))
    directions: np.ndarray = np.rint(SCALE * features / np.maximum(lengths, np.float32(1e-12)))
    return directions


def _main_directions(directions: np.ndarray) -> np.ndarray:
    """Those of known images ``(m, F)``: int16 ``(F, D)``."""
    count, size = directions.shape
    main = _principal_directions(
        directions, int(min(MAIN, MAIN_PER_IMAGE * count, MAIN_PER_FEATURE * size))
    )
    inside = np.square(_parts(directions, main) / SCALE).sum()
    whole = np.square(directions.astype(np.float64)).sum()
    return main[:, :0] if inside > (1 - LEAST_OUTSIDE) * whole else main


def _principal_directions(directions: np.ndarray, most: int) -> np.ndarray:
    """Directions in which others ``(m, F)`` have the greatest mean square: int16 ``(F, most)``."""
    count, size = directions.shape
    if not most:
        return np.empty((size, 0), np.int16)
    vectors = directions / SCALE
    if count < size:
        squares, combined = np.linalg.eigh(vectors @ vectors.T)
        found = vectors.T @ combined  # of length zero if there are fewer different images
        found /= np.sqrt(np.maximum(squares, 1e-9 * max(squares[-1], 1)))
    else:
        found = np.linalg.eigh(vectors.T @ vectors)[1]
    return np.asarray(np.rint(SCALE * found[:, -most:]), np.int16)


def _parts(directions: np.ndarray, main: np.ndarray) -> np.ndarray:
    """Parts of directions ``(N, F)`` in each main one, float64 ``(N, D)``."""
    parts: np.ndarray = directions.astype(np.float64) @ main.astype(np.float64)
    return parts


def _slices(rows: np.ndarray) -> list[np.ndarray]:
    """Parts of an array of rows, so that the distances to all known images fit into memory."""
    return [rows[first : first + SLICE] for first in range(0, len(rows), SLICE)]


def _nearest(apart: np.ndarray) -> np.ndarray:
    """The distance ``(N,)`` to the tenth nearest, of those to all known images ``(N, m)``."""
    neighbour = min(NEIGHBOURS, apart.shape[1] - 1)
    nearest: np.ndarray = np.partition(apart, neighbour - 1, axis=1)[:, neighbour - 1]
    return nearest
