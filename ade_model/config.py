"""The description of a model: everything that is needed to rebuild it, checked once."""

from __future__ import annotations

import dataclasses
from typing import Any

from ade_model.errors import ConfigError

SIGMA_KINDS = ("scalar", "pixel")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One model of the AV-ADE family.

    The latents live at ``len(widths)`` resolutions: the finest at half the image's size, each
    coarser one at half of that. All tuples are ordered coarsest first, as ``z`` is.

    Attributes:
        image_size: height and width of the (square) images, pixels.
        channels: colour channels of the images.
        widths: feature channels of encoder and decoder, one number a resolution.
        latent_channels: channels of ``z``, one number a resolution.
        decoder_blocks: residual blocks of the decoder at each resolution.
        sigma: ``scalar``, one trainable standard deviation of the decoder's Gaussian, or ``pixel``,
            one for each of its dimensions.
        flow_scales: scales of the invertible head ``f``; 0 leaves ``f`` (and its logit) out.
        flow_couplings: coupling layers at each scale.
        flow_blocks: residual blocks in each coupling network.
        flow_width: channels of each coupling network.
        flow_max_log_scale: bound on how far the log-scale of one coupling layer may depend on the image. Eight
            layers at 2.0 learned to stretch noise images by 1e4 and lost their float32 inverse.
    """

    image_size: int = 32
    channels: int = 3
    widths: tuple[int, ...] = (192, 128, 64)
    latent_channels: tuple[int, ...] = (32, 16, 8)
    decoder_blocks: tuple[int, ...] = (1, 1, 2)
    sigma: str = "pixel"
    flow_scales: int = 1
    flow_couplings: int = 8
    flow_blocks: int = 1
    flow_width: int = 32
    flow_max_log_scale: float = 0.7

    def __post_init__(self) -> None:
        for name in ("widths", "latent_channels", "decoder_blocks"):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)
            if not value or any(not isinstance(v, int) or v < 1 for v in value):
                raise ConfigError(f"{name} must be positive integers, got {value}")
            if len(value) != len(self.widths):
                raise ConfigError(f"{name} must have one number a resolution ({len(self.widths)}), got {value}")
        for name, least in (("image_size", 2), ("channels", 1), ("flow_scales", 0), ("flow_couplings", 1),
                            ("flow_blocks", 0), ("flow_width", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
        if self.sigma not in SIGMA_KINDS:
            raise ConfigError(f"sigma must be one of {', '.join(SIGMA_KINDS)}, got {self.sigma!r}")
        if not self.flow_max_log_scale > 0:
            raise ConfigError(f"flow_max_log_scale must be positive, got {self.flow_max_log_scale}")
        if self.image_size % self.size_multiple:
            fitting = [s for s in (32, 48, 64) if s % self.size_multiple == 0]
            raise ConfigError(
                f"image_size must be a multiple of {self.size_multiple} "
                f"({len(self.widths)} latent resolutions, {self.flow_scales} flow scales), "
                f"such as {', '.join(map(str, fitting)) or self.size_multiple}; got {self.image_size}")

    @property
    def size_multiple(self) -> int:
        """Image sizes that fit are the multiples of this number."""
        return int(2 ** max(len(self.widths), self.flow_scales))

    @property
    def num_dims(self) -> int:
        """Values per image, ``D = C * H * W``."""
        return self.channels * self.image_size**2

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """``(channels, height, width)`` of ``z``, level by level, coarsest first."""
        levels = len(self.widths)
        sizes = [self.image_size // 2 ** (levels - i) for i in range(levels)]
        return [(c, s, s) for c, s in zip(self.latent_channels, sizes, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Rebuild from :meth:`to_dict`; unknown or missing names are refused."""
        known = {f.name for f in dataclasses.fields(cls)}
        if set(values) != known:
            wrong = sorted(set(values) ^ known)
            raise ConfigError(f"a model configuration has the fields {sorted(known)}; unknown or missing: {wrong}")
        return cls(**values)
