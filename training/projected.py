"""The projected discriminator: small networks on the frozen features of an ImageNet classifier.

Sauer et al., "Projected GANs Converge Faster", 2021. Distances in the same classifier's features
are not an independent measure of a model that was trained against it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from ade_base.errors import ConfigError
from training.metrics.efficientnet import LEVEL_CHANNELS, load_efficientnet

LEAST_SIDE = 64  # of the classifier's input, so that its coarsest features still have positions
FINEST_STRIDE = 4
POSITIONS = 4  # per side, of each level's logits
HEAD_WIDTH = 128
COMPARISONS, COMPARED_DIMS = 64, 8  # of images with the others of their batch
_MIXING_SEED = 0  # the same for all runs, since checkpoints do not contain the mixing


class ProjectedDiscriminator(nn.Module):
    """From ``x``, ``(N, 3, H, W)`` in [0, 1], to logits, ``(N, 80)``, positive for real images.

    Each of the four levels has 16 logits, and so has the comparison of an image with the others of
    its batch, which must therefore be all real or all generated. Only the heads are trained, and
    only they are in the state dict.

    Args:
        widths: channels to which each level's features are mixed, finest first.
        image_size: height and width of the images, pixels.
        channels: of the images; must be 3.

    Raises:
        FeatureError: the package with the classifier's weights is not installed.
        ConfigError: the images do not have 3 channels.
    """

    def __init__(self, widths: tuple[int, ...], image_size: int, channels: int) -> None:
        super().__init__()
        if channels != 3:
            raise ConfigError(
                f"a projected discriminator needs images of 3 channels, got {channels}"
            )
        self.side = max(LEAST_SIDE, 2 ** math.ceil(math.log2(image_size)))
        generator = torch.Generator().manual_seed(_MIXING_SEED)
        self.features = load_efficientnet(torch.get_default_device())
        self.mix_channels = nn.ModuleList(
            _random_conv(known, width, 1, generator)
            for known, width in zip(LEVEL_CHANNELS, widths, strict=True)
        )
        self.mix_scales = nn.ModuleList(
            _random_conv(coarse, fine, 3, generator)
            for fine, coarse in zip(widths, widths[1:], strict=False)
        )
        for module in (self.features, self.mix_channels, self.mix_scales):
            _freeze(module)
        self.heads = nn.ModuleList(
            _head(width, self.side // (FINEST_STRIDE * 2**level))
            for level, width in enumerate(widths)
        )
        self.compare = _BatchComparison(widths[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.judge(self.features_of(x))

    def features_of(self, x: Tensor) -> list[Tensor]:
        """The frozen part: ``(N, width, h, w)`` for each level, finest first."""
        x = F.interpolate(x, (self.side, self.side), mode="bilinear", align_corners=False)
        levels = [
            mix(level)
            for mix, level in zip(self.mix_channels, self.features.levels(x), strict=True)
        ]
        for fine in reversed(range(len(levels) - 1)):  # add to each level the coarser ones
            coarse = self.mix_scales[fine](
                F.interpolate(levels[fine + 1], scale_factor=2.0, mode="nearest")
            )
            levels[fine] = (levels[fine] + coarse) * 0.5**0.5
        return levels

    def judge(self, levels: list[Tensor]) -> Tensor:
        """The trained part: logits of :meth:`features_of`."""
        # A level of fewer positions repeats its logits, so that all levels have the same weight.
        logits = [
            F.interpolate(head(level), POSITIONS, mode="nearest").flatten(1)
            for head, level in zip(self.heads, levels, strict=True)
        ]
        compared = self.compare(levels[-1]).expand(-1, POSITIONS**2)
        return torch.cat([*logits, compared], 1).to(torch.float32)


class _BatchComparison(nn.Module):
    """From the coarsest features, ``(N, C, h, w)``, to logits, ``(N, 1)``, that notice repetition.

    Salimans et al., "Improved Techniques for Training GANs", 2016, section 3.2 ("minibatch
    discrimination"): each image is told how near the others of its batch are. The other heads see
    one image at a time, so a generator of a few convincing images satisfies them.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embed = nn.Linear(width, COMPARISONS * COMPARED_DIMS)
        self.log_scale = nn.Parameter(torch.zeros(COMPARISONS))
        self.head = spectral_norm(nn.Linear(COMPARISONS, 1))

    def forward(self, features: Tensor) -> Tensor:
        # In bfloat16, the sums of differences would have eight bits.
        embedded = self.embed(features.mean((2, 3))).float()
        embedded = embedded.unflatten(1, (COMPARISONS, COMPARED_DIMS))
        distances = (embedded[:, None] - embedded).abs().sum(3)
        others = torch.exp(-distances * self.log_scale.exp()).sum(1) - 1
        logits: Tensor = self.head(others)
        return logits


def _head(width: int, size: int) -> nn.Module:
    """Build the network from a level's features to logits, ``(N, 1, h, w)``, of at most 4x4."""
    halvings = max(0, int(math.log2(size / POSITIONS)))
    kernel, stride = (4, 2) if halvings else (3, 1)
    layers: list[nn.Module] = []
    for out in (*[width] * (halvings - 1), HEAD_WIDTH):
        conv = nn.Conv2d(width, out, kernel, stride, padding=1)
        layers += [spectral_norm(conv), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, spectral_norm(nn.Conv2d(HEAD_WIDTH, 1, 3, padding=1)))


def _random_conv(ins: int, outs: int, kernel: int, generator: torch.Generator) -> nn.Conv2d:
    """A random convolution that keeps the variance of its input."""
    conv = nn.Conv2d(ins, outs, kernel, padding=kernel // 2, bias=False)
    weight = torch.randn(conv.weight.shape, generator=generator, device="cpu") / math.sqrt(
        ins * kernel**2
    )
    conv.weight = nn.Parameter(weight)
    return conv


def _freeze(network: nn.Module) -> None:
    """Turn all weights into constants, which optimisers, counts and checkpoints ignore."""
    for module in network.modules():
        for name, parameter in list(module._parameters.items()):
            del module._parameters[name]
            module.register_buffer(
                name, None if parameter is None else parameter.detach(), persistent=False
            )
