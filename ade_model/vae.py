"""The top-down variational autoencoder on features ``y``.

The encoder works from fine to coarse and returns one feature map per resolution. The decoder works
from coarse to fine. At each level the prior depends on the latents drawn above it; the posterior
depends on those and on the encoder's map (Sonderby et al., "Ladder Variational Autoencoders", 2016;
Kingma et al., "Improved variational inference with inverse autoregressive flow", 2016).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ade_model.config import ModelConfig
from ade_model.distributions import DiagonalGaussian, sum_dims
from ade_model.iaf import InverseAutoregressiveStep
from ade_model.layers import ResidualBlock, conv3x3

MAX_LOG_SCALE = 4.0
MAX_LOG_WIDENING = 1.0  # upper bound on a posterior's log-scale minus its prior's
# Initial sigma of a model whose y is pixels: from 1, training would spend its budget on shrinking
# sigma to the scale of pixels.
PIXEL_LOG_SIGMA = -2.0


def bounded(log_scale: Tensor) -> Tensor:
    """Bound the log-scales of latents smoothly to ±4.

    With unbounded ones, adversarial training diverged.
    """
    return MAX_LOG_SCALE * torch.tanh(log_scale / MAX_LOG_SCALE)


@dataclass(frozen=True)
class Draw:
    """One level's latents, drawn from the posterior.

    Attributes:
        posterior: the Gaussian of the posterior; an autoregressive step may follow it.
        z: the draw, ``(N, c, h, w)``.
        prior: ``p(z_i | z_<i)``.
        log_ratio_terms: terms of ``log q(z | ...) - log p(z | ...)`` at ``z``, the shape of ``z``,
            nats.
        kl_terms: their expectations where these have a closed form, else ``log_ratio_terms``.
    """

    posterior: DiagonalGaussian
    z: Tensor
    prior: DiagonalGaussian
    log_ratio_terms: Tensor
    kl_terms: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """The sum of ``log_ratio_terms``, ``(N,)``, nats."""
        return sum_dims(self.log_ratio_terms)

    @property
    def kl(self) -> Tensor:
        """The sum of ``kl_terms``, ``(N,)``, nats."""
        return sum_dims(self.kl_terms)


class Encoder(nn.Module):
    """From ``y``, ``(N, C, H, W)``, to one feature map per resolution, coarsest first."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch = config.patch
        stages = []
        previous = config.patch**2 * config.channels
        for i, (width, blocks) in enumerate(
            zip(config.widths[::-1], config.decoder_blocks[::-1], strict=True)
        ):
            stages.append(
                nn.Sequential(
                    conv3x3(previous, width, stride=1 if i == 0 else 2),
                    ResidualBlock(width) if blocks else nn.ELU(),
                )
            )
            previous = width
        self.stages = nn.ModuleList(stages)

    def forward(self, y: Tensor) -> list[Tensor]:
        """Maps of ``y``, ``(N, width, h, w)`` each, of the sizes ``config.resolution_sizes``."""
        h = F.pixel_unshuffle(y, self.patch)
        maps = []
        for stage in self.stages:
            h = stage(h)
            maps.append(h)
        return maps[::-1]


class Level(nn.Module):
    """One level of the decoder, with prior and posterior of its latents if it has any.

    A resolution is one level, or ``config.latent_groups`` of them if it has latents. The first
    enlarges the features of the resolution above; the last has the residual blocks.

    Args:
        config: of the model.
        resolution: its index, from 0 for the coarsest one.
        group: index of the level among those of its resolution.
    """

    def __init__(self, config: ModelConfig, resolution: int, group: int = 0) -> None:
        super().__init__()
        width = config.widths[resolution]
        latent_channels = config.latent_channels[resolution] // config.latent_groups
        is_last = not latent_channels or group == config.latent_groups - 1
        blocks = config.decoder_blocks[resolution] if is_last else 0
        self.resolution = resolution
        self.is_bounded = config.posterior_bound
        self.enlarges = group == 0 and resolution > 0
        if self.enlarges:
            self.above = conv3x3(config.widths[resolution - 1], width)
        # The first level starts from a learned map, so that its prior is that of every image.
        self.is_top = group == resolution == 0
        if self.is_top:
            size = config.resolution_sizes[0]
            self.top = nn.Parameter(torch.randn(1, width, size, size) * 0.1)
        self.has_latents = latent_channels > 0
        if self.has_latents:
            self.prior_net = nn.Sequential(nn.ELU(), conv3x3(width, 2 * latent_channels))
            self.from_latents = nn.Conv2d(latent_channels, width, 1)
        infers = config.encoder and self.has_latents
        self.posterior_net = (
            nn.Sequential(nn.ELU(), conv3x3(2 * width, 2 * latent_channels)) if infers else None
        )
        self.iaf = (
            InverseAutoregressiveStep(latent_channels, 2 * width)
            if infers and config.posterior_iaf
            else None
        )
        self.blocks: nn.Module = (
            nn.Sequential(*(ResidualBlock(width) for _ in range(blocks)))
            if blocks
            else (nn.ELU() if is_last else nn.Identity())
        )

    def start(self, features: Tensor | None, num_images: int) -> Tensor:
        """Features of the level above, at this level's resolution.

        Args:
            features: ``(N, width above, h/2, w/2)``, or of the shape that is returned in a later
                group of the same resolution; unused at the first level.
            num_images: N.

        Returns:
            ``(N, width, h, w)``.
        """
        if self.is_top or features is None:
            return self.top.expand(num_images, -1, -1, -1)
        if self.enlarges:
            features = self.above(F.interpolate(features, scale_factor=2.0, mode="nearest"))
        return features

    def prior(self, features: Tensor) -> DiagonalGaussian:
        """``p(z_i | z_<i)``, on ``(N, c, h, w)``, from features, ``(N, width, h, w)``."""
        mean, log_scale = (
            self.prior_net(features).to(self.from_latents.weight.dtype).chunk(2, dim=1)
        )
        return DiagonalGaussian(mean, bounded(log_scale))

    def infer(self, features: Tensor, encoded: Tensor, eps: Tensor) -> Draw:
        """Draw from ``q(z_i | z_<i, y)``.

        The posterior is a Gaussian, given as a correction to the prior's, and an autoregressive
        step if the model has one. A correction of 0 gives the prior unless that is narrow: its
        log-scale is bounded once more.

        Args:
            features: ``(N, width, h, w)``.
            encoded: the encoder's map, of the same shape.
            eps: standard normal noise, ``(N, c, h, w)``, the shape of ``z_i``.
        """
        assert self.posterior_net is not None
        prior = self.prior(features)
        both = torch.cat([features, encoded], dim=1)
        shift, log_scale = self.posterior_net(both).to(prior.mean.dtype).chunk(2, dim=1)
        posterior = self.posterior(prior, shift, log_scale)
        z = posterior.sample(eps)
        log_q = posterior.log_prob_terms(z)
        if self.iaf is None:
            return Draw(
                posterior, z, prior, log_q - prior.log_prob_terms(z), posterior.kl_terms(prior)
            )
        z, log_det = self.iaf(z, both)
        log_ratio = log_q - log_det - prior.log_prob_terms(z)
        return Draw(posterior, z, prior, log_ratio, log_ratio)

    def posterior(
        self, prior: DiagonalGaussian, shift: Tensor, log_scale: Tensor
    ) -> DiagonalGaussian:
        """The posterior's Gaussian, from the corrections to the prior's; all ``(N, c, h, w)``."""
        corrected = bounded(prior.log_scale + log_scale)
        if self.is_bounded:
            corrected = torch.minimum(corrected, prior.log_scale + MAX_LOG_WIDENING)
        return DiagonalGaussian(prior.mean + shift, corrected)

    def finish(self, features: Tensor, z: Tensor | None) -> Tensor:
        """Features that depend on ``z``, for the level below.

        Args:
            features: ``(N, width, h, w)``.
            z: ``(N, c, h, w)``; ``None`` without latents.

        Returns:
            ``(N, width, h, w)``.
        """
        finished: Tensor = self.blocks(features if z is None else features + self.from_latents(z))
        return finished


class Decoder(nn.Module):
    """From latents to ``p(y | z)``, a Gaussian on ``(N, C, H, W)``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch = config.patch
        self.levels = nn.ModuleList(
            Level(config, resolution, group)
            for resolution, channels in enumerate(config.latent_channels)
            for group in range(config.latent_groups if channels else 1)
        )
        self.to_mean = nn.Sequential(
            nn.ELU(), conv3x3(config.widths[-1], config.patch**2 * config.channels)
        )
        shape = (
            (1, 1, 1)
            if config.sigma == "scalar"
            else (config.channels, config.image_size, config.image_size)
        )
        self.log_sigma = nn.Parameter(
            torch.full(shape, 0.0 if config.flow_scales else PIXEL_LOG_SIGMA)
        )

    @property
    def all_levels(self) -> list[Level]:
        """Every level, with latents or without, coarsest first."""
        return cast("list[Level]", list(self.levels))

    def inference_modules(self) -> list[nn.Module]:
        """Modules of ``q(z | y)``, which the generator does not use."""
        return [
            m
            for level in self.all_levels
            for m in (level.posterior_net, level.iaf)
            if m is not None
        ]

    def infer(
        self, encoded: list[Tensor], eps: list[Tensor]
    ) -> tuple[list[Draw], DiagonalGaussian]:
        """Draw latents from the posterior, coarsest first.

        Args:
            encoded: the encoder's maps, coarsest first, one per resolution.
            eps: standard normal noise, one tensor per level with latents, of the shape of ``z``.

        Returns:
            One draw per level, and ``p(y | z)``.
        """
        draws: list[Draw] = []
        features = None
        for level in self.all_levels:
            h = encoded[level.resolution]
            features = level.start(features, h.shape[0])
            if level.has_latents:
                draws.append(level.infer(features, h, eps[len(draws)]))
            features = level.finish(features, draws[-1].z if level.has_latents else None)
        return draws, self._p_y(features)

    def generate(self, eps: list[Tensor]) -> tuple[list[Tensor], DiagonalGaussian]:
        """Draw latents from the prior; returns ``z`` and ``p(y | z)``."""
        z: list[Tensor] = []
        features = None
        for level in self.all_levels:
            features = level.start(features, eps[0].shape[0])
            if level.has_latents:
                z.append(level.prior(features).sample(eps[len(z)]))
            features = level.finish(features, z[-1] if level.has_latents else None)
        return z, self._p_y(features)

    def forward(self, z: list[Tensor]) -> DiagonalGaussian:
        """``p(y | z)`` for given latents, coarsest first."""
        features = None
        remaining = iter(z)
        for level in self.all_levels:
            features = level.start(features, z[0].shape[0])
            features = level.finish(features, next(remaining) if level.has_latents else None)
        return self._p_y(features)

    def _p_y(self, features: Tensor | None) -> DiagonalGaussian:
        mean = F.pixel_shuffle(self.to_mean(features), self.patch).to(self.log_sigma.dtype)
        return DiagonalGaussian(mean, self.log_sigma.expand_as(mean))
