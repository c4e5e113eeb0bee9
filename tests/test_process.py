"""The ASGI application with its worker processes: forms, batches, crashes, metrics, stop.

That its answers equal those of the other engines is tested in test_contract.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from ade_base.ports import Ports, free_ports
from ade_cli.status import _text
from handlers.front.admission import Limits, Memory
from handlers.front.front import Front, Request
from handlers.launch import launcher
from handlers.launch.engines import ENGINES
from handlers.launch.status import read_status
from handlers.process.pool import Pool
from handlers.processes.channel import ask
from handlers.processes.run_folder import run_folder
from handlers.service import wire, worker
from handlers.service.application import READY, Application, ApplicationSettings, served_models
from handlers.service.control import DESCRIBE
from handlers.service.metrics import Metrics
from handlers.service.options import ServingOptions
from handlers.service.pool import PooledModel, WorkerError
from handlers.service.release import CurrentRelease
from handlers.service.worker import WorkerSettings
from serving.api.journal import last_errors
from serving.engine.bundle import BundleError, open_bundle
from serving.engine.signatures import OPERATIONS
from serving.ingest.errors import ApiError, worker_died
from tests.helpers import PRETRAINED, ROOT, npy, suspended, wait_for
from tests.test_metric_names import RECORD, found_metrics

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


def release_of(*folders, number=1):
    return launcher.release_of(number, [open_bundle(folder) for folder in folders])


def one_model(metrics=None, folder=Path("folder")):
    """A model with one worker, which nobody has started."""
    options = ServingOptions(device="cpu")
    settings = WorkerSettings(
        str(folder), "tiny@1", "", "score", "score", "1", str(folder), options
    )
    return PooledModel("score", [settings], metrics or Metrics(Counter()), 60.0, {})


def pool_of(process, model):
    """A pool whose only worker has a stand-in for its process."""
    pool = Pool([model], Path("unused"))
    (place,) = pool._workers
    place.is_ready = True
    pool._tasks.append(asyncio.create_task(place.keep(process)))
    return pool


class StandIn:
    """In the place of a worker's process: answers 200 after some seconds, and measures nothing.

    Args:
        seconds: before its answer.
        error: instead of an answer.
        follows: called for what it sends after the answer; its message, or an error.
    """

    def __init__(self, seconds=0.0, error=None, follows=None):
        self.gone = asyncio.get_running_loop().create_future()
        self.is_asked, self.is_ended = asyncio.Event(), False
        self._seconds, self._error, self._follows = seconds, error, follows

    async def ask(self, parts, seconds):
        self.is_asked.set()
        await asyncio.sleep(self._seconds)
        if self._error is not None:
            raise self._error
        return {"answers": [{"status": 200, "content_type": "a/b", "headers": {}}]}, [b"x"]

    async def next(self, seconds):
        if self._follows is not None:
            return await self._follows(), []
        return {"measurements": [], "leaving": False}, []

    async def end(self):
        self.is_ended = True
        return 70


def request_of(operation="score", is_probe=False):
    path = f"/predictions/{operation}"
    return Request("POST", path, {}, "image/png", bytearray(IMAGE), is_probe)


class RunningApplication:
    """``python -m handlers.service.application``, as ``ade serve`` starts it, without a page.

    The constructor starts it, and the end of a ``with`` block kills it if it still runs. Its
    workers must end with it.

    Args:
        folder: for its files.
        limits: replace the default ones.
        constants: replace those of the module, such as ``STOP_S``.
        pool: of an engine.
        settings: replace those below.
    """

    def __init__(
        self, folder, limits=None, constants=None, pool=ENGINES["process"].code, **settings
    ):
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
            "folder": str(folder),
            "pool": pool,
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

    def __enter__(self):
        return self

    def __exit__(self, *error):
        family = psutil.Process(self.process.pid).children() if self.process.poll() is None else []
        self.process.kill()
        self.process.wait()
        wait_for(lambda: not any(map(is_running, family)))

    def wait(self):
        wait_for(self.is_ready, 120)

    def is_ready(self):
        assert self.process.poll() is None, self.output.read_text()
        try:
            return httpx.get(self.url + READY, timeout=120).status_code == 200
        except httpx.TransportError:
            return False

    def worker(self, name):
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

    def logged(self, name):
        """The ids in a model's journal."""
        lines = self._journal(name).read_text().splitlines()
        return [json.loads(line)["id"] for line in lines]

    def _journal(self, name):
        return self.logs / f"{name}-0.requests.jsonl"

    def post(self, name, content=IMAGE, **headers):
        return httpx.post(
            f"{self.url}/predictions/{name}", content=content, headers=headers, timeout=60
        )

    def begin(self, pool, name, **headers):
        """Post a request, and wait until it is on its way to a worker."""
        before = self._queue_seconds(name)
        posted = pool.submit(self.post, name, **headers)
        wait_for(lambda: self._queue_seconds(name) > before)
        return posted

    def _queue_seconds(self, name):
        """The time that requests waited for a worker, which is added when it gets them."""
        series = rf'^ade_queue_seconds_total\{{.*model_name="{name}".*\}} (.*)$'
        return sum(map(float, re.findall(series, httpx.get(self.metrics).text, re.MULTILINE)))

    def queued(self, name):
        """Number of requests that wait for a worker of a model."""
        running = ask(self.control, {"do": DESCRIBE})
        return int(running["workers"][name]["queued"])

    def in_flight(self):
        """Number of requests that the front has taken and not answered."""
        return sum(
            c.status == psutil.CONN_ESTABLISHED and c.laddr.port == self.port
            for c in psutil.Process(self.process.pid).net_connections("tcp")
        )


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    with RunningApplication(tmp_path_factory.mktemp("process"), LIMITS) as made:
        made.wait()
        yield made
        made.process.terminate()
        assert made.process.wait(30) == 0
    assert "Traceback" not in made.output.read_text(), made.output.read_text()


def error_of(answer):
    assert set(answer.json()) == {"error"} and answer.headers["content-type"] == "application/json"
    return str(answer.json()["error"]["code"])


# Paths


def test_both_paths_of_an_operation(app):
    first, second = (
        httpx.post(f"{app.url}/{prefix}/score", content=IMAGE) for prefix in ("predictions", "v1")
    )
    assert first.status_code == second.status_code == 200 and first.content == second.content
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    expected = [answer.headers["x-request-id"] for answer in (first, second)]
    wait_for(lambda: app.logged("score")[-2:] == expected)


def test_what_can_be_read(app):
    assert httpx.get(f"{app.url}/readyz").json() == {"ready": True}
    assert httpx.get(f"{app.url}/ping").json() == {"status": "Healthy"}
    document = httpx.get(f"{app.url}/openapi.json").json()
    assert document["servers"] == [{"url": "/"}]  # clients on other machines read it, too
    assert set(document["paths"]) == {f"/predictions/{operation}" for operation in OPERATIONS}
    assert httpx.get(f"{app.url}/v1/openapi.json").json() == document


# Workers


def test_requests_that_wait_are_computed_together(app):
    with ThreadPoolExecutor(7) as pool:
        with suspended(app.worker("score")):
            first = app.begin(pool, "score")
            others = [pool.submit(app.post, "score") for _ in range(6)]
            wait_for(lambda: app.queued("score") == 6)
        assert first.result().headers["x-ade-batch"] == "1"
        assert {one.result().headers["x-ade-batch"] for one in others} == {"6"}
    assert {one.result().content for one in others} == {first.result().content}


@pytest.mark.parametrize("body", [IMAGE, IMAGE.ljust(300_000)], ids=["small", "large"])
def test_a_request_whose_client_leaves_before_a_worker_is_free_is_not_computed(app, body):
    length = f"Host: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with ThreadPoolExecutor(1) as pool:
        with suspended(app.worker("score")):
            first = app.begin(pool, "score")
            with socket.create_connection(("127.0.0.1", app.port)) as gone:
                gone.sendall(f"POST /predictions/score HTTP/1.1\r\n{length}".encode())
                wait_for(lambda: app.in_flight() == 2)
                gone.sendall(body)
                wait_for(lambda: app.queued("score") == 1)
            wait_for(lambda: app.in_flight() == 1 and app.queued("score") == 0)
        assert first.result().status_code == 200
    answered = [app.post("score").headers["x-request-id"], first.result().headers["x-request-id"]]
    wait_for(lambda: app.logged("score")[-2:] == answered[::-1])


def test_a_worker_that_crashes_takes_only_its_requests_with_it(app):
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


def test_a_request_that_fails_or_cannot_be_read_leaves_its_neighbours_their_answers(
    tiny_bundle, tmp_path, monkeypatch
):
    settings = WorkerSettings(
        *(str(tiny_bundle), "tiny@1", open_bundle(tiny_bundle).digest, "sample", "tiny-sample"),
        *("1", str(tmp_path), ServingOptions(device="cpu")),
    )
    real = worker.raw_request

    def fail_on_junk(content_type, body, *rest):
        if body == b"junk":
            raise ZeroDivisionError
        return real(content_type, body, *rest)

    monkeypatch.setattr(worker, "raw_request", fail_on_junk)
    about = {"id": "1", "probe": False, "v2": None, "content_type": "application/json"}
    form = {**about, "id": "form", "content_type": "multipart/form-data; boundary=x"}
    good = b'{"n": 1, "seed": 1}'
    no_utf8 = b'--x\r\nContent-Disposition: form-data; name="\xff"\r\n\r\nx\r\n--x--\r\n'
    service = worker.load_service(settings)
    requests = {"requests": [about, about, form, about]}
    answers = worker.answer_batch(service, "tiny-sample", requests, [good, b"junk", no_utf8, good])
    assert [answer.status for answer in answers] == [200, 500, 400, 200]
    assert b"ZeroDivisionError" not in answers[1].body and answers[0].body == answers[3].body
    assert json.loads(answers[2].body)["error"]["code"] == "malformed_request"
    counted = {(name, labels.get("code")): n for name, labels, n in worker.measurements(service)}
    assert counted["ade_requests_total", "malformed_request"] == 1
    logged = {entry["id"]: entry["status"] for entry in last_errors(tmp_path)}
    assert logged == {"1": 500, "form": 400}


def test_an_idle_worker_that_ends_is_replaced(app):
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


def test_a_worker_is_one_process_with_one_thread_for_the_model(app):
    assert len(psutil.Process(app.process.pid).children()) == len(OPERATIONS)
    assert app.worker("score").environ()["OMP_NUM_THREADS"] == "1"


# Metrics


def test_metrics(app):
    """Counts of requests and images; those with the secret of probes are in none."""
    assert found_metrics(app.url, app.metrics) == json.loads(RECORD.read_text())

    def value(name):
        text = httpx.get(app.metrics).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    counted = 'ade_requests_total{model_name="score",worker="0",status="200",code="none"'
    before, images = value(counted), value("ade_bpd_count{")
    assert app.post("score").status_code == 200
    wait_for(lambda: value(counted) == before + 1)
    assert app.post("score", **{"X-Ade-Probe": "secret-of-probes"}).status_code == 200
    assert app.post("score", **{"X-Ade-Probe": "1"}).status_code == 200
    # A refused request shows when those before it are counted, in their order.
    refused = counted.replace('"200",code="none"', '"415",code="not_an_image"')
    refusals = value(refused)
    assert app.post("score", b"not an image").status_code == 415
    wait_for(lambda: value(refused) == refusals + 1)
    assert value(counted) == before + 2 and value("ade_bpd_count{") == images + 2
    assert value('ade_stage_seconds_total{model_name="score"') > 0
    answer = httpx.get(app.metrics)
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    types = dict(re.findall(r"^# TYPE (\w+) (\w+)$", answer.text, re.MULTILINE))
    assert set(types) == set(re.findall(r"^# HELP (\w+) .", answer.text, re.MULTILINE))
    for name, kind in types.items():
        assert (kind == "counter") == name.endswith("_total")
    whole, queued = (
        float(re.findall(rf'^{name}\{{model_name="score".* (\S+)$', answer.text, re.MULTILINE)[0])
        for name in ("ade_answer_seconds_total", "ade_queue_seconds_total")
    )
    assert whole > queued > 0


def test_time_in_the_queue_counts_from_the_arrival_of_a_request():
    """A request waits for its turn before a pool has it."""

    async def text():
        metrics, limits = Metrics(Counter()), Limits(in_flight=(1, 1, 1))
        pool = pool_of(StandIn(0.2), one_model(metrics))
        front = Front(
            Application(pool.models, {}, limits).api, limits, Memory(limits), "", Counter()
        )

        async def post():
            messages = [{"type": "http.request", "body": IMAGE}]

            async def receive():
                return messages.pop() if messages else await asyncio.sleep(60)

            async def send(message):
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


def test_status_of_an_engine_that_reports_no_workers():
    ports = Ports(*free_ports(3))
    found = read_status(ports, host="127.0.0.2")
    assert not found["is_own"] and "no service of this user" in _text(found)
    page = f"http://127.0.0.2:{ports.ui} (ADE_UI_PORT)"
    assert found["silent"] == [f"http://127.0.0.2:{ports.inference} (ADE_INFERENCE_PORT)", page]
    assert f"ready       no: {page} does not answer\n" in _text({**found, "silent": [page]})
    assert "ready       no: not all operations answer\n" in _text({**found, "silent": []})
    own = {**found, "is_own": True, "last_errors": []}
    assert "workers     unknown: the service does not answer" in _text(own)


def test_status_asks_the_users_service_at_its_host(short_path, monkeypatch):
    monkeypatch.setenv("ADE_RUN_DIR", str(short_path / "run"))
    ports = Ports(*free_ports(3))
    with run_folder() as folder:
        folder.describe(ports, "127.0.0.2", short_path, {})
        assert read_status(ports)["silent"][0].startswith(f"http://127.0.0.2:{ports.inference} ")
        assert read_status(ports, host="127.0.0.3")["silent"][0].startswith("http://127.0.0.3:")


def test_metrics_add_up():
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


def test_requests_that_a_worker_fails_are_counted_by_bundle():
    """A release whose workers end over each request must not look healthy."""

    async def fail():
        model = one_model(metrics := Metrics(Counter()))
        for is_probe in (False, True):
            asked = asyncio.create_task(model.answer(request_of(is_probe=is_probe)))
            (job,) = await model.waiting.next_batch()
            job.fail(worker_died())
            with pytest.raises(ApiError):
                await asked
        return metrics.text()

    text = asyncio.run(fail())
    line = 'ade_worker_failures_total{model_name="score",code="unavailable",bundle="tiny@1"} 1.0'
    assert line in text.splitlines()


def test_metrics_of_a_model_stay_while_one_of_its_releases_runs():
    metrics = Metrics({})
    with metrics.of_models(["a"]):
        with metrics.of_models(["a"]):
            metrics.update("ade_images_total", {"bundle": "a"}, 1.0)
        assert metrics.text().endswith('ade_images_total{bundle="a"} 1.0\n')
    assert "ade_" not in metrics.text()


# Overload, start and stop


def test_bundles_of_one_name_do_not_take_each_other_s_place():
    """On a cluster, whose configuration `ade serve` does not check."""
    first = open_bundle(PRETRAINED)
    copies = [dataclasses.replace(first, folder=Path(name)) for name in ("a", "b")]
    with pytest.raises(BundleError, match="need different names"):
        served_models([first, *copies])


def test_whatever_fails_at_a_worker_it_is_replaced(tmp_path, monkeypatch):
    """Even if the front has no memory for its answer, or for the next process."""
    started = 0

    async def start(place):
        nonlocal started
        started += 1
        if started == 1:
            raise MemoryError
        place.is_ready = True
        return StandIn(error=MemoryError)

    async def answer():
        pool = pool_of(StandIn(error=MemoryError), model := one_model())
        async with asyncio.timeout(20):
            for _ in range(2):
                with pytest.raises(ApiError, match="worker"):
                    await model.answer(request_of())
            await pool.stop()

    monkeypatch.setattr("handlers.process.pool._Worker.start", start)
    asyncio.run(answer())
    assert started >= 2


@pytest.mark.parametrize("rest", ["none", "late", "leaving"])
def test_an_answer_stands_whatever_follows_it(rest, tmp_path):
    """A worker sends what it measured after its answers: it may die first, hang, or then leave."""

    async def follows():
        if rest == "none":
            raise WorkerError("its connection ended")
        if rest == "late":
            await asyncio.sleep(60)
        missing = ["ade_gate_calibration_version", {"calibration": "cam"}, 1.0]
        return {"measurements": [missing], "leaving": True}

    async def answer():
        process = StandIn(follows=follows)
        pool = pool_of(process, model := one_model(metrics := Metrics(Counter())))
        (place,) = pool._workers
        async with asyncio.timeout(5):
            found = await model.answer(request_of())
            assert (found.status, found.body) == (200, b"x")
            if rest != "late":
                while not process.is_ended:
                    await asyncio.sleep(0.01)
                assert not place.is_ready
            await pool.stop()
        assert process.is_ended
        # Another release may have the same labels, and does not know this calibration.
        assert "missing" not in metrics.text()

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
def test_messages_that_no_worker_sends_are_refused_at_once(start):
    async def receive():
        stream = asyncio.StreamReader()
        stream.feed_data(start)
        async with asyncio.timeout(5):
            await wire.receive(stream)

    with pytest.raises(ValueError):
        asyncio.run(receive())


@pytest.mark.parametrize("head", [{}, {"measurements": [["ade_other", {}, 1.0]]}], ids=str)
def test_a_worker_whose_first_message_is_invalid_did_not_start(head, tmp_path, monkeypatch):
    (tmp_path / "invalid_worker.py").write_text(
        "import socket, time\nfrom handlers.service import wire\n"
        f"socket.socket(fileno=0).sendall(b''.join(wire.pack({head!r})))\ntime.sleep(1000)"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setattr("handlers.process.pool.WORKER", "invalid_worker")

    others = psutil.Process().children()

    async def start():
        pool = Pool([one_model(folder=tmp_path)], tmp_path)
        with pytest.raises(WorkerError, match="did not start: its measurements are invalid"):
            await pool.start()
        assert not pool.is_ready and psutil.Process().children() == others

    asyncio.run(start())


def test_a_pool_that_is_stopped_answers_what_it_has(tmp_path):
    """The batch that a worker computes, and the requests that wait for one."""

    async def stop_busy():
        pool = pool_of(process := StandIn(60), model := one_model())
        requests = [asyncio.create_task(model.answer(request_of()))]
        await process.is_asked.wait()
        requests.append(asyncio.create_task(model.answer(request_of())))
        await asyncio.sleep(0)
        await pool.__aexit__()
        requests.append(asyncio.create_task(model.answer(request_of())))
        async with asyncio.timeout(5):
            return await asyncio.gather(*requests, return_exceptions=True)

    for error in asyncio.run(stop_busy()):
        assert isinstance(error, ApiError) and (error.status, error.code) == (503, "stopping")


@pytest.mark.parametrize("num_steps", range(8))
def test_no_request_is_lost_if_a_worker_ends_as_it_arrives(num_steps):
    async def check():
        model, gone = one_model(), asyncio.get_running_loop().create_future()
        taking = asyncio.create_task(model.next_batch(gone))
        await asyncio.sleep(0)
        answer = asyncio.create_task(model.answer(request_of()))
        for _ in range(num_steps):
            await asyncio.sleep(0)
        gone.set_result(0)
        (taken,) = await asyncio.gather(taking, return_exceptions=True)
        for _ in range(8):
            await asyncio.sleep(0)
        assert len(model.waiting) == 1 if isinstance(taken, WorkerError) else len(taken) == 1
        answer.cancel()

    asyncio.run(check())


def test_a_removed_release_has_time_for_what_it_accepted():
    """Its requests may wait for their turn, and then for the answer."""

    @contextlib.asynccontextmanager
    async def build(release):
        yield None

    async def seconds(limits):
        current = CurrentRelease[Any](build, lambda _: None, limits)
        async with current.run(release_of(PRETRAINED)):
            running = current._running
            return running._drain_s

    for limits in (Limits(), Limits(waiting_s=500.0)):
        assert asyncio.run(seconds(limits)) > limits.waiting_s + limits.upstream_s


def test_a_full_queue_is_refused_at_once(app):
    room = LIMITS["in_flight"][1] + LIMITS["waiting"]
    with ThreadPoolExecutor(room + 1) as pool:
        with suspended(app.worker("reconstruct")):
            posted = [pool.submit(app.post, "reconstruct") for _ in range(room + 1)]
            first = next(as_completed(posted))  # the others wait for the worker
            refused = first.result()
            assert (refused.status_code, error_of(refused)) == (503, "overloaded")
            assert refused.headers["retry-after"] == "1"
        assert {one.result().status_code for one in posted if one is not first} == {200}


def test_a_stop_refuses_what_is_not_done_in_time(tmp_path):
    """First what waits for a worker, then what a worker computes. It ends in any case.

    What is done in time is answered, although the workers are signalled as well.
    """

    def check(refused):
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
                for one in family:
                    one.send_signal(signal.SIGTERM)  # as to a whole process group
                check(waiting.result())
            assert in_time.result().status_code == 200
            check(late.result())
            assert made.process.wait(30) == 0
        assert psutil.wait_procs(family, timeout=5)[1] == []
    assert "Traceback" not in made.output.read_text(), made.output.read_text()


def is_running(process):
    """Whether a process runs; an orphan that has ended may not be reaped yet."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_worker_that_cannot_start_is_reported(tmp_path):
    options = dataclasses.asdict(ServingOptions(backend="none"))
    with RunningApplication(tmp_path, options=options) as made:
        assert made.process.wait(120) != 0
    assert "did not start" in made.output.read_text() and "none" in made.output.read_text()
