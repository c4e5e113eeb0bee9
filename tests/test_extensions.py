"""The product works without its extensions: each is a folder that can be deleted."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ade_base.extensions import FOLDER, Extension
from tests.helpers import ROOT

NAMES = sorted(path.parent.name for path in FOLDER.glob("*/plugin.py"))
TREE = ("ade_base", "ade_cli", "ade_client", "ade_model", "export", "extensions", "fitting")
TREE += ("handlers", "serving", "tests", "training", "conftest.py", "pyproject.toml")
SCRIPT = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", str(f))]
sys.path.insert(0, ".")
import ade_base.extensions as seam
import pathlib
assert seam.FOLDER == pathlib.Path.cwd() / "extensions"
from ade_cli.main import VERBS, main
import ade_cli.export, ade_cli.fit, ade_cli.score, ade_cli.serve
import handlers.launch.engines, handlers.process.launcher, handlers.service.application
import handlers.service.worker, export.write, fitting.pipeline, serving.page.app, training.loop
try:
    main(["--help"])
except SystemExit:
    pass
"""
VERBS_OF = {
    "codec": {"compress", "decompress"},
    "comparison": {"compare"},
    "gate_reports": {"gate", "ood-bench"},
}


@pytest.mark.parametrize("deleted", [("*",), *((name,) for name in NAMES)], ids="-".join)
def test_the_core_works_without_extensions(deleted: tuple[str, ...], tmp_path: Path) -> None:
    """Its modules are imported, and the help has the verbs of the extensions that are left."""
    for name in TREE:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.webp")
            shutil.copytree(source, tmp_path / name, ignore=ignored)
        else:
            shutil.copy(source, tmp_path)
    for name in deleted:
        shutil.rmtree(tmp_path / "extensions" / ("" if name == "*" else name))
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = set(re.findall(r"^ {4}(\S+)", done.stdout, re.MULTILINE))
    gone = NAMES if deleted == ("*",) else deleted
    for name, verbs in VERBS_OF.items():
        assert verbs.isdisjoint(words) if name in gone else verbs <= words
    assert {"serve", "score", "fit"} <= words


def test_a_misspelt_hook_fails() -> None:
    with pytest.raises(TypeError, match="verb"):
        Extension(verb={})  # type: ignore[call-arg]
