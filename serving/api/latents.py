"""Interpolates and mixes the noise from which latents are sampled.

The noise of an image is one array per level, coarsest first, standard normal in every level. The
noise of a sample follows from its seed (:mod:`serving.engine.noise`); the noise of any other image
is the ``eps`` of its encoding. :meth:`serving.engine.engine.InferenceEngine.sample_with` turns
noise into images.
"""

from __future__ import annotations

import numpy as np


def coarsest(eps: list[np.ndarray], kept: int) -> list[np.ndarray]:
    """Keep the noise of the coarsest levels; zeros give finer levels the mean of their prior."""
    return [noise if level < kept else np.zeros_like(noise) for level, noise in enumerate(eps)]


def from_coarsest(eps: list[np.ndarray]) -> list[np.ndarray]:
    """Keep the noise of one, two, … or all of the coarsest levels.

    Args:
        eps: each level ``(1, c, h, w)``.

    Returns:
        One array ``(levels, c, h, w)`` per level.
    """
    kept = [coarsest(eps, count + 1) for count in range(len(eps))]
    return [np.concatenate(noise) for noise in zip(*kept, strict=True)]


def between(a: list[np.ndarray], b: list[np.ndarray], steps: int) -> list[np.ndarray]:
    """Interpolate noise from ``a`` to ``b``, each a list of ``(1, c, h, w)``.

    The path is a great circle, which keeps the norm. The middle of a straight line would have a
    smaller norm than draws of a standard normal have.

    Returns:
        One array ``(steps, c, h, w)`` per level.
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
    """Combine the 0, 1, … or all coarsest levels of ``a`` with the finer levels of ``b``.

    Returns:
        One array ``(levels + 1, c, h, w)`` per level.
    """
    count = len(a)
    return [
        np.concatenate([first if level < kept else last for kept in range(count + 1)])
        for level, (first, last) in enumerate(zip(a, b, strict=True))
    ]


def with_level(own: list[np.ndarray], others: list[np.ndarray], changed: int) -> list[np.ndarray]:
    """Replace one level of an image's noise by that level of each of ``others``.

    Args:
        own: each level ``(1, c, h, w)``.
        others: each level ``(n, c, h, w)``.
        changed: the level to replace.

    Returns:
        One array ``(n, c, h, w)`` per level.
    """
    return [
        theirs if level == changed else np.repeat(mine, len(theirs), axis=0)
        for level, (mine, theirs) in enumerate(zip(own, others, strict=True))
    ]
