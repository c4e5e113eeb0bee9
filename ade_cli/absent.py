"""Placeholders for packages that are not installed, so that ``ade VERB --help`` always works."""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _AnythingType(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything

    def __getitem__(cls, item: Any) -> Any:
        return cls


class Anything(metaclass=_AnythingType):
    """Stands for any name of a missing package: a base class, a decorator or a value."""

    def __new__(cls, *args: Any, **options: Any) -> Any:
        is_decorating = len(args) == 1 and callable(args[0]) and not options
        return args[0] if is_decorating else Anything


class _AbsentModule(ModuleType):
    __path__: list[str] = []  # submodules are absent too

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything


class _Finder(MetaPathFinder, Loader):
    """Finds packages that were missing; others still fail, as optional imports expect."""

    def __init__(self) -> None:
        self.packages: set[str] = set()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return (
            ModuleSpec(fullname, self, is_package=True)
            if fullname.partition(".")[0] in self.packages
            else None
        )

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _AbsentModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def import_for_help(name: str) -> ModuleType:
    """Import a module with placeholders for missing packages, in order to print its help.

    Raises:
        ModuleNotFoundError: the module itself is missing, or a part of an installed package.
    """
    finder = _Finder()
    sys.meta_path.append(finder)
    try:
        while True:
            try:
                return importlib.import_module(name)
            except ModuleNotFoundError as error:
                package = str(error.name).partition(".")[0]
                if package in finder.packages or package == name.partition(".")[0]:
                    raise
                finder.packages.add(package)
    finally:
        sys.meta_path.remove(finder)
