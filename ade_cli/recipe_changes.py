"""Changes to a recipe's configuration, as ``ade train --set NAME=VALUE`` takes them."""

from __future__ import annotations

import argparse
import typing

from ade_model.config import ModelConfig
from training.config import DiscriminatorConfig, TrainConfig

# Fields that define a system, follow from the data and from options, or differ only in models of
# earlier versions.
FIXED = {
    *(
        "recipe",
        "size",
        "model",
        "discriminator",
        "pixel_discriminator",
        "coverage",
        "flow_sees_quality",
    ),
    *("image_size", "channels", "encoder", "posterior_bound", "d_kind"),
}
WORDS = {bool: "true or false", int: "an integer", float: "a number"}


def fields() -> dict[str, type]:
    """Types of the fields that :func:`training.recipes.recipe` can change, by name."""
    configs = ((TrainConfig, ""), (ModelConfig, ""), (DiscriminatorConfig, "d_"))
    return {
        prefix + name: kind
        for config, prefix in configs
        for name, kind in typing.get_type_hints(config).items()
        if prefix + name not in FIXED
    }


def change(text: str) -> tuple[str, typing.Any]:
    """Read ``NAME=VALUE``, for argparse."""
    name, _, value = text.partition("=")
    known = fields()
    if name not in known:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(sorted(known))}")
    kind = known[name]
    try:
        if kind is bool:
            return name, {"true": True, "false": False}[value]
        if kind in (int, float, str):
            return name, kind(value)
        return name, tuple(int(part) for part in value.split(","))
    except (KeyError, ValueError):
        words = WORDS.get(kind, "integers separated by commas")
        raise argparse.ArgumentTypeError(f"{name} must be {words}, got {value!r}") from None
