"""Typed models of requests and answers.

Each field is declared once, with its type, limits, default and description.

From one declaration such as ::

    @dataclass(frozen=True, kw_only=True)
    class ScoreParameters:
        samples: Annotated[int, Between(1, 64), "draws K"] = 1

follow the check of a request's values (:func:`read`), the JSON that is sent (:func:`to_json`), the
objects that a client gets (:func:`from_json`) and the schema in the OpenAPI document
(:mod:`serving.api.schema`). A field may be ``bool``, ``int``, ``float``, ``str``, ``bytes`` (base64
in JSON), an array (nested lists in JSON), a ``Literal``, a list, a dictionary, another model, or
one of these or ``None``.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import math
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np

from ade_base.messages import show
from serving.ingest.errors import unusable

if TYPE_CHECKING:
    from serving.engine.bundle import Bundle

Model = TypeVar("Model")
Mark = TypeVar("Mark")


@dataclass(frozen=True)
class Between:
    """Limits of an integer, both included."""

    low: int
    high: int


@dataclass(frozen=True)
class Above:
    """Limits of a number, which is above ``low`` and at most ``high``."""

    low: float
    high: float


@dataclass(frozen=True)
class Excludes:
    """The parameter cannot be given together with another one."""

    other: str
    reason: str


@dataclass(frozen=True)
class Flag:
    """``True`` is written as this word, and ``False`` by leaving the field out."""

    word: str


@dataclass(frozen=True)
class Named:
    """The field's name in JSON, if it differs from the attribute's."""

    name: str


@dataclass(frozen=True)
class NullIs:
    """The value that is written as ``null``, because JSON has no such number."""

    value: float


@dataclass(frozen=True)
class Axes:
    """The number of dimensions of an array, which is nested lists in JSON."""

    count: int


@dataclass(frozen=True)
class JsonSchema:
    """Further keywords of the field's JSON Schema."""

    keywords: Mapping[str, Any]


@dataclass(frozen=True)
class OfBundle:
    """Keywords of the field's JSON Schema that depend on the bundle."""

    keywords: Callable[[Bundle], Mapping[str, Any]]


@dataclass(frozen=True)
class Field:
    """One field of a model.

    Attributes:
        attribute: its name in Python.
        name: its name in JSON and in forms.
        type: its type without ``None``.
        default: its value if it is left out; ``MISSING`` if it is always there.
        is_nullable: whether it may be ``None``.
        about: its description.
        marks: the other objects of its annotation; ``flag`` and ``null`` are among them.
    """

    attribute: str
    name: str
    type: Any
    default: Any
    is_nullable: bool = False
    about: str = ""
    marks: tuple[Any, ...] = ()
    flag: Flag | None = None
    null: NullIs | None = None

    def mark(self, kind: type[Mark]) -> Mark | None:
        """The mark of a class, if the annotation has one."""
        return next((mark for mark in self.marks if isinstance(mark, kind)), None)


def _fields_of(model: type) -> dict[str, Field]:
    """The fields of a model, which is a dataclass, by their names in JSON, in order."""
    hints = typing.get_type_hints(model, include_extras=True)
    found = (_field(f, hints[f.name]) for f in dataclasses.fields(model))
    return {field.name: field for field in found}


fields_of: Callable[[type], dict[str, Field]] = functools.cache(_fields_of)


def _field(declared: dataclasses.Field[Any], hint: Any) -> Field:
    marks: tuple[Any, ...] = ()
    if typing.get_origin(hint) is typing.Annotated:
        hint, *rest = typing.get_args(hint)
        marks = tuple(rest)
    kind, is_nullable = without_none(hint)
    default = declared.default
    if declared.default_factory is not MISSING:
        default = declared.default_factory()
    named = next((m.name for m in marks if isinstance(m, Named)), declared.name)
    return Field(
        declared.name,
        named,
        kind,
        default,
        is_nullable,
        " ".join(mark for mark in marks if isinstance(mark, str)),
        marks,
        next((m for m in marks if isinstance(m, Flag)), None),
        next((m for m in marks if isinstance(m, NullIs)), None),
    )


def without_none(hint: Any) -> tuple[Any, bool]:
    """A type without ``| None``, and whether it had that."""
    if not is_union(hint):
        return hint, False
    options = tuple(option for option in typing.get_args(hint) if option is not type(None))
    return typing.Union[options], len(options) < len(typing.get_args(hint))  # noqa: UP007


def is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


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


def to_json(value: Any, always: Collection[str] = ()) -> Any:
    """A model as an object for JSON. A field that has its default is left out.

    Args:
        value: a model, or what a field may hold.
        always: attributes that are written even if they have their default.

    Raises:
        TypeError: a flag is neither true nor false.
    """
    if type(value) in _LEAVES:
        return value
    if isinstance(value, list):
        return [
            vars(item).copy() if _is_plain(type(item)) else to_json(item, always) for item in value
        ]
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if not dataclasses.is_dataclass(value):
        return value
    written = {}
    for field in fields_of(type(value)).values():
        item = getattr(value, field.attribute)
        if _is_default(field, item) and field.attribute not in always:
            continue
        if field.flag is not None:
            if not isinstance(item, (bool, np.bool_)):
                raise TypeError(f"{field.attribute} must be true or false, got {show(item)}")
            item = field.flag.word
        elif field.null is not None and item == field.null.value:
            item = None
        written[field.name] = to_json(item, always)
    return written


_LEAVES = {bool, int, float, str, type(None)}


def _is_plain_model(model: type) -> bool:
    """Whether a model's attributes are its JSON, which saves time for dozens of them per image."""
    return dataclasses.is_dataclass(model) and all(
        field.type in _LEAVES and field.default is MISSING and not field.marks
        for field in fields_of(model).values()
    )


_is_plain: Callable[[type], bool] = functools.cache(_is_plain_model)


def _is_default(field: Field, value: Any) -> bool:
    if field.default is MISSING or value is field.default:
        return value is field.default
    return not isinstance(value, np.ndarray) and bool(value == field.default)


def from_json(model: type[Model], value: Mapping[str, Any]) -> Model:
    """Make a model from an object of JSON.

    Unknown names are ignored, because newer versions may send them.

    Raises:
        TypeError: a field that has no default is missing.
    """
    fields = fields_of(model)
    return model(
        **{
            fields[name].attribute: _load(fields[name], item)
            for name, item in value.items()
            if name in fields
        }
    )


def _load(field: Field, value: Any) -> Any:
    if field.flag is not None:
        return value == field.flag.word
    if value is None:
        return None if field.null is None else field.null.value
    return _load_type(field.type, value)


def _load_type(kind: Any, value: Any) -> Any:
    if typing.get_origin(kind) is list:
        (item,) = typing.get_args(kind)
        return [_load_type(item, each) for each in value]
    if is_union(kind):
        return from_json(_option(typing.get_args(kind), value), value)
    if kind is bytes:
        return base64.b64decode(value)
    if kind is np.ndarray:
        return np.array(value)
    if dataclasses.is_dataclass(kind):
        return from_json(typing.cast(type, kind), value)
    return value


def _option(models: tuple[type, ...], value: Mapping[str, Any]) -> type:
    """The first model whose required fields are all there."""
    for model in models:
        if all(name in value or f.default is not MISSING for name, f in fields_of(model).items()):
            return model
    return models[0]
