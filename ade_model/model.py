"""The whole model, with two paths through it.

* Likelihood: ``x -> flow -> y -> encoder -> z``, then the density of ``y`` under ``decoder(z)``.
* Sampling: ``z`` from the prior, then ``decoder(z) -> y -> flow.inverse -> x``.

All randomness is outside: the caller passes the noise. So is the rounding of ``x`` to images,
:mod:`ade_model.quantization`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ade_model.config import ModelConfig
from ade_model.dequantizer import Dequantizer
from ade_model.distributions import DiagonalGaussian, sum_channels, sum_dims
from ade_model.errors import ConfigError, ShapeError
from ade_model.flow import build_flow
from ade_model.flow_only import PointMass, StandardNormal
from ade_model.layers import divide_among_pixels
from ade_model.likelihood import Evidence
from ade_model.quantization import dequantize
from ade_model.vae import Decoder, Draw, Encoder


@dataclass(frozen=True)
class Encoding:
    """Latents of images: each level's posterior and the draw ``z`` from it, coarsest first."""

    posteriors: list[DiagonalGaussian]
    z: list[Tensor]


@dataclass(frozen=True)
class Dequantized:
    """Images as real numbers, of which the likelihood is computed.

    Attributes:
        x: ``(N, C, H, W)``, in [0, 1].
        log_det_map: each position's share of minus the log density of ``256 x`` within the bins of
            the pixels, ``(N, H, W)``, nats; ``None`` if it is uniform, and so zero.
    """

    x: Tensor
    log_det_map: Tensor | None = None


@dataclass(frozen=True)
class Examination:
    """What the graph ``score`` computes: the evidence in detail.

    Attributes:
        evidence: the terms of the log-weight.
        cost_nats: each pixel's share of ``-log_weight``, ``(N, 3, H, W)``, nats; the three maps are
            those of distortion, log-determinant and latents. Values of cells of several pixels,
            which latents and squeezed features have, are divided evenly among the pixels.
        y: the flow's output, ``(N, C, H, W)``.
        residual: ``y`` standardised by ``p(y | z)``, ``(N, C, H, W)``; zeros for a flow alone.
        standardized_z: ``z`` standardised by its prior, one tensor per level.
    """

    evidence: Evidence
    cost_nats: Tensor
    y: Tensor
    residual: Tensor
    standardized_z: list[Tensor]


class ADEModel(nn.Module):
    """``p(x) = p(f(x)) |det df/dx|`` with ``p(y) = int p(y | z) p(z) dz``, a top-down VAE.

    Lucas et al., "Adaptive Density Estimation for Generative Models", 2019, section 4, eq. 3 and 4.

    Shapes: ``x``, ``y`` and ``y_eps`` are ``(N, C, H, W)``; ``z`` and ``eps`` are lists of tensors,
    one per level, of ``(N, *config.latent_shapes[i])``. All noise is standard normal. With
    ``y_eps=None`` the methods return mean samples ``f^-1(mu(z))``, which the discriminator sees.
    With noise they return density samples ``f^-1(mu(z) + sigma y_eps)``, which the likelihood
    describes. For a flow alone, both are the same and ``z`` is ``y``.

    Example:
        >>> two_levels = {"widths": (8, 8), "latent_channels": (2, 2), "decoder_blocks": (1, 1)}
        >>> model = ADEModel(ModelConfig(image_size=8, **two_levels))
        >>> eps = [torch.randn(3, *shape) for shape in model.config.latent_shapes]
        >>> model.sample(eps).shape
        torch.Size([3, 3, 8, 8])
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.flow = build_flow(config)
        self.dequantizer = (
            Dequantizer(config.channels, config.dequantizer_width)
            if config.dequantizer_width
            else None
        )
        self.encoder: nn.Module | None = nn.Identity()
        self.decoder: Decoder | StandardNormal = StandardNormal()
        if config.widths:
            self.encoder = Encoder(config) if config.encoder else None
            self.decoder = Decoder(config)

    def sample(self, eps: list[Tensor], y_eps: Tensor | None = None) -> Tensor:
        """Draw new images.

        Args:
            eps: noise of the latents.
            y_eps: noise of the decoder; ``None`` for mean samples.

        Returns:
            ``x``, ``(N, C, H, W)``.

        Raises:
            ShapeError: noise has another shape.
        """
        self._check_latents("eps", eps, like=eps)
        _, p_y = self.decoder.generate(eps)
        return self._observe(p_y, y_eps)

    def decode(self, z: list[Tensor], y_eps: Tensor | None = None) -> Tensor:
        """Decode latents to images.

        Args:
            z: the latents.
            y_eps: noise of the decoder; ``None`` for mean samples.

        Returns:
            ``x``, ``(N, C, H, W)``.

        Raises:
            ShapeError: latents or noise have another shape.
        """
        self._check_latents("z", z, like=z)
        return self._observe(self.decoder(z), y_eps)

    def encode(self, x: Tensor, eps: list[Tensor]) -> Encoding:
        """Encode images to latents.

        Args:
            x: dequantised images.
            eps: noise of the latents.

        Raises:
            ShapeError: images or noise have another shape.
            ConfigError: the model has no inference network.
        """
        draws, _, _, _ = self._infer(x, eps)
        return Encoding([draw.posterior for draw in draws], [draw.z for draw in draws])

    def reconstruct(self, x: Tensor, eps: list[Tensor], y_eps: Tensor | None = None) -> Tensor:
        """Encode images and decode their latents.

        Args:
            x: dequantised images.
            eps: noise of the latents.
            y_eps: noise of the decoder; ``None`` for mean reconstructions.

        Returns:
            ``x`` of the reconstructions, ``(N, C, H, W)``.

        Raises:
            ShapeError: images or noise have another shape.
            ConfigError: the model has no inference network.
        """
        _, p_y, _, _ = self._infer(x, eps)
        return self._observe(p_y, y_eps)

    def dequantize(self, images: Tensor, u: Tensor) -> Dequantized:
        """Spread each stored pixel over its bin, as the likelihood needs it.

        Args:
            images: ``(N, C, H, W)``, integers from 0 to 255 in the model's dtype.
            u: the same shape, uniform in [0, 1).

        Raises:
            ShapeError: images or noise have another shape.
        """
        self._check_images("images", images)
        _check_shapes("u", [u], [tuple(images.shape)])
        if self.dequantizer is None:
            return Dequantized(dequantize(images, u))
        position, log_det_map = self.dequantizer(images, u)
        return Dequantized(dequantize(images, position), log_det_map)

    def evidence(self, dequantized: Dequantized | Tensor, eps: list[Tensor]) -> Evidence:
        """The terms of one draw's log-weight; ``kl`` is the log-ratio at the draw.

        Args:
            dequantized: the result of :meth:`dequantize`, for which the log-weight is a bound on
                the probability of the images; or ``x``, of which it bounds the density.
            eps: noise of the latents.

        Raises:
            ShapeError: images or noise have another shape.
            ConfigError: the model has no inference network.
        """
        draws, p_y, y, log_det_map = self._infer(dequantized, eps)
        return Evidence(p_y.log_prob(y), sum_dims(log_det_map), [draw.log_ratio for draw in draws])

    def examine(self, dequantized: Dequantized | Tensor, eps: list[Tensor]) -> Examination:
        """The terms of :meth:`evidence`, each pixel's share of them, and the residuals."""
        draws, p_y, y, log_det_map = self._infer(dequantized, eps)
        log_prob_terms = p_y.log_prob_terms(y)
        evidence = Evidence(
            sum_dims(log_prob_terms), sum_dims(log_det_map), [draw.log_ratio for draw in draws]
        )
        latents = torch.zeros_like(log_det_map)
        for draw in draws:
            cells = sum_channels(draw.log_ratio_terms)
            latents = latents + divide_among_pixels(
                cells, self.config.image_size // cells.shape[-1]
            )
        return Examination(
            evidence,
            torch.stack([-sum_channels(log_prob_terms), -log_det_map, latents], dim=1),
            y,
            p_y.standardize(y),
            [draw.prior.standardize(draw.z) for draw in draws],
        )

    def expected_evidence(
        self, dequantized: Dequantized | Tensor, eps: list[Tensor]
    ) -> tuple[Evidence, Tensor]:
        """As :meth:`evidence`, with ``kl`` in closed form where possible.

        Its variance is lower, which helps training.

        Returns:
            The terms, and the mean of ``p(y | z)``, ``(N, C, H, W)``.
        """
        draws, p_y, y, log_det_map = self._infer(dequantized, eps)
        evidence = Evidence(
            p_y.log_prob(y),
            sum_dims(log_det_map),
            [draw.kl for draw in draws],
            [draw.kl_terms.sum((2, 3)) for draw in draws],
        )
        return evidence, p_y.mean

    def _infer(
        self, given: Dequantized | Tensor, eps: list[Tensor]
    ) -> tuple[list[Draw], DiagonalGaussian | PointMass, Tensor, Tensor]:
        """The draws of the latents, ``p(y | z)``, ``y`` and the map of the log-determinant."""
        if self.encoder is None:
            raise ConfigError("the model has no inference network, so it can only sample")
        x, of_positions = (
            (given, None) if isinstance(given, Tensor) else (given.x, given.log_det_map)
        )
        self._check_images("x", x)
        self._check_latents("eps", eps, like=[x])
        y, log_det_map = self.flow.with_map(x)
        draws, p_y = self.decoder.infer(self.encoder(y), eps)
        if of_positions is not None:
            log_det_map = log_det_map + of_positions
        return draws, p_y, y, log_det_map

    def _observe(self, p_y: DiagonalGaussian | PointMass, y_eps: Tensor | None) -> Tensor:
        if y_eps is None:
            return self.flow.inverse(p_y.mean)
        _check_shapes("y_eps", [y_eps], [tuple(p_y.mean.shape)])
        return self.flow.inverse(p_y.sample(y_eps))

    def _check_images(self, name: str, images: Tensor) -> None:
        config = self.config
        shape = (*images.shape[:1], config.channels, config.image_size, config.image_size)
        _check_shapes(name, [images], [shape])

    def _check_latents(self, name: str, values: list[Tensor], like: list[Tensor]) -> None:
        """Check that there is one tensor per level, for as many images as ``like[0]`` has."""
        batch = tuple(like[0].shape[:1]) if like else ()
        _check_shapes(name, values, [(*batch, *shape) for shape in self.config.latent_shapes])


def _check_shapes(name: str, values: list[Tensor], expected: list[tuple[int, ...]]) -> None:
    found = [tuple(value.shape) for value in values]
    if found != expected:
        shapes, got = (", ".join(map(str, of)) or "none" for of in (expected, found))
        raise ShapeError(f"{name} must have the shape {shapes}, got {got}")
