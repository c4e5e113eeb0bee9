"""Ways through the noise that samples latents: from one image to another, and one level at a time.

Noise is standard normal in every level, whatever the coarser levels are; one array a level,
coarsest first. That of a sample is known from its seed (:mod:`serving.engine.noise`), that of an
image is its encoding's ``eps``; :meth:`serving.engine.engine.InferenceEngine.sample_with` makes
images of it.
"""

from __future__ import annotations

import numpy as np


def coarsest(eps: list[np.ndarray], kept: int) -> list[np.ndarray]:
    """Noise of the coarsest levels alone: finer ones become what those lead to expect."""
    return [noise if level < kept else np.zeros_like(noise) for level, noise in enumerate(eps)]


def between(a: list[np.ndarray], b: list[np.ndarray], steps: int) -> list[np.ndarray]:
    """Noise on the way from ``a`` to ``b``, each a list of ``(1, c, h, w)``: one array ``(steps, c,
    h, w)`` a level.

    On the great circle, so that it stays as long as the ends are: the middle of a straight line is
    shorter than any draw of a standard normal.
    """
    t = np.linspace(0, 1, steps, dtype=np.float64)[:, None, None, None]
    levels = []
    for first, last in zip(a, b, strict=True):
        lengths = np.linalg.norm(first), np.linalg.norm(last)
        cosine = float((first * last).sum() / (lengths[0] * lengths[1] + 1e-12))
        angle = np.arccos(np.clip(cosine, -1, 1))
        if angle < 1e-3:
            levels.append(((1 - t) * first + t * last).astype(np.float32))
        else:
            levels.append(
                (
                    (np.sin((1 - t) * angle) * first + np.sin(t * angle) * last) / np.sin(angle)
                ).astype(np.float32)
            )
    return levels


def exchanged(a: list[np.ndarray], b: list[np.ndarray]) -> list[np.ndarray]:
    """Coarse levels of ``a`` with fine ones of ``b``: none, one, … all of ``a``; each level
    ``(levels + 1, c, h, w)``.
    """
    count = len(a)
    return [
        np.concatenate([first if level < kept else last for kept in range(count + 1)])
        for level, (first, last) in enumerate(zip(a, b, strict=True))
    ]


def with_level(own: list[np.ndarray], others: list[np.ndarray], changed: int) -> list[np.ndarray]:
    """One image's noise with one level of each of ``others`` in its place; the other levels stay.

    Args:
        own: each level ``(1, c, h, w)``.
        others: each level ``(n, c, h, w)``.
        changed: the level.

    Returns:
        Each level ``(n, c, h, w)``.
    """
    return [
        theirs if level == changed else np.repeat(mine, len(theirs), axis=0)
        for level, (mine, theirs) in enumerate(zip(own, others, strict=True))
    ]
