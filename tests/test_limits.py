"""Limits per batch. A request that is alone in its batch is always answered."""

import base64
import io
import json
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from ade_base.pictures.show import write_png
from serving.api.operations.registry import OPERATIONS
from serving.api.service import MAX_DECODE_S, Service
from serving.ingest.picture import prepare_image
from serving.ingest.requests import FilesRequest, RawRequest, decode_images

CASES = (
    [("sample", {"n": 5, "format": format}) for format in ("png", "npy", "json")]
    + [
        ("encode", {"format": format, "eps": eps})
        for format in ("json", "npz")
        for eps in (False, True)
    ]
    + [("reconstruct", {"format": format}) for format in ("npy", "json")]
    + [
        ("score", {"map": map, "explain": explain, "fdr": 0.1})
        for map in (False, True)
        for explain in (False, True)
    ]
)


@pytest.fixture
def engine(pretrained_engine):
    return pretrained_engine


def request(images=None, **parameters):
    files = (
        {}
        if images is None
        else {"images": [base64.b64encode(write_png(image)).decode() for image in images]}
    )
    return RawRequest("application/json", json.dumps({**files, **parameters}).encode())


def expected_bytes(operation, raw, engine):
    parsed = OPERATIONS[operation].parse(raw, engine.bundle)
    if isinstance(parsed, FilesRequest):
        (parsed,) = decode_images([parsed], engine.image_shape)
    return OPERATIONS[operation].answer_bytes(parsed, engine.bundle)


@pytest.mark.parametrize("operation, parameters", CASES)
def test_answers_are_no_longer_than_expected(operation, parameters, engine):
    # Random pixels, which PNG cannot compress.
    noise = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), np.uint8)
    raw = request(None if operation == "sample" else noise, **parameters)
    (answer,) = Service(operation, engine).answer([raw])
    assert answer.status == 200
    expected = expected_bytes(operation, raw, engine)
    assert len(answer.body) <= expected <= 16 * len(answer.body)


def test_a_batch_has_room_for_so_many_bytes_of_answers(engine, real_images, monkeypatch):
    requests = [request(real_images[:4], format="npz", eps=True) for _ in range(5)]
    (alone,) = Service("encode", engine).answer(requests[:1])
    for room, answered in ((1, 1), (2.5, 2), (5.5, 5)):
        monkeypatch.setattr(
            "serving.api.service.MAX_BATCH_BYTES", math.floor(room * len(alone.body))
        )
        answers = Service("encode", engine).answer(requests)
        assert [a.status for a in answers] == [200] * answered + [503] * (5 - answered)
        assert all(a.body == alone.body for a in answers[:answered])
        for refused in answers[answered:]:
            assert (
                json.loads(refused.body)["error"]["code"] == "overloaded"
                and refused.headers["Retry-After"] == "1"
            )
    # An answer that has no room does not keep a shorter one behind it from being computed.
    monkeypatch.setattr("serving.api.service.MAX_BATCH_BYTES", math.floor(1.5 * len(alone.body)))
    small = request(real_images[:1], format="npz")
    assert [a.status for a in Service("encode", engine).answer([*requests[:2], small])] == [
        200,
        503,
        200,
    ]


def test_unused_room_for_answers_is_given_to_others(engine, real_images, monkeypatch):
    requests = [request(real_images[:1])] * 6
    service = Service("score", engine)
    (alone,) = service.answer(requests[:1])
    room = 6 * len(alone.body)
    assert 6 * expected_bytes("score", requests[0], engine) > room
    monkeypatch.setattr("serving.api.service.MAX_BATCH_BYTES", room + len(alone.body))
    assert Counter(a.status for a in service.answer(requests))[200] >= 5


def test_a_batch_is_computed_until_its_time_is_over(engine, real_images, monkeypatch):
    requests = [request(real_images[i : i + 2], samples=4) for i in range(3)]
    alone = [Service("score", engine).answer([r])[0].body for r in requests]
    monkeypatch.setattr("serving.api.service.PASS_ROWS", 8)
    in_passes = Service("score", engine).answer(requests)
    assert [a.body for a in in_passes] == alone and in_passes[0].headers["X-Ade-Batch"] == "6"
    monkeypatch.setattr("serving.api.service.MAX_BATCH_S", 0.0)
    late = Service("score", engine).answer(requests)
    assert [a.status for a in late] == [200, 503, 503] and late[0].headers["X-Ade-Batch"] == "2"
    monkeypatch.setattr("serving.api.service.PASS_ROWS", 16)
    assert [a.status for a in Service("score", engine).answer(requests)] == [200, 200, 503]


def test_images_are_decoded_until_the_time_is_over(engine, real_images, monkeypatch):
    now = 0.0

    def prepare_slowly(*args):
        nonlocal now
        now += 0.6 * MAX_DECODE_S
        return prepare_image(*args)

    monkeypatch.setattr("serving.ingest.requests.prepare_image", prepare_slowly)
    monkeypatch.setattr("serving.api.service.time", SimpleNamespace(monotonic=lambda: now))
    requests = [request(real_images[:1]), request(real_images[:2]), request(real_images[:1])]
    answers = Service("score", engine).answer(requests)
    assert [answer.status for answer in answers] == [200, 503, 503]
    assert now == 1.2 * MAX_DECODE_S, "the others are not decoded"


def test_noise_counts_as_another_row(engine, real_images, monkeypatch):
    calls = []
    encode = engine.encode
    monkeypatch.setattr(
        engine, "encode", lambda images, *rest: calls.append(len(images)) or encode(images, *rest)
    )
    monkeypatch.setattr("serving.api.service.PASS_ROWS", 4)
    for eps, passes in ((False, [4]), (True, [2, 2])):
        calls.clear()
        Service("encode", engine).answer([request(real_images[:2], eps=eps)] * 2)
        assert calls == passes


@pytest.mark.parametrize("operation, parameters", CASES)
def test_a_request_by_itself_is_always_answered(
    operation, parameters, engine, real_images, monkeypatch
):
    for name in ("MAX_BATCH_BYTES", "MAX_BATCH_S", "PASS_ROWS"):
        monkeypatch.setattr(f"serving.api.service.{name}", 0)
    images = None if operation == "sample" else real_images[:3]
    (answer,) = Service(operation, engine).answer([request(images, **parameters)])
    assert answer.status == 200


@pytest.mark.parametrize(
    "operation, parameters, advice",
    [
        ("sample", {"n": 2, "format": "npy"}, "ask for fewer images"),
        ("encode", {"format": "npz"}, "send fewer images"),
        ("encode", {"format": "json"}, 'ask for "format": "npz"'),
        ("reconstruct", {"format": "npy"}, "send fewer images"),
        ("score", {"map": True}, "send fewer images"),
    ],
)
def test_an_answer_that_would_be_too_large_is_refused(
    operation, parameters, advice, engine, real_images, monkeypatch
):
    monkeypatch.setattr("serving.api.responses.MAX_ANSWER_BYTES", 1000)
    images = None if operation == "sample" else real_images[:2]
    (answer,) = Service(operation, engine).answer([request(images, **parameters)])
    error = json.loads(answer.body)["error"]
    assert (answer.status, error["code"]) == (422, "answer_too_large")
    assert error["message"].endswith(f"bytes, at most 1000 are sent: {advice}")


def test_an_answer_that_would_be_too_large_leaves_its_neighbours_theirs(
    engine, real_images, monkeypatch
):
    monkeypatch.setattr("serving.api.responses.MAX_ANSWER_BYTES", 1000)
    requests = [request(real_images[:2], map=map) for map in (True, False, True)]
    answers = Service("score", engine).answer(requests)
    assert [answer.status for answer in answers] == [422, 200, 422]
    assert answers[1].headers["X-Ade-Batch"] == "6"  # computed together


@pytest.mark.slow
def test_many_large_answers_end_no_worker(service, real_images):
    """Twelve requests at once, with answers of 158 MB in total."""
    array = io.BytesIO()
    np.save(array, real_images[:256])
    workers = {process.pid for process in service.workers()}

    def ask(_):
        answer = httpx.post(
            f"{service.url}/predictions/encode",
            files={"image": array.getvalue()},
            data={"format": "npz", "eps": "true"},
            timeout=300,
        )
        return answer.status_code, len(answer.content)

    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(ask, range(12)))
    assert {status for status, _ in answers} <= {200, 503}
    found = Counter(answers)
    ((length, count),) = [(size, n) for (status, size), n in found.items() if status == 200]
    assert count >= 2 and length > 12e6  # as many as a batch has time for
    assert {process.pid for process in service.workers()} == workers


@pytest.mark.slow
def test_a_full_batch_of_scores_ends_no_worker(service, real_images):
    """8,192 rows take nearly all of a worker's time: some are computed, the others get 503."""
    workers = {process.pid for process in service.workers()}
    body = request(real_images[:128], samples=8).body

    def ask(_):
        return httpx.post(
            f"{service.url}/predictions/score",
            content=body,
            timeout=250,  # as docs/api.md recommends
            headers={"Content-Type": "application/json"},
        ).status_code

    with ThreadPoolExecutor(8) as pool:
        answers = set(pool.map(ask, range(8)))
    assert answers <= {200, 503} and 200 in answers
    assert {process.pid for process in service.workers()} == workers
