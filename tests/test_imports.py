"""Who may import whom; and that serving needs no training packages."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.conftest import ROOT

OURS = ("ade_model", "training", "export", "fitting", "serving", "handlers", "ade_cli")
# training reads image files through serving.images, so that trained and served pixels are decoded alike, and its files are
# held by one process at a time as those of bulk scoring are.
ALLOWED = {
    "ade_model": {"ade_model"},
    "training": {"training", "ade_model", "serving.files", "serving.images", "serving.locks"},
    "export": {"export", "ade_model", "serving"},
    "fitting": {"fitting", "ade_model", "training", "export", "serving"},
    "serving": {"serving"},
    "handlers": {"handlers", "serving"},
    "ade_cli": set(OURS),
}


@pytest.mark.parametrize("package", OURS)
def test_import_direction(package: str) -> None:
    for path in (ROOT / package).glob("**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: imports are absolute"
                names = [node.module or ""]
            for name in names:
                if name.split(".")[0] in OURS:
                    assert any(name == a or name.startswith(a + ".") for a in ALLOWED[package]), f"{path}: {name}"


def test_serving_needs_no_training_packages() -> None:
    script = ("import sys\n"
              "for name in ('lightning_fabric', 'tensorboard', 'onnx', 'onnxscript', 'training', 'export',\n"
              "             'ade_model'):\n"
              "    sys.modules[name] = None\n"
              "import ade_cli.main, ade_cli.serve, handlers.base, handlers.front, handlers.score, serving.page.app\n"
              "import serving.client, serving.service\n")
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_a_verb_whose_packages_are_not_installed_says_so() -> None:
    script = "import sys; sys.modules['scipy'] = None; import ade_cli.main; ade_cli.main.main(['fit', '--help'])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "ade fit: scipy" in done.stderr and "make fit" in done.stderr


def test_importing_the_engine_loads_no_torch() -> None:
    script = "import sys, serving.service; assert not {'torch', 'gradio', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
