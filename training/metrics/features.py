"""What all feature spaces share, and the one that knows no image: fixed random convolutions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ade_base.errors import UserError

BATCH = 250
_LAYERS, _WIDTH, _POSITIONS, _SLOPE = ((3, 1), (128, 2), (128, 2)), 128, 2, 0.2
_SEED = 0


class FeatureError(UserError, ValueError):
    """The weights of a network are missing or wrong."""


def to_unit(images: np.ndarray) -> Tensor:
    """From uint8 ``(N, H, W, C)`` to float ``(N, C, H, W)`` in [0, 1]."""
    return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 255


class RandomConvolutions:
    """Three random convolutions of 3 by 3 pixels and 128 channels, averaged over 2 by 2 positions.

    They were trained on nothing, so nothing that a model was trained with can favour it here.

    Args:
        device: where to compute.
    """

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(_SEED)
        self._device = device
        self._layers = [
            (
                (torch.randn(_WIDTH, ins, 3, 3, generator=generator) * (2 / (9 * ins)) ** 0.5),
                stride,
            )
            for ins, stride in _LAYERS
        ]

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features, float64 ``(N, 512)``, of uint8 ``(N, H, W, 3)``."""
        out = []
        for first in range(0, len(images), BATCH):
            h = to_unit(images[first : first + BATCH]).to(self._device) * 2 - 1
            for weight, stride in self._layers:
                h = F.leaky_relu(F.conv2d(h, weight.to(h), stride=stride, padding=1), _SLOPE)
            out.append(F.adaptive_avg_pool2d(h, _POSITIONS).flatten(1).double().cpu().numpy())
        return np.concatenate(out)
