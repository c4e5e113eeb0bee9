"""The seam between the core and the folders of ``extensions/``.

The core imports no extension by name. An extension has a ``plugin.py`` with an :class:`Extension`,
which lists what it adds. Code is named there, as ``"module"`` or ``"module:name"``, and imported
when it is used: ``ade --help`` loads none of it. Deleting the folder removes the extension.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).parents[1] / "extensions"


class Verb(NamedTuple):
    """A verb of ``ade``.

    Attributes:
        line: what it does, for ``ade --help``.
        module: with ``add_arguments(parser)`` and ``run(args)``.
        extra: of pyproject.toml that it needs besides the runtime's, if any.
    """

    line: str
    module: str
    extra: str | None = None


class Engine(NamedTuple):
    """What computes, of ``ade serve`` or ``ade score``.

    Attributes:
        code: of ``ade serve``, a :class:`handlers.service.pool.Pool`; of ``ade score``, a function
            such as :func:`extensions.ray.bulk.score.score_on_ray`.
        extra: of pyproject.toml, with its packages.
        line: what is special about it, for ``--help``.
        on_clusters: whether the option ``--address`` can name a cluster.
        packages: by which the engine is recognised as installed; imported by no other one.
        variables: beginnings of the names of environment variables that its processes inherit.
    """

    code: str
    extra: str | None
    line: str = ""
    on_clusters: bool = False
    packages: tuple[str, ...] = ()
    variables: tuple[str, ...] = ()


class DataSet(NamedTuple):
    """A data set that verbs know by name.

    Attributes:
        code: a function of the folder that holds it, the image size if given, a folder for decoded
            pixels and a reporter, which returns a :class:`training.data.Dataset`.
        size: height and width of its images, pixels, by default or always.
        is_fixed: whether they have no other size.
    """

    code: str
    size: int
    is_fixed: bool


class Graphs(NamedTuple):
    """Further files of a bundle, which ``ade export --with-NAME`` writes.

    Attributes:
        line: what they are for, for ``--help``.
        check: a function of a model's ``config.json``, which raises if it cannot have them.
        write: a function of a model and a bundle's folder, which writes them. Their names begin
            with the name of the option.
        following: the command of ``ade`` that uses them, up to the bundle.
    """

    line: str
    check: str
    write: str
    following: tuple[str, ...]


@dataclass(frozen=True)
class Extension:
    """What an extension adds to the core.

    Attributes:
        verbs: of ``ade``, by name.
        options: functions that add options to the parser of a verb, by the verb's name.
        engines: of ``ade serve``, by name.
        score_engines: of ``ade score``, by name.
        datasets: of ``--data``, by name.
        graphs: of ``ade export``, by name.
        protocols: modules that translate another protocol of inference, by the beginning of its
            paths; see :mod:`handlers.service.protocols`.
    """

    verbs: Mapping[str, Verb] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    engines: Mapping[str, Engine] = field(default_factory=dict)
    score_engines: Mapping[str, Engine] = field(default_factory=dict)
    datasets: Mapping[str, DataSet] = field(default_factory=dict)
    graphs: Mapping[str, Graphs] = field(default_factory=dict)
    protocols: Mapping[str, str] = field(default_factory=dict)


@functools.cache
def extensions() -> tuple[Extension, ...]:
    """The extensions that are there, in the order of their names."""
    names = sorted(path.parent.name for path in FOLDER.glob("*/plugin.py"))
    return tuple(importlib.import_module(f"extensions.{name}.plugin").EXTENSION for name in names)


def added(hook: str) -> dict[str, Any]:
    """What all extensions add in one field of :class:`Extension`."""
    return {name: one for each in extensions() for name, one in getattr(each, hook).items()}


def engine_help(engines: Mapping[str, Engine]) -> str:
    """What is special about each engine, for ``--help``."""
    return ", ".join(f"{name} {each.line}" for name, each in engines.items() if each.line)


def load(reference: str) -> Any:
    """Import what a reference names: ``"module"`` or ``"module:name"``."""
    module, _, name = reference.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found
