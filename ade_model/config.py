"""The description of a model: everything that is needed to rebuild it, checked once."""

from __future__ import annotations

import dataclasses
from typing import Any

from ade_model.errors import ConfigError

SIGMA_KINDS = ("scalar", "pixel")
MASKS = ("channel", "checkerboard")
OPERATIONS = ("sample", "encode", "reconstruct", "score")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One model of the AV-ADE family.

    ``len(widths)`` resolutions, the finest of them ``patch`` pixels to a position, each coarser one
    half of that. All tuples are ordered coarsest first, as ``z`` is. Without any (``widths = ()``)
    the model is the flow by itself: its latents are ``y``, standard normal.

    Attributes:
        image_size: height and width of the (square) images, pixels.
        channels: colour channels of the images.
        widths: feature channels of encoder and decoder, one number a resolution.
        latent_channels: channels of ``z``, one number a resolution; 0 leaves a resolution without
            latents.
        decoder_blocks: residual blocks of the decoder at each resolution; 0 makes it a plain
            convolution, and the encoder's too.
        patch: pixels a side that a position of the finest resolution stands for, 1 or 2.
        encoder: whether there is an inference network; a GAN without one can only sample.
        posterior_iaf: whether an inverse autoregressive step follows the posterior's Gaussian at
            each level.
        sigma: ``scalar``, one trainable standard deviation of the decoder's Gaussian, or ``pixel``,
            one for each of its dimensions.
        flow_scales: scales of the invertible head ``f``; 0 leaves ``f`` (and its logit) out.
        flow_mask: what a coupling layer keeps: ``channel``, half of the channels of 2x2 patches, or
            ``checkerboard``, every other pixel.
        flow_couplings: coupling layers at each scale.
        flow_blocks: residual blocks in each coupling network.
        flow_width: channels of each coupling network.
        flow_max_log_scale: bound on how far the log-scale of one coupling layer may depend on the
            image. Eight layers at 2.0 learned to stretch noise images by 1e4 and lost their float32
            inverse.
    """

    image_size: int = 32
    channels: int = 3
    widths: tuple[int, ...] = (192, 128, 64)
    latent_channels: tuple[int, ...] = (32, 16, 8)
    decoder_blocks: tuple[int, ...] = (1, 1, 2)
    patch: int = 2
    encoder: bool = True
    posterior_iaf: bool = False
    sigma: str = "pixel"
    flow_scales: int = 1
    flow_mask: str = "channel"
    flow_couplings: int = 8
    flow_blocks: int = 1
    flow_width: int = 32
    flow_max_log_scale: float = 0.7

    def __post_init__(self) -> None:
        for name, least in (("widths", 1), ("latent_channels", 0), ("decoder_blocks", 0)):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)):
                raise ConfigError(f"{name} must be a list of integers, got {value!r}")
            value = tuple(value)
            object.__setattr__(self, name, value)
            if any(not isinstance(v, int) or isinstance(v, bool) or v < least for v in value):
                raise ConfigError(f"{name} must be integers of at least {least}, got {value}")
            if len(value) != len(self.widths):
                raise ConfigError(
                    f"{name} must have one number a resolution ({len(self.widths)}), got {value}"
                )
        for name, least in (
            ("image_size", 2),
            ("channels", 1),
            ("flow_scales", 0),
            ("flow_couplings", 1),
            ("flow_blocks", 0),
            ("flow_width", 1),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name, allowed in (("sigma", SIGMA_KINDS), ("flow_mask", MASKS), ("patch", (1, 2))):
            if getattr(self, name) not in allowed or isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"{name} must be one of {', '.join(map(str, allowed))}, got {getattr(self, name)!r}"
                )
        for name in ("encoder", "posterior_iaf"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        bound = self.flow_max_log_scale
        if not isinstance(bound, (int, float)) or isinstance(bound, bool) or not bound > 0:
            raise ConfigError(f"flow_max_log_scale must be positive, got {self.flow_max_log_scale}")
        if self.widths and not self.latent_channels[0]:
            raise ConfigError(
                f"latent_channels must begin with latents at the coarsest level, got {self.latent_channels}"
            )
        if not self.widths and not (self.flow_scales and self.encoder):
            raise ConfigError(
                "a model without resolutions (widths = ()) is a flow: it needs flow_scales of at least 1, "
                "and its encoder is itself"
            )
        if self.image_size % self.size_multiple:
            fitting = [s for s in (32, 48, 64) if s % self.size_multiple == 0]
            raise ConfigError(
                f"image_size must be a multiple of {self.size_multiple} "
                f"({len(self.widths)} latent resolutions, {self.flow_scales} flow scales), "
                f"such as {', '.join(map(str, fitting)) or self.size_multiple}; got {self.image_size}"
            )

    @property
    def size_multiple(self) -> int:
        """Image sizes that fit are the multiples of this number."""
        finest = self.patch * 2 ** (len(self.widths) - 1) if self.widths else 1
        return int(max(finest, 2**self.flow_scales))

    @property
    def num_dims(self) -> int:
        """Values per image, ``D = C * H * W``."""
        return self.channels * self.image_size**2

    @property
    def level_sizes(self) -> list[int]:
        """Height and width of each resolution's features, coarsest first."""
        return [self.image_size // (self.patch * 2**i) for i in reversed(range(len(self.widths)))]

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """``(channels, height, width)`` of ``z``, level by level, coarsest first."""
        if not self.widths:
            return [(self.channels, self.image_size, self.image_size)]
        return [(c, s, s) for c, s in zip(self.latent_channels, self.level_sizes, strict=True) if c]

    @property
    def operations(self) -> tuple[str, ...]:
        """Of the four verbs, those that this model has."""
        return OPERATIONS if self.encoder else ("sample",)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Rebuild from :meth:`to_dict`. Unknown names are refused, missing ones too, but for those
        that came later: their defaults are what older models are.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        later = {"patch", "encoder", "posterior_iaf", "flow_mask"}
        wrong = sorted((set(values) ^ known) - (later - set(values)))
        if wrong:
            raise ConfigError(
                f"a model configuration has the fields {sorted(known)}; unknown or missing: {wrong}"
            )
        return cls(**values)
