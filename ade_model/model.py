"""The whole model. Two paths lead through it:

* likelihood: ``x -> flow -> y -> encoder -> z``, then ``y`` is judged by ``decoder(z)``;
* sampling: ``z`` from the prior, ``decoder(z) -> y -> flow.inverse -> x``.

Images and their quantisation stay outside (:mod:`ade_model.quantization`), and so does all
randomness: whoever calls brings the noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ade_model.config import ModelConfig
from ade_model.distributions import DiagonalGaussian, sum_channels, sum_dims
from ade_model.errors import ConfigError, ShapeError
from ade_model.flow import build_flow
from ade_model.flow_only import PointMass, StandardNormal
from ade_model.layers import spread
from ade_model.likelihood import Evidence
from ade_model.vae import Decoder, Draw, Encoder


@dataclass(frozen=True)
class Encoding:
    """Latents of images: the posterior of each level, and the draw ``z`` from it; coarsest first."""

    posteriors: list[DiagonalGaussian]
    z: list[Tensor]


@dataclass(frozen=True)
class Examination:
    """One pass of :meth:`ADEModel.score` in detail.

    Attributes:
        evidence: the terms of the log-weight.
        cost: ``(N, 3, H, W)``, nats: what each pixel adds to ``-log_weight``, by distortion,
            log-determinant and latents. What belongs to a cell of several pixels (latents, squeezed
            features) is divided evenly among them.
        y: the flow's output, ``(N, C, H, W)``.
        residual: ``y`` standardised by ``p(y | z)``, ``(N, C, H, W)``; zeros for a flow by itself.
        surprises: ``z`` standardised by its prior, one tensor a level.
    """

    evidence: Evidence
    cost: Tensor
    y: Tensor
    residual: Tensor
    surprises: list[Tensor]


class ADEModel(nn.Module):
    """``p(x) = p(f(x)) |det df/dx|`` with ``p(y) = int p(y | z) p(z) dz``, a top-down VAE.

    Lucas et al., "Adaptive Density Estimation for Generative Models", 2019, section 4, eq. 3 and 4.

    Shapes: ``x``, ``y`` and ``y_eps`` are ``(N, C, H, W)``; ``z`` and ``eps`` are lists of tensors,
    one a level, of ``(N, *config.latent_shapes[i])``. All noise is standard normal. Passing
    ``y_eps=None`` gives mean samples ``f^-1(mu(z))``, what the discriminator sees; passing noise
    gives density samples ``f^-1(mu(z) + sigma y_eps)``, what the likelihood describes. Of a flow by
    itself the two are the same, and its ``z`` is ``y``.

    Example:
        >>> model = ADEModel(ModelConfig(image_size=8, widths=(8, 8), latent_channels=(2, 2),
        decoder_blocks=(1, 1)))
        >>> eps = [torch.randn(3, *shape) for shape in model.config.latent_shapes]
        >>> model.sample(eps).shape
        torch.Size([3, 3, 8, 8])
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.flow = build_flow(config)
        self.encoder: nn.Module | None = nn.Identity()
        self.decoder: Decoder | StandardNormal = StandardNormal()
        if config.widths:
            self.encoder = Encoder(config) if config.encoder else None
            self.decoder = Decoder(config)

    def sample(
        self, eps: list[Tensor], y_eps: Tensor | None = None, temperature: Tensor | float = 1.0
    ) -> Tensor:
        """New images ``x``; ``temperature`` multiplies the prior's standard deviations."""
        self._check_latents(eps, "eps")
        _, p_y = self.decoder.generate(eps, temperature)
        return self._observe(p_y, y_eps)

    def decode(self, z: list[Tensor], y_eps: Tensor | None = None) -> Tensor:
        """The images ``x`` of given latents."""
        self._check_latents(z, "z")
        return self._observe(self.decoder(z), y_eps)

    def encode(self, x: Tensor, eps: list[Tensor]) -> Encoding:
        """The latents of images."""
        draws, _, _, _ = self._infer(x, eps)
        return Encoding([draw.posterior for draw in draws], [draw.z for draw in draws])

    def reconstruct(self, x: Tensor, eps: list[Tensor], y_eps: Tensor | None = None) -> Tensor:
        """Encode and decode."""
        _, p_y, _, _ = self._infer(x, eps)
        return self._observe(p_y, y_eps)

    def score(self, x: Tensor, eps: list[Tensor]) -> Evidence:
        """The log-weight of one draw of latents, in its parts; ``kl`` is the sampled log-ratio."""
        return self.examine(x, eps).evidence

    def examine(self, x: Tensor, eps: list[Tensor]) -> Examination:
        """What :meth:`score` computes, with where it comes from and what is left unexplained."""
        draws, p_y, y, log_det_map = self._infer(x, eps)
        evidence = Evidence(
            p_y.log_prob(y), sum_dims(log_det_map), [draw.log_ratio for draw in draws]
        )
        latents = torch.zeros_like(log_det_map)
        for draw in draws:
            cells = sum_channels(draw.log_ratio_terms)
            latents = latents + spread(cells, self.config.image_size // cells.shape[-1])
        cost = torch.stack([-sum_channels(p_y.log_prob_terms(y)), -log_det_map, latents], dim=1)
        return Examination(
            evidence,
            cost,
            y,
            p_y.standardize(y),
            [draw.prior.standardize(draw.z) for draw in draws],
        )

    def evidence(self, x: Tensor, eps: list[Tensor]) -> Evidence:
        """As :meth:`score` with ``kl`` in closed form where there is one: lower variance, for
        training.
        """
        return self.evidence_and_features(x, eps)[0]

    def evidence_and_features(self, x: Tensor, eps: list[Tensor]) -> tuple[Evidence, Tensor]:
        """:meth:`evidence`, and the mean of ``p(y | z)`` that it was judged by, ``(N, C, H, W)``."""
        draws, p_y, y, log_det_map = self._infer(x, eps)
        evidence = Evidence(
            p_y.log_prob(y),
            sum_dims(log_det_map),
            [draw.kl for draw in draws],
            [draw.kl_terms.sum((2, 3)) for draw in draws],
        )
        return evidence, p_y.mean

    def _infer(
        self, x: Tensor, eps: list[Tensor]
    ) -> tuple[list[Draw], DiagonalGaussian | PointMass, Tensor, Tensor]:
        if self.encoder is None:
            raise ConfigError("this model has no inference network: it can only sample")
        expected = (self.config.channels, self.config.image_size, self.config.image_size)
        if x.ndim != 4 or tuple(x.shape[1:]) != expected:
            raise ShapeError(
                f"x must be (N, {', '.join(map(str, expected))}), got {tuple(x.shape)}"
            )
        self._check_latents(eps, "eps")
        y, log_det_map = self.flow.with_map(x)
        draws, p_y = self.decoder.infer(self.encoder(y), eps)
        return draws, p_y, y, log_det_map

    def _observe(self, p_y: DiagonalGaussian | PointMass, y_eps: Tensor | None) -> Tensor:
        return self.flow.inverse(p_y.mean if y_eps is None else p_y.sample(y_eps))

    def _check_latents(self, values: list[Tensor], name: str) -> None:
        shapes = [tuple(v.shape[1:]) for v in values]
        if shapes != self.config.latent_shapes:
            raise ShapeError(
                f"{name} must have one tensor a level with (N, ...) of {self.config.latent_shapes}, "
                f"got {shapes}"
            )
