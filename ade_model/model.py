"""The whole model, with two paths through it.

Likelihood::

    images (N, C, H, W), 0..255
      -> ADEModel.dequantize         quantization.py, dequantizer.py
    x = (images + u) / 256, in [0, 1]
      -> flow                        flow.py, bijections.py
    y (N, C, H, W) and log |det dy/dx|
      -> encoder, decoder.infer      vae.py; flow_only.py without a VAE
    z ~ q(z | y) and p(y | z)
      -> ADEModel.elbo_terms         likelihood.py
    log p(y | z) + log |det dy/dx| - sum of the KL, a bound on log p(x), (N,) nats
      -> bits_per_dim                training/evaluate.py for a data set
    (N,) bits per dimension

Sampling::

    z from the prior -> decoder(z) -> y -> flow.inverse -> x -> quantize -> images

All randomness is outside: the caller passes the noise. So is the rounding of ``x`` to images,
:mod:`ade_model.quantization`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ade_base.errors import ConfigError
from ade_model.config import ModelConfig
from ade_model.dequantizer import Dequantizer
from ade_model.distributions import DiagonalGaussian, sum_channels, sum_dims
from ade_model.errors import ShapeError
from ade_model.flow import build_flow
from ade_model.flow_only import PointMass, StandardNormal
from ade_model.layers import divide_among_pixels
from ade_model.likelihood import ElboTerms
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
    """What the graph ``score`` computes: the terms of the ELBO in detail.

    Attributes:
        terms: the terms of the log-weight.
        cost_nats: each pixel's share of ``-log_weight``, ``(N, 3, H, W)``, nats; the three maps are
            those of distortion, log-determinant and latents. Values of cells of several pixels,
            which latents and squeezed features have, are divided evenly among the pixels.
        y: the flow's output, ``(N, C, H, W)``.
        residual: ``y`` standardised by ``p(y | z)``, ``(N, C, H, W)``; zeros for a flow alone.
        standardized_z: ``z`` standardised by its prior, one tensor per level.
    """

    terms: ElboTerms
    cost_nats: Tensor
    y: Tensor
    residual: Tensor
    standardized_z: list[Tensor]


@dataclass(frozen=True)
class _Inference:
    """What the model infers from images.

    Attributes:
        y: the flow's output, ``(N, C, H, W)``.
        log_det_map: each position's share of ``log |det dy/dx|``, and of the positions within the
            pixels' bins if these are learned, ``(N, H, W)``, nats.
        draws: one per level, coarsest first.
        p_y: ``p(y | z)`` at the draws, on ``(N, C, H, W)``.
    """

    y: Tensor
    log_det_map: Tensor
    draws: list[Draw]
    p_y: DiagonalGaussian | PointMass


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
        >>> from ade_model.likelihood import bits_per_dim
        >>> images = torch.randint(256, (3, 3, 8, 8)).float()
        >>> dequantized = model.dequantize(images, torch.rand(images.shape))
        >>> terms = model.elbo_terms(dequantized, eps)
        >>> bits_per_dim(terms.log_weight, model.config.num_dims).shape
        torch.Size([3])
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
        self.encoder: nn.Module | None
        self.decoder: Decoder | StandardNormal
        if config.widths:
            self.encoder = Encoder(config) if config.encoder else None
            self.decoder = Decoder(config)
        else:
            self.encoder = nn.Identity()
            self.decoder = StandardNormal()

    def _infer(self, given: Dequantized | Tensor, eps: list[Tensor]) -> _Inference:
        """From images to latents, as all methods do that take images."""
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
        return _Inference(y, log_det_map, draws, p_y)

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
        return self._x_from(p_y, y_eps)

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
        return self._x_from(self.decoder(z), y_eps)

    def encode(self, x: Tensor, eps: list[Tensor]) -> Encoding:
        """Encode images to latents.

        Args:
            x: dequantised images.
            eps: noise of the latents.

        Raises:
            ShapeError: images or noise have another shape.
            ConfigError: the model has no inference network.
        """
        draws = self._infer(x, eps).draws
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
        return self._x_from(self._infer(x, eps).p_y, y_eps)

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

    def elbo_terms(self, dequantized: Dequantized | Tensor, eps: list[Tensor]) -> ElboTerms:
        """The terms of one draw's log-weight; ``kl`` is the log-ratio at the draw.

        Args:
            dequantized: the result of :meth:`dequantize`, for which the log-weight is a bound on
                the probability of the images; or ``x``, of which it bounds the density.
            eps: noise of the latents.

        Raises:
            ShapeError: images or noise have another shape.
            ConfigError: the model has no inference network.
        """
        found = self._infer(dequantized, eps)
        return ElboTerms(
            found.p_y.log_prob(found.y),
            sum_dims(found.log_det_map),
            [draw.log_ratio for draw in found.draws],
        )

    def examine(self, dequantized: Dequantized | Tensor, eps: list[Tensor]) -> Examination:
        """The terms of :meth:`elbo_terms`, each pixel's share of them, and the residuals."""
        found = self._infer(dequantized, eps)
        log_prob_terms = found.p_y.log_prob_terms(found.y)
        terms = ElboTerms(
            sum_dims(log_prob_terms),
            sum_dims(found.log_det_map),
            [draw.log_ratio for draw in found.draws],
        )
        latents = torch.zeros_like(found.log_det_map)
        for draw in found.draws:
            cells = sum_channels(draw.log_ratio_terms)
            latents = latents + divide_among_pixels(
                cells, self.config.image_size // cells.shape[-1]
            )
        return Examination(
            terms=terms,
            cost_nats=torch.stack(
                [-sum_channels(log_prob_terms), -found.log_det_map, latents], dim=1
            ),
            y=found.y,
            residual=found.p_y.standardize(found.y),
            standardized_z=[draw.prior.standardize(draw.z) for draw in found.draws],
        )

    def elbo_terms_with_analytic_kl(
        self, dequantized: Dequantized | Tensor, eps: list[Tensor]
    ) -> tuple[ElboTerms, Tensor]:
        """As :meth:`elbo_terms`, with ``kl`` in closed form where possible.

        Its variance is lower, which helps training.

        Returns:
            The terms, and the mean of ``p(y | z)``, ``(N, C, H, W)``.
        """
        found = self._infer(dequantized, eps)
        terms = ElboTerms(
            found.p_y.log_prob(found.y),
            sum_dims(found.log_det_map),
            [draw.kl for draw in found.draws],
            [draw.kl_terms.sum((2, 3)) for draw in found.draws],
        )
        return terms, found.p_y.mean

    def _x_from(self, p_y: DiagonalGaussian | PointMass, y_eps: Tensor | None) -> Tensor:
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
