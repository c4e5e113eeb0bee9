"""Typed models of requests and answers.

Each field is declared once, with its type, limits, default and description.

From one declaration such as ::

    @dataclass(frozen=True, kw_only=True)
    class ScoreParameters:
        samples: Annotated[int, Between(1, 64), "draws K"] = 1

follow the check of a request's values (:mod:`serving.ingest.parameters`), the JSON that is sent
(:func:`to_json`), the objects that a client gets (:func:`from_json`) and the schema in the OpenAPI
document (:mod:`serving.api.schema`). A field may be ``bool``, ``int``, ``float``, ``str``,
``bytes`` (base64 in JSON), an array (nested lists in JSON), a ``Literal``, a list, a dictionary,
another model, or one of these or ``None``.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass
from typing import Any, TypeVar

import numpy as np

from ade_base.messages import show

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

    keywords: Callable[[Any], Mapping[str, Any]]  # of a serving.engine.bundle.Bundle


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
