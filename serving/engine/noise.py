"""Random numbers that are a fixed function of what they are for.

Philox is counter-based: a key names a stream, and no stream knows of another. Only its raw words
are used, which NumPy keeps stable; uniforms and normals come from them by the arithmetic below,
since NumPy does not promise the streams of its own distributions.
"""

from __future__ import annotations

import hashlib
from typing import Final

import numpy as np

MAX_SEED: Final = 2**63 - 1


def sample_key(seed: int, index: int, draw: int = 0) -> bytes:
    """The stream of sample ``index`` of ``seed``: 16 bytes."""
    return hashlib.sha256(b"ade sample %d %d %d" % (seed, index, draw)).digest()[:16]


def image_digest(pixels: np.ndarray) -> bytes:
    """SHA-256 of one image's pixels, uint8 ``(H, W, C)``."""
    return hashlib.sha256(np.ascontiguousarray(pixels).data).digest()


def image_key(seed: int, digest: bytes, draw: int = 0) -> bytes:
    """The stream of draw ``draw`` for the image of that :func:`image_digest`: 16 bytes."""
    return hashlib.sha256(b"ade image %d %d " % (seed, draw) + digest).digest()[:16]


def tie_breaker(digest: bytes) -> float:
    """A number on [0, 1) that belongs to the image of that :func:`image_digest`."""
    return int.from_bytes(hashlib.sha256(b"ade ties " + digest).digest()[:6], "little") / 2**48


class NoiseStream:
    """The numbers of one key, in the order in which they are asked for.

    Args:
        key: 16 bytes.
    """

    def __init__(self, key: bytes) -> None:
        self._words = np.random.Philox(key=int.from_bytes(key, "little"))

    def uniform(self, shape: tuple[int, ...]) -> np.ndarray:
        """float32 in [0, 1), of 24 bits each."""
        words = self._words.random_raw(int(np.prod(shape)))
        return ((words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)).reshape(shape)

    def normal(self, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normals, float32, by the transform of Box and Muller (1958) in float64."""
        count = int(np.prod(shape))
        pairs = -(-count // 2)
        words = self._words.random_raw(2 * pairs) >> np.uint64(11)
        unit = (
            words.astype(np.float64) + 0.5
        ) * 2.0**-53  # open at both ends: the logarithm is finite
        radius = np.sqrt(-2.0 * np.log(unit[:pairs]))
        angle = (2.0 * np.pi) * unit[pairs:]
        values = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        return values[:count].astype(np.float32).reshape(shape)
