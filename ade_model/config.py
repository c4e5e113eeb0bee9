"""The configuration of a model: everything that is needed to rebuild it, validated once."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ade_base.errors import ConfigError

SIGMA_KINDS = ("scalar", "pixel")
MASKS = ("channel", "checkerboard")
# Fields that models of earlier versions lack.
LATER_FIELDS = frozenset(("posterior_bound", "dequantizer_width", "latent_groups"))
OPERATIONS = ("sample", "encode", "reconstruct", "score")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The configuration of one model of the AV-ADE family.

    The model has ``len(widths)`` resolutions. A position of the finest one covers ``patch`` x
    ``patch`` pixels; each coarser one has half the height and width. All tuples are ordered
    coarsest first, as ``z`` is. A model without resolutions (``widths = ()``) is the flow alone:
    its latents are ``y``, with a standard normal prior.

    Attributes:
        image_size: height and width of the images, pixels.
        channels: colour channels of the images.
        widths: feature channels of encoder and decoder, one number per resolution.
        latent_channels: channels of ``z``, one number per resolution; 0 for a resolution without
            latents.
        latent_groups: levels that the latents of each resolution are split into. Each has an equal
            share of the channels, and depends on those before it.
        decoder_blocks: residual blocks of the decoder, one number per resolution; 0 for a plain
            convolution, in the encoder too.
        patch: pixels per side of a position at the finest resolution, 1 or 2.
        encoder: whether there is an inference network; without one, a model can only sample.
        posterior_iaf: whether an inverse autoregressive step follows the posterior's Gaussian at
            each level.
        posterior_bound: whether the Gaussian of each posterior is at most e times as wide as the
            prior, as in all new models; an autoregressive step after it is not bounded. Wider ones
            only cost bits: images unlike all training images could cost tens of thousands of bits
            per dimension.
        sigma: standard deviation of the decoder's Gaussian: ``scalar``, one trainable number, or
            ``pixel``, one for each of its dimensions.
        flow_scales: scales of the invertible head ``f``; 0 for a model without ``f`` and its logit.
        flow_mask: what a coupling layer keeps: ``channel``, half of the channels of 2x2 patches, or
            ``checkerboard``, every other pixel.
        flow_couplings: coupling layers at each scale; with checkerboards those of the last one, and
            each other scale has one fewer of both kinds, at least one.
        flow_blocks: residual blocks in each coupling network.
        flow_width: channels of each coupling network; twice as many in the channel couplings of a
            flow with checkerboards.
        flow_max_log_scale: bound on the part of a coupling layer's log-scale that depends on the
            image; with 2.0, eight layers learned to stretch noise images by 1e4 and lost their
            float32 inverse.
        dequantizer_width: channels of the networks that choose where in its pixel's bin the
            likelihood sees a value; 0 for uniform positions.
    """

    image_size: int = 32
    channels: int = 3
    widths: tuple[int, ...] = (192, 128, 64)
    latent_channels: tuple[int, ...] = (32, 16, 8)
    latent_groups: int = 1
    decoder_blocks: tuple[int, ...] = (1, 1, 2)
    patch: int = 2
    encoder: bool = True
    posterior_iaf: bool = False
    posterior_bound: bool = False
    sigma: str = "pixel"
    flow_scales: int = 1
    flow_mask: str = "channel"
    flow_couplings: int = 8
    flow_blocks: int = 1
    flow_width: int = 32
    flow_max_log_scale: float = 0.7
    dequantizer_width: int = 0

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
                    f"{name} must have one number per resolution ({len(self.widths)}), got {value}"
                )
        for name, least in (
            ("image_size", 2),
            ("channels", 1),
            ("latent_groups", 1),
            ("flow_scales", 0),
            ("flow_couplings", 1),
            ("flow_blocks", 0),
            ("flow_width", 1),
            ("dequantizer_width", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"{name} must be an integer of at least {least}, got {value!r}")
        for name, allowed in (("sigma", SIGMA_KINDS), ("flow_mask", MASKS), ("patch", (1, 2))):
            value = getattr(self, name)
            if value not in allowed or isinstance(value, bool):
                choices = ", ".join(map(str, allowed))
                raise ConfigError(f"{name} must be one of {choices}, got {value!r}")
        for name in ("encoder", "posterior_iaf", "posterior_bound"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, got {getattr(self, name)!r}")
        bound = self.flow_max_log_scale
        is_number = isinstance(bound, (int, float)) and not isinstance(bound, bool)
        if not is_number or not 0 < bound < math.inf:
            raise ConfigError(f"flow_max_log_scale must be positive and finite, got {bound}")
        if self.widths and not self.latent_channels[0]:
            raise ConfigError(
                "latent_channels must be above 0 at the coarsest level, its first, "
                f"got {self.latent_channels}"
            )
        if any(c % self.latent_groups for c in self.latent_channels):
            raise ConfigError(
                f"latent_channels must be multiples of latent_groups ({self.latent_groups}), "
                f"got {self.latent_channels}"
            )
        if not self.widths and not (self.flow_scales and self.encoder):
            raise ConfigError(
                "a model without resolutions (widths = ()) is a flow: flow_scales must be at least "
                f"1 and encoder true, got {self.flow_scales} and {self.encoder}"
            )
        if self.dequantizer_width and not self.encoder:
            raise ConfigError(
                "dequantizer_width must be 0 without an inference network, "
                f"got {self.dequantizer_width}"
            )
        if self.image_size % self.size_multiple:
            fitting = [str(s) for s in (32, 48, 64) if s % self.size_multiple == 0]
            raise ConfigError(
                f"image_size must be a multiple of {self.size_multiple} "
                f"({_counted(len(self.widths), 'latent resolution')}, "
                f"{_counted(self.flow_scales, 'flow scale')}), "
                f"such as {', '.join(fitting) or self.size_multiple}; got {self.image_size}"
            )

    @property
    def size_multiple(self) -> int:
        """The number that an image size must be a multiple of."""
        finest = self.patch * 2 ** (len(self.widths) - 1) if self.widths else 1
        return int(max(finest, 2**self.flow_scales, 2 if self.dequantizer_width else 1))

    @property
    def num_dims(self) -> int:
        """Values per image, ``D = C * H * W``."""
        return self.channels * self.image_size**2

    @property
    def resolution_sizes(self) -> list[int]:
        """Height and width of each resolution's features, coarsest first."""
        return [self.image_size // (self.patch * 2**i) for i in reversed(range(len(self.widths)))]

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """``(channels, height, width)`` of ``z``, level by level, coarsest first."""
        if not self.widths:
            return [(self.channels, self.image_size, self.image_size)]
        return [
            (c // self.latent_groups, s, s)
            for c, s in zip(self.latent_channels, self.resolution_sizes, strict=True)
            for _ in range(self.latent_groups if c else 0)
        ]

    @property
    def operations(self) -> tuple[str, ...]:
        """The verbs that this model supports."""
        return OPERATIONS if self.encoder else ("sample",)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Rebuild from :meth:`to_dict`.

        Fields that were added later may be missing: their defaults describe older models.

        Raises:
            ConfigError: a field is unknown, missing or invalid.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        wrong = sorted((set(values) ^ known) - (LATER_FIELDS - set(values)))
        if wrong:
            raise ConfigError(
                f"a model configuration has the fields {sorted(known)}; unknown or missing: {wrong}"
            )
        return cls(**values)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
