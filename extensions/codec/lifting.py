"""Splits an orthogonal matrix into lifting steps, which act on integers without loss.

A lifting step adds to some values a rounded combination of the others: whatever was added can be
subtracted again exactly (Bruekers and van den Enden, "New networks for perfect inversion and
perfect reconstruction", 1992). A rotation of two values is three such steps. By the cosine-sine
decomposition (Paige and Wei, "History and generality of the CS decomposition", 1994), a rotation of
n values is three steps between two halves of them, after a rotation of each half by itself. Both
halves' rotations are split at the same time, so there are three steps for each halving. They keep
rounding errors small: a step's matrix has a spectral norm of at most 1, and the product of any
number of steps, from the first or from the last, one of at most 1.62.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COEFFICIENT_BITS = 18  # finer than the grid of values that rarely exceed 4


@dataclass(frozen=True)
class Lifting:
    """``matrix @ x``: signs, then steps ``x += steps[i] / 2**COEFFICIENT_BITS @ x``.

    Attributes:
        signs: ``(n,)``, 1 or -1.
        steps: ``(3 * ceil(log2(n)), n, n)``, int32. A step reads none of the values that it
            changes.
    """

    signs: np.ndarray
    steps: np.ndarray


def factorize(matrix: np.ndarray) -> Lifting:
    """Factorise an orthogonal ``(n, n)``.

    Raises:
        ValueError: the matrix is not orthogonal.
    """
    n = len(matrix)
    if np.abs(matrix @ matrix.T - np.eye(n)).max() > 1e-6:
        raise ValueError("the matrix is not orthogonal")
    blocks = [_nearest_orthogonal(matrix.astype(np.float64))]
    steps: list[np.ndarray] = []
    while max(map(len, blocks)) > 1:
        outer, inner = np.zeros((n, n)), np.zeros((n, n))
        smaller: list[np.ndarray] = []
        start = 0
        for block in blocks:
            middle, end = start + len(block) // 2, start + len(block)
            if len(block) == 1:
                smaller.append(block)
            else:
                upper, lower, *halves = _split(block)
                outer[start:middle, middle:end] = upper
                inner[middle:end, start:middle] = lower
                smaller += halves
            start = end
        steps += [outer, inner, outer]
        blocks = smaller
    steps.reverse()
    numerators = np.rint(np.array(steps).reshape(-1, n, n) * 2**COEFFICIENT_BITS)
    signs = np.array([1 if block[0, 0] > 0 else -1 for block in blocks])
    return Lifting(signs, numerators.astype(np.int32))


def _split(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The steps between two halves, and the rotation of each half that comes before.

    With ``O`` the first result and ``I`` the second, the matrix is
    ``[1 O; 0 1] @ [1 0; I 1] @ [1 O; 0 1] @ [first 0; 0 second]``.
    """
    h = len(matrix) // 2
    left, cosines, right = np.linalg.svd(matrix[:h, :h])
    first = left @ right
    cosine = (left * cosines) @ left.T  # symmetric: the upper left block is cosine @ first
    sine = matrix[h:, :h] @ first.T
    outer = -np.linalg.solve(np.eye(h) + cosine, sine.T)
    # The rotation that these three steps make, whose transpose leaves the halves' rotations.
    other_cosine = np.eye(len(matrix) - h) + sine @ outer
    second = -sine @ matrix[:h, h:] + other_cosine @ matrix[h:, h:]
    return outer, sine, first, _nearest_orthogonal(second)


def _nearest_orthogonal(matrix: np.ndarray) -> np.ndarray:
    left, _, right = np.linalg.svd(matrix)
    nearest: np.ndarray = left @ right
    return nearest
