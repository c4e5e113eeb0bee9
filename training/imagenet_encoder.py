"""An encoder that nobody trains: the features of an ImageNet classifier, of enlarged images.

For images without classes it tells unknown things apart better than a small network that learnt
from the same images, and it needs few of them; each score pays for it (docs/ood.md).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.data import Rows
from training.metrics.efficientnet import EfficientNetFeatures, EfficientNetLite0, load_efficientnet

SIZE = 160  # pixels per side to which images are resized
SEEN = 2000  # images, of which the features' spread is taken
LEAST_SPREAD = 0.05  # added to it: some features are nearly always zero


class ImageNetEncoder(nn.Module):
    """Pixels to the pooled features of EfficientNet-Lite0, divided by their spread.

    Otherwise the few features that vary most would decide which images are near each other.

    Args:
        network: the classifier up to its features.
        spread: of the features of the images at hand, ``(1280,)``.
    """

    spread: Tensor

    def __init__(self, network: EfficientNetLite0, spread: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("spread", spread)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Features, ``(N, 1280)``, of uint8 or float ``(N, H, W, 3)``, values of 0..255."""
        x = images.permute(0, 3, 1, 2).float() / 255
        x = F.interpolate(x, (SIZE, SIZE), mode="bilinear", align_corners=False, antialias=True)
        return (self.network(x) / self.spread,)


def imagenet_encoder(images: np.ndarray | Rows, seed: int) -> tuple[ImageNetEncoder, int]:
    """An encoder in evaluation mode, and the number of images whose features give the spread.

    Args:
        images: uint8 ``(N, H, W, 3)``.
        seed: of the choice among more than :data:`SEEN` of them.

    Raises:
        FeatureError: the package with the network's weights is not installed.
    """
    rows = np.sort(np.random.default_rng(seed).permutation(len(images))[:SEEN])
    spread = EfficientNetFeatures(SIZE)(np.asarray(images[rows])).std(0) + LEAST_SPREAD
    encoder = ImageNetEncoder(load_efficientnet(), torch.from_numpy(spread).float())
    return encoder.eval().requires_grad_(False), len(rows)
