"""Measurement of a model by the panel of :mod:`ade_base.panel`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ade_base.panel import LITE2, RANDOM, RELATIVE
from ade_model.model import ADEModel
from training.data import DataError, Dataset, ImageSet
from training.evaluate import likelihood_figures, psnr_figure, sample_images, sample_kinds
from training.metrics.efficientnet import EfficientNetFeatures
from training.metrics.features import FeatureError, RandomConvolutions
from training.metrics.frechet import frechet_distance
from training.metrics.gan_train import gan_train_accuracy, label_samples
from training.metrics.precision_recall import improved_precision_recall
from training.recipes import saw_efficientnet

SELECT, FINAL = "select", "test"
SETS = 2000  # images in each set between which distances are measured, and reconstructed ones
LEAST = 100  # images in such a set
LABELLED = 10_000  # samples, and real images, that GAN-train learns from
PER_TESTED = 5  # of these for each image that tests it, at most

Features = Callable[[np.ndarray], np.ndarray]


@dataclass(eq=False)
class Measurer:
    """Measures models against the same held-out images, whose features it computes once.

    Attributes:
        dataset: of the model.
        device: of the model.
        part: held-out part of the data set.
        images: number of its images to use, the first ones; ``None`` for all.
        seed: of the noise.
        report: called with each line of progress.

    Raises:
        DataError: there are too few held-out images.
    """

    dataset: Dataset
    device: torch.device
    part: str = SELECT
    images: int | None = None
    seed: int = 0
    report: Callable[[str], None] = lambda line: None
    held_out: ImageSet = field(init=False)
    _sets: int = field(init=False)

    def __post_init__(self) -> None:
        part = self.dataset.parts[self.part]
        self.held_out = part.slice(0, len(part) if self.images is None else self.images)
        if len(self.held_out) < 2:
            raise DataError(
                f"the part {self.part} of {self.dataset.name} has {len(part)} images "
                f"({self.dataset.splits[self.part]}); measuring needs at least 2"
            )
        self._sets = min(SETS, len(self.held_out), len(self.dataset.parts["train"]))

    def measure(self, model: ADEModel, about: Mapping[str, Any]) -> dict[str, Any]:
        """Measure one model.

        Args:
            model: in evaluation mode, float32, on the device.
            about: the ``config.json`` of its checkpoint, for the operations that it supports (a GAN
                can only sample until its inference network is trained) and its recipe.

        Returns:
            Plain values for JSON: what was measured on, and the ``figures`` of the panel.
        """
        operations = about.get("operations", model.config.operations)
        figures = self._likelihood(model) if "score" in operations else {}
        for name in {"bpd", "kl", "psnr"} - figures.keys():
            figures[name] = _absent("the model has no likelihood")
        self._samples(model, operations, figures)
        if saw_efficientnet(about):
            for name in (LITE2, "density_lite2", "precision", "recall", "gan_train"):
                figures[name].setdefault("note", RELATIVE)
        return {
            "data": self.dataset.name,
            "split": self.dataset.splits[self.part],
            "images": len(self.held_out),
            "seed": self.seed,
            "figures": figures,
        }

    def _likelihood(self, model: ADEModel) -> dict[str, Any]:
        self.report("bits per dimension")
        images = np.asarray(self.held_out.images[:])
        figures = likelihood_figures(model, images, self.device, self.seed)
        self.report("reconstructions")
        figures["psnr"] = psnr_figure(model, images[:SETS], self.device)
        return figures

    def _samples(self, model: ADEModel, operations: Any, figures: dict[str, Any]) -> None:
        """The figures of samples, or why there are none."""
        names = ("precision", "recall", LITE2, RANDOM, "density_lite2", "density_random")
        if self._sets < LEAST:
            why = f"needs {LEAST} held-out and training images, has {self._sets}"
            figures |= {name: _absent(why) for name in (*names, "gan_train")}
            return
        kinds = sample_kinds(model, operations)
        count = max(self._sets, self._to_label)
        self.report(f"{count:,} mean samples")
        samples = sample_images(model, count, self.device, False, self.seed)
        density = None
        if "density" in kinds:
            self.report(f"{self._sets:,} density samples")
            density = sample_images(model, self._sets, self.device, True, self.seed)
        for space in (LITE2, RANDOM):
            try:
                features, scale, real, known = self._space(space)
            except FeatureError as error:
                lacking = _absent(str(error))
                figures |= dict.fromkeys((space, f"density_{space}"), lacking)
                if space == LITE2:
                    figures |= dict.fromkeys(("precision", "recall", "gan_train"), lacking)
                continue
            base = frechet_distance(known[: self._sets], real)
            for name, drawn in ((space, samples), (f"density_{space}", density)):
                if drawn is None:
                    figures[name] = _absent("the model has no density samples")
                    continue
                self.report(f"{name}: features of samples")
                generated = features(drawn if name == LITE2 else drawn[: self._sets]) / scale
                ours = frechet_distance(generated[: self._sets], real)
                distances = {"distance": ours, "distance_of_real": base}
                figures[name] = {"value": ours - base, "images": self._sets, **distances}
                if name == LITE2:
                    found = improved_precision_recall(generated[: self._sets], real)
                    for kind, value in zip(("precision", "recall"), found, strict=True):
                        figures[kind] = {"value": value, "images": self._sets}
                    figures["gan_train"] = self._gan_train(samples, generated, known)

    @functools.cached_property
    def _to_label(self) -> int:
        """Number of samples, and of training images, that GAN-train learns from; 0 without it."""
        train = self.dataset.parts["train"]
        if train.labels is None or self.held_out.labels is None:
            return 0
        return min(LABELLED, len(train), PER_TESTED * len(self.held_out))

    @functools.cache  # noqa: B019
    def _space(self, name: str) -> tuple[Features, np.ndarray, np.ndarray, np.ndarray]:
        """A feature space, by what to divide it, and the held-out and training images in it."""
        self.report(f"{name}: features of real images")
        features: Features
        if name == LITE2:
            features = EfficientNetFeatures(version=2, mode="bicubic")
        else:
            features = RandomConvolutions(self.device)
        real = features(np.asarray(self.held_out.images[: self._sets]))
        spread = real.std(0)
        scale = np.ones_like(spread) if name == LITE2 else np.where(spread > 0, spread, 1)
        count = max(self._sets, self._to_label) if name == LITE2 else self._sets
        known = features(np.asarray(self.dataset.parts["train"].images[:count]))
        return features, scale, real / scale, known / scale

    def _gan_train(
        self, samples: np.ndarray, generated: np.ndarray, known: np.ndarray
    ) -> dict[str, Any]:
        count = self._to_label
        train = self.dataset.parts["train"]
        if not count or train.labels is None or self.held_out.labels is None:
            return _absent("the images have no classes")
        classes, labels = np.unique(train.labels, return_inverse=True)
        if len(classes) < 2:
            return _absent("the images are of one class")
        self.report("GAN-train")
        tested = np.isin(self.held_out.labels, classes)
        images = np.asarray(self.held_out.images[:])[tested]
        truth = np.searchsorted(classes, self.held_out.labels[tested])
        made = label_samples(known[:count], labels[:count], generated[:count])
        ours, real = (
            gan_train_accuracy(seen[:count], its, images, truth, self.device)
            for seen, its in ((samples, made), (np.asarray(train.images[:count]), labels[:count]))
        )
        return {"value": ours, "real": real, "images": len(images), "samples": count}


def _absent(why: str) -> dict[str, Any]:
    return {"value": None, "note": why}
