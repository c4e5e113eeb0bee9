"""A point of a run's curve: what its averaged weights do on images that it was not trained on.

It says in a few hundred bytes what a run must be stopped for: overfitting (``train_`` against
``select_``), latents that are not used (``select_kl_``), a discriminator that knows its training
images by heart, samples that move away from images.
"""

from __future__ import annotations

import numpy as np
import torch

from training.adversary import Adversary
from training.data import Dataset
from training.evaluate import likelihood_figures, sample_images
from training.metrics.features import RandomConvolutions, to_unit
from training.metrics.frechet import frechet_distance
from training.step import Trainer

IMAGES = 500  # of each set
LEAST = 100  # with fewer, a distance between sets says nothing


def curve_point(trainer: Trainer, dataset: Dataset) -> dict[str, float]:
    """Measure the averaged weights and the discriminators.

    Returns:
        By name, of as many as :data:`IMAGES` images: ``select_bpd`` and ``train_bpd``; the KL of
        each level on select images, ``select_kl_<level>``, bits per dimension; where
        discriminators take part, their mean logits, ``logit_train``, ``logit_select`` and
        ``logit_samples``, after the prefix of each; and ``random``, how much farther mean samples
        are from select images than training images are, in random convolutions (Fréchet distance).
    """
    sets = {name: _first(dataset, name) for name in ("train", "select")}
    values: dict[str, float] = {}
    for name, images in sets.items():
        if len(images) > 1 and "score" in trainer.operations:
            figures = likelihood_figures(trainer.ema, images, trainer.device)
            values[f"{name}_bpd"] = figures["bpd"]["value"]
            if name == "select":
                levels = figures["kl"].get("levels", [])
                values |= {f"select_kl_{level}": value for level, value in enumerate(levels)}
    sets["samples"] = sample_images(trainer.ema, len(sets["train"]), trainer.device, False)
    for adversary in trainer.adversaries if trainer.is_joint else ():
        for name, images in sets.items():
            if len(images):
                key = f"{adversary.prefix}logit_{name}"
                values[key] = _mean_logit(adversary, images, trainer)
    if min(len(images) for images in sets.values()) >= LEAST and images.shape[-1] == 3:
        features = RandomConvolutions(trainer.device)
        train, select, samples = (features(images) for images in sets.values())
        spread = np.where(select.std(0) > 0, select.std(0), 1)
        distances = (frechet_distance(x / spread, select / spread) for x in (samples, train))
        values["random"] = next(distances) - next(distances)
    return values


def _first(dataset: Dataset, part: str) -> np.ndarray:
    images = dataset.parts[part].images
    return np.asarray(images[: min(IMAGES, len(images))])


@torch.no_grad()
def _mean_logit(adversary: Adversary, images: np.ndarray, trainer: Trainer) -> float:
    """In batches of a step's size, because a discriminator may compare the images of a batch."""
    network, size = adversary.network.eval(), trainer.config.batch_size
    logits = [
        network(to_unit(images[first : first + size]).to(trainer.device)).flatten()
        for first in range(0, len(images), size)
    ]
    network.train()
    return torch.cat(logits).mean().item()
