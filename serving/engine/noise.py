"""Random numbers that are a fixed function of their purpose: a seed, and an image or an index.

Philox is a counter-based generator: each key gives an independent stream. Only its raw words are
used, because NumPy guarantees those to stay the same across versions. NumPy does not guarantee it
for its distributions, so uniform and normal numbers are computed here.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np


def sample_key(seed: int, index: int) -> bytes:
    """Return the key (16 bytes) of sample ``index`` of ``seed``."""
    # The 0 means nothing, but without it every seed would draw other samples.
    return hashlib.sha256(b"ade sample %d %d 0" % (seed, index)).digest()[:16]


def image_digest(pixels: np.ndarray) -> bytes:
    """Return the SHA-256 of one image's pixels, uint8 ``(H, W, C)``."""
    return hashlib.sha256(np.ascontiguousarray(pixels).data).digest()


def short_digest(pixels: np.ndarray) -> int:
    """Return the first 8 bytes of :func:`image_digest`, by which calibrations know an image."""
    return int.from_bytes(image_digest(pixels)[:8])


def image_key(seed: int, digest: bytes, draw: int = 0) -> bytes:
    """Return the key (16 bytes) of one draw for the image with this :func:`image_digest`."""
    return hashlib.sha256(b"ade image %d %d " % (seed, draw) + digest).digest()[:16]


class NoiseStream:
    """The stream of one key; each call returns the next numbers.

    Args:
        key: 16 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._words = np.random.Philox(key=int.from_bytes(key, "little"))

    def uniform(self, shape: tuple[int, ...]) -> np.ndarray:
        """Draw float32 numbers in [0, 1), with 24 random bits each."""
        words = self._words.random_raw(math.prod(shape))
        return ((words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).reshape(shape)

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        """Draw float32 standard normals, by the transform of Box and Muller (1958) in float64."""
        count = math.prod(shape)
        pairs = -(-count // 2)
        words = self._words.random_raw(2 * pairs) >> np.uint64(11)
        # In the open interval (0, 1), so that the logarithm is finite.
        unit = (words.astype(np.float64) + 0.5) * 2.0**-53
        radius = np.sqrt(-2.0 * np.log(unit[:pairs]))
        angle = (2.0 * np.pi) * unit[pairs:]
        values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return values[:count].astype(np.float32).reshape(shape)
