"""The named systems; each recipe is a complete configuration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ade_base.errors import ConfigError
from ade_model.config import ModelConfig
from training import flagship
from training.discriminator import DiscriminatorConfig

SIZES = ("tiny", "small", "paper")
OPTIMIZERS = ("adam", "adamax", "muon")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How one model is trained.

    Attributes:
        recipe: name of the recipe.
        size: of the networks, one of :data:`SIZES`.
        model: configuration of the model.
        discriminator: configuration of the discriminator; ``None`` for maximum likelihood alone.
        batch_size: images per step, over all processes.
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
        kl_warmup: training images, from the start, over which the weight of the KL grows from 0 to
            1.
        reconstruction_weight: weight of the mean squared error of mean reconstructions, in units of
            x, beside L_C. A strong flow predicts pixels from their neighbours and leaves little to
            the latents; this makes them hold what an image looks like.
        noisy_share: share of the generated images that the discriminator sees with the decoder's
            noise; the others are mean samples, as in the paper. If the discriminator sees mean
            samples only, density samples look too noisy.
        quality_weight: ``w`` in ``L_C + w L_Q``: L_C is the likelihood's loss, in bits per
            dimension, and L_Q the adversarial loss, in nats (without a unit if the discriminator is
            projected, whose loss is a hinge); without L_C, the weight of L_Q alone.
        guide_weight: weight of the guide's loss: the mean squared distance of each generated
            image's features from those that it needs, so that all of them together have the mean
            and the covariance of real images' features; 0 without a guide.
        classifier_weight: weight of the same loss in the features of the ImageNet classifier that a
            projected discriminator sees images through; 0 to leave it out.
        flow_sees_quality: whether L_Q trains the flow too; in the paper it does not.
        inference_share: additional fraction of the budget in which an inference network and sigma
            are trained with the generator frozen, for the likelihood of a GAN.
        d_steps: discriminator steps per model step.
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
    batch_size: int = 64
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
    kl_warmup: int = 0
    reconstruction_weight: float = 0.0
    noisy_share: float = 0.0
    quality_weight: float = 0.05
    guide_weight: float = 0.0
    classifier_weight: float = 0.0
    flow_sees_quality: bool = False
    inference_share: float = 0.0
    d_steps: int = 1
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
            "likelihood_batch_size": 0,
            "likelihood_learning_rate": 0,
            "d_steps": 1,
            "gp_every": 1,
            "warmup_steps": 0,
            "inference_share": 0,
            "free_bits": 0,
            "reconstruction_weight": 0,
            "kl_warmup": 0,
            "quality_weight": 0,
            "guide_weight": 0,
            "classifier_weight": 0,
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
        if self.inference_share and (self.coverage or not self.model.widths):
            raise ConfigError(
                "inference_share must be 0 except for a GAN, "
                f"got {self.inference_share} for {self.recipe}"
            )
        for name in ("free_bits", "kl_warmup", "reconstruction_weight", "noisy_share"):
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
        alone = ("likelihood_share", "likelihood_batch_size", "likelihood_learning_rate")
        for name in alone[1:]:
            if getattr(self, name) and not self.likelihood_share:
                raise ConfigError(
                    f"{name} must be 0 without likelihood_share, got {getattr(self, name)}"
                )
        for name in ("reconstruction_weight", "noisy_share", "likelihood_share"):
            if getattr(self, name) and not self.coverage:
                raise ConfigError(
                    f"{name} must be 0 without L_C, got {getattr(self, name)} for {self.recipe}"
                )
        for name in ("noisy_share", "guide_weight", "classifier_weight", "likelihood_share"):
            if getattr(self, name) and self.discriminator is None:
                raise ConfigError(
                    f"{name} must be 0 without a discriminator, got {getattr(self, name)} "
                    f"for {self.recipe}"
                )
        if self.classifier_weight and self.model.channels != 3:
            raise ConfigError(
                f"classifier_weight must be 0 without 3 channels, got {self.classifier_weight} for "
                f"images of {self.model.channels}"
            )
        if self.discriminator is not None:
            self.discriminator.check_image_size(self.model.image_size)
        if self.compares_images and self.gp_weight:
            raise ConfigError(
                "gp_weight must be 0 with a projected discriminator, which has several logits per "
                f"image, got {self.gp_weight} for {self.recipe}"
            )

    @property
    def compares_images(self) -> bool:
        """Whether the discriminator compares the images of each process's share of a batch."""
        return self.discriminator is not None and self.discriminator.kind == "projected"

    @property
    def first_batch_size(self) -> int:
        """Images per step of the run's first phase."""
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
        discriminator = values["discriminator"]
        unknown = sorted(
            [*(values.keys() - _names(cls))]
            + [f"d_{name}" for name in (discriminator or {}).keys() - _names(DiscriminatorConfig)]
        )
        if unknown:
            raise ConfigError(f"a configuration of training has unknown fields: {unknown}")
        values = {**values, "model": ModelConfig.from_dict(values["model"])}
        if discriminator is not None:
            values["discriminator"] = DiscriminatorConfig(**discriminator)
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class _Size:
    """Settings that the systems of one size share."""

    model: dict[str, Any]
    flow_alone: dict[str, Any]
    plain: DiscriminatorConfig
    residual: DiscriminatorConfig
    batch_size: int
    adversarial_rate: float


_SIZES = {
    "tiny": _Size(
        {
            "widths": (96, 64, 32),
            "latent_channels": (16, 8, 4),
            "decoder_blocks": (1, 1, 1),
            "flow_couplings": 4,
            "flow_blocks": 1,
            "flow_width": 32,
        },
        {"flow_scales": 2, "flow_couplings": 6, "flow_blocks": 1, "flow_width": 48},
        DiscriminatorConfig((64, 128, 256)),
        DiscriminatorConfig((64, 128, 128), "residual", plain_stages=1),
        batch_size=32,
        adversarial_rate=5e-4,
    ),
    "small": _Size(
        {},
        {"flow_scales": 2, "flow_couplings": 8, "flow_blocks": 1, "flow_width": 64},
        DiscriminatorConfig((64, 128, 256)),
        DiscriminatorConfig((64, 128, 128, 128), "residual", plain_stages=1),
        batch_size=64,
        adversarial_rate=3e-4,
    ),
    # The networks of the paper, as far as it describes them: SNGAN's generator and discriminator,
    # Real-NVP's f with one scale and three residual blocks of two layers (footnote 3).
    "paper": _Size(
        {
            "widths": (512, 256, 128, 64),
            "latent_channels": (32, 32, 32, 0),
            "decoder_blocks": (0, 0, 0, 0),
            "patch": 1,
            "flow_mask": "checkerboard",
            "flow_couplings": 4,
            "flow_blocks": 3,
            "flow_width": 32,
        },
        {
            "flow_scales": 2,
            "flow_mask": "checkerboard",
            "flow_couplings": 4,
            "flow_blocks": 8,
            "flow_width": 64,
        },
        DiscriminatorConfig((64, 128, 256, 512), patch=1),
        DiscriminatorConfig((128, 128, 128, 128, 128), "residual", plain_stages=2, patch=1),
        batch_size=64,
        adversarial_rate=3e-4,
    ),
}
# The same for all sizes, since the frozen features take most of its operations.
_PROJECTED = DiscriminatorConfig((64, 64, 128, 256), "projected")
GUIDE_WEIGHT = 0.2  # if there is a guide
_ADVERSARIAL = ("g_", "d_", "gp_", "quality_weight", "augment")  # how names of such fields begin
# Fields that need a flow, a VAE, or weights that only the likelihood trains.
_OF_FLOW = {"flow_mask", "flow_couplings", "flow_blocks", "flow_width", "flow_max_log_scale"}
_OF_VAE = {"sigma", "patch", "posterior_iaf"}
_OF_LIKELIHOOD = {"learning_rate", "beta1", "beta2"}
# Fields that need L_C, a discriminator of pixels, or a gradient penalty.
_OF_COVERAGE = {"free_bits", "kl_warmup", "dequantizer_width", "posterior_iaf"}
_OF_PIXEL_DISCRIMINATOR = {"d_patch"}
_OF_PENALTY = {"gp_target", "gp_every"}
PAPER_WIDTH_WITH_FLOW = 472  # instead of 512, for the weights that f adds (Table 1, dagger)


@dataclasses.dataclass(frozen=True)
class _System:
    """One system of the paper: its settings that do not depend on the size."""

    line: str
    coverage: bool = True
    adversary: str | None = None  # a kind of discriminator
    vae: bool = True
    flow_scales: int = 1
    wide: bool = False
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)


# The likelihood of pixels gets steep as sigma gets small: with a rate of 1e-3, the VAE diverged
# after 119,000 images of CIFAR-10.
_PIXELS: dict[str, Any] = {
    "flow_scales": 0,
    "model": {"sigma": "scalar"},
    "training": {"learning_rate": 5e-4},
}
_GAN: dict[str, Any] = {
    **_PIXELS,
    "coverage": False,
    "training": {**_PIXELS["training"], "quality_weight": 1.0, "inference_share": 0.25},
}
_SYSTEMS = {
    "gan": _System("adversarial alone", adversary="plain", **_GAN),
    "gan-rd": _System("adversarial alone, residual discriminator", adversary="residual", **_GAN),
    "vae": _System("maximum likelihood, Gaussian decoder on pixels", **_PIXELS),
    # Nearly every gradient is scaled to the same norm, so growing norms do not lengthen steps. With
    # 1, a fit of 64x64 scenes was rescued once in 1,800 steps, with 4 twice.
    "v-ade": _System(
        "maximum likelihood, decoder in the flow's feature space", training={"clip": 0.25}
    ),
    "av-gde": _System(
        "likelihood and adversarial, Gaussian decoder on pixels", adversary="plain", **_PIXELS
    ),
    "av-ade": _System(
        "likelihood and adversarial, decoder in the flow's feature space", adversary="plain"
    ),
    "av-ade-rd": _System("av-ade with a residual discriminator", adversary="residual"),
    "av-ade-pd": _System(
        "av-ade with a projected discriminator: frozen features of ImageNet (not in the paper)",
        adversary="projected",
        training={
            "d_learning_rate": 4e-4,
            "d_beta1": 0.0,
            "gp_weight": 0.0,
            "augment": True,
            "free_bits": 8.0,
            "reconstruction_weight": 8.0,
            "noisy_share": 0.5,
        },
    ),
    "flagship": _System(flagship.LINE, adversary="projected"),
    "av-ade-wg-rd": _System(
        "av-ade-rd with a generator of twice the width", adversary="residual", wide=True
    ),
    "av-ade-iaf-rd": _System(
        "av-ade-rd with an inverse autoregressive posterior",
        adversary="residual",
        model={"posterior_iaf": True},
    ),
    "av-ade-s2": _System("av-ade with two scales in the flow", adversary="plain", flow_scales=2),
    "real-nvp": _System("the flow alone, maximum likelihood", vae=False),
    "flow-gan-a": _System(
        "the flow alone, adversarial",
        vae=False,
        coverage=False,
        adversary="plain",
        training={"quality_weight": 1.0, "flow_sees_quality": True},
    ),
    "flow-gan-h": _System(
        "the flow alone, likelihood and adversarial",
        vae=False,
        adversary="plain",
        training={"flow_sees_quality": True},
    ),
}


def recipe_names() -> dict[str, str]:
    """The name of every recipe, with a one-line description."""
    return {name: system.line for name, system in _SYSTEMS.items()}


def saw_efficientnet(about: Mapping[str, Any]) -> bool:
    """Whether a model or one of its ancestors was trained against EfficientNet's features.

    Args:
        about: the ``config.json`` of a checkpoint or bundle.
    """
    known = _SYSTEMS.get(about.get("recipe", ""))
    if known is not None and known.adversary == "projected":
        return True
    if about.get("guided"):  # by these features, or by an encoder that learnt to predict them
        return True
    ancestors = (about.get("started_from"), about.get("flow_from"))
    return any(before is not None and saw_efficientnet(before) for before in ancestors)


def recipe(
    name: str, image_size: int, channels: int, size: str = "small", **changes: Any
) -> TrainConfig:
    """The configuration of a named system for images of a size.

    Args:
        name: one of :func:`recipe_names`.
        image_size: height and width of the images, pixels.
        channels: colour channels of the images.
        size: of the networks, one of :data:`SIZES`.
        changes: fields to change: those of :class:`TrainConfig` and :class:`ModelConfig`, and those
            of :class:`DiscriminatorConfig` with the prefix ``d_``, except its kind.

    Raises:
        ValueError: there is no recipe or size of that name.
        ConfigError: the image size does not suit the networks, or a change is invalid or has no
            effect in this system.
    """
    if name not in _SYSTEMS:
        raise ValueError(f"recipe must be one of {', '.join(_SYSTEMS)}, got {name!r}")
    if size not in _SIZES:
        raise ValueError(f"size must be one of {', '.join(_SIZES)}, got {size!r}")
    system, sized = _SYSTEMS[name], _SIZES[size]
    if "d_kind" in changes:  # reports tell by the recipe against which features a model was trained
        raise ConfigError(f"d_kind cannot be changed: it is that of the recipe {name}")
    of_the_model = {name: changes.pop(name) for name in _names(ModelConfig) & changes.keys()}
    of_the_discriminator = {
        name: changes.pop(f"d_{name}")
        for name in _names(DiscriminatorConfig)
        if f"d_{name}" in changes
    }
    training: dict[str, Any] = {"batch_size": sized.batch_size, "coverage": system.coverage}
    if system.adversary is not None:
        discriminator = {"plain": sized.plain, "residual": sized.residual, "projected": _PROJECTED}[
            system.adversary
        ]
        training |= {
            "discriminator": dataclasses.replace(discriminator, **of_the_discriminator),
            "g_learning_rate": sized.adversarial_rate,
        }
    else:
        idle = [
            *(f"d_{one}" for one in of_the_discriminator),
            *(one for one in changes if one.startswith(_ADVERSARIAL)),
        ]
        if idle:
            raise ConfigError(f"{min(idle)}: {name} has no discriminator")
    if name == "flagship":
        training |= flagship.training_of(size)
    training |= {**system.training, **changes}
    fields = _model_fields(system, size, image_size, training.get("inference_share", 0) > 0)
    if name == "flagship":
        fields |= flagship.MODEL[size]
    model = ModelConfig(
        **{"image_size": image_size, "channels": channels, **fields, **of_the_model}
    )
    config = TrainConfig(recipe=name, size=size, model=model, **training)
    _check_effect(
        config, {*of_the_model, *changes, *(f"d_{name}" for name in of_the_discriminator)}
    )
    return config


def _model_fields(
    system: _System, size: str, image_size: int, has_inference: bool
) -> dict[str, Any]:
    """Fields of a system's model.

    Args:
        system: the system.
        size: of the networks, one of :data:`SIZES`.
        image_size: height and width of the images, pixels.
        has_inference: whether a GAN gets an inference network.
    """
    sized = _SIZES[size]
    if not system.vae:
        return {**sized.flow_alone, "widths": (), "latent_channels": (), "decoder_blocks": ()}
    fields: dict[str, Any] = {
        "flow_scales": system.flow_scales,
        "posterior_bound": True,
        **sized.model,
        **system.model,
    }
    if size == "paper":
        fields = _paper_networks(fields, image_size)
    latents = fields.get("latent_channels", ModelConfig.latent_channels)
    widths = fields.get("widths", ModelConfig.widths)
    if system.wide:
        fields["widths"] = tuple(2 * width for width in widths)
    if not system.coverage:  # a GAN's noise enters at the coarsest level only
        fields["latent_channels"] = (sum(latents), *(0 for _ in latents[1:]))
        fields["encoder"] = has_inference
    return fields


def _check_effect(config: TrainConfig, given: set[str]) -> None:
    """Check that fields that were given change something in this system.

    Raises:
        ConfigError: one does not.
    """
    has_flow, has_vae = config.model.flow_scales > 0, bool(config.model.widths)
    # As :class:`training.step.Trainer` groups the weights.
    has_coverage = config.coverage or config.inference_share > 0
    likelihood_trains = has_coverage and (
        has_vae
        or config.discriminator is None
        or not config.flow_sees_quality
        or config.model.dequantizer_width > 0
    )
    for has, names, what in (
        (has_flow, _OF_FLOW, "flow"),
        (has_vae, _OF_VAE, "VAE"),
        (likelihood_trains, _OF_LIKELIHOOD, "weights that the likelihood alone trains"),
        (has_coverage, _OF_COVERAGE, "L_C"),
        (not config.compares_images, _OF_PIXEL_DISCRIMINATOR, "discriminator of pixels"),
        (config.gp_weight > 0, _OF_PENALTY, "gradient penalty"),
    ):
        if not has and (idle := names & given):
            raise ConfigError(f"{min(idle)}: {config.recipe} has no {what}")
    if has_flow and "flow_scales" in given and not (config.coverage or config.flow_sees_quality):
        raise ConfigError(f"flow_scales: {config.recipe} has no loss that trains a flow")


def _names(config: type) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}


def _paper_networks(options: dict[str, Any], image_size: int) -> dict[str, Any]:
    """Narrow the generator if there is ``f``, and add a layer for 64x64 images (section 5.3)."""
    options = dict(options)
    if options["flow_scales"]:
        options["widths"] = (PAPER_WIDTH_WITH_FLOW, *options["widths"][1:])
    if image_size > 48:
        options["widths"] += (options["widths"][-1],)
        options["latent_channels"] = (
            *options["latent_channels"][:-1],
            options["latent_channels"][-2],
            0,
        )
        options["decoder_blocks"] += (0,)
    return options
