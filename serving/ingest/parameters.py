"""Checks the values of a request against the fields of its model (:mod:`ade_client.model`)."""

from __future__ import annotations

import contextlib
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal

from ade_base.messages import show
from ade_client.model import Above, Between, Excludes, Field
from serving.ingest.errors import unusable


def read(owner: str, fields: Mapping[str, Field], given: Mapping[str, Any]) -> dict[str, Any]:
    """Check the values of a request.

    Args:
        owner: the operation's name, for errors.
        fields: the fields by name.
        given: values of JSON, or text of a form. ``None`` counts as not given.

    Returns:
        A value for every field, by attribute.

    Raises:
        ApiError: 422 ``unknown_parameter`` or ``bad_parameter``.
    """
    for name in given:
        if name not in fields:
            raise unusable(
                "unknown_parameter",
                f"{owner} has no parameter {show(name)}; it has {', '.join(fields)}",
            )
    given = {name: value for name, value in given.items() if value is not None}
    values = {
        field.attribute: _read(field, given[name]) if name in given else field.default
        for name, field in fields.items()
    }
    for name in (name for name in fields if name in given):
        excluded = fields[name].mark(Excludes)
        if excluded is not None and excluded.other in given:
            raise unusable(
                "bad_parameter",
                f"{name} and {excluded.other} exclude each other: {excluded.reason}",
            )
    return values


def _read(field: Field, value: Any) -> Any:
    if field.flag is not None:
        return _choice(field, value, (field.flag.word,)) == field.flag.word
    if typing.get_origin(field.type) is Literal:
        return _choice(field, value, typing.get_args(field.type))
    if field.type is bool:
        return _boolean(field, value)
    if field.type is int:
        return _integer(field, value)
    if field.type is float:
        return _number(field, value)
    if field.type is str and not isinstance(value, str):
        raise unusable("bad_parameter", f"{field.name} must be a string, got {show(value)}")
    return value  # the operation checks it


LARGEST_EXACT = 2**53  # of whole numbers as floating-point ones
# As forms spell them: what JSON and Python write in any case, what check boxes send, digits.
_BOOLEANS = {"true": True, "on": True, "1": True, "false": False, "off": False, "0": False}


def _choice(field: Field, value: Any, options: tuple[str, ...]) -> str:
    if value not in options:
        raise unusable(
            "bad_parameter", f"{field.name} must be one of {', '.join(options)}, got {show(value)}"
        )
    return str(value)


def _boolean(field: Field, value: Any) -> bool:
    if isinstance(value, str):
        value = _BOOLEANS.get(value.lower(), value)
    if not isinstance(value, bool):
        raise unusable("bad_parameter", f"{field.name} must be true or false, got {show(value)}")
    return value


def whole(value: Any) -> Any:
    """4 for 4.0, because JSON has one type of numbers; any other value as it is."""
    is_whole = isinstance(value, float) and value.is_integer() and abs(value) <= LARGEST_EXACT
    return int(value) if is_whole else value


def _integer(field: Field, value: Any) -> int:
    limits = field.mark(Between)
    assert limits is not None
    name, low, high = field.name, limits.low, limits.high
    if isinstance(value, str) and _is_decimal(value):
        with contextlib.suppress(ValueError):  # the text itself is reported below
            value = int(value)
    value = whole(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise unusable(
            "bad_parameter",
            f"{name} must be a whole number from {low} to {high}, got {show(value)}",
        )
    if not low <= value <= high:
        raise unusable("bad_parameter", f"{name} must be from {low} to {high}, got {show(value)}")
    return value


def _number(field: Field, value: Any) -> float:
    limits = field.mark(Above)
    assert limits is not None
    name, low, high = field.name, limits.low, limits.high
    if isinstance(value, str) and _is_decimal(value):
        with contextlib.suppress(ValueError):  # the text itself is reported below
            value = float(value)
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


def _is_decimal(text: str) -> bool:
    """Whether a number has none of what only Python reads: ``1_000``, digits of other scripts."""
    return text.isascii() and "_" not in text
