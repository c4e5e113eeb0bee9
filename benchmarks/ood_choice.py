"""The choice of the verdict: statistics and densities compared on corrupted held-out images.

The densities are fitted to CIFAR-10's training images 45,000-45,999. The in-distribution images are
46,000-46,999, and the OOD images are made by corrupting them. No real OOD data set is used.

``python -m benchmarks.ood_choice pretrained/cifar10 --root CIFAR10``
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from sklearn.covariance import LedoitWolf
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture

from export.verdict import detector
from export.verdict.corruptions import CORRUPTIONS, add_noise, blur, jpeg, posterize
from export.verdict.measuring import statistics_of
from serving.engine.engine import InferenceEngine
from serving.verdict.density import FARTHEST, NormalScores
from serving.verdict.statistics import statistic_names
from training.datasets import load_dataset

FIT = 1000
Corruption = Callable[[np.ndarray, np.random.Generator], np.ndarray]
FAMILIES = {  # by prefixes of names; the first that matches
    "map": ("map_", "log_det_map_"),
    "likelihood": ("bpd", "distortion", "log_det", "kl_"),
    "complexity": ("complexity", "excess"),
    "pixels": ("pixel_",),
    "residual": ("residual_",),
    "features": ("feature_",),
    "latents": ("latent_",),
}


def _clipped(values: np.ndarray) -> np.ndarray:
    return np.clip(np.round(values), 0, 255).astype(np.uint8)


def _shuffled_patches(size: int) -> Corruption:
    def corrupt(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        side = images.shape[1] // size
        made = []
        for image in images:
            patches = (
                image.reshape(side, size, side, size, 3).swapaxes(1, 2).reshape(-1, size, size, 3)
            )
            patches = patches[rng.permutation(len(patches))]
            made.append(
                patches.reshape(side, side, size, size, 3).swapaxes(1, 2).reshape(image.shape)
            )
        return np.stack(made)

    return corrupt


def _contrast(factor: float) -> Corruption:
    return lambda images, rng: _clipped(
        images.mean((1, 2), keepdims=True) * (1 - factor) + images * factor
    )


def _coarse(size: int) -> Corruption:
    def corrupt(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        side = images.shape[1] // size
        means = _clipped(images.reshape(len(images), side, size, side, size, 3).mean((2, 4)))
        return means.repeat(size, 1).repeat(size, 2)

    return corrupt


def _zoom(factor: float) -> Corruption:
    def corrupt(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        size = images.shape[1]
        cut = int(size / factor)
        first = (size - cut) // 2
        return np.stack(
            [
                np.asarray(
                    Image.fromarray(image[first : first + cut, first : first + cut]).resize(
                        (size, size), Image.Resampling.BICUBIC
                    )
                )
                for image in images
            ]
        )

    return corrupt


def _random_phases(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Images with the spectra of the given ones and random phases."""
    angles = np.angle(np.fft.fft2(rng.normal(size=images.shape[:3])))[..., None]
    means = images.mean((1, 2), keepdims=True)
    spectrum = np.fft.fft2(images - means, axes=(1, 2)) * np.exp(1j * angles)
    return _clipped(np.real(np.fft.ifft2(spectrum, axes=(1, 2))) + means)


def _tiles(size: int) -> Corruption:
    def corrupt(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        count = images.shape[1] // size
        places = rng.integers(0, images.shape[1] - size + 1, (len(images), 2))
        return np.stack(
            [
                np.tile(image[y : y + size, x : x + size], (count, count, 1))
                for image, (y, x) in zip(images, places, strict=True)
            ]
        )

    return corrupt


def _shapes(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pictures of a few polygons and lines, each of one colour."""
    made = []
    for _ in images:
        picture = Image.new("RGB", (128, 128), tuple(rng.integers(0, 256, 3)))
        pen = ImageDraw.Draw(picture)
        for _ in range(rng.integers(1, 5)):
            points = [tuple(p) for p in rng.integers(0, 128, (rng.integers(3, 6), 2))]
            colour = tuple(int(v) for v in rng.integers(0, 256, 3))
            if rng.random() < 0.5:
                pen.polygon(points, fill=colour)
            else:
                pen.line(points, fill=colour, width=int(rng.integers(4, 20)))
        made.append(np.asarray(picture.resize(images.shape[1:3], Image.Resampling.LANCZOS)))
    return np.stack(made)


OOD_IMAGES: dict[str, Corruption] = {
    **CORRUPTIONS,
    "noise 5": lambda x, rng: add_noise(x, rng, 5.0),
    "noise 15": lambda x, rng: add_noise(x, rng, 15.0),
    "blurred 0.5": lambda x, rng: blur(x, 0.5),
    "blurred 1": lambda x, rng: blur(x, 1.0),
    "JPEG 20": lambda x, rng: jpeg(x, 20),
    "JPEG 60": lambda x, rng: jpeg(x, 60),
    "blue for red": lambda x, rng: x[..., ::-1].copy(),
    "colours turned": lambda x, rng: x[..., [1, 2, 0]],
    "posterised to 4 bits": lambda x, rng: posterize(x, 4),
    "patches of 4": _shuffled_patches(4),
    "patches of 8": _shuffled_patches(8),
    "patches of 16": _shuffled_patches(16),
    "contrast 0.3": _contrast(0.3),
    "contrast 1.8": _contrast(1.8),
    "pixels of 2": _coarse(2),
    "pixels of 4": _coarse(4),
    "grey": lambda x, rng: _clipped(x.mean(3, keepdims=True).repeat(3, 3)),
    "inverted": lambda x, rng: 255 - x,
    "zoomed 1.4": _zoom(1.4),
    "zoomed 2": _zoom(2),
    "zoomed 3.2": _zoom(3.2),
    "upside down": lambda x, rng: x[:, ::-1].copy(),
    "random phases": _random_phases,
    "tiles of 8": _tiles(8),
    "tiles of 16": _tiles(16),
    "shapes": _shapes,
    "two at once": lambda x, rng: ((x.astype(int) + x[rng.permutation(len(x))]) // 2).astype(
        np.uint8
    ),
}


def _ledoit_wolf(scores: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    found = LedoitWolf().fit(scores)
    return found.mahalanobis


def _four_gaussians(scores: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    found = GaussianMixture(4, reg_covar=0.1, random_state=0).fit(scores)
    return lambda z: -found.score_samples(z)


def _copod(scores: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Li et al., "COPOD", 2020: the sum over statistics of the log tail probabilities.

    It is the largest of the sums over left tails, over right tails, and over the tails to which the
    statistics are skewed.
    """
    ordered = np.sort(scores, axis=0)
    n = len(ordered)
    skew = np.sign(((scores - scores.mean(0)) ** 3).mean(0))

    def scores_of(z: np.ndarray) -> np.ndarray:
        places = np.stack(
            [np.searchsorted(ordered[:, j], z[:, j], "right") for j in range(z.shape[1])], axis=1
        )
        left, right = -np.log((places + 1) / (n + 1)), -np.log((n - places + 1) / (n + 1))
        return np.maximum(
            np.maximum(left.sum(1), right.sum(1)), np.where(skew < 0, left, right).sum(1)
        )

    return scores_of


def _ours(scores: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return detector.fit_mixture(scores).negative_log_density


DENSITIES = {
    "shrunk mixture (served)": _ours,
    "one Gaussian, Ledoit-Wolf": _ledoit_wolf,
    "4 Gaussians": _four_gaussians,
    "COPOD": _copod,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--root", required=True)
    args = parser.parse_args()
    engine = InferenceEngine(args.bundle, device="cpu", operations=["score"])
    images = np.asarray(load_dataset("cifar10", args.root).parts["select"].images[:])
    found = {
        "fit": statistics_of(engine, images[:FIT], "fit"),
        "in-distribution": statistics_of(engine, images[FIT:], "in-distribution"),
    }
    for name, corrupt in OOD_IMAGES.items():
        found[name] = statistics_of(engine, corrupt(images[FIT:], np.random.default_rng(0)), name)
    own = statistic_names(engine.image_shape, engine.latent_shapes)  # without semantic ones
    every = [name for name in own if found["fit"][name].min() < found["fit"][name].max()]

    def mean_auroc(
        names: list[str], density: Callable[[np.ndarray], Callable[[np.ndarray], np.ndarray]]
    ) -> float:
        rows = {key: np.stack([values[n] for n in names], axis=1) for key, values in found.items()}
        normal = NormalScores.fit(rows["fit"])
        scores = {key: np.clip(normal(values), -FARTHEST, FARTHEST) for key, values in rows.items()}
        judge = density(scores["fit"])
        inside = judge(scores["in-distribution"])
        truth = np.repeat([0, 1], [len(inside), len(inside)])
        areas = [
            roc_auc_score(truth, np.concatenate([inside, judge(scores[name])]))
            for name in OOD_IMAGES
        ]
        return float(np.mean(areas))

    print(f"mean AUROC over {len(OOD_IMAGES)} kinds of corrupted images\n")
    print("| density, on all statistics | |\n|---|---|")
    for name, density in DENSITIES.items():
        print(f"| {name} | {mean_auroc(every, density):.4f} |")
    print("\n| statistics, served density | |\n|---|---|")
    families: dict[str, list[str]] = {family: [] for family in FAMILIES}
    for name in every:
        families[
            next(family for family, starts in FAMILIES.items() if name.startswith(starts))
        ].append(name)
    print(f"| bpd alone | {mean_auroc(['bpd'], _ours):.4f} |")
    for family, names in families.items():
        print(f"| {family} alone | {mean_auroc(names, _ours):.4f} |")
    print(f"| all | {mean_auroc(every, _ours):.4f} |")
    for family, names in families.items():
        print(
            f"| all but {family} | {mean_auroc([n for n in every if n not in names], _ours):.4f} |"
        )


if __name__ == "__main__":
    main()
