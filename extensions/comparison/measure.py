"""Measurement of the systems of a comparison, by the measures of its table and its claims."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ade_model.model import ADEModel
from extensions.comparison.inception import inception_features, verified_inception
from extensions.comparison.resnet20 import ResNet20, features_of
from extensions.comparison.rows import EFFICIENTNET, INCEPTION, RESNET20, Bound, Distance, Measured
from training.data import DataError, Dataset, Report
from training.evaluate import (
    bpd_of,
    likelihood_figures,
    psnr_figure,
    sample_images,
    sample_kinds,
)
from training.metrics.efficientnet import EfficientNetFeatures, efficientnet_weights
from training.metrics.frechet import frechet_distance, is_rank_deficient
from training.metrics.gan_train import gan_train_accuracy
from training.metrics.precision_recall import improved_precision_recall
from training.recipes import saw_efficientnet

PART = "test"  # of the data set
MIN_HELD_OUT = 20  # for distances between sets of features
FID_IMAGES = 50_000  # samples, and training images


@dataclass(frozen=True)
class MeasureOptions:
    """What to measure, and on how many images.

    Attributes:
        draws: K of the importance-weighted bound; 1 for none.
        bound_images: number of images for that bound, the first ones; ``None`` for all.
        resnet20: weights of a CIFAR-10 ResNet-20, for its feature space and GAN-train.
        efficientnet: whether to use the feature space of EfficientNet-Lite0, with half as many
            samples.
        inception: weights of the FID's Inception, or ``download``.
        samples: number of samples for ResNet-20.
    """

    draws: int = 8
    bound_images: int | None = None
    resnet20: Path | None = None
    efficientnet: bool = False
    inception: str | None = None
    samples: int = 10_000

    def archived(self) -> dict[str, Any]:
        """Plain values for JSON, without paths: an archive should not tell where it was made."""
        how = dataclasses.asdict(self)
        if self.resnet20 is not None:
            how["resnet20"] = ResNet20(self.resnet20).digest
        if self.inception is not None:
            how["inception"] = "given"  # a file or "download", of the same weights
        return how


def check_options(dataset: Dataset, options: MeasureOptions) -> None:
    """Check that everything can be measured, which is best known before days of training.

    Raises:
        DataError: there are too few held-out images.
        FeatureError: the weights of a network are missing or wrong.
    """
    found = len(dataset.parts[PART])
    least = MIN_HELD_OUT if options.resnet20 or options.efficientnet or options.inception else 2
    if found < least:
        raise DataError(
            f"the part {PART} of {dataset.name} has {found} images ({dataset.splits[PART]}); "
            f"these measurements need at least {least}: give more images"
        )
    check_networks(options)


def check_networks(options: MeasureOptions) -> None:
    """Check the networks that measure, for which no images need to be read.

    Raises:
        FeatureError: the weights of a network are missing or wrong.
    """
    if options.resnet20 is not None:
        ResNet20(options.resnet20)
    if options.efficientnet:
        efficientnet_weights()
    if options.inception is not None:
        verified_inception(options.inception)


@dataclass
class _Space:
    """A feature space, with real images in it."""

    samples: int
    features: Callable[[np.ndarray], np.ndarray]
    real: np.ndarray
    reference: str


@dataclass
class Measurer:
    """Measures models against the same images, whose features it computes once.

    Raises:
        DataError: there are too few held-out images.
        FeatureError: the weights of a network are missing or wrong.
    """

    dataset: Dataset
    device: torch.device
    options: MeasureOptions
    report: Report = lambda line: None
    images: np.ndarray = field(init=False)
    _network: ResNet20 = field(init=False)
    _spaces: dict[str, _Space] = field(init=False, default_factory=dict)
    _real_accuracy: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        options, device = self.options, self.device
        check_options(self.dataset, options)
        self.images = np.asarray(self.dataset.parts[PART].images[:])
        if options.resnet20 is not None:
            self._network = ResNet20(options.resnet20).to(device)
            self._add(RESNET20, options.samples, partial(features_of, self._network, device=device))
        if options.efficientnet:
            self._add(EFFICIENTNET, options.samples // 2, EfficientNetFeatures())
        if options.inception is not None:
            features = partial(inception_features, options.inception, device=device)
            self._add(INCEPTION, FID_IMAGES, features, "train")

    def _add(
        self,
        name: str,
        samples: int,
        features: Callable[[np.ndarray], np.ndarray],
        part: str = PART,
    ) -> None:
        self.report(f"{name}: features of real images")
        real = features(np.asarray(self.dataset.parts[part].images[:samples]))
        reference = f"{len(real)} images of {self.dataset.splits[part]}"
        self._spaces[name] = _Space(samples, features, real, reference)

    def measure(self, model: ADEModel, about: Mapping[str, Any], checkpoint: str = "") -> Measured:
        """Measure one model.

        Args:
            model: in evaluation mode, float32, on the device.
            about: the ``config.json`` of its checkpoint, for the operations that it supports (a GAN
                can only sample until its inference network is trained) and its recipe.
            checkpoint: name of its folder.
        """
        operations = about.get("operations", model.config.operations)
        figures: dict[str, Any] = {}
        if "score" in operations:
            figures |= self._likelihood(model)
        if self._spaces:
            figures |= self._mean_samples(model, saw_efficientnet(about))
        if RESNET20 in self._spaces and "density" in sample_kinds(model, operations):
            samples = self._samples(model, "density", self.options.samples)
            space = self._spaces[RESNET20]
            figures["density"] = frechet_distance(space.real, space.features(samples))
        how, split = self.options.archived(), self.dataset.splits[PART]
        return Measured(checkpoint, how, split, len(self.images), **figures)

    def _likelihood(self, model: ADEModel) -> dict[str, Any]:
        self.report("bits per dimension")
        bpd = likelihood_figures(model, self.images, self.device)["bpd"]
        found: dict[str, Any] = {"bpd": bpd["value"], "bpd_error": bpd["error"]}
        images, draws = self.images[: self.options.bound_images], self.options.draws
        if draws > 1:
            one, several = (
                float(bpd_of(model, images, self.device, count).mean()) for count in (1, draws)
            )
            found["bound"] = Bound(several, draws, len(images), one)
        self.report("reconstructions")
        return {**found, "psnr": psnr_figure(model, images, self.device)["value"]}

    def _samples(self, model: ADEModel, kind: str, count: int) -> np.ndarray:
        self.report(f"{count} {kind} samples")
        return sample_images(model, count, self.device, kind == "density")

    def _mean_samples(self, model: ADEModel, saw_efficientnet: bool) -> dict[str, Any]:
        """Distances of mean samples in each space, and GAN-train."""
        count = max(space.samples for space in self._spaces.values())
        samples = self._samples(model, "mean", count)
        found: dict[str, Any] = {"distances": {}}
        for name, space in self._spaces.items():
            self.report(f"{name}: mean samples")
            real, generated = space.real, space.features(samples[: space.samples])
            precision = recall = None
            if name != INCEPTION:
                size = min(len(generated), len(real))
                precision, recall = improved_precision_recall(generated[:size], real[:size])
            found["distances"][name] = Distance(
                frechet=frechet_distance(real, generated),
                samples=len(generated),
                reference=space.reference,
                is_reliable=not is_rank_deficient(real, generated),
                is_independent=not (saw_efficientnet and name == EFFICIENTNET),
                precision=precision,
                recall=recall,
            )
            if name == RESNET20:
                classes = self._network.logits(generated).argmax(1)
                found |= self._gan_train(samples[: space.samples], classes)
        return found

    def _gan_train(self, samples: np.ndarray, classes: np.ndarray) -> dict[str, float | None]:
        labels, train = self.dataset.parts[PART].labels, self.dataset.parts["train"]
        if labels is None or self.dataset.name != "cifar10":  # the classifier knows CIFAR-10
            return {}
        self.report("GAN-train")
        test = (self.images, labels, self.device)
        if self._real_accuracy is None and train.labels is not None:
            count = min(len(samples), len(train))
            images = np.asarray(train.images[:count])
            self._real_accuracy = gan_train_accuracy(images, train.labels[:count], *test)
        accuracy = gan_train_accuracy(samples, classes, *test)
        return {"gan_train": accuracy, "gan_train_of_real": self._real_accuracy}
