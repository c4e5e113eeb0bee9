"""The ASGI application with its worker processes: forms, batches, crashes, metrics, stop.

That its answers equal those of the other engines is tested in test_contract.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gzip
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import tritonclient.http

from ade_base.ports import Ports, free_ports
from ade_cli.status import _text
from handlers.front.admission import Limits, Memory
from handlers.front.front import Front, Request
from handlers.launch import engines
from handlers.launch.options import ServingOptions
from handlers.limits import MAX_REQUEST_BYTES
from handlers.process.pool import Pool, WorkerError
from handlers.processes.channel import ask
from handlers.processes.run_folder import run_folder
from handlers.service import wire, worker
from handlers.service.application import READY, Application, ApplicationSettings, served_models
from handlers.service.control import DESCRIBE
from handlers.service.metrics import Metrics
from handlers.service.protocols import V2 as v2
from handlers.service.release import CurrentRelease, Release
from handlers.service.worker import WorkerSettings
from handlers.torchserve.status import read_status
from serving.api.journal import last_errors
from serving.api.responses import Response
from serving.engine.bundle import BundleError, open_bundle
from serving.engine.signatures import OPERATIONS
from serving.ingest.errors import ApiError, worker_died
from serving.ingest.forms import MAX_FIELDS
from tests.helpers import (
    PRETRAINED,
    ROOT,
    npy,
    suspended,
    wait_for,
)

SCRIPT = """
import json, sys
from pathlib import Path
from handlers.service import application
from handlers.front.admission import Limits
file, limits, constants = Path(sys.argv[1]), *map(json.loads, sys.argv[2:])
vars(application).update(constants)
application.run(application.ApplicationSettings.load(file), Limits(**limits), file)
"""
LIMITS = {"in_flight": (1, 40, 40), "waiting": 2}
IMAGE = npy(np.zeros((1, 32, 32, 3), np.uint8))


def release_of(*folders: Path, number: int = 1) -> Release:
    return engines.release_of(number, [open_bundle(folder) for folder in folders])


class RunningApplication:
    """``python -m handlers.service.application``, as ``ade serve`` starts it, without a page.

    The constructor starts it, and the end of a ``with`` block kills it if it still runs.

    Args:
        folder: for its files.
        limits: replace the default ones.
        constants: replace those of the module, such as ``STOP_S``.
        settings: replace those below.
    """

    def __init__(
        self,
        folder: Path,
        limits: dict[str, Any] | None = None,
        constants: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.port, self.metrics_port = free_ports(2)
        self.url = f"http://127.0.0.1:{self.port}"
        self.metrics = f"http://127.0.0.1:{self.metrics_port}/metrics"
        self.settings = folder / "front.json"
        self.control = folder / "front.sock"
        self.logs = folder / "logs"
        self.logs.mkdir()
        given: dict[str, Any] = {
            "host": "127.0.0.1",
            "port": self.port,
            "metrics_port": self.metrics_port,
            "exposes_metrics": False,
            "token": None,
            "allowed_hosts": (),
            "probe_secret": "secret-of-probes",
            "release": dataclasses.asdict(release_of(PRETRAINED)),
            "workers": dict.fromkeys(OPERATIONS, 1),
            "options": dataclasses.asdict(ServingOptions(device="cpu")),
            "logs": str(self.logs),
            "control": str(self.control),
        }
        ApplicationSettings(**{**given, **settings}).save(self.settings)
        self.output = folder / "front.out"
        changes = (json.dumps(one or {}) for one in (limits, constants))
        with open(self.output, "wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SCRIPT, str(self.settings), *changes],
                cwd=ROOT,
                stdout=out,
                stderr=out,
            )

    def __enter__(self) -> RunningApplication:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()

    def wait(self) -> None:
        wait_for(self.is_ready, 120)

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.output.read_text()
        try:
            return httpx.get(self.url + READY, timeout=120).status_code == 200
        except httpx.TransportError:
            return False

    def worker(self, name: str) -> psutil.Process:
        """The only worker process of a model."""
        for line in self.output.read_text().splitlines():
            assert "Traceback" not in line, self.output.read_text()
        journal = str(self._journal(name))
        (found,) = (
            process
            for process in psutil.Process(self.process.pid).children()
            if journal in {file.path for file in process.open_files()}
        )
        return found

    def logged(self, name: str) -> list[str]:
        """The ids in a model's journal."""
        lines = self._journal(name).read_text().splitlines()
        return [json.loads(line)["id"] for line in lines]

    def _journal(self, name: str) -> Path:
        return self.logs / f"{name}-0.requests.jsonl"

    def post(self, name: str, content: bytes = IMAGE, **headers: str) -> httpx.Response:
        return httpx.post(
            f"{self.url}/predictions/{name}", content=content, headers=headers, timeout=60
        )

    def begin(self, pool: ThreadPoolExecutor, name: str, **headers: str) -> Future[httpx.Response]:
        """Post a request, and wait until it is on its way to a worker."""
        before = self._queue_seconds(name)
        posted = pool.submit(self.post, name, **headers)
        wait_for(lambda: self._queue_seconds(name) > before)
        return posted

    def _queue_seconds(self, name: str) -> float:
        """The time that requests waited for a worker, which is added when it gets them."""
        series = rf'^ade_queue_seconds_total\{{.*model_name="{name}".*\}} (.*)$'
        return sum(map(float, re.findall(series, httpx.get(self.metrics).text, re.MULTILINE)))

    def queued(self, name: str) -> int:
        """Number of requests that wait for a worker of a model."""
        running = ask(self.control, {"do": DESCRIBE})
        return int(running["workers"][name]["queued"])

    def in_flight(self) -> int:
        """Number of requests that the front has taken and not answered."""
        return sum(
            c.status == psutil.CONN_ESTABLISHED and c.laddr.port == self.port
            for c in psutil.Process(self.process.pid).net_connections("tcp")
        )


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApplication]:
    with RunningApplication(tmp_path_factory.mktemp("process"), LIMITS) as made:
        made.wait()
        yield made
        made.process.terminate()
        assert made.process.wait(30) == 0
    assert "Traceback" not in made.output.read_text(), made.output.read_text()


def error_of(answer: httpx.Response) -> str:
    assert set(answer.json()) == {"error"} and answer.headers["content-type"] == "application/json"
    return str(answer.json()["error"]["code"])


def v2_error_of(answer: httpx.Response) -> str:
    assert set(answer.json()) == {"error"} and answer.headers["content-type"] == "application/json"
    assert isinstance(answer.json()["error"], str)
    return str(answer.json()["error"])


# Paths


def test_both_paths_of_an_operation(app: RunningApplication) -> None:
    first, second = (
        httpx.post(f"{app.url}/{prefix}/score", content=IMAGE) for prefix in ("predictions", "v1")
    )
    assert first.status_code == second.status_code == 200 and first.content == second.content
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    expected = [answer.headers["x-request-id"] for answer in (first, second)]
    wait_for(lambda: app.logged("score")[-2:] == expected)


def test_what_can_be_read(app: RunningApplication) -> None:
    assert httpx.get(f"{app.url}/readyz").json() == {"ready": True}
    assert httpx.get(f"{app.url}/ping").json() == {"status": "Healthy"}
    document = httpx.get(f"{app.url}/openapi.json").json()
    assert document["servers"] == [{"url": "/"}]  # clients on other machines read it, too
    assert set(document["paths"]) == {f"/predictions/{operation}" for operation in OPERATIONS}
    assert httpx.get(f"{app.url}/v1/openapi.json").json() == document
    head = httpx.head(f"{app.url}/openapi.json")
    assert head.status_code == 200 and head.content == b"" and int(head.headers["content-length"])
    refused = httpx.post(f"{app.url}/readyz")
    assert (refused.status_code, error_of(refused)) == (405, "not_allowed")
    assert refused.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    "path, code",
    [
        ("/", "not_found"),
        ("/metrics", "not_found"),
        ("/predictions/", "not_found"),
        ("/predictions/score/1.0", "not_found"),
        ("/v1/other", "unknown_model"),
        ("/models", "not_found"),
    ],
)
def test_nothing_else_is_there(app: RunningApplication, path: str, code: str) -> None:
    answer = httpx.post(app.url + path)
    assert (answer.status_code, error_of(answer)) == (404, code)


@pytest.mark.parametrize("method", ["OPTIONS", "DELETE", "PATCH", "TRACE"])
@pytest.mark.parametrize(
    "path, allowed",
    [
        ("/predictions/score", "GET, HEAD, POST, PUT"),
        ("/v1/score", "GET, HEAD, POST, PUT"),
        ("/v2/models/score/infer", "POST"),
        ("/openapi.json", "GET, HEAD"),
    ],
)
def test_methods_that_are_refused(
    app: RunningApplication, method: str, path: str, allowed: str
) -> None:
    answer = httpx.request(method, app.url + path)
    assert answer.status_code == 405 and answer.headers["allow"] == allowed
    if path.startswith("/v2/"):
        assert v2_error_of(answer) == f"{path} takes {allowed}, not {method}"
    else:
        assert error_of(answer) == "not_allowed"


@pytest.mark.parametrize(
    "path", ["/ping", READY, "/openapi.json", "/v1/openapi.json", "/v2", "/v2/health/live"]
)
def test_head_works_where_get_does(app: RunningApplication, path: str) -> None:
    got, head = httpx.get(app.url + path), httpx.head(app.url + path)
    assert head.status_code == got.status_code == 200 and head.content == b""
    assert head.headers["content-length"] == got.headers["content-length"]


@pytest.mark.parametrize(
    "head",
    [
        b"POST /predictions/score HTTP/1.0\r\nHost: localhost\r\n",
        b"POST /predictions/score HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n",
        b"PATCH /predictions/score HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n",
    ],
)
def test_a_connection_is_closed_after_the_answer(app: RunningApplication, head: bytes) -> None:
    """By its end, not by a reset, which would lose the answer."""
    with socket.create_connection(("127.0.0.1", app.port), 60) as connection:
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(IMAGE) + IMAGE)
        with connection.makefile("rb") as stream:
            lines, _, body = stream.read().partition(b"\r\n\r\n")
    expected = b"405" if head.startswith(b"PATCH") else b"200"
    assert lines.startswith(b"HTTP/1.1 " + expected) and json.loads(body)


def test_pipelined_requests_are_answered_in_order(app: RunningApplication) -> None:
    """Of several operations, each with its own identity."""
    with socket.create_connection(("127.0.0.1", app.port), 60) as connection:
        for operation, close in (
            ("encode", ""),
            ("score", ""),
            ("encode", "Connection: close\r\n"),
        ):
            head = f"POST /predictions/{operation} HTTP/1.1\r\nHost: localhost\r\n{close}"
            length = f"Content-Length: {len(IMAGE)}\r\n\r\n"
            connection.sendall((head + length).encode() + IMAGE)
        with connection.makefile("rb") as stream:
            text = stream.read().decode()
    answers = text.split("HTTP/1.1 200 OK\r\n")[1:]
    assert ["bpd_parts" in answer for answer in answers] == [False, True, False]
    assert len(set(re.findall(r"x-request-id: (\S+)", text))) == 3


def test_the_guard_is_before_it(app: RunningApplication) -> None:
    for headers, status in (({"Host": "evil.example"}, 421), ({"Origin": "http://a.example"}, 403)):
        assert app.post("score", **headers).status_code == status


# Forms


@pytest.mark.parametrize(
    "body, status, code",
    [
        (b"n=1&n=2", 400, "malformed_request"),
        (b"&".join(b"n%d=1" % i for i in range(MAX_FIELDS + 1)), 413, "too_many_images"),
        (IMAGE, 200, None),  # a file that curl sends under a form's content type
    ],
)
def test_forms_are_checked(
    app: RunningApplication, body: bytes, status: int, code: str | None
) -> None:
    answer = app.post("score", body, **{"Content-Type": "application/x-www-form-urlencoded"})
    assert answer.status_code == status and (code is None or error_of(answer) == code)
    if code is not None:
        counted = rf'ade_requests_total{{model_name="score",.*status="{status}",code="{code}"'
        wait_for(lambda: re.search(counted, httpx.get(app.metrics).text))


def test_a_refused_form_leaves_its_neighbours_their_answers(app: RunningApplication) -> None:
    head = b'Content-Disposition: form-data; name="\xff"'  # passes the front, but is not UTF-8
    refused = b"--x\r\n%s\r\n\r\nx\r\n--x--\r\n" % head
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    with ThreadPoolExecutor(4) as pool:
        with suspended(app.worker("score")):
            made = [
                pool.submit(app.post, "score", IMAGE if i % 2 else refused, **kind)
                for i, kind in enumerate([form, {}] * 2)
            ]
            wait_for(lambda: app.in_flight() == 4)
        answers = [one.result() for one in made]
    assert [answer.status_code for answer in answers] == [400, 200, 400, 200]
    assert len({answer.headers["x-request-id"] for answer in answers}) == 4


# Workers


def test_requests_that_wait_are_computed_together(app: RunningApplication) -> None:
    with ThreadPoolExecutor(7) as pool:
        with suspended(app.worker("score")):
            first = app.begin(pool, "score")
            others = [pool.submit(app.post, "score") for _ in range(6)]
            wait_for(lambda: app.queued("score") == 6)
        assert first.result().headers["x-ade-batch"] == "1"
        assert {one.result().headers["x-ade-batch"] for one in others} == {"6"}
    assert {one.result().content for one in others} == {first.result().content}


@pytest.mark.parametrize("body", [IMAGE, IMAGE.ljust(300_000)], ids=["small", "large"])
def test_a_request_whose_client_leaves_before_a_worker_is_free_is_not_computed(
    app: RunningApplication, body: bytes
) -> None:
    length = f"Host: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with ThreadPoolExecutor(1) as pool:
        with suspended(app.worker("score")):
            first = app.begin(pool, "score")
            for path in ("/predictions/score", "/v2/models/score/infer"):
                with socket.create_connection(("127.0.0.1", app.port)) as gone:
                    gone.sendall(f"POST {path} HTTP/1.1\r\n{length}".encode())
                    wait_for(lambda: app.in_flight() == 2)
                    gone.sendall(body)
                    wait_for(lambda: app.queued("score") == 1)
                wait_for(lambda: app.in_flight() == 1 and app.queued("score") == 0)
        assert first.result().status_code == 200
    answered = [app.post("score").headers["x-request-id"], first.result().headers["x-request-id"]]
    wait_for(lambda: app.logged("score")[-2:] == answered[::-1])


def test_a_worker_that_crashes_takes_only_its_requests_with_it(app: RunningApplication) -> None:
    worker = app.worker("score")
    with ThreadPoolExecutor(1) as pool, suspended(worker):
        lost = app.begin(pool, "score")
        assert app.post("encode").status_code == 200
        worker.kill()
        answer = lost.result()
    assert (answer.status_code, error_of(answer)) == (503, "unavailable")
    assert answer.headers["retry-after"] == "1"
    assert app.post("score").status_code == 200  # waits for the next process
    assert app.worker("score").pid != worker.pid


def test_a_request_that_fails_unexpectedly_leaves_its_neighbours_their_answers(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = WorkerSettings(
        *(str(tiny_bundle), "tiny@1", open_bundle(tiny_bundle).digest, "sample", "tiny-sample"),
        *("1", str(tmp_path), ServingOptions(device="cpu")),
    )
    real = worker.raw_request

    def fail_on_junk(content_type: str, body: bytes, *rest: Any) -> Any:
        if body == b"junk":
            raise ZeroDivisionError
        return real(content_type, body, *rest)

    monkeypatch.setattr(worker, "raw_request", fail_on_junk)
    about = {"id": "1", "probe": False, "v2": None, "content_type": "application/json"}
    good = b'{"n": 1, "seed": 1}'
    answers = worker.answer_batch(
        worker.load_service(settings),
        "tiny-sample",
        {"requests": [about] * 3},
        [good, b"junk", good],
    )
    assert [answer.status for answer in answers] == [200, 500, 200]
    assert b"ZeroDivisionError" not in answers[1].body


def test_requests_that_cannot_be_read_or_translated_are_counted_and_logged(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    settings = WorkerSettings(
        *(str(tiny_bundle), "tiny@1", open_bundle(tiny_bundle).digest, "sample", "tiny-sample"),
        *("1", str(tmp_path), ServingOptions(device="cpu")),
    )
    service = worker.load_service(settings)
    about = {"probe": False, "content_type": "multipart/form-data"}
    unknown = b'{"inputs": [], "outputs": [{"name": "other"}]}'
    lengths = {"form": None, "tensors": 1, "other": len(unknown)}
    requests = [{**about, "id": id, "v2": length} for id, length in lengths.items()]
    answers = worker.answer_batch(service, "sample", {"requests": requests}, [b"x", b"[", unknown])
    assert [answer.status for answer in answers] == [400, 400, 422]
    assert isinstance(json.loads(answers[0].body)["error"], dict)
    assert all(isinstance(json.loads(answer.body)["error"], str) for answer in answers[1:])
    counted = {(name, labels.get("code")): n for name, labels, n in worker.measurements(service)}
    assert counted["ade_requests_total", "malformed_request"] == 2
    assert counted["ade_requests_total", "bad_array"] == 1
    assert [(entry["id"], entry["status"]) for entry in last_errors(tmp_path)] == [
        ("form", 400),
        ("tensors", 400),
        ("other", 422),
    ]


def test_an_idle_worker_that_ends_is_replaced(app: RunningApplication) -> None:
    worker = app.worker("sample")
    worker.kill()
    wait_for(lambda: httpx.get(f"{app.url}/readyz").status_code == 503)
    assert httpx.get(f"{app.url}/readyz").json() == {"ready": False}
    wait_for(app.is_ready, 60)
    assert app.worker("sample").pid != worker.pid
    starts = [
        line
        for line in httpx.get(app.metrics).text.splitlines()
        if line.startswith('ade_worker_starts_total{model_name="sample"')
    ]
    model = open_bundle(PRETRAINED).model_id
    assert starts == [
        f'ade_worker_starts_total{{model_name="sample",worker="0",bundle="{model}"}} 2.0'
    ]


@pytest.fixture(scope="module")
def of_a_copy(
    tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[RunningApplication, Path]]:
    """An application and its bundle, which may be damaged for a while."""
    folder = tmp_path_factory.mktemp("process-of-a-copy")
    bundle = shutil.copytree(tiny_bundle, folder / "bundle")
    with RunningApplication(folder, release=dataclasses.asdict(release_of(bundle))) as made:
        made.wait()
        yield made, bundle
        made.process.terminate()
        assert made.process.wait(30) == 0


def test_starts_that_fail_are_counted(
    of_a_copy: tuple[RunningApplication, Path], tmp_path: Path
) -> None:
    """Waiting clients may leave before they are answered, so that nothing else would count."""
    app, bundle = of_a_copy

    def starts() -> float:
        pattern = r'ade_worker_starts_total\{model_name="score",worker="0",bundle=.*\} (\S+)'
        (found,) = re.findall(pattern, httpx.get(app.metrics).text)
        return float(found)

    before = starts()
    assert before >= 1
    (bundle / "score.onnx").rename(tmp_path / "score.onnx")
    app.worker("score").kill()
    wait_for(lambda: starts() >= before + 2, 60)
    assert not app.is_ready() and "score.onnx is missing" in app.output.read_text()
    (tmp_path / "score.onnx").rename(bundle / "score.onnx")
    wait_for(app.is_ready, 60)
    assert starts() >= before + 3


def test_a_worker_is_one_process_with_one_thread_for_the_model(app: RunningApplication) -> None:
    assert len(psutil.Process(app.process.pid).children()) == len(OPERATIONS)
    assert app.worker("score").environ()["OMP_NUM_THREADS"] == "1"


# Metrics


def test_metrics(app: RunningApplication) -> None:
    def value(name: str) -> float:
        text = httpx.get(app.metrics).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    counted = 'ade_requests_total{model_name="score",worker="0",status="200",code="none"'
    before = value(counted)
    assert app.post("score").status_code == 200
    wait_for(lambda: value(counted) == before + 1)
    assert app.post("score", **{"X-Ade-Probe": "secret-of-probes"}).status_code == 200
    assert app.post("score", **{"X-Ade-Probe": "1"}).status_code == 200
    # A refused request shows when those before it are counted, in their order.
    refused = counted.replace('"200",code="none"', '"415",code="not_an_image"')
    refusals = value(refused)
    assert app.post("score", b"not an image").status_code == 415
    wait_for(lambda: value(refused) == refusals + 1)
    assert value(counted) == before + 2
    answer = httpx.get(app.metrics)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert "# TYPE ade_request_seconds histogram\n" in answer.text
    assert "# TYPE ade_requests_total counter\n" in answer.text
    types = dict(re.findall(r"^# TYPE (\w+) (\w+)$", answer.text, re.MULTILINE))
    assert set(types) == set(re.findall(r"^# HELP (\w+) .", answer.text, re.MULTILINE))
    for name, kind in types.items():
        assert (kind == "counter") == name.endswith("_total")
    whole, queued = (
        float(re.findall(rf'^{name}\{{model_name="score".* (\S+)$', answer.text, re.MULTILINE)[0])
        for name in ("ade_answer_seconds_total", "ade_queue_seconds_total")
    )
    assert whole > queued > 0


def test_time_in_the_queue_counts_from_the_arrival_of_a_request() -> None:
    """A request waits for its turn before a pool has it."""

    class Slow:
        """In the place of a worker's process."""

        def __init__(self) -> None:
            self.gone = asyncio.get_running_loop().create_future()

        async def ask(self, parts: Any, seconds: float) -> Any:
            await asyncio.sleep(0.2)
            return {"answers": [{"status": 200, "content_type": "a/b", "headers": {}}]}, [b"x"]

        async def next(self, seconds: float) -> Any:
            return {"measurements": [], "leaving": False}, []

        async def end(self) -> int:
            return 0

    async def text() -> str:
        settings = WorkerSettings(
            *("folder", "tiny@1", "", "score", "score", "1"),
            *("logs", ServingOptions(device="cpu")),
        )
        metrics, limits = Metrics(Counter()), Limits(in_flight=(1, 1, 1))
        pool = Pool("score", [settings], metrics, 60.0, {})
        process: Any = Slow()
        pool._tasks.append(asyncio.create_task(pool._workers[0].keep(process)))
        front = Front(Application([pool], {}, limits).api, limits, Memory(limits), "", Counter())

        async def post() -> None:
            messages = [{"type": "http.request", "body": IMAGE}]

            async def receive() -> Any:
                return messages.pop() if messages else await asyncio.sleep(60)

            async def send(message: Any) -> None:
                assert message.get("status", 200) == 200

            scope = {"type": "http", "method": "POST", "path": "/v1/score", "headers": []}
            await front(scope, receive, send)

        await asyncio.gather(post(), post(), post())
        await pool.stop()
        return metrics.text()

    pattern = r"^ade_(queue|answer)_seconds_total\{.*\} (\S+)$"
    seconds = dict(re.findall(pattern, asyncio.run(text()), re.MULTILINE))
    # The three wait for 0, 0.2 and 0.4 s.
    assert float(seconds["queue"]) > 0.5 and float(seconds["answer"]) > 1.1


def test_status_counts_requests(app: RunningApplication) -> None:
    """As test_server.py's test_status does with the other engine."""
    ports = Ports(app.port, app.metrics_port, free_ports(1)[0])

    def counts() -> dict[str, float]:
        found = read_status(ports)["requests"]
        return {kind: found.get(kind, 0.0) for kind in ("2xx", "4xx")}

    before = counts()
    assert app.post("score").status_code == 200
    assert app.post("score", b"").status_code == 400
    wait_for(lambda: counts()["4xx"] == before["4xx"] + 1)
    # It asks for a sample itself each time, which is counted a moment after the answer.
    assert counts()["2xx"] >= before["2xx"] + 2
    # Only calibrations that were used or are damaged.
    assert set(read_status(ports)["calibrations"]) <= {"default"}


def test_status_of_an_engine_that_reports_no_workers() -> None:
    ports = Ports(*free_ports(3))
    found = read_status(ports, host="127.0.0.2")
    assert not found["is_own"] and "no service of this user" in _text(found)
    page = f"http://127.0.0.2:{ports.ui} (ADE_UI_PORT)"
    assert found["silent"] == [f"http://127.0.0.2:{ports.inference} (ADE_INFERENCE_PORT)", page]
    assert f"ready       no: {page} does not answer\n" in _text({**found, "silent": [page]})
    assert "ready       no: not all operations answer\n" in _text({**found, "silent": []})
    own = {**found, "is_own": True, "last_errors": []}
    assert "workers     unknown: its engine does not answer, or is Ray, which does" in _text(own)


def test_status_asks_the_users_service_at_its_host(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADE_RUN_DIR", str(short_path / "run"))
    ports = Ports(*free_ports(3))
    with run_folder() as folder:
        folder.describe(ports, "127.0.0.2", short_path, {})
        assert read_status(ports)["silent"][0].startswith(f"http://127.0.0.2:{ports.inference} ")
        assert read_status(ports, host="127.0.0.3")["silent"][0].startswith("http://127.0.0.3:")


def test_metrics_add_up() -> None:
    metrics = Metrics({"overloaded": 2})
    for value in (1, 2):
        metrics.update("ade_images_total", {"model_name": 'a"\\\n'}, value)
        metrics.update("ade_drift_images", {}, value)
    lines = metrics.text().splitlines()
    (started,) = (line for line in lines if line.startswith("process_start_time_seconds "))
    assert [line for line in lines if not line.startswith("# HELP ")] == [
        "# TYPE process_start_time_seconds gauge",
        started,
        "# TYPE ade_images_total counter",
        'ade_images_total{model_name="a\\"\\\\\\n"} 3.0',
        "# TYPE ade_drift_images gauge",
        "ade_drift_images{} 2.0",
        "# TYPE ade_front_refusals_total counter",
        'ade_front_refusals_total{code="overloaded"} 2',
    ]
    with pytest.raises(KeyError):
        metrics.update("ade_other", {}, 1.0)
    metrics.update("ade_drift_images", {"worker": "1", "calibration": "night"}, 2)
    metrics.drop_gauges({"worker": "1"})
    assert metrics.text().splitlines()[-4:] == lines[-4:]


def test_requests_that_a_worker_fails_are_counted_by_bundle(tmp_path: Path) -> None:
    """A release whose workers end over each request must not look healthy."""

    async def fail() -> str:
        settings = WorkerSettings(
            *(str(tmp_path), "tiny@1", "", "score", "score", "1"),
            *(str(tmp_path), ServingOptions(device="cpu")),
        )
        pool = Pool("score", [settings], Metrics(Counter()), 60.0, {})
        for is_probe in (False, True):
            request = Request("POST", "/predictions/score", {}, "", bytearray(), is_probe)
            asked = asyncio.create_task(pool.answer(request))
            (job,) = await pool.waiting.next_batch()
            job.fail(worker_died())
            with pytest.raises(ApiError):
                await asked
        return pool.metrics.text()

    text = asyncio.run(fail())
    line = 'ade_worker_failures_total{model_name="score",code="unavailable",bundle="tiny@1"} 1.0'
    assert line in text.splitlines()


def test_metrics_of_a_model_stay_while_one_of_its_releases_runs() -> None:
    metrics = Metrics({})
    with metrics.of_models(["a"]):
        with metrics.of_models(["a"]):
            metrics.update("ade_images_total", {"bundle": "a"}, 1.0)
        assert metrics.text().endswith('ade_images_total{bundle="a"} 1.0\n')
    assert "ade_" not in metrics.text()


# The Open Inference Protocol


@pytest.fixture
def triton(app: RunningApplication) -> Iterator[tritonclient.http.InferenceServerClient]:
    client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{app.port}")
    yield client
    client.close()


def tensor(array: np.ndarray, name: str, datatype: str, binary: bool) -> Any:
    made = tritonclient.http.InferInput(name, list(array.shape), datatype)
    made.set_data_from_numpy(array, binary_data=binary)
    return made


def test_v2_health_and_metadata(
    app: RunningApplication, triton: tritonclient.http.InferenceServerClient
) -> None:
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


@pytest.mark.parametrize("binary", [True, False], ids=["binary", "json"])
def test_v2_answers_are_those_of_the_api(
    app: RunningApplication, triton: tritonclient.http.InferenceServerClient, binary: bool
) -> None:
    images = np.stack(
        [
            np.full((32, 32, 3), 90, np.uint8),
            np.eye(32, dtype=np.uint8)[..., None] + np.zeros(3, np.uint8),
        ]
    )
    given = [tensor(images, "images", "UINT8", binary)]

    def infer(operation: str, inputs: Any, *names: str, **parameters: Any) -> list[np.ndarray]:
        outputs = [tritonclient.http.InferRequestedOutput(name, binary) for name in names]
        answer = triton.infer(
            operation, inputs, outputs=outputs, request_id="mine", parameters=parameters or None
        )
        assert answer.get_response()["id"] == "mine"
        found = triton.infer(operation, inputs, parameters=parameters or None)
        assert set(names) <= {one["name"] for one in found.get_response()["outputs"]}
        return [answer.as_numpy(name) for name in names]

    def api(operation: str, **fields: str) -> httpx.Response:
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
def test_v2_errors(app: RunningApplication, change: dict[str, Any], status: int) -> None:
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


def test_v2_parameters_may_have_a_fraction_of_zero() -> None:
    texts = {4.0: "4", 0.5: "0.5", 1e300: "1e+300", "x": "x"}
    assert {value: v2._text(value) for value in texts} == texts


def test_v2_answers_in_json_are_bounded() -> None:
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


def test_the_documented_program_of_tritons_client(
    app: RunningApplication, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "how-to" / "serve-without-java.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    exec(block.replace("127.0.0.1:8080", f"127.0.0.1:{app.port}"), {})
    assert re.fullmatch(r"\[3\.\d+\] \[ True\]\n", capsys.readouterr().out)


def test_v2_requests_that_are_no_json(app: RunningApplication) -> None:
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


def test_v2_errors_of_the_front_and_the_guard_have_its_shape(app: RunningApplication) -> None:
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


def test_v2_loses_nothing_in_silence(app: RunningApplication) -> None:
    """An image would be judged by another calibration, or otherwise, than the client asked for."""

    def ask(
        inputs: list[dict[str, Any]], binary: bytes = b"", query: str = "", **fields: Any
    ) -> httpx.Response:
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


def test_v2_takes_as_many_values_as_the_api() -> None:
    bundle = open_bundle(PRETRAINED)
    image = np.full(bundle.image_shape, 255, np.uint8).tolist()
    ones = [[np.ones(shape).tolist() for shape in bundle.latent_shapes]] * 256
    for operation, request in (
        ("score", {"inputs": [{"name": "images", "data": [image] * 256}]}),
        ("sample", {"inputs": [], "parameters": {"latents": ones}}),
    ):
        assert v2._head(json.dumps(request).encode(), operation, bundle).keys() == request.keys()


def test_v2_tells_a_rejected_image_from_one_without_a_verdict(app: RunningApplication) -> None:
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


# Overload, start and stop


def test_bundles_of_one_name_do_not_take_each_other_s_place() -> None:
    """On a cluster, whose configuration `ade serve` does not check."""
    first = open_bundle(PRETRAINED)
    copies = [dataclasses.replace(first, folder=Path(name)) for name in ("a", "b")]
    with pytest.raises(BundleError, match="need different names"):
        served_models([first, *copies])


def pool_of(process: Any, folder: Path) -> Pool:
    """A pool whose only worker has a stand-in for its process."""
    settings = WorkerSettings(
        *(str(folder), "tiny@1", "", "score", "score", "1"),
        *(str(folder), ServingOptions(device="cpu")),
    )
    pool = Pool("score", [settings], Metrics(Counter()), 60.0, {})
    (place,) = pool._workers
    place.is_ready = True
    pool._tasks.append(asyncio.create_task(place.keep(process)))
    return pool


def test_whatever_fails_at_a_worker_it_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the front has no memory for its answer, or for the next process."""
    started = 0

    class Failing:
        """In the place of a worker's process."""

        def __init__(self) -> None:
            self.gone = asyncio.get_running_loop().create_future()

        async def ask(self, parts: Any, seconds: float) -> Any:
            raise MemoryError

        async def end(self) -> int:
            return 70

    async def start(place: Any) -> Any:
        nonlocal started
        started += 1
        if started == 1:
            raise MemoryError
        place.is_ready = True
        return Failing()

    async def answer() -> None:
        pool = pool_of(Failing(), tmp_path)
        request = Request("POST", "/predictions/score", {}, "image/png", bytearray(IMAGE), False)
        async with asyncio.timeout(20):
            for _ in range(2):
                with pytest.raises(ApiError, match="worker"):
                    await pool.answer(request)
            await pool.stop()

    monkeypatch.setattr("handlers.process.pool._Worker.start", start)
    asyncio.run(answer())
    assert started >= 2


@pytest.mark.parametrize("rest", ["none", "late", "leaving"])
def test_an_answer_stands_whatever_follows_it(rest: str, tmp_path: Path) -> None:
    """A worker sends what it measured after its answers: it may die first, hang, or then leave."""

    class Answering:
        """In the place of a worker's process."""

        def __init__(self) -> None:
            self.gone = asyncio.get_running_loop().create_future()
            self.is_ended = False

        async def ask(self, parts: Any, seconds: float) -> Any:
            return {"answers": [{"status": 200, "content_type": "a/b", "headers": {}}]}, [b"x"]

        async def next(self, seconds: float) -> Any:
            if rest == "none":
                raise WorkerError("its connection ended")
            if rest == "late":
                await asyncio.sleep(60)
            missing = ["ade_gate_calibration_version", {"calibration": "cam"}, 1.0]
            return {"measurements": [missing], "leaving": True}, []

        async def end(self) -> int:
            self.is_ended = True
            return 70

    async def answer() -> None:
        process = Answering()
        pool = pool_of(process, tmp_path)
        (place,) = pool._workers
        request = Request("POST", "/predictions/score", {}, "image/png", bytearray(IMAGE), False)
        async with asyncio.timeout(5):
            found = await pool.answer(request)
            assert (found.status, found.body) == (200, b"x")
            if rest != "late":
                while not process.is_ended:
                    await asyncio.sleep(0.01)
                assert not place.is_ready
            await pool.stop()
        assert process.is_ended
        # Another release may have the same labels, and does not know this calibration.
        assert "missing" not in pool.metrics.text()

    asyncio.run(answer())


@pytest.mark.parametrize(
    "start",
    [
        b"\xff" * 4,
        b"\0\0\0\x02[]",
        b"\0\0\0\x0e" + b'{"sizes":[""]}',
        b"\0\0\0\x0e" + b'{"sizes":[-1]}',
        b"\0\0\0\x18" + b'{"sizes":[999999999999]}',
    ],
)
def test_messages_that_no_worker_sends_are_refused_at_once(start: bytes) -> None:
    async def receive() -> None:
        stream = asyncio.StreamReader()
        stream.feed_data(start)
        async with asyncio.timeout(5):
            await wire.receive(stream)

    with pytest.raises(ValueError):
        asyncio.run(receive())


@pytest.mark.parametrize("head", [{}, {"measurements": [["ade_other", {}, 1.0]]}], ids=str)
def test_a_worker_whose_first_message_is_invalid_did_not_start(
    head: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "invalid_worker.py").write_text(
        "import socket, time\nfrom handlers.service import wire\n"
        f"socket.socket(fileno=0).sendall(b''.join(wire.pack({head!r})))\ntime.sleep(1000)"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setattr("handlers.process.pool.WORKER", "invalid_worker")

    others = psutil.Process().children()

    async def start() -> None:
        settings = WorkerSettings(
            *(str(tmp_path), "tiny@1", "", "score", "score", "1"),
            *(str(tmp_path), ServingOptions(device="cpu")),
        )
        pool = Pool("score", [settings], Metrics(Counter()), 60.0, {})
        with pytest.raises(WorkerError, match="did not start: its measurements are invalid"):
            await pool.start()
        assert not pool.is_ready and psutil.Process().children() == others

    asyncio.run(start())


def test_a_pool_that_is_stopped_answers_what_it_has(tmp_path: Path) -> None:
    """The batch that a worker computes, and the requests that wait for one."""

    class Busy:
        """In the place of a worker's process, which never answers."""

        def __init__(self) -> None:
            self.gone = asyncio.get_running_loop().create_future()
            self.is_asked = asyncio.Event()

        async def ask(self, parts: Any, seconds: float) -> Any:
            self.is_asked.set()
            await asyncio.sleep(60)

        async def end(self) -> int:
            return 0

    async def stop_busy() -> list[Any]:
        settings = WorkerSettings(
            *(str(tmp_path), "tiny@1", "", "score", "score", "1"),
            *(str(tmp_path), ServingOptions(device="cpu")),
        )
        pool = Pool("score", [settings], Metrics(Counter()), 60.0, {})
        process = Busy()
        pool._tasks.append(asyncio.create_task(pool._workers[0].keep(process)))  # type: ignore[arg-type]
        request = Request("POST", "/predictions/score", {}, "image/png", bytearray(IMAGE), False)
        requests = [asyncio.create_task(pool.answer(request))]
        await process.is_asked.wait()
        requests.append(asyncio.create_task(pool.answer(request)))
        await asyncio.sleep(0)
        await pool.stop()
        requests.append(asyncio.create_task(pool.answer(request)))
        async with asyncio.timeout(5):
            return await asyncio.gather(*requests, return_exceptions=True)

    for error in asyncio.run(stop_busy()):
        assert isinstance(error, ApiError) and (error.status, error.code) == (503, "stopping")


@pytest.mark.parametrize("num_steps", range(8))
def test_no_request_is_lost_if_a_worker_ends_as_it_arrives(num_steps: int) -> None:
    async def check() -> None:
        settings = WorkerSettings(
            *("folder", "tiny@1", "", "score", "score", "1"),
            *("logs", ServingOptions(device="cpu")),
        )
        pool = Pool("score", [settings], Metrics(Counter()), 60.0, {})
        process: Any = SimpleNamespace(gone=asyncio.get_running_loop().create_future())
        taking = asyncio.create_task(pool._workers[0]._next_batch(process))
        await asyncio.sleep(0)
        request = Request("POST", "/predictions/score", {}, "image/png", bytearray(IMAGE), False)
        answer = asyncio.create_task(pool.answer(request))
        for _ in range(num_steps):
            await asyncio.sleep(0)
        process.gone.set_result(0)
        (taken,) = await asyncio.gather(taking, return_exceptions=True)
        for _ in range(8):
            await asyncio.sleep(0)
        assert len(pool.waiting) == 1 if isinstance(taken, WorkerError) else len(taken) == 1
        answer.cancel()

    asyncio.run(check())


def test_a_removed_release_has_time_for_what_it_accepted() -> None:
    """Its requests may wait for their turn, and then for the answer."""

    @contextlib.asynccontextmanager
    async def build(release: Release) -> AsyncIterator[Any]:
        yield None

    async def seconds(limits: Limits) -> float:
        current = CurrentRelease[Any](build, lambda _: None, limits)
        async with current.run(release_of(PRETRAINED)):
            running = current._running
            return running._drain_s

    for limits in (Limits(), Limits(waiting_s=500.0)):
        assert asyncio.run(seconds(limits)) > limits.waiting_s + limits.upstream_s


def test_a_full_queue_is_refused_at_once(app: RunningApplication) -> None:
    room = LIMITS["in_flight"][1] + LIMITS["waiting"]
    with ThreadPoolExecutor(room + 1) as pool:
        with suspended(app.worker("reconstruct")):
            posted = [pool.submit(app.post, "reconstruct") for _ in range(room + 1)]
            first = next(as_completed(posted))  # the others wait for the worker
            refused = first.result()
            assert (refused.status_code, error_of(refused)) == (503, "overloaded")
            assert refused.headers["retry-after"] == "1"
        assert {one.result().status_code for one in posted if one is not first} == {200}


def test_a_token_and_a_stop(tmp_path: Path) -> None:
    """Probes need no token, and metrics only on another address than loopback's.

    A stop answers what was accepted and leaves no process.
    """
    exposing: dict[str, Any] = {"token": "t" * 43, "host": "0.0.0.0", "exposes_metrics": True}
    with RunningApplication(tmp_path, **exposing) as made:
        made.wait()
        exposed = made.metrics.replace("127.0.0.1", "127.0.0.2")
        paths = ("/ping", "/openapi.json", "/v1/score")
        for url in (*(made.url + path for path in paths), exposed):
            answer = httpx.get(url)
            assert (answer.status_code, error_of(answer)) == (401, "bad_token")
        assert httpx.get(made.metrics).status_code == 200
        # The service asks this port whether the front hangs, which is no client that was refused.
        assert httpx.get(made.metrics.removesuffix("metrics")).status_code == 404
        assert 'code="not_found"' not in httpx.get(made.metrics).text
        bearer = {"Authorization": "bearer " + "t" * 43}
        assert httpx.get(exposed, headers=bearer).status_code == 200
        family = psutil.Process(made.process.pid).children()
        with ThreadPoolExecutor(1) as pool:
            with suspended(made.worker("score")):
                accepted = made.begin(pool, "score", **bearer)
                made.process.terminate()
                for one in family:
                    one.send_signal(signal.SIGTERM)  # as to a whole process group
                time.sleep(0.5)
            assert accepted.result().status_code == 200
        assert made.process.wait(30) == 0
        assert psutil.wait_procs(family, timeout=5)[1] == []
        assert made.output.read_text() == ""


def test_a_stop_refuses_what_is_not_done_in_time(tmp_path: Path) -> None:
    """First what waits for a worker, then what a worker computes. It ends in any case."""

    def check(refused: httpx.Response) -> None:
        assert (refused.status_code, error_of(refused)) == (503, "stopping")
        assert refused.headers["retry-after"] == "1"

    constants = {"REFUSE_S": 0.5, "STOP_S": 6}
    with RunningApplication(tmp_path, LIMITS, constants) as made, ThreadPoolExecutor(3) as pool:
        made.wait()
        family = psutil.Process(made.process.pid).children()
        with suspended(made.worker("score")):
            with suspended(made.worker("encode")):
                in_time, late = (pool.submit(made.post, name) for name in ("encode", "score"))
                begun = "ade_queue_seconds_total{"
                wait_for(lambda: httpx.get(made.metrics).text.count(begun) == 2)
                waiting = pool.submit(made.post, "score")
                wait_for(lambda: made.queued("score") == 1)
                made.process.terminate()
                check(waiting.result())
            assert in_time.result().status_code == 200
            check(late.result())
            assert made.process.wait(30) == 0
        assert psutil.wait_procs(family, timeout=5)[1] == []
    assert "Traceback" not in made.output.read_text(), made.output.read_text()


def test_workers_end_with_a_front_that_is_killed(tmp_path: Path) -> None:
    with RunningApplication(tmp_path) as made:
        made.wait()
        family = psutil.Process(made.process.pid).children()
    wait_for(lambda: not any(is_running(one) for one in family))


def is_running(process: psutil.Process) -> bool:
    """Whether a process runs; an orphan that has ended may not be reaped yet."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_worker_that_cannot_start_is_reported(tmp_path: Path) -> None:
    options = dataclasses.asdict(ServingOptions(backend="none"))
    with RunningApplication(tmp_path, options=options) as made:
        assert made.process.wait(120) != 0
    assert "did not start" in made.output.read_text() and "none" in made.output.read_text()
