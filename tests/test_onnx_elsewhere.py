"""The code of docs/how-to/onnx-elsewhere.md, run against the shipped bundle."""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ade_base.pictures.read import read_image
from serving.engine.bundle import open_bundle
from serving.engine.noise import NoiseStream, sample_key
from serving.engine.signatures import OPERATIONS, graphs_of, inputs_of, outputs_of
from tests.helpers import PRETRAINED, ROOT, npm_install, tool
from tests.test_docs import blocks

PAGE = ROOT / "docs" / "how-to" / "onnx-elsewhere.md"
EXAMPLES = PAGE.parent / "examples"
CAT = ROOT / "serving" / "examples" / "cat.png"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder for the page's code."""
    (tmp_path / "bundle").symlink_to(PRETRAINED)
    shutil.copy(CAT, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def expected(pretrained_engine):
    """The service's score."""
    return pretrained_engine.score(read_image(CAT.read_bytes()).pixels[None])[0].bpd


def test_python(folder, expected):
    """Any noise gives nearly the service's number; the service's noise gives exactly it."""
    namespace: dict[str, Any] = {}
    plain, noise, openvino, torchscript = blocks(PAGE, "python")
    exec(plain, namespace)
    assert 8 + namespace["parts"].sum() == pytest.approx(expected, abs=0.05)
    exec(noise, namespace)
    assert 8 + namespace["parts"].sum() == pytest.approx(expected, abs=1e-6)
    exec(torchscript, namespace)
    assert 8 + float(namespace["parts"].sum()) == pytest.approx(expected, abs=1e-4)
    assert '"INFERENCE_PRECISION_HINT": "f32"' in openvino


def test_openvino(folder, expected, capsys):
    pytest.importorskip("openvino")
    plain, noise, openvino, _ = blocks(PAGE, "python")
    exec(plain + noise + openvino, {})
    (found,) = re.findall(r"OpenVINO: \[([\d.]+)\]", capsys.readouterr().out)
    assert float(found) == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_javascript(folder, expected):
    """In Node.js, and on a web page."""
    npm_install(folder, "onnxruntime-node@1", "pngjs@7", "onnxruntime-web@1")
    for name in ("noise.mjs", "score.mjs", "score.html"):
        shutil.copy(EXAMPLES / name, folder)
    done = subprocess.run(["node", "score.mjs"], capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[-1]) == pytest.approx(expected, abs=1e-6)
    assert on_page(folder, "score.html") == pytest.approx(expected, abs=1e-5)


def on_page(folder, name):
    """The number at the end of a web page's text."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed (apt-get install chromium)")
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(f"http://localhost:{server.server_port}/{name}")
            page.wait_for_function("document.body?.innerText.includes('bits')", timeout=60_000)
            text: str = page.inner_text("body")
            browser.close()
        server.shutdown()
    return float(text.split()[-1])


def test_the_shapes_in_the_cpp_code():
    (code,) = blocks(PAGE, "cpp")
    (listed,) = re.findall(r"shapes(\{\{.*\}\});", code)
    shapes = json.loads(listed.replace("{", "[").replace("}", "]"))
    manifest = open_bundle(PRETRAINED).manifest
    assert shapes == [[1, *shape] for shape in manifest["latent_shapes"]]
    images = ", ".join(map(str, [1, *manifest["image_shape"]]))
    assert code.count(f"({{{images}}}") == 2  # images and u


@pytest.mark.slow
def test_cpp(folder):
    compiler = tool("g++")
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")  # imports setuptools
    (code,) = blocks(PAGE, "cpp")
    Path("score.cpp").write_text(code)
    libraries = cpp_extension.library_paths()
    command = [compiler, "-std=c++17", "score.cpp", "-o", "score"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += [f"-I{path}" for path in cpp_extension.include_paths()]
    command += [f"-{option}{path}" for path in libraries for option in ("L", "Wl,-rpath,")]
    command += ["-ltorch", "-ltorch_cpu", "-lc10"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(["./score"], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout.removeprefix("bits per dimension: ")) < 16


def test_the_test_vector():
    text = PAGE.read_text()
    key = sample_key(7, 3)
    words = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(4)
    assert f"`{key.hex()}`" in text
    assert ", ".join(f"`{int(word):016x}`" for word in words) in text
    for values in (NoiseStream(key).uniform((3,)), NoiseStream(key).normal((4,))):
        (row,) = re.findall(rf"an array of {len(values)} \w+ numbers \| (.*) \|", text)
        assert np.allclose([float(value) for value in row.split(", ")], values, atol=5e-8)


def test_the_tables_are_the_signatures():
    rows = dict(re.findall(r"^\| (`[a-z_`, ]+`) \| (.* \| .*) \|$", PAGE.read_text(), re.MULTILINE))
    for graph in graphs_of(OPERATIONS):
        (row,) = [text for names, text in rows.items() if f"`{graph}`" in names]
        for name in (*inputs_of(graph, 1), *outputs_of(graph, 1)):
            assert f"`{name.replace('_0', '_i')}`" in row, (graph, name)


def test_the_web_page_names_the_weights():
    """onnxruntime-web gets only the bytes of a graph, and reads this name from them."""
    page = (EXAMPLES / "score.html").read_text()
    assert 'externalData: [{ path: "model.safetensors"' in page
    assert b"model.safetensors" in (PRETRAINED / "score.onnx").read_bytes()
