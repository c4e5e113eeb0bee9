"""Completes the docstrings of the contract's types by what their fields declare."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any

from sphinx.util.typing import stringify_annotation

from ade_client import contract
from ade_client.model import fields_of


def _model(declared: Any) -> type | None:
    """A type of the contract, or the one whose fields a method takes as arguments."""
    method = getattr(declared, "__wrapped__", None)
    taken = getattr(method, "__annotations__", {}).get("parameters", "")
    model = getattr(contract, taken, declared)
    is_ours = dataclasses.is_dataclass(model) and model.__module__ == contract.__name__
    return typing.cast(type, model) if is_ours else None


def show_plain_types(app: Any, declared: Any, is_bound: bool) -> None:
    """Leave the limits of fields out of the signature of a method that takes them."""
    model = _model(declared)
    if model is not None and not isinstance(declared, type):
        types = typing.get_type_hints(model)
        signature = inspect.signature(declared)
        declared.__signature__ = signature.replace(
            parameters=[
                parameter.replace(annotation=types.get(name, parameter.annotation))
                for name, parameter in signature.parameters.items()
            ]
        )


def add_fields(
    app: Any, what: str, name: str, declared: Any, options: Any, lines: list[str]
) -> None:
    """Describe the fields of a type, or the arguments of a method that takes such fields."""
    model = _model(declared)
    if model is None:
        return
    types = typing.get_type_hints(model)
    lines.append("")
    for field in fields_of(model).values():
        if declared is not model:
            lines.append(f":param {field.attribute}: {field.about}")
        else:
            kind = stringify_annotation(types[field.attribute], "smart")
            lines.append(f":ivar {field.attribute}: {field.about}")
            lines.append(f":vartype {field.attribute}: {kind}")


def shorten(app: Any, what: str, name: str, declared: Any, *signature: Any) -> Any:
    """Leave out the signatures of types whose fields are listed."""
    of_contract = getattr(declared, "__module__", "") == contract.__name__
    is_listed = of_contract or "Attributes:" in str(declared.__doc__)
    return ("", None) if dataclasses.is_dataclass(declared) and is_listed else None


def setup(app: Any) -> dict[str, Any]:
    app.connect("autodoc-before-process-signature", show_plain_types)
    app.connect("autodoc-process-docstring", add_fields)
    app.connect("autodoc-process-signature", shorten)
    return {"parallel_read_safe": True}
