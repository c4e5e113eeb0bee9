"""Splits an orthogonal matrix into lifting steps, which act on integers without loss.

A rotation of two values is three lifting steps, each of which adds to one value a rounded multiple
of the other: whatever was added can be subtracted again exactly (Bruekers and van den Enden, "New
networks for perfect inversion and perfect reconstruction", 1992). An orthogonal matrix is a product
of such rotations and of signs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Lifting:
    """``matrix @ x``: signs, then rounds of rotations of neighbouring pairs.

    Round ``r`` rotates the pairs ``(first, first + 1)``, ``(first + 2, first + 3)`` and so on.

    Attributes:
        signs: ``(n,)``, 1 or -1.
        firsts: ``(rounds,)``, of the first pair.
        pairs: ``(rounds,)``, how many pairs there are.
        outer: ``(rounds, n // 2)``, the factor of a round's first and third step, at most 1.
        inner: ``(rounds, n // 2)``, that of its second step, at most 1.
    """

    signs: np.ndarray
    firsts: np.ndarray
    pairs: np.ndarray
    outer: np.ndarray
    inner: np.ndarray

    def apply(self, x: np.ndarray) -> np.ndarray:
        """The steps without rounding, of ``(n, ...)``."""
        y = x * self.signs[:, None]
        for first, pairs, outer, inner in zip(
            self.firsts, self.pairs, self.outer, self.inner, strict=True
        ):
            a, b = y[first : first + 2 * pairs : 2], y[first + 1 : first + 2 * pairs : 2]
            a += outer[:pairs, None] * b
            b += inner[:pairs, None] * a
            a += outer[:pairs, None] * b
        result: np.ndarray = y
        return result


def factorize(matrix: np.ndarray) -> Lifting:
    """Factorise an orthogonal ``(n, n)`` by Givens rotations, as many at once as are disjoint.

    The order is that of Sameh and Kuck, "On stable parallel linear system solvers", 1978. All
    angles are within ±90 degrees, so no factor exceeds 1.

    Raises:
        ValueError: the matrix is not orthogonal.
    """
    n = len(matrix)
    if np.abs(matrix @ matrix.T - np.eye(n)).max() > 1e-6:
        raise ValueError("the matrix is not orthogonal")
    work = matrix.astype(np.float64)
    rounds: list[tuple[int, list[float]]] = []
    for step in range(2 * n - 3):
        # Entry (i, j) is cleared in step n - 1 - i + 2j by a rotation of the rows i - 1 and i.
        rows = [i for i in range(1, n) for j in range(i) if n - 1 - i + 2 * j == step]
        angles = []
        for i in rows:
            j = (step - (n - 1 - i)) // 2
            upper, lower = work[i - 1, j], work[i, j]
            angle = np.arctan(lower / upper) if upper else np.copysign(np.pi / 2, lower)
            c, s = np.cos(angle), np.sin(angle)
            work[[i - 1, i]] = np.array([[c, s], [-s, c]]) @ work[[i - 1, i]]
            angles.append(float(angle))
        if rows:
            rounds.append((rows[0] - 1, angles))
    rounds.reverse()
    angles_of = np.zeros((len(rounds), n // 2))
    for r, (_, angles) in enumerate(rounds):
        angles_of[r, : len(angles)] = angles
    return Lifting(
        np.where(np.diag(work) > 0, 1, -1),
        np.array([first for first, _ in rounds]),
        np.array([len(angles) for _, angles in rounds]),
        -np.tan(angles_of / 2),
        np.sin(angles_of),
    )
