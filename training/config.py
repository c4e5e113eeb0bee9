"""How a model is trained, as its run records it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from ade_base.errors import ConfigError
from ade_model.config import ModelConfig

SIZES = ("tiny", "small", "paper")
OPTIMIZERS = ("adam", "adamax", "muon")
KINDS = ("plain", "residual", "projected")  # of discriminators
FEATURE_LEVELS = 4  # of the frozen classifier that a projected discriminator sees


def names_of(config: type) -> set[str]:
    """The names of a configuration's fields."""
    return {field.name for field in dataclasses.fields(config)}


@dataclasses.dataclass(frozen=True)
class DiscriminatorConfig:
    """Configuration of a convolutional classifier of real and generated images.

    Attributes:
        widths: channels after the first convolution and after each stage, which halves the size;
            for ``projected``, channels to which each of four feature levels is mixed, finest first.
        kind: ``residual`` is the paper's ``rd``, with stages as in Gulrajani et al., "Improved
            Training of Wasserstein GANs", 2017; ``plain`` has those of Miyato et al., "Spectral
            Normalization for Generative Adversarial Networks", 2018, without the normalisation;
            ``projected`` is that of :mod:`training.projected`.
        plain_stages: number of final stages that keep the size instead of halving it.
        patch: pixels per side of a position of the first convolution.
    """

    widths: tuple[int, ...] = (64, 128, 256)
    kind: str = "plain"
    plain_stages: int = 0
    patch: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if self.kind not in KINDS:
            raise ConfigError(
                f"the discriminator's kind must be one of {', '.join(KINDS)}, got {self.kind!r}"
            )
        if not self.widths or min(self.widths) < 1:
            raise ConfigError(
                f"d_widths must be one or more integers of at least 1, got {self.widths}"
            )
        if not 0 <= self.plain_stages < len(self.widths):
            raise ConfigError(
                f"d_plain_stages must be from 0 to {len(self.widths) - 1}, the number of stages, "
                f"got {self.plain_stages}"
            )
        if self.kind == "projected" and (len(self.widths) != FEATURE_LEVELS or self.plain_stages):
            raise ConfigError(
                f"a projected discriminator needs {FEATURE_LEVELS} d_widths and 0 "
                f"d_plain_stages, got {self.widths} and {self.plain_stages}"
            )
        if self.patch < 1:
            raise ConfigError(f"d_patch must be at least 1, got {self.patch}")

    @property
    def halvings(self) -> int:
        """Number of stages that halve the size."""
        return len(self.widths) - 1 - self.plain_stages

    def check_image_size(self, image_size: int) -> None:
        """Check that images of a size suit the stages; a projected discriminator takes any size.

        Raises:
            ConfigError: the size is not a multiple of the patch, or too small for the stages.
        """
        if self.kind == "projected":
            return
        if image_size % self.patch or image_size // self.patch < 2**self.halvings:
            raise ConfigError(
                f"image_size must be a multiple of {self.patch} and at least "
                f"{self.patch * 2**self.halvings} for a discriminator with d_patch {self.patch} "
                f"and {self.halvings} stages that halve the size, got {image_size}"
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How one model is trained.

    Attributes:
        recipe: name of the recipe.
        size: of the networks, one of :data:`SIZES`.
        model: configuration of the model.
        discriminator: configuration of the discriminator; ``None`` for maximum likelihood alone.
        pixel_discriminator: of one of pixels that takes part beside a projected one.
        batch_size: images per step, over all processes; with a discriminator, as many real as
            generated ones.
        coverage_batch_size: images whose likelihood is trained in a step with a discriminator; 0
            for ``batch_size``.
        alone_steps: first steps of the discriminators, from which the generator does not learn.
        likelihood_share: first part of the images, with which the likelihood alone trains, before
            the discriminator takes part.
        likelihood_batch_size: as batch_size, for these; 0 for the same.
        likelihood_learning_rate: highest rate of all weights while the likelihood alone trains
            them, with ``beta1`` and ``beta2``; 0 for ``learning_rate``.
        optimizer: of model and discriminator, ``adam`` or ``adamax``; or ``muon`` for the model's
            3 × 3 convolutions of at least 16 input and output channels, and ``adam`` for all else.
        learning_rate: highest rate of the weights that the likelihood alone trains (flow,
            dequantiser, encoder, posterior and sigma), and of the whole model if there is no
            discriminator.
        beta1: decay per step of the gradient's running mean, for the same weights.
        beta2: decay per step of the squared gradient's running mean, for the same weights.
        g_learning_rate: highest rate of the weights that make samples, if there is a discriminator.
        g_beta1: as beta1, for the weights that make samples.
        g_beta2: as beta2, for the weights that make samples.
        d_learning_rate: highest rate of the discriminator.
        d_beta1: as beta1, for the discriminator.
        d_beta2: as beta2, for the discriminator.
        warmup_steps: steps over which the learning rates grow linearly from zero; after a phase of
            likelihood alone also those over which the discriminator's rate and ``quality_weight``
            do.
        cooldown: last fraction of the budget, over which the learning rates fall linearly to a
            fiftieth.
        coverage: whether the model is trained with L_C, the likelihood's loss.
        free_bits: nats per latent channel and image; the KL of a channel costs nothing below it
            (reported values of L_C are without this).
        reconstruction_weight: weight of the mean squared error of mean reconstructions, in units of
            x, beside L_C. A strong flow predicts pixels from their neighbours and leaves little to
            the latents; this makes them hold what an image looks like.
        noisy_share: share of the generated images that the discriminator sees with the decoder's
            noise; the others are mean samples, as in the paper. If the discriminator sees mean
            samples only, density samples look too noisy.
        quality_weight: ``w`` in ``L_C + w L_Q``: L_C is the likelihood's loss, in bits per
            dimension, and L_Q the adversarial loss, in nats (without a unit if the discriminator is
            projected, whose loss is a hinge); without L_C, the weight of L_Q alone.
        flow_sees_quality: whether L_Q trains the flow too; in the paper it does not.
        inference_share: additional fraction of the budget in which an inference network and sigma
            are trained with the generator frozen, for the likelihood of a GAN.
        gp_weight: weight of the gradient penalty.
        gp_target: slope that the penalty enforces at random interpolates of real and generated
            images, per unit of x.
        gp_every: discriminator steps per computation of the penalty, whose weight is multiplied by
            this number.
        ema_decay: decay per step of the averaged weights, which are evaluated and exported.
        clip: multiple of the running mean of a gradient's norm to which longer gradients are
            shortened. Below 1 nearly all gradients get the same norm.
        augment: whether real and generated images are changed at random in brightness, saturation,
            contrast and position before the discriminator sees them.
        flips: whether training images are mirrored at random.
    """

    recipe: str
    model: ModelConfig
    size: str = "small"
    discriminator: DiscriminatorConfig | None = None
    pixel_discriminator: DiscriminatorConfig | None = None
    batch_size: int = 64
    coverage_batch_size: int = 0
    alone_steps: int = 0
    likelihood_share: float = 0.0
    likelihood_batch_size: int = 0
    likelihood_learning_rate: float = 0.0
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    # Adam moves a weight with rare gradients by up to (1 - beta1) / sqrt(1 - beta2) rates in one
    # step: 16 for 0.5 and 0.999, by which a run was lost; 5 for 0.5 and 0.99.
    g_learning_rate: float = 5e-4
    g_beta1: float = 0.5
    g_beta2: float = 0.99
    d_learning_rate: float = 8e-4
    d_beta1: float = 0.5
    d_beta2: float = 0.99
    warmup_steps: int = 200
    cooldown: float = 0.2
    coverage: bool = True
    free_bits: float = 0.0
    reconstruction_weight: float = 0.0
    noisy_share: float = 0.0
    quality_weight: float = 0.05
    flow_sees_quality: bool = False
    inference_share: float = 0.0
    gp_weight: float = 0.5
    gp_target: float = 0.0
    gp_every: int = 4
    ema_decay: float = 0.9995
    clip: float = 1.0
    augment: bool = False
    flips: bool = True

    def __post_init__(self) -> None:
        least_values = {
            "batch_size": 1,
            "coverage_batch_size": 0,
            "alone_steps": 0,
            "likelihood_batch_size": 0,
            "likelihood_learning_rate": 0,
            "gp_every": 1,
            "warmup_steps": 0,
            "inference_share": 0,
            "free_bits": 0,
            "reconstruction_weight": 0,
            "quality_weight": 0,
            "gp_weight": 0,
            "gp_target": 0,
        }
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{field.name} must be a finite number, got {value}")
        for name, least in least_values.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "g_beta1", "g_beta2", "d_beta1", "d_beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} must be at least 0 and below 1, got {getattr(self, name)}"
                )
        for name in ("learning_rate", "g_learning_rate", "d_learning_rate", "clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}")
        for name in ("likelihood_share", "cooldown", "noisy_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(
                f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}"
            )
        self._check_that_fields_fit()

    def _check_that_fields_fit(self) -> None:
        """Check what each field needs of the others.

        Raises:
            ConfigError: one has no effect in this system, or a wrong one.
        """
        if self.inference_share and (self.coverage or not self.model.widths):
            raise ConfigError(
                "inference_share must be 0 except for a GAN, "
                f"got {self.inference_share} for {self.recipe}"
            )
        for name in ("free_bits", "reconstruction_weight", "noisy_share"):
            if getattr(self, name) and not self.model.widths:
                raise ConfigError(
                    f"{name} must be 0 for a system without latents, "
                    f"got {getattr(self, name)} for {self.recipe}"
                )
        if 0 < self.noisy_share * self.batch_size < 1:
            raise ConfigError(
                f"noisy_share must be 0 or at least 1/{self.batch_size}, one image of each batch, "
                f"got {self.noisy_share:g}"
            )
        for name in ("likelihood_batch_size", "likelihood_learning_rate", "alone_steps"):
            if getattr(self, name) and not self.likelihood_share:
                raise ConfigError(
                    f"{name} must be 0 without likelihood_share, got {getattr(self, name)}"
                )
        for name in (
            "reconstruction_weight",
            "noisy_share",
            "likelihood_share",
            "coverage_batch_size",
        ):
            if getattr(self, name) and not self.coverage:
                raise ConfigError(
                    f"{name} must be 0 without L_C, got {getattr(self, name)} for {self.recipe}"
                )
        for name in ("noisy_share", "likelihood_share", "coverage_batch_size"):
            if getattr(self, name) and self.discriminator is None:
                raise ConfigError(
                    f"{name} must be 0 without a discriminator, got {getattr(self, name)} "
                    f"for {self.recipe}"
                )
        for discriminator in (self.discriminator, self.pixel_discriminator):
            if discriminator is not None:
                discriminator.check_image_size(self.model.image_size)
        pixels = self.pixel_discriminator
        if pixels is not None and (not self.compares_images or pixels.kind == "projected"):
            raise ConfigError("a pixel_discriminator takes part beside a projected one alone")
        if self.compares_images and self.gp_weight and pixels is None:
            raise ConfigError(
                "gp_weight must be 0 with a projected discriminator, which has several logits per "
                f"image, got {self.gp_weight} for {self.recipe}"
            )

    @property
    def compares_images(self) -> bool:
        """Whether the discriminator compares the images of each process's share of a batch."""
        return self.discriminator is not None and self.discriminator.kind == "projected"

    @property
    def joint_batch_size(self) -> int:
        """Images per step, once adversaries take part, that count towards the budget."""
        return self.coverage_batch_size or self.batch_size

    @property
    def first_batch_size(self) -> int:
        """Images per step of the run's first phase."""
        if not self.likelihood_share:
            return self.joint_batch_size
        return self.likelihood_batch_size or self.batch_size

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Rebuild from :meth:`to_dict`; fields that were added later may be missing.

        Raises:
            ConfigError: a field is unknown, as in a run of version 0.1, or invalid.
        """
        unknown = sorted(values.keys() - names_of(cls))
        values = {**values, "model": ModelConfig.from_dict(values["model"])}
        for name, prefix in (("discriminator", "d_"), ("pixel_discriminator", "pixel_d_")):
            given = values.get(name)
            if given is not None:
                others = given.keys() - names_of(DiscriminatorConfig)
                unknown += sorted(prefix + field for field in others)
                values[name] = None if others else DiscriminatorConfig(**given)
        if unknown:
            raise ConfigError(f"a configuration of training has unknown fields: {unknown}")
        return cls(**values)
