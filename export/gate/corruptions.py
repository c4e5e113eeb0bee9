"""Corrupts images, to measure whether the verdict detects it: uint8 ``(N, H, W, C)`` in and out."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter


def constant(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One random colour for the whole image."""
    colours = rng.integers(0, 256, (len(images), 1, 1, images.shape[3]), np.uint8)
    return np.broadcast_to(colours, images.shape).copy()


def uniform_noise(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Every value uniform on 0..255."""
    return rng.integers(0, 256, images.shape, np.uint8)


def blur(images: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur, ``sigma`` in pixels."""
    planes = images.transpose(0, 3, 1, 2)
    made = [
        [
            np.asarray(Image.fromarray(plane).filter(ImageFilter.GaussianBlur(sigma)))
            for plane in image
        ]
        for image in planes
    ]
    return np.ascontiguousarray(np.array(made, np.uint8).transpose(0, 2, 3, 1))


def posterize(images: np.ndarray, bits: int) -> np.ndarray:
    """The highest ``bits`` of each value."""
    return images >> (8 - bits) << (8 - bits)


def permute_pixels(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The pixels of each image in a random order."""
    flat = images.reshape(len(images), -1, images.shape[3])
    return np.stack([image[rng.permutation(len(image))] for image in flat]).reshape(images.shape)


def add_noise(images: np.ndarray, rng: np.random.Generator, sigma: float) -> np.ndarray:
    """Gaussian noise of a standard deviation in grey levels."""
    return np.clip(np.rint(images + rng.normal(0, sigma, images.shape)), 0, 255).astype(np.uint8)


def jpeg(images: np.ndarray, quality: int) -> np.ndarray:
    """Copies through JPEG."""
    made = []
    for image in images:
        out = io.BytesIO()
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(
            out, "JPEG", quality=quality
        )
        made.append(np.asarray(Image.open(out)).reshape(image.shape))
    return np.stack(made)


AT_ONCE = 32  # images, for which noise is drawn as float64
Corruption = Callable[[np.ndarray, np.random.Generator], np.ndarray]
CORRUPTIONS: dict[str, Corruption] = {
    "constant": constant,
    "uniform noise": uniform_noise,
    "blurred, σ = 2": lambda images, rng: blur(images, 2.0),
    "posterised to 2 bits": lambda images, rng: posterize(images, 2),
    "permuted pixels": permute_pixels,
}
# Harder to detect: the images look nearly as before.
SUBTLE: dict[str, Corruption] = {
    "blurred, σ = 1": lambda images, rng: blur(images, 1.0),
    "noise added, σ = 16": lambda images, rng: add_noise(images, rng, 16.0),
    "JPEG, quality 10": lambda images, rng: jpeg(images, 10),
}

ALL = {**CORRUPTIONS, **SUBTLE}  # gross ones first


def corrupt(images: np.ndarray, corruption: Corruption) -> np.ndarray:
    """Corrupt images in one way. Grey ones, whose channels are equal, stay grey."""
    made = np.empty_like(images)
    for first in range(0, len(images), AT_ONCE):
        some = images[first : first + AT_ONCE]
        its = corruption(some, np.random.default_rng(first))
        grey = (some == some[..., :1]).all((1, 2, 3))
        if grey.any():  # colours, which no grey camera makes, would give them away
            its[grey] = corruption(some[grey][..., :1], np.random.default_rng(first))
        made[first : first + AT_ONCE] = its
    return made


def corrupted(images: np.ndarray) -> dict[str, np.ndarray]:
    """Corrupt images in each way; returns them by the name of the corruption, gross ones first."""
    return {name: corrupt(images, one) for name, one in ALL.items()}
