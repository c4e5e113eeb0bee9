"""The features of a ResNet-20 that was trained on CIFAR-10's labels.

Encoders of the same labels guided the shipped model, for which it is no independent measure.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.data import NOT_ARRAYS
from training.metrics.features import BATCH, FeatureError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Block(nn.Module):
    """Two convolutions with a skip connection, strided and zero-padded where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride, self.padding = stride, (out_channels - in_channels) // 2

    def forward(self, h: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(h)))))
        skip = F.pad(
            h[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding)
        )
        return F.relu(out + skip)


class ResNet20(nn.Module):
    """The CIFAR-10 classifier of He et al., "Deep Residual Learning", 2016, section 4.2.

    Args:
        path: ``.npz`` file of its arrays, named as in a PyTorch state dict.

    Raises:
        FeatureError: the file cannot be read, or holds other arrays.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        for i in (1, 2, 3):
            first = _Block(widths[i - 1], widths[i], 1 if i == 1 else 2)
            self.add_module(
                f"layer{i}",
                nn.Sequential(first, *(_Block(widths[i], widths[i], 1) for _ in range(2))),
            )
        self.linear = nn.Linear(64, 10)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
            missing, unexpected = self.load_state_dict(state, strict=False)
        except NOT_ARRAYS as error:
            raise FeatureError(f"{path} does not hold a ResNet-20: {error}") from error
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]
        if missing or unexpected:
            raise FeatureError(
                f"{path} does not hold a ResNet-20: missing {missing}, unexpected {unexpected}"
            )
        self.eval().requires_grad_(False)

    @property
    def digest(self) -> str:
        """SHA-256 of the weights, in whatever file they are."""
        weights = {n: w for n, w in self.state_dict().items() if "num_batches" not in n}
        parts = [weights[name].cpu().numpy().tobytes() for name in sorted(weights)]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def forward(self, x: Tensor) -> Tensor:
        """From images, ``(N, 3, H, W)`` in [0, 1], to features, ``(N, 64)``."""
        h = (x - x.new_tensor(MEAN)[:, None, None]) / x.new_tensor(STD)[:, None, None]
        h = F.relu(self.bn1(self.conv1(h)))
        for i in (1, 2, 3):
            h = self.get_submodule(f"layer{i}")(h)
        return h.mean((2, 3))

    def logits(self, features: np.ndarray) -> np.ndarray:
        """Class scores ``(N, 10)`` of features ``(N, 64)``."""
        weight, bias = (
            value.detach().double().cpu().numpy()
            for value in (self.linear.weight, self.linear.bias)
        )
        scores: np.ndarray = features @ weight.T + bias
        return scores


@torch.no_grad()
def features_of(network: nn.Module, images: np.ndarray, device: torch.device) -> np.ndarray:
    """Features, float64 ``(N, F)``, of uint8 ``(N, H, W, 3)``."""
    out = []
    for first in range(0, len(images), BATCH):
        batch = torch.from_numpy(np.array(images[first : first + BATCH])).to(device)
        out.append(network(batch.permute(0, 3, 1, 2).float() / 255).double().cpu().numpy())
    return np.concatenate(out)
