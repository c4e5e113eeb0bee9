"""Measurement of the systems of a comparison, by the measures of its table and its claims."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ade_base.pictures.show import psnr
from ade_model.model import ADEModel
from extensions.comparison.inception import inception_features, verified_inception
from extensions.comparison.resnet20 import ResNet20, features_of
from training.data import DataError, Dataset
from training.evaluate import (
    bpd_of,
    likelihood_figures,
    reconstructions,
    sample_images,
    sample_kinds,
)
from training.metrics.efficientnet import EfficientNetFeatures, efficientnet_weights
from training.metrics.frechet import frechet_distance, is_rank_deficient
from training.metrics.gan_train import gan_train_accuracy
from training.metrics.precision_recall import NEIGHBOURS, improved_precision_recall
from training.recipes import saw_efficientnet

MIN_HELD_OUT = 20  # for distances between sets of features
FID_COUNTS = (5_000, 10_000, 50_000)
NOT_INDEPENDENT = "not independent: the model was trained against these features"
RESNET20, EFFICIENTNET, INCEPTION = "resnet20-cifar10", "efficientnet-lite0", "inception-v3"


@dataclass(frozen=True)
class MeasureOptions:
    """What to measure, and on how many images.

    Attributes:
        part: held-out part of the data set.
        images: number of its images to use, the first ones; ``None`` for all.
        draws: K of the importance-weighted bound.
        bound_images: number of images for that bound, the first ones; ``None`` for all.
        resnet20: weights of a CIFAR-10 ResNet-20, for its feature space and GAN-train.
        efficientnet: whether to use the feature space of EfficientNet-Lite0.
        inception: weights of the FID's Inception, or ``download``.
        samples: number of samples for ResNet-20.
        efficientnet_samples: number of samples for EfficientNet-Lite0.
        seed: of the noise.
    """

    part: str = "test"
    images: int | None = None
    draws: int = 8
    bound_images: int | None = None
    resnet20: Path | None = None
    efficientnet: bool = False
    inception: str | None = None
    samples: int = 10_000
    efficientnet_samples: int = 5_000
    seed: int = 0


def check_options(dataset: Dataset, options: MeasureOptions) -> None:
    """Check that everything can be measured, which is best known before days of training.

    Raises:
        DataError: there are too few held-out images.
        FeatureError: the weights of a network are missing or wrong.
    """
    found = len(dataset.parts[options.part])
    if options.images is not None:
        found = min(found, options.images)
    least = MIN_HELD_OUT if options.resnet20 or options.efficientnet or options.inception else 2
    if found < least:
        raise DataError(
            f"the part {options.part} of {dataset.name} has {found} images "
            f"({dataset.splits[options.part]}); these measurements need at least {least}: choose "
            "another part, or give more images"
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
    """A feature space, with the held-out images in it."""

    samples: int
    features: Callable[[np.ndarray], np.ndarray]
    real: np.ndarray
    logits: Callable[[np.ndarray], np.ndarray] | None = None


@dataclass
class Measurer:
    """Measures models against the same held-out images, whose features it computes once.

    Raises:
        DataError: there are too few held-out images.
        FeatureError: the weights of a network are missing or wrong.
    """

    dataset: Dataset
    device: torch.device
    options: MeasureOptions
    report: Callable[[str], None] = lambda line: None
    images: np.ndarray = field(init=False)
    _spaces: dict[str, _Space] = field(init=False, default_factory=dict)
    _real_accuracy: float | None = field(init=False, default=None)
    _fid_real: dict[int, np.ndarray] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        options = self.options
        check_options(self.dataset, options)
        self.images = np.asarray(self.dataset.parts[options.part].images[: options.images])
        if options.resnet20 is not None:
            network = ResNet20(options.resnet20).to(self.device)
            self._add(
                RESNET20,
                options.samples,
                lambda images: features_of(network, images, self.device),
                network.logits,
            )
        if options.efficientnet:
            self._add(EFFICIENTNET, options.efficientnet_samples, EfficientNetFeatures())

    def _add(
        self,
        name: str,
        samples: int,
        features: Callable[[np.ndarray], np.ndarray],
        logits: Callable[[np.ndarray], np.ndarray] | None = None,
    ) -> None:
        self.report(f"{name}: features of held-out images")
        self._spaces[name] = _Space(samples, features, features(self.images[:samples]), logits)

    def measure(self, model: ADEModel, about: Mapping[str, Any]) -> dict[str, Any]:
        """Measure one model.

        Args:
            model: in evaluation mode, float32, on the device.
            about: the ``config.json`` of its checkpoint, for the operations that it supports (a GAN
                can only sample until its inference network is trained) and its recipe.

        Returns:
            Plain values for JSON; each figure has its number of samples and its reference.
        """
        options = self.options
        operations = about.get("operations", model.config.operations)
        result: dict[str, Any] = {
            "data": self.dataset.name,
            "part": options.part,
            "split": self.dataset.splits[options.part],
            "images": len(self.images),
            "seed": options.seed,
        }
        if "score" in operations:
            self.report("bits per dimension")
            result |= self._likelihood(model)
            self.report("reconstructions")
            made = reconstructions(model, self.images[: options.bound_images], self.device)
            decibels = map(psnr, self.images[: len(made)], made)
            inexact = [value for value in decibels if value is not None]
            result["psnr"] = {
                "mean_db": float(np.mean(inexact)) if inexact else None,
                "exact": len(made) - len(inexact),
                "images": len(made),
            }
        for kind in sample_kinds(model, operations) if self._spaces else ():
            self._samples(result, model, kind)
        if saw_efficientnet(about) and EFFICIENTNET in self._spaces:
            result["distances"]["mean"][EFFICIENTNET]["independent"] = NOT_INDEPENDENT
        if options.inception is not None:
            self._inception(result, model)
        return result

    def _likelihood(self, model: ADEModel) -> dict[str, Any]:
        options = self.options
        figures = likelihood_figures(model, self.images, self.device, options.seed)
        bpd, kl = figures["bpd"], figures["kl"]
        result: dict[str, Any] = {
            "elbo": {
                "bpd": bpd["value"],
                "standard_error": bpd["error"],
                "images": bpd["images"],
            }
        }
        if kl["value"] is not None:
            result["kl"] = {"sum": kl["value"], "images": kl["images"]}
        if options.draws > 1:
            images = self.images[: options.bound_images]
            one, several = (
                bpd_of(model, images, self.device, draws, options.seed)
                for draws in (1, options.draws)
            )
            result[f"iwae-{options.draws}"] = {
                "bpd": float(several.mean()),
                "standard_error": float(several.std(ddof=1) / np.sqrt(len(several))),
                "images": len(several),
                "elbo": float(one.mean()),
            }
        return result

    def _samples(self, result: dict[str, Any], model: ADEModel, kind: str) -> None:
        """Distances of samples in each space; EfficientNet's is for mean samples alone."""
        with_noise = kind == "density"
        spaces = {k: v for k, v in self._spaces.items() if not (with_noise and k == EFFICIENTNET)}
        if not spaces:
            return
        count = max(space.samples for space in spaces.values())
        self.report(f"{count} {kind} samples")
        samples = sample_images(model, count, self.device, with_noise, self.options.seed)
        found: dict[str, Any] = {}
        for name, space in spaces.items():
            self.report(f"{name}: {kind} samples")
            generated = space.features(samples[: space.samples])
            reference = f"{len(space.real)} images of {self.dataset.splits[self.options.part]}"
            values: dict[str, Any] = {
                "samples": len(generated),
                "reference": reference,
                "frechet": frechet_distance(space.real, generated),
            }
            if is_rank_deficient(space.real, generated):
                values["rank_deficient"] = True
            if kind == "mean":
                values["neighbours"] = _neighbours(generated, space.real)
                if space.logits is not None:
                    classes = space.logits(generated).argmax(1)
                    self._gan_train(result, samples[: space.samples], classes)
            found[name] = values
        result.setdefault("distances", {})[kind] = found

    def _gan_train(self, result: dict[str, Any], samples: np.ndarray, classes: np.ndarray) -> None:
        labels = self.dataset.parts[self.options.part].labels
        if labels is None or self.dataset.name != "cifar10":  # the classifier knows CIFAR-10
            return
        self.report("GAN-train")
        labels = labels[: len(self.images)]
        train = self.dataset.parts["train"]
        if self._real_accuracy is None and train.labels is not None:
            count = min(len(samples), len(train))
            self._real_accuracy = gan_train_accuracy(
                np.asarray(train.images[:count]),
                train.labels[:count],
                self.images,
                labels,
                self.device,
            )
        result["gan_train"] = {
            "accuracy": gan_train_accuracy(samples, classes, self.images, labels, self.device),
            "accuracy_of_real": self._real_accuracy,
            "samples": len(samples),
            "classes": int(len(np.unique(classes))),
        }

    def _inception(self, result: dict[str, Any], model: ADEModel) -> None:
        """The FID.

        That of 5,000 and of 10,000 samples is against the held-out part; that of 50,000 samples is
        against the training images. Of the held-out part at most ``options.images`` are used.
        """
        assert self.options.inception is not None
        self.report("Inception: samples")
        samples = sample_images(
            model, FID_COUNTS[-1], self.device, with_noise=False, seed=self.options.seed
        )
        generated = inception_features(self.options.inception, samples, self.device)
        if not self._fid_real:
            few, more, most = FID_COUNTS
            held_out, train = (
                inception_features(self.options.inception, np.asarray(images), self.device)
                for images in (self.images[:more], self.dataset.parts["train"].images[:most])
            )
            self._fid_real = {few: held_out, more: held_out, most: train}
        fid: dict[str, Any] = {}
        for count in FID_COUNTS:
            part = "train" if count == FID_COUNTS[-1] else self.options.part
            real = self._fid_real[count]
            fid[str(count)] = {
                "fid": frechet_distance(real, generated[:count]),
                "reference": f"{len(real)} images of {self.dataset.splits[part]}",
            }
            if is_rank_deficient(real, generated[:count]):
                fid[str(count)]["rank_deficient"] = True
        result["inception"] = {"fid": fid}


def _neighbours(generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    size = min(len(generated), len(real))
    precision, recall = improved_precision_recall(generated[:size], real[:size])
    return {"precision": precision, "recall": recall, "neighbours": NEIGHBOURS, "images": size}
