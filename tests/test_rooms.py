"""The allowed imports between packages, without cycles; only one of them knows TorchServe."""

from __future__ import annotations

import ast
import graphlib
import re
from collections import defaultdict
from collections.abc import Iterator

import pytest

from tests.helpers import ROOT

PACKAGES = (
    "ade_base",
    "ade_client",
    "ade_model",
    "training",
    "export",
    "fitting",
    "serving",
    "handlers",
    "extensions",
    "ade_cli",
)
# A room is a folder, one within serving/ or extensions/, or a module at the top of serving/. What a
# room may import beside itself and ade_base: rooms, or single modules.
SERVED = {"serving.ingest", "serving.api", "serving.engine", "serving.verdict"}
MAY_IMPORT: dict[str, set[str]] = {
    "ade_base": set(),
    "ade_model": set(),
    "serving.verdict": set(),
    "serving.engine": {"serving.verdict"},
    "serving.ingest": {"serving.engine", "serving.verdict"},
    "serving.api": {"serving.ingest", "serving.engine", "serving.verdict"},
    # Only models, names and constants: the client needs just NumPy, Pillow, httpx, filelock.
    "ade_client": {
        "serving.ingest",
        "serving.api.operations",
        "serving.verdict.calibration_file",
        "serving.verdict.decision",
    },
    "serving.bulk": SERVED,
    "serving.gate": {"ade_client", *SERVED},
    "serving.page": {"ade_client", *SERVED},
    "handlers": {"serving.bulk", "ade_client", *SERVED},
    "training": {"ade_model"},
    "export": {"ade_model", "training.data", "training.datasets", *SERVED},
    "fitting": {"ade_model", "training", "export", "serving", "extensions.gate_reports"},
    "extensions.codec": SERVED,  # needs no PyTorch
    "extensions.comparison": {"ade_model", "training", "serving"},
    "extensions.gate_reports": {"ade_model", "export", "training", *SERVED},
    "extensions.ray": {"handlers", "serving.bulk", *SERVED},
    "extensions.upload_gate": {"serving.gate", *SERVED},
    "ade_cli": set(PACKAGES),
}
LIBRARIES = ("ade_model", "training", "export", "fitting", "extensions/codec")
SERVER = "handlers/torchserve/"
# Beside the server's own room and the docs: `ade serve --engine` must know its name.
MAY_NAME_THE_SERVER = {"handlers/launch/engines.py"}


def imports() -> Iterator[tuple[str, str]]:
    """Every import of ours in our packages: the importing module and the imported one."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for node in ast.walk(ast.parse(path.read_text())):
                names = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    assert node.level == 0, f"{path}: imports are absolute"
                    names = [node.module or ""]
                yield from ((module, name) for name in names if name.split(".")[0] in PACKAGES)


def room_of(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] in ("serving", "extensions") else parts[0]


def is_within(module: str, names: set[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


ARROWS = sorted({(room_of(a), a, b) for a, b in imports() if room_of(a) != room_of(b)})


@pytest.mark.parametrize("room", sorted({room for room, _, _ in ARROWS}))
def test_a_room_imports_what_it_may(room: str) -> None:
    allowed = MAY_IMPORT[room] | (set() if room == "ade_model" else {"ade_base"})
    wrong = [
        f"{a} imports {b}"
        for from_room, a, b in ARROWS
        if from_room == room and not is_within(b, allowed)
    ]
    assert not wrong, wrong


def test_rooms_have_no_import_cycles() -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for room, _, imported in ARROWS:
        graph[room].add(room_of(imported))
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the cycle


def test_every_room_is_a_package_that_loads_nothing() -> None:
    for init in (path for package in PACKAGES for path in (ROOT / package).rglob("__init__.py")):
        # Other modules may import their names from there.
        if init.parent.name not in (
            "ade_model",
            "datasets",
        ):
            assert not [
                n
                for n in ast.parse(init.read_text()).body
                if isinstance(n, (ast.Import, ast.ImportFrom))
            ], init


def test_libraries_name_no_option_of_the_command_line() -> None:
    """Callers in Python have no command line."""
    for path in (path for package in LIBRARIES for path in sorted((ROOT / package).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not re.search(r"(^|[\s`'\"(])--[a-z]", node.value), f"{path}: {node.value}"


def test_one_room_knows_the_model_server() -> None:
    """A second server is a second folder beside it."""
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        name = str(path.relative_to(ROOT))
        if name.startswith(SERVER) or name in MAY_NAME_THE_SERVER:
            continue
        text = path.read_text()
        for own in ("handlers.torchserve", "handlers/torchserve"):  # the room's own name
            text = text.replace(own, "")
        assert "torchserve" not in text.lower(), name
        assert not re.search(r"^\s*(import|from) ts\b", text, re.MULTILINE), name
