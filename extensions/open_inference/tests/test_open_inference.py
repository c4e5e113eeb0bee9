"""Requests of the Open Inference Protocol, to the application with its worker processes."""

from __future__ import annotations

import gzip
import io
import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http

from extensions.open_inference import translation as v2
from handlers.limits import MAX_REQUEST_BYTES
from handlers.service import worker
from handlers.service.options import ServingOptions
from handlers.service.worker import WorkerSettings
from serving.api.journal import last_errors
from serving.api.responses import Response
from serving.engine.bundle import open_bundle
from serving.engine.signatures import OPERATIONS
from tests.helpers import PRETRAINED, ROOT, npy, suspended, wait_for
from tests.test_process import RunningApplication, error_of


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with RunningApplication(tmp_path_factory.mktemp("process")) as made:
        made.wait()
        yield made


def v2_error_of(answer):
    assert set(answer.json()) == {"error"} and answer.headers["content-type"] == "application/json"
    assert isinstance(answer.json()["error"], str)
    return str(answer.json()["error"])


@pytest.fixture
def triton(app):
    client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{app.port}")
    yield client
    client.close()


def tensor(array, name, datatype, binary):
    made = tritonclient.http.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def test_health_and_metadata(app, triton):
    assert triton.is_server_live() and triton.is_server_ready()
    assert triton.get_server_metadata()["extensions"] == ["binary_tensor_data"]
    for operation in OPERATIONS:
        assert triton.is_model_ready(operation) and triton.is_model_ready(operation, "1")
    found = triton.get_model_metadata("score", "1")
    assert found["name"] == "score" and found["versions"] == ["1"]
    assert found["platform"] == "onnxruntime_onnx"
    ready = httpx.get(f"{app.url}/v2/models/score/ready")
    assert ready.json() == {"name": "score", "ready": True}
    assert found["inputs"] == [{"name": "images", "datatype": "UINT8", "shape": [-1, 32, 32, 3]}]
    assert not triton.is_model_ready("other") and not triton.is_model_ready("score", "2")


@pytest.mark.parametrize("method", ["OPTIONS", "DELETE", "PATCH", "TRACE"])
def test_methods_that_are_refused(app, method):
    path = "/v2/models/score/infer"
    answer = httpx.request(method, app.url + path)
    assert answer.status_code == 405 and answer.headers["allow"] == "POST"
    assert v2_error_of(answer) == f"{path} takes POST, not {method}"


@pytest.mark.parametrize("path", ["/v2", "/v2/health/live"])
def test_head_works_where_get_does(app, path):
    got, head = httpx.get(app.url + path), httpx.head(app.url + path)
    assert head.status_code == got.status_code == 200 and head.content == b""
    assert head.headers["content-length"] == got.headers["content-length"]


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_answers_are_those_of_the_api(app, triton, binary):
    images = np.stack(
        [
            np.full((32, 32, 3), 90, np.uint8),
            np.eye(32, dtype=np.uint8)[..., None] + np.zeros(3, np.uint8),
        ]
    )
    given = [tensor(images, "images", "UINT8", binary)]

    def infer(operation, inputs, *names, **parameters):
        outputs = [tritonclient.http.InferRequestedOutput(name, binary) for name in names]
        answer = triton.infer(
            operation, inputs, outputs=outputs, request_id="mine", parameters=parameters or None
        )
        assert answer.get_response()["id"] == "mine"
        found = triton.infer(operation, inputs, parameters=parameters or None)
        assert set(names) <= {one["name"] for one in found.get_response()["outputs"]}
        return [answer.as_numpy(name) for name in names]

    def api(operation, **fields):
        files = {} if operation == "sample" else {"files": {"image": npy(images)}}
        return httpx.post(f"{app.url}/v1/{operation}", data=fields, **files, timeout=60)

    results = api("score", samples="2").json()["results"]
    bpd, p_value, accepted = infer("score", given, "bpd", "p_value", "accepted", samples=2)
    assert bpd.tolist() == [one["bpd"] for one in results]
    assert p_value.tolist() == pytest.approx(
        [np.nan if one["p_value"] is None else one["p_value"] for one in results], nan_ok=True
    )
    assert accepted.tolist() == [one["decision"] == "accept" for one in results]
    with np.load(io.BytesIO(api("encode", format="npz").content)) as arrays:
        (z,) = infer("encode", given, "z_0")
        assert z.dtype == np.float32 and np.array_equal(z, arrays["z_0"])
    answer = api("reconstruct", format="npy")
    made, psnr = infer("reconstruct", given, "images", "psnr")
    assert np.array_equal(made, np.load(io.BytesIO(answer.content)))
    assert ",".join(f"{one:.4f}" for one in psnr) == answer.headers["x-ade-psnr"]
    numbers = [tensor(np.array([v]), name, "INT64", binary) for name, v in (("n", 2), ("seed", 7))]
    images_of_7, seed = infer("sample", numbers, "images", "seed", kind="density")
    expected = api("sample", n="2", seed="7", kind="density", format="npy")
    assert np.array_equal(images_of_7, np.load(io.BytesIO(expected.content))) and seed == [7]


@pytest.mark.parametrize(
    "change, status",
    [
        ({"inputs": None}, 400),
        ({"parameters": [1]}, 400),
        ({"parameters": {"alpha": json.loads("[" * 300 + "]" * 300)}}, 400),
        ({"parameters": {"sede": 1}}, 422),
        ({"parameters": {"samples": 0}}, 422),
        ({"outputs": [{"name": "other"}]}, 422),
        ({"outputs": [{}]}, 400),
        ({"shape": [1, 32, 32]}, 400),
        ({"shape": [1, 16, 64, 3]}, 422),
        ({"shape": "x"}, 400),
        ({"shape": [1] * 100, "data": [1]}, 400),
        ({"shape": [0, 2**40, 2**40, 2**40], "data": []}, 400),
        ({"shape": [0] + [2**25] * 7, "data": []}, 400),
        ({"shape": [2**63] * 300}, 400),
        ({"shape": [2**63] * 4}, 400),
        ({"name": "x" * 2**20, "shape": "x"}, 400),
        ({"name": "x" * 2**20}, 422),
        ({"datatype": "FP16"}, 422),
        ({"datatype": "FP32"}, 422),
        ({"data": [0.5] * 3072}, 400),
        ({"data": [256] * 3072}, 400),
        ({"data": ["x"] * 3072}, 400),
        ({"datatype": "FP32", "data": ["9"] * 3072}, 400),
        ({"name": "image"}, 422),
        ({"parameters of the input": {"binary_data_size": 5}}, 400),
    ],
    ids=str,
)
def test_errors(app, change, status):
    one = {"name": "images", "shape": [1, 32, 32, 3], "datatype": "UINT8", "data": [9] * 3072}
    request: dict[str, Any] = {"inputs": [one]}
    for name, value in change.items():
        if name == "parameters of the input":
            one["parameters"] = value
        else:
            (one if name in one else request)[name] = value
    answer = httpx.post(f"{app.url}/v2/models/score/infer", json=request)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"} and len(answer.json()["error"]) < 300


def test_requests_that_cannot_be_translated_are_counted_and_logged(tiny_bundle, tmp_path):
    settings = WorkerSettings(
        *(str(tiny_bundle), "tiny@1", open_bundle(tiny_bundle).digest, "sample", "tiny-sample"),
        *("1", str(tmp_path), ServingOptions(device="cpu")),
    )
    service = worker.load_service(settings)
    bodies = {"tensors": b"[", "other": b'{"inputs": [], "outputs": [{"name": "other"}]}'}
    requests = [
        {"id": id, "probe": False, "content_type": "application/json", "v2": len(body)}
        for id, body in bodies.items()
    ]
    answers = worker.answer_batch(service, "sample", {"requests": requests}, [*bodies.values()])
    assert [answer.status for answer in answers] == [400, 422]
    assert all(isinstance(json.loads(answer.body)["error"], str) for answer in answers)
    counted = {(name, labels.get("code")): n for name, labels, n in worker.measurements(service)}
    assert counted["ade_requests_total", "malformed_request"] == 1
    assert counted["ade_requests_total", "bad_array"] == 1
    logged = [(entry["id"], entry["status"]) for entry in last_errors(tmp_path)]
    assert logged == [("tensors", 400), ("other", 422)]


def test_a_request_whose_client_leaves_before_a_worker_is_free_is_not_computed(app):
    head = b"POST /v2/models/score/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n"
    with ThreadPoolExecutor(1) as pool:
        with suspended(app.worker("score")):
            first = app.begin(pool, "score")
            with socket.create_connection(("127.0.0.1", app.port)) as gone:
                gone.sendall(head + bytes(9))
                wait_for(lambda: app.queued("score") == 1)
            wait_for(lambda: app.in_flight() == 1 and app.queued("score") == 0)
        assert first.result().status_code == 200


def test_parameters_may_have_a_fraction_of_zero():
    texts = {4.0: "4", 0.5: "0.5", 1e300: "1e+300", "x": "x"}
    assert {value: v2._text(value) for value in texts} == texts


def test_answers_in_json_are_bounded():
    """A number takes several times the bytes that it has in a binary tensor."""
    tensor = np.zeros((400, 20, 400), np.float32)
    out = io.BytesIO()
    np.savez(out, z_0=tensor[None])
    response = Response(200, "application/x-npz", out.getvalue(), {"X-Ade-Model": "a@1"})
    for is_binary, status in ((False, 422), (True, 200)):
        call = v2.Call("encode", "encode", None, {}, is_binary)
        answer = v2.respond(call, response)
        assert answer.status == status and answer.headers["X-Ade-Model"] == "a@1"
        assert is_binary or b"set binary_data_output" in answer.body


def test_the_documented_program_of_tritons_client(app, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "how-to" / "open-inference.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(block.replace("127.0.0.1:8080", f"127.0.0.1:{app.port}"), {})
    assert re.fullmatch(r"\[3\.\d+\] \[ True\]\n", capsys.readouterr().out)


def test_requests_that_are_no_json(app):
    url = f"{app.url}/v2/models/score/infer"
    for length in ("9", "-1", "x", "1" * 5000):
        answer = httpx.post(url, content=b"{}", headers={"Inference-Header-Content-Length": length})
        assert answer.status_code == 400 and "Inference-Header" in answer.json()["error"]
    assert httpx.post(url, content=b"[" * 1000).status_code == 400
    assert httpx.post(url, content=b"[" * 2**20).status_code == 413
    assert httpx.get(url).status_code == 405
    assert "no such model" in v2_error_of(httpx.post(f"{app.url}/v2/models/x/infer"))
    assert "a model has /v2" in v2_error_of(httpx.get(f"{app.url}/v2/models/score/config"))
    assert httpx.get(f"{app.url}/v2/").json() == httpx.get(f"{app.url}/v2").json()
    packed = httpx.post(url, content=gzip.compress(b"{}"), headers={"Content-Encoding": "gzip"})
    assert packed.status_code == 415 and "must not be compressed" in v2_error_of(packed)


def test_errors_of_the_front_and_the_guard_have_its_shape(app):
    url = f"{app.url}/v2/models/score/infer"
    for headers, body, status in (
        ({"Host": "a.example"}, b"", 421),
        ({"Origin": "http://a.example"}, b"", 403),
        ({}, bytes(MAX_REQUEST_BYTES + 1), 413),
    ):
        answer = httpx.post(url, headers=headers, content=body)
        assert answer.status_code == status and v2_error_of(answer)
    assert "there are /predictions" in v2_error_of(httpx.get(f"{app.url}/v2/other"))
    assert error_of(httpx.get(f"{app.url}/v20")) == "not_found"


def test_loses_nothing_in_silence(app):
    """An image would be judged by another calibration, or otherwise, than the client asked for."""

    def ask(inputs, binary=b"", query="", **fields):
        text = json.dumps({"inputs": inputs, **fields}).encode()
        return httpx.post(
            f"{app.url}/v2/models/score/infer{query}",
            content=text + binary,
            headers={"Inference-Header-Content-Length": str(len(text))},
        )

    about = {"name": "images", "shape": [1, 32, 32, 3], "datatype": "UINT8"}
    image = {**about, "data": [9] * 3072}
    in_bytes = {**about, "parameters": {"binary_data_size": 3072}}
    # A proxy may have checked the first.
    twice = b'{"parameters": {"calibration": "a"}, "parameters": {}, "inputs": []}'
    answer = httpx.post(f"{app.url}/v2/models/score/infer", content=twice)
    assert answer.status_code == 400 and "'parameters' more than once" in v2_error_of(answer)
    unpaired = b'{"id": "\\ud800", "inputs": []}'
    answer = httpx.post(f"{app.url}/v2/models/score/infer", content=unpaired)
    assert answer.status_code == 400 and "is not JSON" in v2_error_of(answer)
    for answer, status, message in (
        (ask([image, image]), 400, "several inputs 'images'"),
        (ask([in_bytes], b"\t" * 3073), 400, "has 1 bytes that belong to no input"),
        (ask([image], b"\t"), 400, "has 1 bytes that belong to no input"),
        *(
            (
                ask([{**about, "parameters": {"binary_data_size": size}}], b"\t" * 3072),
                400,
                "binary_data_size must be a number of bytes, at most the 3072 that follow",
            )
            for size in (2**62, 3073, -1, True, 3072.0, "3072")
        ),
        (ask([{**image, **in_bytes}], b"\t" * 3072), 400, "data or binary_data_size"),
        (ask([image], parameters={"format": "npy"}), 422, "format is not a parameter"),
        (ask([image], parameters={"image1": "x"}), 422, "'image1' is not a parameter: images are"),
        (ask([image], parameters={"image": "x"}), 422, "'image' is not a parameter: images are"),
        (ask([image], query="?calibration=night"), 400, "not of the query string"),
        (ask([image], calibration="night"), 422, "the request has no 'calibration'"),
        (
            ask([{**image, "parameters": {"calibration": "night"}}]),
            422,
            "parameters of the tensor 'images' has no 'calibration'; it may have binary_data_size, "
            "content_type",
        ),
        (
            ask([image], outputs=[{"name": "bpd", "parameters": {"classification": 2}}]),
            422,
            "parameters of the tensor 'bpd' has no 'classification'",
        ),
        *(
            (ask([image], parameters={name: value}), 422, f"{name} is not a parameter here")
            for name, value in (("fdr", 0.05), ("map", True), ("explain", True))
        ),
        (ask([image], parameters={"calibration": None}), 422, "must be a string, got null"),
    ):
        assert answer.status_code == status and message in answer.json()["error"], answer.text
    assert ask([in_bytes], b"\t" * 3072).json()["outputs"] == ask([image]).json()["outputs"]
    for parameters in ({"alpha": None, "resize": None}, {"map": False, "explain": "false"}):
        assert ask([image], parameters=parameters).status_code == 200
    assert ask([{**image, "parameters": {"content_type": "np"}}]).status_code == 200


def test_takes_as_many_values_as_the_api():
    bundle = open_bundle(PRETRAINED)
    image = np.full(bundle.image_shape, 255, np.uint8).tolist()
    ones = [[np.ones(shape).tolist() for shape in bundle.latent_shapes]] * 256
    for operation, request in (
        ("score", {"inputs": [{"name": "images", "data": [image] * 256}]}),
        ("sample", {"inputs": [], "parameters": {"latents": ones}}),
    ):
        assert v2._head(json.dumps(request).encode(), operation, bundle).keys() == request.keys()


def test_tells_a_rejected_image_from_one_without_a_verdict(app):
    """Its p-value is a number, too, if alpha is too small for the calibration."""
    one = {"name": "images", "shape": [1, 32, 32, 3], "datatype": "UINT8", "data": [9] * 3072}
    found = {}
    for alpha in (0.05, 1e-6):
        request = {"inputs": [one], "parameters": {"alpha": alpha}}
        answer = httpx.post(f"{app.url}/v2/models/score/infer", json=request).json()
        found[alpha] = {output["name"]: output["data"] for output in answer["outputs"]}
    assert found[0.05]["p_value"] == found[1e-6]["p_value"] != [None]
    assert found[0.05]["accepted"] == found[1e-6]["accepted"] == [False]
    assert (found[0.05]["has_verdict"], found[1e-6]["has_verdict"]) == ([True], [False])


@pytest.mark.parametrize("decision, p_value", [("reject", 0.01), ("no_verdict", None)])
def test_no_image_is_accepted_but_by_a_decision(decision, p_value):
    ood = True if decision == "reject" else None
    results = [{"bpd": 3.0, "p_value": p_value, "ood": ood, "decision": decision}]
    answer = Response(200, "application/json", json.dumps({"results": results}).encode(), {})
    response = v2.respond(v2.Call("score", "score", None, {}, is_binary=False), answer)
    found = {one["name"]: one["data"] for one in json.loads(response.body)["outputs"]}
    assert found["accepted"] == [False] and found["p_value"] == [p_value]
    assert found["has_verdict"] == [decision == "reject"]
