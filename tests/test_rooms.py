"""The imports between rooms, without circles; only one of them knows TorchServe."""

from __future__ import annotations

import ast
import graphlib
import re
from collections import defaultdict

from tests.helpers import ROOT
from tests.house import (
    MOVING,
    PACKAGES,
    allowed_in,
    imports,
    module_of,
    product_files,
    python_files,
    read_record,
    room_of,
    wrong_imports,
)

LIBRARIES = ("ade_model", "training", "export", "fitting", "extensions/codec")
SERVER = "handlers/torchserve/"
# Beside the server's own room and the docs: `ade serve --engine` and `ade status` know its name.
MAY_NAME_THE_SERVER = {"handlers/launch/engines.py", "handlers/launch/status.py"}


def test_imports_between_rooms_are_right_or_on_the_list():
    """Of those on the list, none is added, and those that are gone are taken off."""
    found = {(a, b) for a, names in wrong_imports().items() for b in names}
    listed = {(a, b) for a, names in read_record()["imports"].items() for b in names}
    new = [f"{a} ({room_of(a)}) imports {b} ({room_of(b)})" for a, b in sorted(found - listed)]
    assert not new, f"{new}: tests/house.py says which rooms may import which"
    assert not listed - found, f"{sorted(listed - found)} is gone: python -m tests.house --record"


def test_tests_of_the_core_import_no_extension():
    """Not even inside a function: they run after an extension is deleted."""
    found = imports(paths=[*python_files("tests"), ROOT / "conftest.py"])
    assert not [(a, b) for a, b in found if b.startswith("extensions.")]


def test_modules_that_have_moved_are_off_the_list():
    modules = set(map(module_of, product_files()))
    assert not MOVING.keys() - modules, "take them out of MOVES in tests/house.py"


def test_every_room_has_a_line_in_the_table():
    assert not [module for module, _ in imports() if allowed_in(room_of(module)) is None]


def test_modules_have_no_import_circles():
    """Not even by imports inside functions."""
    graph: dict[str, set[str]] = defaultdict(set)
    for module, imported in imports(with_types=False):
        graph[module].add(imported)
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def test_every_room_is_a_package_that_loads_nothing():
    for init in (path for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")):
        # Other modules may import their names from there.
        if init.parent.name not in ("ade_client", "datasets"):
            assert not [
                n
                for n in ast.parse(init.read_text()).body
                if isinstance(n, (ast.Import, ast.ImportFrom))
            ], init


def test_libraries_name_no_option_of_the_command_line():
    """Callers in Python have no command line."""
    for path in product_files():
        if not str(path.relative_to(ROOT)).startswith(LIBRARIES):
            continue
        if path.parent.name == "verbs" or path.name == "plugin.py":  # parts of the command line
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.search(r"(^|[\s`'\"(])--[a-z]", node.value), f"{path}: {node.value}"


def test_one_room_knows_the_model_server():
    """A second server is a second folder beside it."""
    for path in product_files():
        name = str(path.relative_to(ROOT))
        if name.startswith(SERVER) or name in MAY_NAME_THE_SERVER:
            continue
        text = path.read_text()
        for own in ("handlers.torchserve", "handlers/torchserve"):  # the room's own name
            text = text.replace(own, "")
        assert "torchserve" not in text.lower(), name
        assert not re.search(r"^\s*(import|from) ts\b", text, re.MULTILINE), name
