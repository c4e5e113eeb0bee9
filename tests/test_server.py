"""The contract over HTTP, on a real TorchServe with the shipped bundle."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

import httpx
import numpy as np
import pytest
from PIL import Image

from ade_base.ports import VARIABLES, free_ports
from ade_cli.main import main
from ade_client.client import AdeClient, AdeError, ScoreResult
from ade_model.checkpoint import save_model
from handlers.service.options import ServingOptions
from handlers.torchserve.configuration import ServerFolder, write_configuration
from tests.helpers import PRETRAINED, ROOT, encode, make_model, narrow, npy, wait_for
from tests.service import RunningService, error_of_serve

EXAMPLE = ROOT / "serving" / "examples" / "cat.png"
OPERATIONS = ("sample", "encode", "reconstruct", "score")


def test_java_reads_folders_of_any_name(tmp_path):
    """Java reads properties as Latin-1, and log4j2 its file as XML, at an address that is a URI."""
    folder = ServerFolder(tmp_path / "José & #1")
    folder.path.mkdir()
    command, environment = write_configuration(
        folder, ["score"], ServingOptions(), tmp_path / "R&D"
    )
    text = (folder.path / "config.properties").read_bytes().decode("latin-1")
    properties = dict(line.split("=", 1) for line in text.splitlines())
    assert json.loads(f'"{properties["model_store"]}"') == str(folder.store)
    assert properties["allowed_urls"] == "(?!)" and properties["enable_model_api"] == "false"
    (log,) = [word for word in command if word.startswith("-Dlog4j")]
    found = Path(urllib.parse.unquote(urllib.parse.urlsplit(log.partition("=")[2]).path))
    assert found.parent == folder.path
    (file,) = ElementTree.parse(found).iter("RollingFile")
    assert file.attrib["fileName"] == "${env:LOG_LOCATION}/torchserve.log"
    assert environment["LOG_LOCATION"] == str(tmp_path / "R&D")


@pytest.fixture(scope="module")
def client(service):
    with AdeClient(service.url) as made:
        yield made


def post(service, operation, data=None, content_type="image/png", **options):
    headers = {"Content-Type": content_type} if data is not None else {}
    return httpx.post(
        f"{service.url}/predictions/{operation}",
        content=data,
        headers=headers,
        timeout=60,
        **options,
    )


def error_of(answer):
    body = answer.json()
    assert set(body) == {"error"} and set(body["error"]) <= {"code", "message", "index"}, body
    assert answer.headers["content-type"] == "application/json"
    assert "Traceback" not in answer.text and 'File "' not in answer.text
    return body["error"]


def test_a_picture_reproduces_itself(service):
    first = post(
        service,
        "sample",
        json.dumps({"n": 5, "kind": "density", "temperature": 0.7}).encode(),
        "application/json",
    )
    text = Image.open(io.BytesIO(first.content)).text
    values = {
        "seed": int(text["ade:seed"]),
        "index": int(text["ade:index"]),
        "n": int(text["ade:n"]),
        "kind": text["ade:kind"],
        "temperature": float(text["ade:temperature"]),
    }
    again = post(service, "sample", json.dumps(values).encode(), "application/json")
    assert again.content == first.content
    assert text["ade:model"] == first.headers["x-ade-model"]


def test_image_i_depends_on_seed_and_index_alone(client):
    whole = client.sample(40, seed=3).images
    assert np.array_equal(client.sample(3, seed=3, index=17).images, whole[17:20])
    answer = client.sample(2, seed=3, index=5)
    assert np.array_equal(answer.images, whole[5:7]) and answer.seed == 3
    assert client.sample().seed != client.sample().seed


def test_the_score_does_not_depend_on_worker_or_batch(service, client, real_images):
    """Sixty-four requests at once reach all workers, in batches of all sizes."""
    data = encode(Image.fromarray(real_images[0]), "PNG")
    others = [encode(Image.fromarray(image), "PNG") for image in real_images[1:33]]
    with ThreadPoolExecutor(64) as pool:
        answers = list(
            pool.map(lambda d: post(service, "score", d), [d for o in others for d in (data, o)])
        )
    assert {a.status_code for a in answers} == {200}
    assert len({a.content for a in answers[::2]}) == 1
    assert len({a.headers["x-ade-batch"] for a in answers}) > 1
    together = client.score(real_images[:33])
    for a, b in zip(answers[1::2], together[1:], strict=True):
        assert a.json()["results"][0]["bpd"] == b.bpd


def test_a_broken_image_among_good_ones(client, real_images):
    images = [real_images[0], b"junk", real_images[1]]
    scores = client.score(images)
    assert isinstance(scores[1], AdeError) and scores[1].index == 1
    assert [scores[0], scores[2]] == client.score(real_images[:2])
    made = client.reconstruct(images)
    assert isinstance(made[1], AdeError) and made[0].image.shape == (32, 32, 3)
    assert made[0].psnr > 10
    with pytest.raises(AdeError) as caught:
        client.encode(images)
    assert caught.value.status == 415 and caught.value.index == 1


def test_encode_then_decode(client, real_images):
    latents = client.encode(real_images[:2])
    assert latents.model == client.sample(1).model
    made = client.decode(latents.z)
    again = np.stack([r.image for r in client.reconstruct(real_images[:2])])
    assert np.abs(made.astype(int) - again).max() <= 1


def test_files_arrays_pillow_images_and_paths_score_alike(client, tmp_path, real_images):
    path = tmp_path / "image.webp"
    Image.fromarray(real_images[0]).save(path, lossless=True)
    results = client.score(
        [real_images[0], Image.fromarray(real_images[0]), path, str(path), path.read_bytes()]
    )
    for one in (real_images[0], path.read_bytes(), Image.open(path)):  # instead of a list
        results += client.score(one)
    assert len({r.bpd for r in results if isinstance(r, ScoreResult)}) == 1 and len(results) == 8


def as_json(**values):
    return json.dumps(values).encode(), "application/json"


def test_clients_that_call_every_body_a_form(service):
    """curl, and urllib, whose default content type is that of a URL-encoded form."""
    url, path = f"{service.url}/predictions/score", ROOT / "serving" / "examples" / "cat.png"
    expected = httpx.post(url, content=path.read_bytes()).json()
    done = subprocess.run(
        ["curl", "-sS", "--data-binary", f"@{path}", url], capture_output=True, check=True
    )
    assert json.loads(done.stdout) == expected
    with urllib.request.urlopen(url, path.read_bytes()) as answer:
        assert json.load(answer) == expected


def test_head_works_on_the_page_where_get_does(service):
    for path in ("/readyz", "/openapi.json"):
        got, head = (ask(service.page + path, timeout=60) for ask in (httpx.get, httpx.head))
        assert head.status_code == got.status_code == 200 and head.content == b""
        assert head.headers["content-length"] == got.headers["content-length"]


def test_status(service, client, monkeypatch, capsys):
    client.sample(seed=1)
    with pytest.raises(AdeError):
        client.sample(n=0)
    # TorchServe reads the counts from its workers' logs.
    wait_for(lambda: 'status="422"' in httpx.get(f"{service.metrics}/metrics").text)
    for variable, port in service.variables.items():
        monkeypatch.setenv(variable, port)
    assert main(["status"]) == 0
    text = capsys.readouterr().out
    assert "ready       yes" in text and "backend     onnxruntime/CPU" in text
    assert "READY (pid" in text
    assert main(["status", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    manifest = json.loads((PRETRAINED / "manifest.json").read_text())
    assert (
        found["answers"]["model"]
        == f"{manifest['name']}@{manifest['files']['model.safetensors'][:12]}"
    )
    assert set(found["models"]) == set(OPERATIONS) and found["models"]["score"]["queued"] == 0
    assert all(
        w["state"] == "READY" and w["memory_mib"] > 50
        for m in found["models"].values()
        for w in m["workers"]
    )
    assert found["requests"]["2xx"] > 0 and found["requests"]["4xx"] > 0
    assert found["versions"]["torchserve"]
    assert "error       20" in text and "sample 422 bad_parameter: n must be from 1 to 256" in text
    assert {"time", "id", "ms", "batch"} <= set(found["last_errors"][-1])
    assert main(["status", "--host", "::1"]) == 2
    assert "takes an IPv4 address or a name, got ::1" in capsys.readouterr().err
    for variable, unused in zip(service.variables, free_ports(len(VARIABLES)), strict=True):
        monkeypatch.setenv(variable, str(unused))
    assert main(["status"]) == 1
    away = capsys.readouterr().out
    assert "ready       no" in away
    assert "workers     unknown: no service of this user is on these ports\n" in away


def test_reasons_and_groups(client, real_images):
    noise = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), np.uint8)
    (result,) = client.score(noise)
    assert result.ood and result.explain[0].p_value < 0.001
    images = np.concatenate([real_images[:9], noise])
    group = client.score_group(images, fdr=0.1)
    assert group.p_value is not None and group.p_value < 0.05
    assert group.discoveries == sum(r.discovery for r in group.results) >= 1
    assert group.results[-1].discovery
    at_half = client.score_group(images, alpha=0.5)
    assert at_half.rejected == sum(r.p_value <= 0.5 for r in group.results) > group.rejected


@pytest.mark.slow
def test_the_other_backend_and_a_further_bundle(real_images, small_images, tmp_path):
    """TorchScript agrees with ONNX; the further bundle answers under its own name."""
    from export.write import export_bundle

    (tmp_path / "checkpoint").mkdir()
    save_model(
        make_model(narrow("gan", inference_share=0.0).model),
        tmp_path / "checkpoint",
        {"recipe": "gan", "data": "corners", "splits": {}, "seed": 0, "images_seen": 0},
    )
    export_bundle(tmp_path / "checkpoint", tmp_path / "sampler", "sampler", small_images[:40], None)
    running = RunningService(
        PRETRAINED, tmp_path / "sampler", options=("--backend", "torchscript", "--workers", "1")
    )
    try:
        from serving.engine.engine import InferenceEngine

        expected = InferenceEngine(PRETRAINED, device="cpu", operations=["score"]).score(
            real_images[:20]
        )
        with AdeClient(running.url) as client:
            for a, b in zip(client.score(real_images[:20]), expected, strict=True):
                assert abs(a.bpd - b.bpd) <= 1e-4
        assert (
            post(running, "score", EXAMPLE.read_bytes()).headers["x-ade-backend"]
            == "torchscript/cpu"
        )
        with AdeClient(running.url, model="sampler") as sampler:
            assert sampler.sample(3, seed=1).images.shape == (3, 8, 8, 3) and sampler.is_ready()
        for operation in ("encode", "reconstruct", "score"):
            answer = post(running, f"sampler-{operation}", EXAMPLE.read_bytes())
            assert answer.status_code == 422 and error_of(answer)["code"] == "not_available"
            assert f"sampler (gan) has no {operation}" in error_of(answer)["message"]
    finally:
        assert running.stop(signal.SIGINT) == []
    assert running.process.returncode == 0, "".join(running.output)


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_make_serve_gives_the_same_bytes_and_leaves_no_process_behind(service, real_images, sign):
    """Ctrl-C reaches make and its child, SIGTERM only make."""
    import psutil

    ports = dict(zip(VARIABLES, free_ports(len(VARIABLES)), strict=True))
    environment = {**os.environ, **{VARIABLES[n][0]: str(p) for n, p in ports.items()}}
    process = subprocess.Popen(
        ["make", "serve", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.serve"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    limit = threading.Timer(180, os.killpg, (process.pid, signal.SIGKILL))
    limit.start()
    assert process.stdout is not None
    for line in process.stdout:
        if "Ctrl-C stops everything." in line:
            break
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 7
    url = f"http://127.0.0.1:{ports['inference']}"
    for operation, content, content_type in (
        ("score", npy(real_images[:40]), "application/x-npy"),
        ("sample", *as_json(n=9, seed=4)),
    ):
        headers = {"Content-Type": content_type}
        answer = httpx.post(
            f"{url}/predictions/{operation}", content=content, headers=headers, timeout=60
        )
        assert answer.status_code == 200
        assert answer.content == post(service, operation, content, content_type).content
    if sign == signal.SIGINT:
        os.killpg(process.pid, sign)
    else:
        process.send_signal(sign)
    process.communicate(timeout=60)
    limit.cancel()
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_make_fit_requires_a_folder_of_images():
    command = ["make", "fit", "DATA=", f"VENV={sys.prefix}", "-o", f"{sys.prefix}/.fit"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "make fit needs DATA=DIR" in done.stderr


def mean_bpd(service, images):
    served = [
        result["bpd"]
        for first in range(0, len(images), 256)
        for result in post(
            service, "score", npy(images[first : first + 256]), "application/x-npy"
        ).json()["results"]
    ]
    assert len(served) == len(images)
    return float(np.mean(served))


@pytest.mark.slow
def test_bpd_over_http_is_that_of_evaluate(service, real_images):
    import torch

    from ade_model.checkpoint import load_model
    from training.evaluate import bpd_of

    expected = bpd_of(load_model(PRETRAINED), real_images, torch.device("cpu"), 1).mean()
    # 300 images with other noise: the means differ by more than with 10,000.
    assert abs(mean_bpd(service, real_images) - float(expected)) < 0.005


def test_a_taken_port_is_named(service):
    assert "set ADE_INFERENCE_PORT to another" in error_of_serve(**service.variables)


def test_a_missing_gpu_is_reported_at_once():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    expected = "PyTorch finds no CUDA device|there is no NVIDIA driver"
    assert re.search(expected, error_of_serve("--device", "cuda"))
