"""Command-line options made from the fields of a configuration and their descriptions."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import typing
from collections.abc import Collection


def integers(text: str) -> tuple[int, ...]:
    """Parse integers separated by commas, such as ``192,128,64``."""
    return tuple(int(part) for part in text.split(","))


def add_config_options(
    parser: argparse.ArgumentParser,
    title: str,
    config: type,
    leave_out: Collection[str],
    prefix: str = "",
) -> list[str]:
    """Add an option for each field of a configuration; its value is ``None`` if not given.

    Args:
        parser: gets a group of options.
        title: of the group.
        config: a dataclass whose docstring describes every field under ``Attributes:``.
        leave_out: fields without an option.
        prefix: put before each name.

    Returns:
        The options' destinations, ``prefix + name``.
    """
    group = parser.add_argument_group(title)
    types, texts = typing.get_type_hints(config), _descriptions(config)
    names = []
    for field in dataclasses.fields(config):
        if field.name in leave_out:
            continue
        names.append(prefix + field.name)
        kind = types[field.name]
        how: dict[str, typing.Any]
        if kind is bool:
            how = {"action": argparse.BooleanOptionalAction}
        elif kind in (int, float, str):
            how = {"type": kind, "metavar": {int: "N", float: "X", str: "NAME"}[kind]}
        else:
            how = {"type": integers, "metavar": "N,N,…"}
        group.add_argument(f"--{names[-1].replace('_', '-')}", help=texts[field.name], **how)
    return names


def given_options(args: argparse.Namespace, names: Collection[str]) -> dict[str, typing.Any]:
    """The options that were given, by name."""
    return {name: value for name in names if (value := getattr(args, name)) is not None}


def _descriptions(config: type) -> dict[str, str]:
    attributes = (inspect.getdoc(config) or "").partition("Attributes:\n")[2]
    found = re.finditer(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", attributes, re.MULTILINE)
    return {match[1]: _plain(match[2]) for match in found}


def _plain(text: str) -> str:
    """Remove a docstring's markup, for argparse."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"\1", " ".join(text.split()))
    return text.replace("``", "").replace("%", "%%").removesuffix(".")
