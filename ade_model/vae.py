"""The top-down variational autoencoder on features ``y``.

The encoder climbs from fine to coarse and leaves one map of features a resolution. The decoder comes
down from coarse to fine: at each level the prior depends on the latents drawn above it, and the
posterior on those and on the encoder's map (Sonderby et al., "Ladder Variational Autoencoders", 2016;
Kingma et al., "Improved variational inference with inverse autoregressive flow", 2016).
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ade_model.config import ModelConfig
from ade_model.distributions import DiagonalGaussian
from ade_model.layers import ResidualBlock, conv3x3

MAX_LOG_SCALE = 4.0


def bounded(log_scale: Tensor) -> Tensor:
    """Log-scales of latents stay within ±4, smoothly: unbounded ones made adversarial training diverge."""
    return MAX_LOG_SCALE * torch.tanh(log_scale / MAX_LOG_SCALE)


class Encoder(nn.Module):
    """``y (N, C, H, W)`` to a list of feature maps, coarsest first."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        fine_to_coarse = list(reversed(config.widths))
        stages = []
        previous = 4 * config.channels
        for i, width in enumerate(fine_to_coarse):
            stages.append(nn.Sequential(
                conv3x3(previous, width, stride=1 if i == 0 else 2), ResidualBlock(width)))
            previous = width
        self.stages = nn.ModuleList(stages)

    def forward(self, y: Tensor) -> list[Tensor]:
        h = F.pixel_unshuffle(y, 2)
        maps = []
        for stage in self.stages:
            h = stage(h)
            maps.append(h)
        return maps[::-1]


class Level(nn.Module):
    """One resolution of the decoder: prior and posterior of its latents, then its features."""

    def __init__(self, width: int, latent_channels: int, blocks: int, size: int, above: int | None) -> None:
        super().__init__()
        self.above = None if above is None else conv3x3(above, width)
        if above is None:  # the coarsest level starts from a learned map; its prior is the same for all images
            self.top = nn.Parameter(torch.randn(1, width, size, size) * 0.1)
        self.prior_net = nn.Sequential(nn.ELU(), conv3x3(width, 2 * latent_channels))
        self.posterior_net = nn.Sequential(nn.ELU(), conv3x3(2 * width, 2 * latent_channels))
        self.from_latents = nn.Conv2d(latent_channels, width, 1)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))

    def start(self, features: Tensor | None, num_images: int) -> Tensor:
        """Features from the level above, brought to this resolution."""
        if self.above is None or features is None:
            return self.top.expand(num_images, -1, -1, -1)
        fine: Tensor = self.above(F.interpolate(features, scale_factor=2.0, mode="nearest"))
        return fine

    def prior(self, features: Tensor) -> DiagonalGaussian:
        """``p(z_i | z_<i)``."""
        mean, log_scale = self.prior_net(features).to(self.from_latents.weight.dtype).chunk(2, dim=1)
        return DiagonalGaussian(mean, bounded(log_scale))

    def posterior(self, features: Tensor, encoded: Tensor, prior: DiagonalGaussian) -> DiagonalGaussian:
        """``q(z_i | z_<i, y)``, as a correction to the prior: it starts where the prior is."""
        both = torch.cat([features, encoded], dim=1)
        shift, log_scale = self.posterior_net(both).to(prior.mean.dtype).chunk(2, dim=1)
        return DiagonalGaussian(prior.mean + shift, bounded(prior.log_scale + log_scale))

    def finish(self, features: Tensor, z: Tensor) -> Tensor:
        """Features that know of ``z``."""
        known: Tensor = self.blocks(features + self.from_latents(z))
        return known


class Decoder(nn.Module):
    """Latents to ``p(y | z)``, a Gaussian on ``(N, C, H, W)``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.latent_shapes = config.latent_shapes
        above: list[int | None] = [None, *config.widths[:-1]]
        self.levels = nn.ModuleList(
            Level(width, shape[0], blocks, shape[1], up) for width, shape, blocks, up in zip(
                config.widths, config.latent_shapes, config.decoder_blocks, above, strict=True))
        self.to_mean = nn.Sequential(nn.ELU(), conv3x3(config.widths[-1], 4 * config.channels))
        shape = (1, 1, 1) if config.sigma == "scalar" else (config.channels, config.image_size, config.image_size)
        self.log_sigma = nn.Parameter(torch.zeros(shape))

    @property
    def _levels(self) -> list[Level]:
        return cast("list[Level]", list(self.levels))

    def infer(self, encoded: list[Tensor], eps: list[Tensor]) -> tuple[
            list[DiagonalGaussian], list[DiagonalGaussian], list[Tensor], DiagonalGaussian]:
        """Draw latents from the posterior, top down.

        Args:
            encoded: the encoder's maps, coarsest first.
            eps: standard normal noise, one tensor a level, of the shape of ``z``.

        Returns:
            posteriors, priors, ``z`` (each one a level) and ``p(y | z)``.
        """
        posteriors, priors, z = [], [], []
        features = None
        for level, h, noise in zip(self._levels, encoded, eps, strict=True):
            features = level.start(features, noise.shape[0])
            priors.append(level.prior(features))
            posteriors.append(level.posterior(features, h, priors[-1]))
            z.append(posteriors[-1].sample(noise))
            features = level.finish(features, z[-1])
        return posteriors, priors, z, self._observe(features)

    def generate(self, eps: list[Tensor], temperature: Tensor | float = 1.0) -> tuple[list[Tensor], DiagonalGaussian]:
        """Draw latents from the prior: ``z`` and ``p(y | z)``."""
        z = []
        features = None
        for level, noise in zip(self._levels, eps, strict=True):
            features = level.start(features, noise.shape[0])
            z.append(level.prior(features).sample(noise, temperature))
            features = level.finish(features, z[-1])
        return z, self._observe(features)

    def forward(self, z: list[Tensor]) -> DiagonalGaussian:
        """``p(y | z)`` for given latents, coarsest first."""
        features = None
        for level, latents in zip(self._levels, z, strict=True):
            features = level.finish(level.start(features, latents.shape[0]), latents)
        return self._observe(features)

    def _observe(self, features: Tensor | None) -> DiagonalGaussian:
        mean = F.pixel_shuffle(self.to_mean(features), 2).to(self.log_sigma.dtype)
        return DiagonalGaussian(mean, self.log_sigma.expand_as(mean))
