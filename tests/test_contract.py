"""The recorded contract: requests of docs/api.md get the answers in ``data/contract.json``.

The requests are in contract.py, as code; their answers are in the record, one line each. A failing
request means that clients see another answer. If that is intended, record again and read the diff
line by line before committing it::

    python -m tests.test_contract --record

Every engine of ``ade serve`` gives these answers, and so does the service in the process of the
tests, in seconds::

    python -m pytest tests/test_contract.py -k in_process

In an environment (versions, processor) of which there is a record, bodies are compared byte for
byte. Elsewhere rounding may differ: there, numbers are compared within a tolerance and pictures and
arrays by shape and mean, the statistics of ``explain`` by name, and everything else still exactly;
recording there adds the bytes. In all environments, the bodies of the engines that one run tests
are compared byte for byte with each other: `make test` compares the service in process with
TorchServe and process, `make test-ray` with all three.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.util
import io
import json
import math
from importlib import metadata

import httpx
import numpy as np
import pytest
from PIL import Image

from ade_base.system import numerics
from handlers.launch.engines import ENGINES, default_engine
from tests.contract import REQUESTS, SERVERS_OWN
from tests.helpers import DATA, PRETRAINED, ROOT
from tests.in_process import ServiceHere
from tests.service import RunningService

RECORD = DATA / "contract.json"
IN_PROCESS = "in_process"
TOLERANCE = 1e-4
P_VALUE_TOLERANCE = 1e-3  # a p-value moves in steps of 1 / (n + 1)
LONG_LIST = 64  # numbers; a longer list is recorded by its shape and mean
PRESENT = "(any)"  # of a header whose value differs from request to request
VARYING = {"x-ade-batch", "server-timing"}
HEADERS = {"x-ade-model", "x-ade-backend", "x-ade-seed", "x-ade-psnr", "retry-after", *VARYING}
ENVIRONMENT_HEADERS = {"x-ade-backend", "x-ade-psnr"}  # may differ on another machine
FIRST: dict[str, str] = {}  # SHA-256 of the first engine's answers, by request


def environment():
    """Everything that the bytes of an answer may depend on."""
    return {**numerics(), "pillow": metadata.version("pillow")}


def here():
    return json.dumps(environment())


def observed(answer):
    """The part of an answer that is recorded."""
    headers = {
        name: PRESENT if name in VARYING else value
        for name, value in sorted(answer.headers.items())
        if name in HEADERS
    }
    return {
        "status": answer.status_code,
        "type": answer.headers.get("content-type", ""),
        "headers": headers,
        "sha256": hashlib.sha256(answer.content).hexdigest(),
        "body": outline(answer),
    }


def outline(answer):
    """The body, with long arrays and pictures by their shapes and means."""
    kind = answer.headers.get("content-type", "")
    if kind == "application/json":
        return _short(answer.json())
    if kind == "image/png":
        return _picture(answer.content)
    if kind == "application/x-npy":
        return _array(np.load(io.BytesIO(answer.content)))
    if kind == "application/x-npz":
        with np.load(io.BytesIO(answer.content)) as arrays:
            return {name: _array(arrays[name]) for name in arrays.files}
    return answer.text


def _array(array):
    return {
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "mean": float(array.mean(dtype=np.float64)),
    }


def _picture(data):
    image = Image.open(io.BytesIO(data))
    return {"text": getattr(image, "text", {}), **_array(np.asarray(image))}


def _short(value):
    if isinstance(value, dict):
        return {name: _short(item) for name, item in value.items()}
    if isinstance(value, str) and value.startswith("iVBORw0KGgo"):  # a PNG in base64
        return _picture(base64.b64decode(value))
    if isinstance(value, list):
        try:
            array = np.asarray(value, float)
        except (ValueError, TypeError):
            return [_short(item) for item in value]
        return _array(array) if array.size > LONG_LIST else value
    return value


def assert_close(found, expected, where):
    """Equal except for rounding."""
    if isinstance(expected, dict) and isinstance(found, dict):
        assert list(found) == list(expected), where
        for name, value in expected.items():
            assert_close(found[name], value, f"{where}.{name}")
    elif isinstance(expected, list) and isinstance(found, list):
        assert len(found) == len(expected), where
        if where.endswith(".explain"):
            found, expected = _by_name(found, where), _by_name(expected, where)
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_close(a, b, f"{where}[{i}]")
    elif isinstance(expected, float):
        tolerance = P_VALUE_TOLERANCE if where.endswith("p_value") else TOLERANCE
        assert math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance), (
            f"{where}: {found}, not {expected}"
        )
    else:
        assert found == expected, where


def _by_name(explain, where):
    """In an order that rounding does not change.

    The answer's is that of the p-values. Many are equal, and then rounding decides.
    """
    p_values = [one["p_value"] for one in explain]
    assert p_values == sorted(p_values), where
    return sorted(explain, key=lambda one: one["statistic"])


def compare(answer, record, name):
    found, expected = observed(answer), record["answers"][name]
    exact = record["environment"] == environment()
    headers = {
        name: value
        for name, value in expected["headers"].items()
        if exact or name not in ENVIRONMENT_HEADERS
    }
    assert (found["status"], found["type"]) == (expected["status"], expected["type"]), answer.text[
        :500
    ]
    assert {name: found["headers"].get(name) for name in headers} == headers
    if "x-ade-backend" in expected["headers"]:
        assert found["headers"]["x-ade-backend"].startswith("onnxruntime/")
    assert_close(
        found["body"], expected["body"], "body"
    )  # first, because its error is the clearest
    known = expected["sha256"] if exact else record["elsewhere"].get(here(), {}).get(name)
    assert known in (None, found["sha256"]), "close, but not the same bytes"


@pytest.fixture(scope="module")
def record():
    yield json.loads(RECORD.read_text())


def engine_parameter(name):
    """Ray takes a minute to start, and many cores to be quick."""
    if name != "ray":
        return name
    is_absent = importlib.util.find_spec("ray") is None
    reason = "ray is not installed (extra ray)"
    skips = pytest.mark.skipif(is_absent, reason=reason)
    return pytest.param(name, marks=[pytest.mark.slow, skips])


@pytest.fixture(scope="module", params=[IN_PROCESS, *map(engine_parameter, ENGINES)])
def client(request):
    """Of the bundle that ships, in this process and on each engine."""
    if request.param == IN_PROCESS:
        with client_here() as without_server:
            yield without_server
    elif request.param == default_engine():
        with client_of(request.getfixturevalue("service")) as default:
            yield default
    else:
        few = ("--workers", "1") if request.param == "ray" else ()
        options = ("--engine", request.param, *few)
        running = RunningService(PRETRAINED, options=options, timeout=300)
        with client_of(running) as other:
            yield other
        assert running.stop() == []


def client_here():
    return httpx.Client(transport=ServiceHere(PRETRAINED), base_url="http://127.0.0.1")


def client_of(running):
    return httpx.Client(base_url=running.url, timeout=120)


def test_the_record_has_every_request(record):
    assert list(record["answers"]) == list(REQUESTS) and list(record["servers_own"]) == list(
        SERVERS_OWN
    )


@pytest.mark.parametrize("name", REQUESTS)
def test_an_answer_is_as_recorded(client, record, name):
    answer = REQUESTS[name].send(client)
    compare(answer, record, name)
    body = observed(answer)["sha256"]
    assert FIRST.setdefault(name, body) == body, "the engine before gave other bytes"


@pytest.mark.parametrize("name", SERVERS_OWN)
def test_an_answer_of_the_server_itself(client, record, name):
    """As recorded, but for the message: engines have different paths."""
    answer, expected = SERVERS_OWN[name].send(client), record["servers_own"][name]
    assert answer.status_code == expected["status"]
    assert answer.json()["error"]["code"] == expected["body"]["error"]["code"]
    assert answer.json()["error"]["message"]


def test_a_changed_answer_is_noticed(record):
    expected = record["answers"]["score: file"]
    body = json.loads(json.dumps(expected["body"]))
    body["results"][0]["bpd"] += 3 * TOLERANCE * body["results"][0]["bpd"]
    with pytest.raises(AssertionError, match=r"body.results\[0\].bpd"):
        assert_close(body, expected["body"], "body")


def test_statistics_change_places_only_if_their_p_values_are_equal(record):
    expected = record["answers"]["score: file"]["body"]
    body = json.loads(json.dumps(expected))
    explain = body["results"][0]["explain"]
    assert explain[52]["p_value"] == explain[53]["p_value"]
    explain[52:54] = explain[53], explain[52]
    assert_close(body, expected, "body")
    explain[:2] = explain[1], explain[0]
    with pytest.raises(AssertionError, match=r"body.results\[0\].explain"):
        assert_close(body, expected, "body")


def write_record(client):
    """Send all requests and write their answers, one line each.

    If only rounding differs from the record of another environment, their hashes are added to it.
    """
    answers = {name: request.send(client) for name, request in REQUESTS.items()}
    own = {name: request.send(client) for name, request in SERVERS_OWN.items()}
    record = json.loads(RECORD.read_text())
    known = {json.dumps(record["environment"]), *record["elsewhere"]}
    try:
        assert here() not in known and list(answers) == list(record["answers"])
        for name, answer in answers.items():
            compare(answer, record, name)
    except AssertionError:
        record = {
            "environment": environment(),
            "answers": {name: observed(answer) for name, answer in answers.items()},
            "servers_own": {name: observed(answer) for name, answer in own.items()},
            "elsewhere": {},
        }
    else:
        hashes = {name: observed(answer)["sha256"] for name, answer in answers.items()}
        record["elsewhere"][here()] = hashes
    lines = {
        section: ",\n".join(
            f"{json.dumps(name)}: {json.dumps(entry, separators=(',', ':'))}"
            for name, entry in record[section].items()
        )
        for section in ("answers", "servers_own", "elsewhere")
    }
    sections = [f'"{section}": {{\n{rows}\n}}' for section, rows in lines.items()]
    RECORD.write_text(
        "{\n"
        + ",\n".join([f'"environment": {json.dumps(record["environment"])}', *sections])
        + "\n}\n"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description="Record the answers of the service in this work tree."
    )
    parser.add_argument("--record", action="store_true", required=True)
    parser.parse_args()
    with client_here() as opened:
        write_record(opened)
    print(f"{RECORD.relative_to(ROOT)}: {len(REQUESTS)} answers, {RECORD.stat().st_size} bytes")
