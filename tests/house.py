"""Measures the house: lines of code by file and function, imports between rooms.

``data/house.json`` lists what is too long or imports what it should not, as it is today. The lists
may only shrink: test_sizes.py and test_rooms.py compare. After a move, or when something became
shorter, record again and read what the command prints and the diff::

    python -m tests.house --record

Lines are counted without blank lines, comments and docstrings.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import json
import tokenize
from pathlib import Path

from tests.helpers import DATA, ROOT

RECORD = DATA / "house.json"
MAX_FILE, MAX_FUNCTION = 350, 90
STEP = 500  # ceilings of whole parts are rounded up to it, or every commit would have to record
# Folders of the product; those that do not exist yet, or no longer, have no files.
PACKAGES = (
    "ade_base",
    "ade_client",
    "ade_model",
    "serving",
    "handlers",
    "training",
    "export",
    "fitting",
    "extensions",
    "ade_cli",
)

# Who may import whom. A room is a package, a folder of serving/, handlers/ and extensions/,
# or one of serving/gate.py and serving/bulk.py.
BASE = {"ade_base"}
ENGINE = {"serving.engine", "serving.verdict"}
SERVED = {"ade_base", "ade_client", "serving.ingest", "serving.api", *ENGINE}
POOLS = {"handlers.process", "handlers.torchserve"}
HANDLING = {*SERVED, "handlers.front", "handlers.processes"}
ANYTHING = {"*"}  # but extensions: each can be deleted, so only its own modules import it
MAY_IMPORT = {
    "ade_base": set(),
    "ade_client": BASE,
    "ade_model": BASE,
    "serving.verdict": {*BASE, "ade_client.contract"},
    "serving.ingest": {*BASE, "ade_client"},
    "serving.engine": {*BASE, "ade_client.contract", "serving.verdict"},
    "serving.api": SERVED,
    "serving.gate": {*BASE, "serving.ingest", *ENGINE},
    "serving.bulk": {*BASE, "serving.ingest", *ENGINE},
    "serving.page": {*BASE, "ade_client", "serving.ingest", "serving.verdict"},
    # From the socket to the verbs, each knows those before it; no pool knows another pool, and the
    # others know pools by name alone.
    "handlers.front": SERVED,
    "handlers.processes": SERVED,
    "handlers.service": HANDLING,
    **dict.fromkeys(POOLS, {*HANDLING, "handlers.service"}),
    "handlers.launch": {*HANDLING, "handlers.service"},
    "training": {*BASE, "ade_model", "serving.engine"},
    "export": {
        *BASE,
        "ade_model",
        "training.data",
        "training.datasets",
        "serving.ingest",
        *ENGINE,
    },
    "fitting": {*BASE, "ade_model", "training", "export"},
    "ade_cli": ANYTHING,
    "extensions": ANYTHING,
}
# Modules that are not in their room yet. A line goes when its module has moved.
MOVES = {
    "handlers.front": ("handlers.limits handlers.service.metrics"),
}
MOVING = {module: room for room, modules in MOVES.items() for module in modules.split()}


def python_files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def product_files():
    return [p for p in python_files(*PACKAGES) if "tests" not in p.relative_to(ROOT).parts]


def module_of(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def room_of(module):
    """The room in which a module will be: of its longest beginning in MOVES, or where it is."""
    parts = module.split(".")
    for n in range(len(parts), 0, -1):
        if (room := MOVING.get(".".join(parts[:n]))) is not None:
            return room
    is_divided = parts[0] in ("serving", "handlers", "extensions")
    return ".".join(parts[:2]) if is_divided else parts[0]


def imports(with_types=True, paths=None):
    """Every import of ours: the importing module and the imported one.

    Args:
        with_types: also those under ``if TYPE_CHECKING``.
        paths: of the importing modules; by default the product.
    """
    product = product_files()
    modules = set(map(module_of, product))

    def within(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                if with_types:
                    yield from within(child)
            elif isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, "imports are absolute"
                for alias in child.names:
                    name = f"{child.module}.{alias.name}"
                    yield name if name in modules else str(child.module)
            else:
                yield from within(child)

    for path in product if paths is None else paths:
        found = dict.fromkeys(within(ast.parse(path.read_text())))
        yield from ((module_of(path), name) for name in found if name.split(".")[0] in PACKAGES)


def allowed_in(room):
    """What a room may import; ``None`` if it has no line in the table."""
    return MAY_IMPORT.get("extensions" if room.startswith("extensions.") else room)


def wrong_imports():
    """Imports that the rooms do not allow: the imported modules by the importing one."""
    found: dict[str, list[str]] = {}
    for module, imported in imports():
        room, other = room_of(module), room_of(imported)
        allowed = allowed_in(room) or set()
        if (
            room != other
            and other not in allowed
            and not (allowed is ANYTHING and not other.startswith("extensions."))
            and not any(f"{imported}.".startswith(f"{name}.") for name in allowed)
        ):
            found.setdefault(module, []).append(imported)
    return {module: sorted(names) for module, names in sorted(found.items())}


def _docstrings(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            value = first.value if isinstance(first, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value


def code_lines(text, tree):
    """The numbers of the lines of code."""
    lines = text.splitlines()
    no_code = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    found = {
        line
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in no_code
        for line in range(token.start[0], token.end[0] + 1)
        if lines[line - 1].strip()
    }
    for text_node in _docstrings(tree):
        found.difference_update(range(text_node.lineno, (text_node.end_lineno or 0) + 1))
    return found


def _functions(node, name=""):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            own = f"{name}.{child.name}".lstrip(".")
            if not isinstance(child, ast.ClassDef):
                yield own, child
            yield from _functions(child, own)
        else:
            yield from _functions(child, name)


def sizes():
    """Lines of code of the product, its core and the tests, and of what is too long."""
    totals = dict.fromkeys(("product", "core", "tests"), 0)
    files: dict[str, int] = {}
    functions: dict[str, int] = {}
    for path in python_files(*PACKAGES, "tests", "benchmarks"):
        name, text = str(path.relative_to(ROOT)), path.read_text()
        tree = ast.parse(text)
        lines = code_lines(text, tree)
        room = room_of(module_of(path))
        if "tests" in path.relative_to(ROOT).parts:
            totals["tests"] += len(lines)
        elif room != "benchmarks":
            totals["product"] += len(lines)
            if not room.startswith(("extensions", "serving.page")):
                totals["core"] += len(lines)
        if len(lines) > MAX_FILE:
            files[name] = len(lines)
        for function, node in _functions(tree):
            own = len(lines.intersection(range(node.lineno, (node.end_lineno or 0) + 1)))
            if own > MAX_FUNCTION:
                functions[f"{name}: {function}"] = own
    return {"lines": totals, "files": files, "functions": functions}


def measure():
    return {**sizes(), "imports": wrong_imports()}


def read_record():
    """The record, without the files of an extension that is deleted or of the benchmarks."""
    record = json.loads(RECORD.read_text())
    for kind in ("files", "functions"):
        record[kind] = {n: lines for n, lines in record[kind].items() if not _is_deleted(n)}
    return record


def _is_deleted(name):
    first, second, *_ = Path(name).parts
    folder = {"benchmarks": "benchmarks", "extensions": f"extensions/{second}"}.get(first, "")
    return not (ROOT / folder).exists()


def count(entries):
    return sum(len(entry) if isinstance(entry, list) else 1 for entry in entries.values())


def write_record():
    """Write what there is today, and print how the numbers changed."""
    before, now = {}, measure()
    with contextlib.suppress(FileNotFoundError, ValueError):  # such as that of a merge
        before = read_record()
    for name, lines in now["lines"].items():
        print(f"{name}: {lines:,} lines of code")
        now["lines"][name] = -(-lines // STEP) * STEP
    for name in ("files", "functions", "imports"):
        was, is_now = count(before.get(name, {})), count(now[name])
        print(f"{name} on the list: {was}, now {is_now}{' (MORE)' if is_now > was else ''}")
    RECORD.write_text(json.dumps(now, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Record what is too long or imported wrongly.")
    parser.add_argument("--record", action="store_true", required=True)
    parser.parse_args()
    write_record()
