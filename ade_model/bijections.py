"""Invertible layers on ``(N, C, H, W)``, each with its log-determinant.

Every layer keeps the number of values. ``forward`` maps images to features and ``inverse`` maps
features to images. Both are differentiable, since the adversarial loss reaches the decoder through
``inverse``. Every log-determinant is a sum of terms at positions, which :meth:`Bijection.with_map`
returns. Log-determinants have float32 precision or better, whatever autocast does to the networks
inside.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ade_model.distributions import sum_channels, sum_dims
from ade_model.layers import ResidualBlock, conv3x3


class Bijection(nn.Module):
    """A layer with ``y, log_det_jacobian = layer(x)`` and ``x = layer.inverse(y)``.

    A layer implements ``transform`` and ``inverse``; a layer made of others implements
    ``with_map`` and ``inverse``.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``y`` and the log-determinant, ``(N,)``, nats."""
        y, log_det_map = self.with_map(x)
        return y, sum_dims(log_det_map)

    def with_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``y`` and each position's share of the log-determinant, ``(N, H, W)``, nats."""
        y, terms = self.transform(x)
        return y, sum_channels(terms)

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``y`` and the terms of the log-determinant, ``(N, channels, H, W)``, nats."""
        raise NotImplementedError

    def inverse(self, y: Tensor) -> Tensor:
        """The ``x`` that is mapped to ``y``; both have as many values, in the shapes above."""
        raise NotImplementedError


def zero_log_det(x: Tensor) -> Tensor:
    """Log-determinant terms of a layer that preserves volume: zeros."""
    return torch.zeros_like(x[:, :1])


class Chain(Bijection):
    """Layers in sequence, all of the same height and width; an empty chain is the identity."""

    def __init__(self, *layers: Bijection) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def with_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(x[:, 0])
        for layer in self.layers:
            x, log_det_map = layer.with_map(x)  # type: ignore[operator]  # untyped in ModuleList
            total = total + log_det_map
        return x, total

    def inverse(self, y: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            y = layer.inverse(y)  # type: ignore[operator]
        return y


class Logit(Bijection):
    """``logit(a + (1 - 2a) x)``, which maps [0, 1] to a bounded interval.

    No sample is then far outside the range of pixels. Dinh et al., "Density estimation using Real
    NVP", 2017, section 4.1, with its margin ``a = 0.05``.
    """

    MARGIN = 0.05

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = 1 - 2 * self.MARGIN
        p = self.MARGIN + inner * x
        log_p, log_q = p.log(), (1 - p).log()
        return log_p - log_q, torch.log(torch.full_like(p, inner)) - log_p - log_q

    def inverse(self, y: Tensor) -> Tensor:
        return (y.sigmoid() - self.MARGIN) / (1 - 2 * self.MARGIN)


class Squeeze(Bijection):
    """Move each 2x2 patch into channels: ``(N, C, H, W)`` to ``(N, 4C, H/2, W/2)``."""

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.pixel_unshuffle(x, 2), zero_log_det(x)

    def inverse(self, y: Tensor) -> Tensor:
        return F.pixel_shuffle(y, 2)


class Rotation(Bijection):
    """A learned orthogonal mixing of the channels, the same at each position.

    The invertible 1x1 convolution of Kingma and Dhariwal, "Glow", 2018, restricted to products of
    Householder reflections: the inverse is the transpose and the log-determinant is zero, both
    exactly, whatever the weights.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.normals = nn.Parameter(torch.randn(channels, channels))

    def matrix(self) -> Tensor:
        """``(C, C)``, orthogonal."""
        normals = self.normals / self.normals.norm(dim=1, keepdim=True)
        eye = torch.eye(normals.shape[0], dtype=normals.dtype, device=normals.device)
        # The reflections' product at once (Joffrain et al., "Accumulating Householder
        # transformations, revisited", 2006): one by one they took a tenth of a training step.
        upper = torch.triu(normals @ normals.t(), diagonal=1) + eye / 2
        solved = torch.linalg.solve_triangular(upper, normals, upper=True)
        matrix: Tensor = eye - normals.t() @ solved
        return matrix

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, self.matrix()[:, :, None, None]), zero_log_det(x)

    def inverse(self, y: Tensor) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            return F.conv2d(y, self.matrix().t()[:, :, None, None])


class _Coupling(Bijection):
    """The network of a coupling layer, with bounds on its input and output.

    Dinh et al., "Density estimation using Real NVP", 2017, eq. 4 and 5. The log-scale is the sum of
    an unbounded learned constant for each channel and a part that depends on the image, bounded
    smoothly to ``±max_log_scale``. The network's input is bounded smoothly to ``±MAX_INPUT``, which
    training images do not reach. OOD images thus cannot produce extreme scales, and ``inverse``
    stays exact for them.
    """

    MAX_INPUT = 12.0

    def __init__(
        self, inputs: int, changed: int, width: int, blocks: int, max_log_scale: float
    ) -> None:
        super().__init__()
        self.max_log_scale = max_log_scale
        self.log_gain = nn.Parameter(torch.zeros(changed, 1, 1))
        output = conv3x3(width, 2 * changed)
        nn.init.zeros_(output.weight)  # the layer starts as the identity
        self.coupling_net = nn.Sequential(
            conv3x3(inputs, width), *(ResidualBlock(width) for _ in range(blocks)), nn.ELU(), output
        )

    def log_scale_and_shift(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """What the network computes from the values that are kept.

        Args:
            kept: ``(N, inputs, h, w)``.

        Returns:
            Log-scale and shift, ``(N, changed, h, w)`` each.
        """
        bounded = self.MAX_INPUT * torch.tanh(kept / self.MAX_INPUT)
        raw, shift = self.coupling_net(bounded).to(kept.dtype).chunk(2, dim=1)
        return self.log_gain + self.max_log_scale * torch.tanh(raw / self.max_log_scale), shift


class AffineCoupling(_Coupling):
    """Scale and shift half of the channels, as computed from the other half."""

    def __init__(self, channels: int, width: int, blocks: int, max_log_scale: float) -> None:
        super().__init__(channels // 2, channels - channels // 2, width, blocks, max_log_scale)
        self.kept = channels // 2

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept, changed = x[:, : self.kept], x[:, self.kept :]
        log_scale, shift = self.log_scale_and_shift(kept)
        return torch.cat([kept, changed * log_scale.exp() + shift], dim=1), log_scale

    def inverse(self, y: Tensor) -> Tensor:
        kept, changed = y[:, : self.kept], y[:, self.kept :]
        log_scale, shift = self.log_scale_and_shift(kept)
        return torch.cat([kept, (changed - shift) * (-log_scale).exp()], dim=1)


class CheckerboardCoupling(_Coupling):
    """Scale and shift one colour of a checkerboard of pixels, as computed from the other colour.

    Args:
        channels: of the images.
        size: height and width of the images.
        colour: 0 or 1, the colour that is kept.
        width: channels of the coupling network.
        blocks: residual blocks of the coupling network.
        max_log_scale: bound on the part of the log-scale that depends on the image.
    """

    kept: Tensor

    def __init__(
        self, channels: int, size: int, colour: int, width: int, blocks: int, max_log_scale: float
    ) -> None:
        super().__init__(channels, channels, width, blocks, max_log_scale)
        rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        self.register_buffer("kept", ((rows + columns + colour) % 2).float(), persistent=False)

    def _on_the_changed(self, values: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.log_scale_and_shift(values * self.kept)
        changed = 1 - self.kept
        return log_scale * changed, shift * changed

    def transform(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._on_the_changed(x)
        return x * log_scale.exp() + shift, log_scale

    def inverse(self, y: Tensor) -> Tensor:
        log_scale, shift = self._on_the_changed(y)
        return (y - shift) * (-log_scale).exp()


class OnHalfOfTheChannels(Bijection):
    """Apply ``inner`` to the first half of the channels and keep the second half unchanged."""

    def __init__(self, inner: Bijection) -> None:
        super().__init__()
        self.inner = inner

    def with_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        half = x.shape[1] // 2
        changed, log_det_map = self.inner.with_map(x[:, :half])
        return torch.cat([changed, x[:, half:]], dim=1), log_det_map

    def inverse(self, y: Tensor) -> Tensor:
        half = y.shape[1] // 2
        return torch.cat([self.inner.inverse(y[:, :half]), y[:, half:]], dim=1)
