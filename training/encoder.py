"""The verdict's encoder: EfficientNet-Lite0, trained on ImageNet, which sees enlarged images.

The generative model's statistics describe colours, edges and textures; they hardly depend on the
object in the image. The features of a network that tells a thousand kinds of things apart do. If
the images have classes, a linear classifier of the features learns them in a second. Nothing else
is trained, so few images suffice. Each score takes longer for it (docs/ood.md).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.data import DataError, ImageSet
from training.metrics.efficientnet import (
    SIZE,
    EfficientNetFeatures,
    EfficientNetLite,
    load_efficientnet,
)

SEEN = 2000  # images, of which the features' spread is taken
SEEN_WITH_CLASSES = 10_000  # of which it is taken, and from which the classifier learns
LEAST_SPREAD = 0.05  # added to it: some features are nearly always zero
MIN_IMAGES = 8
# Of the classifier. Three times fewer steps, or ten times the decay, give the same AUROCs.
STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 1000, 256, 1e-3, 1e-2
SEED = 0  # of an encoder, and of the choice among more images than it sees


@dataclass(frozen=True)
class TrainedEncoder:
    """An encoder in evaluation mode, and how it came about.

    Attributes:
        network: on the CPU; from uint8 or float ``(N, H, W, 3)``, values of 0..255, to the outputs.
        images_seen: with repetition, if it is a small encoder.
        classes: 0 without labels.
    """

    network: nn.Module
    images_seen: int
    classes: int

    @property
    def outputs(self) -> list[str]:
        """Names of what the network gives, those of a bundle's ``features`` graph."""
        return ["features", "logits"][: 2 if self.classes else 1]


class ImageNetEncoder(nn.Module):
    """Pixels to the pooled features of EfficientNet-Lite0, divided by their spread, and to logits.

    Otherwise the few features that vary most would decide which images are near each other.

    Args:
        network: EfficientNet up to its features.
        spread: of the features of the images at hand, ``(1280,)``.
        classifier: of the divided features; ``None`` without classes.
    """

    spread: Tensor

    def __init__(
        self, network: EfficientNetLite, spread: Tensor, classifier: nn.Linear | None
    ) -> None:
        super().__init__()
        self.network = network
        self.classifier = classifier
        self.register_buffer("spread", spread)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features, ``(N, 1280)``, and logits if there are classes."""
        x = images.permute(0, 3, 1, 2).float() / 255
        x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
        features = self.network(x) / self.spread
        return (features,) if self.classifier is None else (features, self.classifier(features))


def make_encoder(images: ImageSet) -> TrainedEncoder:
    """Make an encoder, with a classifier if the images have labels of two kinds or more.

    Args:
        images: uint8 ``(N, H, W, 3)``. With labels, nothing that the verdict is fitted to or
            calibrated on.

    Raises:
        DataError: too few images.
        FeatureError: the package with EfficientNet's weights is not installed.
    """
    if len(images) < MIN_IMAGES:
        raise DataError(f"an encoder needs at least {MIN_IMAGES} images, got {len(images)}")
    kinds, numbers = np.empty(0), np.empty(0, int)
    if images.labels is not None:
        kinds, numbers = np.unique(images.labels, return_inverse=True)
    classes = len(kinds) if len(kinds) > 1 else 0
    most = SEEN_WITH_CLASSES if classes else SEEN
    rows = np.sort(np.random.default_rng(SEED).permutation(len(images))[:most])
    network = EfficientNetFeatures()
    features = network(np.asarray(images.images[rows])).astype(np.float32)
    spread = features.std(0, dtype=np.float64).astype(np.float32) + np.float32(LEAST_SPREAD)
    classifier = None
    if classes:
        labels = torch.from_numpy(numbers[rows])
        classifier = linear_classifier(torch.from_numpy(features / spread), labels, classes)
    encoder = ImageNetEncoder(load_efficientnet(), torch.from_numpy(spread), classifier)
    return TrainedEncoder(encoder.eval().requires_grad_(False), len(rows), classes)


def linear_classifier(features: Tensor, labels: Tensor, classes: int) -> nn.Linear:
    """A linear classifier of features ``(N, F)``, trained by cross-entropy."""
    draws = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        layer = nn.Linear(features.shape[1], classes)
    middle = features.mean(0)
    optimizer = torch.optim.AdamW(
        layer.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, foreach=True
    )
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / STEPS)
        rows = torch.randint(len(features), (BATCH,), generator=draws)
        loss = F.cross_entropy(layer(features[rows] - middle), labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    with torch.no_grad():  # what was learnt from centred features applies to them as they are
        layer.bias.sub_(layer.weight @ middle)
    return layer
