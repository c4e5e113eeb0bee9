"""JSON Schemas of the API's models, for the OpenAPI document."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any, Literal

import numpy as np

from ade_client.model import (
    Above,
    Axes,
    Between,
    Excludes,
    Field,
    JsonSchema,
    OfBundle,
    fields_of,
    is_union,
)
from serving.engine.bundle import Bundle

BINARY = {"type": "string", "format": "binary"}


class Schemas:
    """Makes the schemas of models for one bundle.

    Args:
        components: where the schemas of models are collected, by name. Those that depend on the
            bundle get its name in front if the plain name has another schema.
        bundle: whose shapes and kinds go into the schemas.
    """

    def __init__(self, components: dict[str, Any], bundle: Bundle) -> None:
        self._components = components
        self._bundle = bundle

    def parameters(self, fields: Mapping[str, Field]) -> dict[str, Any]:
        """The properties of a request, all optional."""
        return {name: self._parameter(field) for name, field in fields.items()}

    def _parameter(self, field: Field) -> dict[str, Any]:
        if field.flag is not None:
            field = dataclasses.replace(field, type=Literal[field.flag.word], default=None)
        schema, excluded = self._field(field, closed=False), field.mark(Excludes)
        if excluded is not None:
            # Not as ``default``: some generated clients send defaults, which would conflict.
            schema["description"] += f" ({field.default} unless given; not with {excluded.other})"
        elif field.default is not None:
            schema["default"] = field.default
        return schema

    def reference(self, model: type, closed: bool = True) -> dict[str, Any]:
        """A reference to the schema of a model.

        Args:
            model: a dataclass.
            closed: whether it has no further properties.
        """
        fields = fields_of(model)
        schema = obj(
            {name: self._result(field, closed) for name, field in fields.items()},
            [name for name, field in fields.items() if field.default is MISSING],
            closed,
        )
        name = model.__name__
        if self._components.setdefault(name, schema) != schema:
            name = f"{self._bundle.name}-{name}"
            self._components[name] = schema
        return {"$ref": f"#/components/schemas/{name}"}

    def _result(self, field: Field, closed: bool) -> dict[str, Any]:
        schema = self._field(field, closed)
        # A field with a default is left out instead of being null.
        if field.null is not None or field.is_nullable and field.default is MISSING:
            schema["type"] = [schema["type"], "null"]
        return schema

    def _field(self, field: Field, closed: bool) -> dict[str, Any]:
        schema = self._type(field.type, field, closed)
        further, of_bundle = field.mark(JsonSchema), field.mark(OfBundle)
        if further is not None:
            schema |= further.keywords
        if of_bundle is not None:
            schema |= of_bundle.keywords(self._bundle)
        if field.about and "$ref" not in schema:
            schema["description"] = field.about
        return schema

    def _type(self, kind: Any, field: Field, closed: bool) -> dict[str, Any]:
        if typing.get_origin(kind) is Literal:
            return {"type": "string", "enum": list(typing.get_args(kind))}
        if typing.get_origin(kind) is list:
            (item,) = typing.get_args(kind)
            return {"type": "array", "items": self._type(item, field, closed)}
        if is_union(kind):
            return {"anyOf": [self._type(each, field, closed) for each in typing.get_args(kind)]}
        if kind is np.ndarray:
            return _nested(field)
        if dataclasses.is_dataclass(kind):
            return self.reference(typing.cast(type, kind), closed)
        return {**_PLAIN[typing.get_origin(kind) or kind], **_limits(field)}


_PLAIN: dict[Any, dict[str, Any]] = {
    bool: {"type": "boolean"},
    int: {"type": "integer", "format": "int64"},  # seeds do not fit into 32 bits
    float: {"type": "number"},
    str: {"type": "string"},
    bytes: {"type": "string", "contentEncoding": "base64", "contentMediaType": "image/png"},
    dict: {"type": "object"},
}


def _limits(field: Field) -> dict[str, Any]:
    between, above = field.mark(Between), field.mark(Above)
    if between is not None:
        return {"minimum": between.low, "maximum": between.high}
    if above is not None:
        return {"exclusiveMinimum": above.low, "maximum": above.high}
    return {}


def _nested(field: Field) -> dict[str, Any]:
    axes = field.mark(Axes)
    assert axes is not None
    schema: dict[str, Any] = {"type": "number"}
    for _ in range(axes.count):
        schema = {"type": "array", "items": schema}
    return schema


def obj(
    properties: Mapping[str, Any], required: typing.Collection[str], closed: bool = True
) -> dict[str, Any]:
    """The schema of an object."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": list(required),
        "additionalProperties": not closed,
    }
