"""The product works without its extensions: each is a folder that can be deleted."""

import re
import shutil
import subprocess
import sys

import pytest

from ade_base.extensions import FOLDER, Extension, load
from tests.helpers import ROOT, WORDS_OF_EXTENSIONS
from tests.house import PACKAGES

NAMES = sorted(path.parent.name for path in FOLDER.glob("*/plugin.py"))
PREPARED = """
import pathlib, sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", str(f))]
sys.path.insert(0, ".")
import ade_base.extensions as seam
assert seam.FOLDER == pathlib.Path.cwd() / "extensions"
"""
IMPORTS_AND_HELP = """
from ade_cli.main import VERBS, main
import ade_cli.export, ade_cli.fit, ade_cli.score, ade_cli.serve
import handlers.launch.launcher, handlers.service.application
import handlers.service.worker, export.write, fitting.pipeline, serving.page.app, training.loop
try:
    main(["--help"])
except SystemExit:
    pass
"""
COLLECTS_TESTS = """
import pytest
sys.exit(pytest.main(["--collect-only", "-qq", "-p", "no:cacheprovider"]))
"""


def copy_tree(into, deleted):
    """Copy the code but for these folders; what else is there are links."""
    for source in ROOT.iterdir():
        if source.name.startswith(".") or source.name in deleted:
            continue
        if source.name in (*PACKAGES, "tests", "benchmarks"):
            shutil.copytree(
                source, into / source.name, ignore=shutil.ignore_patterns("__pycache__", "*.webp")
            )
        elif source.suffix in (".py", ".toml"):
            shutil.copy(source, into)
        else:
            (into / source.name).symlink_to(source)
    for name in deleted:
        shutil.rmtree(into / name, ignore_errors=True)


def run_in(tree, script):
    command = [sys.executable, "-c", PREPARED + script]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return done.stdout


@pytest.mark.parametrize("deleted", ["extensions", *(f"extensions/{name}" for name in NAMES)])
def test_the_core_works_without_extensions(deleted, tmp_path):
    """Its modules are imported, and the help has the verbs of the extensions that are left."""
    copy_tree(tmp_path, [deleted])
    help_text = run_in(tmp_path, IMPORTS_AND_HELP)
    shown = set(re.findall(r"^ {4}(\S+)", help_text, re.MULTILINE))
    left = {path.parent.name for path in tmp_path.glob("extensions/*/plugin.py")}
    verbs = {name: set(extension(name).verbs) for name in NAMES}
    for name, own in verbs.items():
        assert own <= shown if name in left else own.isdisjoint(shown)
    assert {"serve", "score", "fit"} <= shown


def test_the_tests_are_collected_without_extensions_and_benchmarks(tmp_path):
    copy_tree(tmp_path, ["extensions", "benchmarks"])
    collected = run_in(tmp_path, COLLECTS_TESTS)
    assert "tests/test_contract.py" in collected and "extensions/" not in collected


def extension(name):
    found = load(f"extensions.{name}.plugin:EXTENSION")
    assert isinstance(found, Extension)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_words_of_each_extension_are_known(name):
    """So that the commands in the documentation can be told apart from misspelt ones."""
    its = extension(name)
    words = {*its.verbs, *its.engines, *its.score_engines, *its.datasets}
    words |= {f"--with-{graphs}" for graphs in its.graphs}
    assert words == WORDS_OF_EXTENSIONS.get(name, set())


def test_a_misspelt_hook_fails():
    with pytest.raises(TypeError, match="verb"):
        Extension(verb={})  # type: ignore[call-arg]
