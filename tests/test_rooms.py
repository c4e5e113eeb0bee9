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
    "ade_model",
    "training",
    "export",
    "fitting",
    "serving",
    "coding",
    "handlers",
    "ade_cli",
)
# A room is a folder, or a module at the top of serving/. What a room may import beside itself:
# rooms, or single modules.
IMAGES = {"serving.images", "serving.files", "serving.decode"}
SERVED = {"serving.api", "serving.engine", "serving.verdict", *IMAGES}
MAY_IMPORT = {
    "ade_model": set(),
    "serving.decode": set(),
    "serving.images": {"serving.decode"},
    "serving.files": {"serving.images"},
    "serving.verdict": IMAGES,
    "serving.engine": {"serving.verdict", *IMAGES},
    "serving.api": {"serving.engine", "serving.verdict", *IMAGES},
    # Only models, names and constants: the client needs just NumPy, Pillow, httpx, filelock.
    "serving.client": {
        "serving.api.errors",
        "serving.api.model",
        "serving.api.operations",
        "serving.api.requests",
        "serving.verdict.calibration_file",
        "serving.verdict.decision",
        *IMAGES,
    },
    "serving.bulk": SERVED,
    "serving.gate": {"serving.client", *SERVED},
    "serving.gate_asgi": {
        "serving.gate",
        "serving.api.errors",
        "serving.api.forms",
        "serving.api.guard",
        "serving.api.requests",
        "serving.verdict.calibration_file",
        "serving.verdict.store",
    },
    "serving.page": {"serving.client", *SERVED},
    "handlers": {"serving.bulk", "serving.client", *SERVED},
    "training": {"ade_model", *IMAGES},
    "export": {"ade_model", "training.data", "training.datasets", *SERVED},
    "fitting": {"ade_model", "training", "export", "serving"},
    # Needs no PyTorch; only the command line imports it.
    "coding": SERVED,
    "ade_cli": set(PACKAGES),
}
# Small modules at the top of serving/ that import nothing else of ours are everybody's.
SHARED = {
    "serving.brand",
    "serving.cores",
    "serving.errors",
    "serving.messages",
    "serving.onnx_runtime",
    "serving.ports",
    "serving.reports",
    "serving.signals",
    "serving.tables",
}
LIBRARIES = ("ade_model", "training", "export", "fitting", "coding")
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
    return ".".join(parts[:2]) if parts[0] == "serving" else parts[0]


def is_within(module: str, names: set[str]) -> bool:
    return any(module == name or module.startswith(name + ".") for name in names)


ARROWS = sorted({(room_of(a), a, b) for a, b in imports() if room_of(a) != room_of(b)})


@pytest.mark.parametrize("room", sorted({room for room, _, _ in ARROWS}))
def test_a_room_imports_what_it_may(room: str) -> None:
    allowed = MAY_IMPORT.get(room, set()) | (SHARED if room != "ade_model" else set())
    wrong = [
        f"{a} imports {b}"
        for from_room, a, b in ARROWS
        if from_room == room and not is_within(b, allowed)
    ]
    assert not wrong, wrong


def test_shared_modules_import_nothing_else_of_ours() -> None:
    assert not [(a, b) for a, b in imports() if is_within(a, SHARED) and not is_within(b, SHARED)]


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
