"""The types of all fields of a bundle's manifest, which are checked when it is read."""

from __future__ import annotations

from dataclasses import dataclass
from types import EllipsisType
from typing import Any

from ade_base.messages import show

# One of: a type; ``[T]``, a list of any length; ``(T, T)``, a list of that length; a dictionary of
# fields, all optional, in which ``...`` stands for all other names. Unknown fields are not checked.
Expected = Any
_NAMES = {
    str: "a string",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


@dataclass(frozen=True)
class Either:
    """One of several types."""

    options: tuple[Expected, ...]


def _or_null(expected: Expected) -> Either:
    return Either((expected, None))


_SHAPE = (int, int, int)
_STARTED_FROM: dict[str, Expected] = {
    "recipe": str,
    "images_seen": int,
    "taken": str,
    "guided": bool,
    "data": str,
    "splits": {...: str},
    "sketch": [str],
}
_STARTED_FROM["started_from"] = _or_null(_STARTED_FROM)
_STARTED_FROM["flow_from"] = _or_null(_STARTED_FROM)  # if the flow is that of another model
# A figure of ade_base/panel.py, and what it was measured on.
_FIGURE: dict[str | EllipsisType, Expected] = {"value": _or_null(float), "note": str}
_FIGURE |= {"images": int, "samples": int, "levels": [float], ...: float}
_MEASURED: dict[str, Expected] = {
    "data": str,
    "split": str,
    "images": int,
    "seed": int,
    "figures": {...: _FIGURE},
}
_CALIBRATION: dict[str, Expected] = {
    "statistic": str,
    "estimator": str,
    "resize": _or_null(str),
    "components": int,
    "images": int,
    "median_bpd": float,
    "smallest_p_value": float,
    "fitted_to": int,
    "data": str,
    "webp": str,
}
_CALIBRATION["resized"] = _or_null({**_CALIBRATION, "resized_and_back": int})
# What a network was trained on; training/datasets/sketch.py explains the sketch.
DATA: dict[str, Expected] = {"name": str, "splits": {...: str}, "sketch": [str]}
MANIFEST: dict[str, Expected] = {
    "format_version": int,
    "name": str,
    "recipe": str,
    "licence": _or_null(str),
    "image_shape": _SHAPE,
    "latent_shapes": [_SHAPE],
    "operations": [str],
    "files": {...: str},
    "data": DATA,
    "training": {
        "images_seen": int,
        "started_from": _or_null(_STARTED_FROM),
        "seed": int,
        "weights": int,
        "flow_weights": int,
        "flow_from": _or_null(_STARTED_FROM),
        "guided": bool,
    },
    # By the part of the data; before version 0.3 the figures of one part, which are not shown.
    "evaluation": _or_null({"select": _MEASURED, "test": _MEASURED}),
    "calibration": _or_null(_CALIBRATION),
    "calibrations": _or_null({...: _CALIBRATION}),
    "features": _or_null(
        {
            "source": str,
            "sha256": str,
            "preprocessing": str,
            "features": int,
            "classes": int,
            "data": DATA,
        }
    ),
    "parity": [
        {
            "graph": str,
            "output": str,
            "backend": str,
            "unit": str,
            "difference": float,
            "limit": float,
        }
    ],
}
REQUIRED = ("name", "recipe", "image_shape", "latent_shapes", "files", "data")


def check_types(value: Any, expected: Expected, name: str) -> None:
    """Check that a value parsed from JSON has the expected type, recursively.

    Args:
        value: parsed from JSON.
        expected: see :data:`Expected`.
        name: the field's name, for the error.

    Raises:
        TypeError: it has another type; the error names the field, the expected types and the value.
    """
    options = expected.options if isinstance(expected, Either) else (expected,)
    fitting = [option for option in options if _fits(value, _type_of(option))]
    if not fitting:
        names = " or ".join(_NAMES[_type_of(option)] for option in options)
        raise TypeError(f"{name} must be {names}, got {show(value)}")
    (option, *_) = fitting
    if isinstance(option, dict):
        for key, item in value.items():
            if key in option or ... in option:
                check_types(
                    item, option.get(key, option.get(...)), f"{name}.{key}" if name else key
                )
    elif isinstance(option, tuple) and len(value) != len(option):
        raise TypeError(f"{name} must have {len(option)} values, got {show(value)}")
    elif isinstance(option, (list, tuple)):
        for i, item in enumerate(value):
            check_types(item, option[0], f"{name}[{i}]")


def _type_of(expected: Expected) -> type:
    if isinstance(expected, (list, tuple)):
        return list
    return expected if isinstance(expected, type) else type(expected)


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool):  # a bool is an int in Python
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)
