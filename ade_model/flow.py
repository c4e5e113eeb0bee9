"""The invertible head ``f``: a multi-scale Real-NVP between images and the decoder's feature space."""

from __future__ import annotations

from torch import Tensor

from ade_model.bijections import (
    AffineCoupling,
    Bijection,
    Chain,
    Logit,
    OnHalfOfTheChannels,
    Rotation,
    Squeeze,
)
from ade_model.config import ModelConfig


class _Unsqueezed(Bijection):
    """Squeeze, apply ``inner``, and bring every value back to its place, so that ``y`` has the image's shape."""

    def __init__(self, inner: Bijection) -> None:
        super().__init__()
        self.squeeze = Squeeze()
        self.inner = inner

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det_jacobian = self.inner(self.squeeze(x)[0])
        return self.squeeze.inverse(y), log_det_jacobian

    def inverse(self, y: Tensor) -> Tensor:
        return self.squeeze.inverse(self.inner.inverse(self.squeeze(y)[0]))


def build_flow(config: ModelConfig) -> Bijection:
    """``f`` for a model: ``y`` is ``(N, C, H, W)`` like ``x``, whatever the number of scales.

    Each scale squeezes, runs its couplings (a channel rotation before each), and hands half of the
    channels on to the next one, as in Dinh et al., "Density estimation using Real NVP", 2017,
    section 3.6. With ``flow_scales = 0`` it is the identity, without the logit.
    """
    if config.flow_scales == 0:
        return Chain()

    def scale(channels: int, remaining: int) -> Bijection:
        channels *= 4
        layers: list[Bijection] = []
        for _ in range(config.flow_couplings):
            layers += [Rotation(channels), AffineCoupling(
                channels, config.flow_width, config.flow_blocks, config.flow_max_log_scale)]
        if remaining > 1:
            layers.append(OnHalfOfTheChannels(scale(channels // 2, remaining - 1)))
        return _Unsqueezed(Chain(*layers))

    return Chain(Logit(), scale(config.channels, config.flow_scales))
