"""The parameters of each operation: one table that requests are read by and that the OpenAPI
document is made from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from serving.api.errors import unusable
from serving.engine.noise import MAX_SEED
from serving.messages import show

MAX_IMAGES = 256
MAX_SAMPLES = 64
MAX_TEMPERATURE = 10.0


@dataclass(frozen=True)
class Kind:
    """What values a parameter takes: ``read(name, value)`` checks one, ``schema`` says it in JSON
    Schema.
    """

    read: Callable[[str, Any], Any]
    schema: Mapping[str, Any]


@dataclass(frozen=True)
class Parameter:
    """One parameter; without a value it is ``default``."""

    default: Any
    kind: Kind
    about: str


def _integer(low: int, high: int) -> Kind:
    def read(name: str, value: Any) -> int:
        if isinstance(value, str):
            try:
                value = (
                    int(value)
                    if value.strip().lstrip("+-").isascii() and "_" not in value
                    else None
                )
            except ValueError:
                value = None
            if value is None:
                raise unusable(
                    "bad_parameter", f"{name} must be a whole number from {low} to {high}"
                )
        if isinstance(value, bool) or not isinstance(value, int):
            raise unusable(
                "bad_parameter",
                f"{name} must be a whole number from {low} to {high}, got {show(value)}",
            )
        if not low <= value <= high:
            raise unusable(
                "bad_parameter", f"{name} must be from {low} to {high}, got {show(value)}"
            )
        return value

    return Kind(read, {"type": "integer", "minimum": low, "maximum": high})


def _number(low: float, high: float) -> Kind:
    """A number above ``low`` and at most ``high``."""

    def read(name: str, value: Any) -> float:
        if isinstance(value, str):
            try:
                value = float(value)
            except ValueError:
                value = None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise unusable(
                "bad_parameter",
                f"{name} must be a number above {low:g} and at most {high:g}, got {show(value)}",
            )
        # Integers of any length are compared before they become floats.
        if not (low < value <= high) or not math.isfinite(value):
            raise unusable(
                "bad_parameter",
                f"{name} must be above {low:g} and at most {high:g}, got {show(value)}",
            )
        return float(value)

    return Kind(read, {"type": "number", "exclusiveMinimum": low, "maximum": high})


def _choice(*options: str) -> Kind:
    def read(name: str, value: Any) -> str:
        if value not in options:
            raise unusable(
                "bad_parameter", f"{name} must be one of {', '.join(options)}, got {show(value)}"
            )
        return str(value)

    return Kind(read, {"type": "string", "enum": list(options)})


def _boolean() -> Kind:
    def read(name: str, value: Any) -> bool:
        if value in ("true", "false"):
            return bool(value == "true")
        if not isinstance(value, bool):
            raise unusable("bad_parameter", f"{name} must be true or false, got {show(value)}")
        return value

    return Kind(read, {"type": "boolean"})


def _latents() -> Kind:
    """Checked where the model's shapes are known."""
    return Kind(
        lambda name, value: value,
        {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_IMAGES,
            "items": {
                "type": "object",
                "required": ["levels"],
                "properties": {
                    "levels": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "anyOf": [{"required": ["z"]}, {"required": ["eps"]}],
                            "properties": {"z": {"type": "array"}, "eps": {"type": "array"}},
                        },
                    }
                },
            },
        },
    )


_SEED = _integer(0, MAX_SEED)
_KIND = Parameter(
    "mean", _choice("mean", "density"), "the decoder's mean, or a draw from its Gaussian"
)
_IMAGE_PARAMETERS = {
    "seed": Parameter(0, _SEED, "of the noise"),
    "resize": Parameter(
        None, _choice("fit"), "bring images of another size to the model's instead of refusing them"
    ),
}
PARAMETERS: dict[str, dict[str, Parameter]] = {
    "sample": {
        "n": Parameter(1, _integer(1, MAX_IMAGES), "images"),
        "seed": Parameter(None, _SEED, "drawn unless given, and in the answer"),
        "index": Parameter(
            0, _integer(0, MAX_SEED), "of the first image: an image depends on seed and index alone"
        ),
        "temperature": Parameter(
            1.0, _number(0, MAX_TEMPERATURE), "multiplies the prior's standard deviations"
        ),
        "kind": _KIND,
        "latents": Parameter(
            None,
            _latents(),
            "decode these instead of drawing n: what encode answered, z or else eps of each level",
        ),
        "format": Parameter("png", _choice("png", "npy", "json"), "of the answer"),
    },
    "encode": {
        **_IMAGE_PARAMETERS,
        "eps": Parameter(False, _boolean(), "also the standard normal noise that samples each z"),
        "format": Parameter("json", _choice("json", "npz"), "of the answer"),
    },
    "reconstruct": {
        **_IMAGE_PARAMETERS,
        "kind": _KIND,
        "format": Parameter(
            None, _choice("png", "npy", "json"), "png for one image, json for several"
        ),
    },
    "score": {
        **_IMAGE_PARAMETERS,
        "samples": Parameter(
            1,
            _integer(1, MAX_SAMPLES),
            "draws K: 1 is the ELBO, more the importance-weighted bound",
        ),
        "alpha": Parameter(0.01, _number(0, 1), "false-alarm rate of ood"),
        "fdr": Parameter(
            None, _number(0, 1), "false discovery rate over the images of the request"
        ),
        "explain": Parameter(True, _boolean(), "each statistic with its p-value"),
        "map": Parameter(False, _boolean(), "the bits of each pixel"),
        "format": Parameter("json", _choice("json"), "of the answer"),
    },
}


def read_parameters(operation: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Checked values of every parameter of an operation.

    Raises:
        ApiError: one is unknown, or of a value that it does not take.
    """
    known = PARAMETERS[operation]
    for name in given:
        if name not in known:
            raise unusable(
                "unknown_parameter",
                f"{operation} has no parameter {show(name)}; it has {', '.join(known)}",
            )
    return {
        name: spec.kind.read(name, given[name]) if given.get(name) is not None else spec.default
        for name, spec in known.items()
    }
