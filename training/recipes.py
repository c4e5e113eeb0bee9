"""The named systems; each recipe is a complete configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ade_base.errors import ConfigError
from ade_model.config import ModelConfig
from training import flagship
from training.config import DiscriminatorConfig, TrainConfig, names_of


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
# How names of such fields begin.
_ADVERSARIAL = ("g_", "d_", "gp_", "quality_weight", "augment", "alone_", "coverage_")
# Fields that need a flow, a VAE, or weights that only the likelihood trains.
_OF_FLOW = {"flow_mask", "flow_couplings", "flow_blocks", "flow_width", "flow_max_log_scale"}
_OF_VAE = {"sigma", "patch", "posterior_iaf"}
_OF_LIKELIHOOD = {"learning_rate", "beta1", "beta2"}
# Fields that need L_C, a discriminator of pixels, or a gradient penalty.
_OF_COVERAGE = {"free_bits", "dequantizer_width", "posterior_iaf"}
_OF_PIXEL_DISCRIMINATOR = {"d_patch"}
_OF_PENALTY = {"gp_target", "gp_every"}
PAPER_WIDTH_WITH_FLOW = 472  # instead of 512, for the weights that f adds (Table 1, dagger)


@dataclasses.dataclass(frozen=True)
class _System:
    """One system of the paper: its settings that do not depend on the size."""

    line: str
    coverage: bool = True
    adversary: str | None = None  # a kind of discriminator
    with_pixels: bool = False  # whether one of pixels takes part beside it
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
    "flagship": _System(flagship.LINE, adversary="projected", with_pixels=True),
    "flagship-pd": _System(flagship.LINE_PROJECTED, adversary="projected"),
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
    of_the_model = {name: changes.pop(name) for name in names_of(ModelConfig) & changes.keys()}
    of_the_discriminator = {
        name: changes.pop(f"d_{name}")
        for name in names_of(DiscriminatorConfig)
        if f"d_{name}" in changes
    }
    training: dict[str, Any] = {"batch_size": sized.batch_size, "coverage": system.coverage}
    if system.adversary is not None:
        discriminator = {"plain": sized.plain, "residual": sized.residual, "projected": _PROJECTED}[
            system.adversary
        ]
        training |= {
            "discriminator": dataclasses.replace(discriminator, **of_the_discriminator),
            "pixel_discriminator": sized.plain if system.with_pixels else None,
            "g_learning_rate": sized.adversarial_rate,
        }
    else:
        idle = [
            *(f"d_{one}" for one in of_the_discriminator),
            *(one for one in changes if one.startswith(_ADVERSARIAL)),
        ]
        if idle:
            raise ConfigError(f"{min(idle)}: {name} has no discriminator")
    is_flagship = name.startswith("flagship")
    if is_flagship:
        training |= flagship.training_of(size)
        training["gp_weight"] = flagship.GP_WEIGHT * system.with_pixels
    training |= {**system.training, **changes}
    fields = _model_fields(system, size, image_size, training.get("inference_share", 0) > 0)
    if is_flagship:
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
