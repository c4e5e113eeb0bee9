"""The named systems: each recipe is a complete configuration, and nothing but that."""

from __future__ import annotations

import dataclasses
from typing import Any

from ade_model.config import ModelConfig
from training.discriminator import DiscriminatorConfig


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How one model is trained.

    Attributes:
        recipe: the recipe's name.
        model: what is trained.
        discriminator: its opponent; ``None`` trains by maximum likelihood alone.
        batch_size: images a step, over all processes.
        learning_rate: of the model's Adam.
        beta1: of the model's Adam.
        warmup_steps: steps over which the learning rate grows linearly from zero.
        quality_weight: ``w`` in ``L_C + w L_Q`` with L_C in bits per dimension.
        flow_sees_quality: whether L_Q trains the flow too; in the paper it does not.
        d_learning_rate: of the discriminator's Adam.
        d_steps: discriminator steps a model step.
        gp_weight: weight of the gradient penalty.
        gp_target: slope that the penalty asks for at random interpolates of real and generated images.
        gp_every: the penalty is computed at every so many discriminator steps, its weight multiplied accordingly.
        ema_decay: of the averaged weights, which are evaluated and exported.
        max_grad_norm: gradients are clipped to this norm.
        flips: mirror training images at random.
    """

    recipe: str
    model: ModelConfig
    discriminator: DiscriminatorConfig | None = None
    batch_size: int = 64
    learning_rate: float = 1e-3
    beta1: float = 0.9
    warmup_steps: int = 200
    quality_weight: float = 0.05
    flow_sees_quality: bool = False
    d_learning_rate: float = 8e-4
    d_steps: int = 1
    gp_weight: float = 0.5
    gp_target: float = 0.0
    gp_every: int = 4
    ema_decay: float = 0.999
    max_grad_norm: float = 1.0
    flips: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Rebuild from :meth:`to_dict`."""
        values = dict(values)
        values["model"] = ModelConfig.from_dict(values["model"])
        if values["discriminator"] is not None:
            values["discriminator"] = DiscriminatorConfig(
                **{**values["discriminator"], "widths": tuple(values["discriminator"]["widths"])})
        return cls(**values)


_NO_FLOW = {"flow_scales": 0}
_ADVERSARIAL: dict[str, Any] = {"discriminator": DiscriminatorConfig(), "learning_rate": 3e-4, "beta1": 0.5}

# name: (what it is, model options, training options)
_RECIPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "vae": ("maximum likelihood, Gaussian decoder on pixels", {**_NO_FLOW, "sigma": "scalar"}, {}),
    "v-ade": ("maximum likelihood, decoder in the flow's feature space", {}, {}),
    "av-gde": ("likelihood and adversarial, Gaussian decoder on pixels", {**_NO_FLOW, "sigma": "scalar"}, _ADVERSARIAL),
    "av-ade": ("likelihood and adversarial, decoder in the flow's feature space", {}, _ADVERSARIAL),
}


def recipe_names() -> dict[str, str]:
    """Every recipe's name and one line on it."""
    return {name: line for name, (line, _, _) in _RECIPES.items()}


def recipe(name: str, image_size: int, channels: int, **changes: Any) -> TrainConfig:
    """The configuration of a named system for images of a size.

    Args:
        name: one of :func:`recipe_names`.
        image_size: pixels.
        channels: colour channels.
        changes: fields of :class:`TrainConfig` to set differently.

    Raises:
        ValueError: no recipe of that name.
        ConfigError: the image size does not fit.
    """
    if name not in _RECIPES:
        raise ValueError(f"no recipe {name!r}; there are {', '.join(_RECIPES)}")
    _, model_options, train_options = _RECIPES[name]
    model = ModelConfig(image_size=image_size, channels=channels, **model_options)
    return TrainConfig(recipe=name, model=model, **{**train_options, **changes})
