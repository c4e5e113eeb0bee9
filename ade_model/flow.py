"""The invertible head ``f``: a multi-scale Real-NVP from images to the decoder's features."""

from __future__ import annotations

from torch import Tensor

from ade_model.bijections import (
    AffineCoupling,
    Bijection,
    Chain,
    CheckerboardCoupling,
    Logit,
    OnHalfOfTheChannels,
    Rotation,
    Squeeze,
)
from ade_model.config import ModelConfig
from ade_model.layers import divide_among_pixels


class Unsqueezed(Bijection):
    """Squeeze, apply ``inner`` and unsqueeze, so that ``y`` has the image's shape."""

    def __init__(self, inner: Bijection) -> None:
        super().__init__()
        self.squeeze = Squeeze()
        self.inner = inner

    def with_map(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_det_map = self.inner.with_map(self.squeeze.transform(x)[0])
        return self.squeeze.inverse(y), divide_among_pixels(log_det_map, 2)

    def inverse(self, y: Tensor) -> Tensor:
        return self.squeeze.inverse(self.inner.inverse(self.squeeze.transform(y)[0]))


def build_flow(config: ModelConfig) -> Bijection:
    """Build ``f``, whose ``y`` has the shape of ``x`` for any number of scales.

    After Dinh et al., "Density estimation using Real NVP", 2017, section 3.6: a scale applies its
    couplings and passes half of the channels to the next one. With ``flow_scales = 0`` the result
    is the identity, without the logit.
    """
    if config.flow_scales == 0:
        return Chain()
    build = _channel_scale if config.flow_mask == "channel" else _checkerboard_scale
    return Chain(Logit(), build(config, config.channels, config.image_size, config.flow_scales))


def _channel_couplings(
    config: ModelConfig, channels: int, count: int, width: int
) -> list[Bijection]:
    """Channel couplings, with a rotation before each."""
    layers: list[Bijection] = []
    for _ in range(count):
        layers += [
            Rotation(channels),
            AffineCoupling(channels, width, config.flow_blocks, config.flow_max_log_scale),
        ]
    return layers


def _channel_scale(config: ModelConfig, channels: int, size: int, remaining: int) -> Bijection:
    """A scale whose couplings all work at half the resolution, which is four times as fast."""
    layers = _channel_couplings(config, 4 * channels, config.flow_couplings, config.flow_width)
    if remaining > 1:
        layers.append(
            OnHalfOfTheChannels(_channel_scale(config, 2 * channels, size // 2, remaining - 1))
        )
    return Unsqueezed(Chain(*layers))


def _checkerboard_scale(config: ModelConfig, channels: int, size: int, remaining: int) -> Bijection:
    """A scale in the order of Dinh et al., "Density Estimation Using Real NVP", 2017, section 3.6.

    The last scale has checkerboard couplings only. Each scale before it has one coupling fewer, at
    least one, then a squeeze and the same number of channel couplings, whose networks are twice as
    wide. docs/training.md lists how it differs from the published one.
    """
    count = config.flow_couplings if remaining == 1 else max(1, config.flow_couplings - 1)
    layers: list[Bijection] = [
        CheckerboardCoupling(
            channels, size, i % 2, config.flow_width, config.flow_blocks, config.flow_max_log_scale
        )
        for i in range(count)
    ]
    if remaining > 1:
        layers.append(
            Unsqueezed(
                Chain(
                    *_channel_couplings(config, 4 * channels, count, 2 * config.flow_width),
                    OnHalfOfTheChannels(
                        _checkerboard_scale(config, 2 * channels, size // 2, remaining - 1)
                    ),
                )
            )
        )
    return Chain(*layers)
