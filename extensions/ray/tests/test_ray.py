"""The service on Ray: its processes, and what a client sees when parts of it die.

The recorded contract runs over it in ``test_contract.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import httpx
import psutil
import pytest

from ade_base.ports import local_address
from ade_client.contract import MODEL_HEADER
from benchmarks.ray_cluster import ray_cluster
from extensions.ray import instance
from handlers.launch.publish import DESCRIBE
from handlers.processes.channel import ask
from serving.engine.bundle import open_bundle
from tests.helpers import PRETRAINED, ROOT, with_calibrations
from tests.service import RunningService

CAT = (ROOT / "serving" / "examples" / "cat.png").read_bytes()
LOOPBACK = ("127.", "::1", "::ffff:127.")
NAMES = ("raylet", "gcs_server", "ray::")  # of Ray's processes
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed (extra ray)"
)


# Connecting


# In the place of Ray.
STAND_IN = """
import os
import signal
import sys
from types import SimpleNamespace

def init(**options):
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    if os.environ.get("STOP_IN_INIT"):
        os.kill(os.getpid(), signal.SIGTERM)
    if os.environ.get("REFUSED_IN_INIT"):
        raise RayError("token authentication is enabled but no token was found")

class RayError(Exception):
    pass

shutdown = lambda: None
exceptions = SimpleNamespace(RayError=RayError)
"""
SCORE = """
from extensions.ray.instance import ray_instance
with ray_instance("10.0.0.1:6379", 1):
    pass
"""
FOLDER = """
import fcntl, os, sys
from pathlib import Path
from extensions.ray import instance
instance.SHORT = sys.argv[1]
with instance.ray_instance("10.0.0.1:6379", 1):
    (folder,) = Path(sys.argv[1]).glob("ade-ray-*")
    try:
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("locked")
"""
STOP = """
import os, signal
from ade_cli.main import _signals_raise
from extensions.ray.instance import ray_instance
with _signals_raise("{verb}"), ray_instance("10.0.0.1:6379", 1):
    os.kill(os.getpid(), signal.SIGTERM)
"""


def run_on_stand_in(script, folder):
    (folder / "ray.py").write_text(STAND_IN)
    path = f"{folder}:{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    return subprocess.run(
        [sys.executable, "-c", script, folder],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("where", ["", "STOP_IN_INIT"])
@pytest.mark.parametrize("verb, status", [("score", 128 + signal.SIGTERM), ("serve", 0)])
def test_sigterm_ends_a_job_in_bulk_with_the_status_of_a_local_one(
    verb, status, where, tmp_path, monkeypatch
):
    if where:
        monkeypatch.setenv(where, "1")
    done = run_on_stand_in(STOP.format(verb=verb), tmp_path)
    assert done.returncode == status, done.stderr


def test_a_cluster_that_refuses_is_an_error_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setenv("REFUSED_IN_INIT", "1")
    assert run_on_stand_in(SCORE, tmp_path).stderr.splitlines()[-1] == (
        "extensions.ray.instance.ClusterError: the Ray cluster at 10.0.0.1:6379: "
        "token authentication is enabled but no token was found"
    )


def test_cleaners_of_temporary_files_leave_out_the_folder_of_an_instance(tmp_path):
    """systemd-tmpfiles takes this lock of each folder before it looks for old files."""
    done = run_on_stand_in(FOLDER, tmp_path)
    assert done.stdout == "locked\n", done.stderr


def test_folders_of_killed_processes_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(instance, "SHORT", str(tmp_path))
    old, new, used = (tmp_path / f"{instance.PREFIX}{name}" for name in ("old", "new", "used"))
    for folder in (old, new, used):
        folder.mkdir()
    for folder in (old, used):
        os.utime(folder, (0, 0))
    with instance.kept_from_cleaners(used):
        instance._remove_abandoned()
    assert sorted(tmp_path.iterdir()) == [new, used]


def test_a_log_that_cannot_be_written_keeps_no_replica_from_starting():
    script = (
        "import logging; from extensions.ray.serve.logs import open_log; "
        "open_log('/dev/null/logs', 'front-0'); logging.warning('lost')"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


# Processes


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.2)


def processes_of_ray():
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name().startswith(NAMES):
                found.append(process)
    return found


def workers_of(service, model="score"):
    """The process ids of a model's replicas."""
    found = ask(service.folder.control_socket, {"do": DESCRIBE})["workers"] or {}
    return [worker["pid"] for worker in found.get(model, {"workers": []})["workers"]]


def connections_of(process):
    with contextlib.suppress(psutil.Error):
        return process.net_connections("tcp")
    return []


def refusal(port, message):
    """The error with which the gRPC server of a replica answers."""
    import grpc

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
        with pytest.raises(grpc.RpcError) as caught:
            call(message, timeout=30)
    return str(caught.value.code().name)


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_and_nothing_is_reached_from_outside(sign):
    """But for the API and the page."""
    before = {process.pid for process in processes_of_ray()}
    options = ("--engine", "ray", "--workers", "1", "--host", "0.0.0.0")
    service = RunningService(PRETRAINED, options=options, timeout=300)
    url = f"http://{local_address('0.0.0.0')}:{service.ports['inference']}"
    headers = {"Authorization": f"Bearer {service.folder.token_file.read_text()}"}
    of_ray = [process for process in processes_of_ray() if process.pid not in before]
    processes = [*service.descendants(), *of_ray]
    try:
        assert len(of_ray) > 6
        outside = {
            (process.cmdline()[0], connection.laddr.port)
            for process in processes
            for connection in connections_of(process)
            if connection.status == psutil.CONN_LISTEN
            and not connection.laddr.ip.startswith(LOOPBACK)
        }
        # Ray has no setting for the address of these servers.
        of_replicas = {one for one in outside if one[0].startswith("ray::ServeReplica:")}
        others = {port for _, port in outside - of_replicas}
        assert others == {service.ports[name] for name in ("inference", "ui")}, outside
        for _, port in of_replicas:
            assert refusal(port, b"") == "UNAUTHENTICATED"
        scored = httpx.post(f"{url}/predictions/score", content=CAT, timeout=60, headers=headers)
        assert scored.status_code == 200
        text = httpx.get(f"{service.metrics}/metrics", timeout=60).text
        assert 'ade_requests_total{model_name="score"' in text
    finally:
        service.process.send_signal(sign)
        service.process.wait(90)
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive


# Failures


class Load:
    """Clients that score one picture again and again, and count what they get.

    Args:
        url: of the service.
        num_clients: at a time.
        request: what they send, as arguments of httpx; by default the picture alone.

    Attributes:
        answers: the body of each model's answers, which are all the same.
    """

    def __init__(self, url, num_clients, **request):
        self._url = f"{url}/predictions/score"
        self._request = {"timeout": 30, **(request or {"content": CAT})}
        first = httpx.post(self._url, **{**self._request, "timeout": 120})
        assert first.status_code == 200
        self.answers = {first.headers[MODEL_HEADER]: first.content}
        self.counts: Counter[str] = Counter()
        self._is_over = threading.Event()
        self._clients = [threading.Thread(target=self._run) for _ in range(num_clients)]

    def __enter__(self):
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *error):
        self._is_over.set()
        for client in self._clients:
            client.join(150)

    def _run(self):
        with httpx.Client() as client:
            while not self._is_over.is_set():
                outcome = self._ask(client)
                self.counts[outcome] += 1
                if outcome != "ok":
                    time.sleep(0.2)

    def _ask(self, client):
        try:
            answer = client.post(self._url, **self._request)
        except httpx.TransportError:
            return "dropped"
        if answer.status_code != 200:
            return str(answer.status_code)
        expected = self.answers.setdefault(answer.headers[MODEL_HEADER], answer.content)
        return "ok" if answer.content == expected else "wrong"

    def wait_for_answers(self, count):
        """Wait until so many more requests are answered; returns the seconds."""
        started, wanted = time.monotonic(), self.counts["ok"] + count
        wait_for(lambda: self.counts["ok"] >= wanted, 90)
        return time.monotonic() - started


@needs_ray
@pytest.mark.slow
def test_replicas_die_follow_the_load_and_are_published(tmp_path):
    """On one machine: no wrong answer, and of errors only 503 over replicas that die."""
    logs = tmp_path / "logs"
    options = ("--engine", "ray", "--workers", "2", "--logs", str(logs))
    service = RunningService(PRETRAINED, options=options, timeout=300)
    other = with_calibrations(
        PRETRAINED, tmp_path / "other", lambda its: dataclasses.replace(its, webp="0.1"), "other"
    )
    try:
        (pid,) = workers_of(service)
        with Load(service.url, 24) as load:
            wait_for(lambda: len(workers_of(service)) == 2, 120)
            assert set(load.counts) == {"ok"}
            psutil.Process(pid).kill()
            load.wait_for_answers(50)
            wait_for(lambda: len(workers_of(service)) == 2 and pid not in workers_of(service), 120)
        assert set(load.counts) <= {"ok", "503"}, load.counts
        with Load(service.url, 2) as load:
            command = [sys.executable, "-m", "ade_cli.main", "publish", str(other)]
            environment = {**os.environ, **service.variables}
            subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
            load.wait_for_answers(50)
        assert set(load.counts) == {"ok"}, load.counts
        assert set(load.answers) == {open_bundle(one).model_id for one in (PRETRAINED, other)}
        log = logs / "score-release2-0.log"
        wait_for(lambda: log.exists() and "was calibrated with libwebp 0.1" in log.read_text(), 10)
    finally:
        assert service.stop() == []


@pytest.fixture
def cluster():
    with ray_cluster() as made:
        yield made


@needs_ray
@pytest.mark.slow
def test_two_fronts_share_the_replicas_of_a_cluster_and_a_node_dies(cluster):
    """No wrong answer, and errors end; a front that ends leaves the replicas to the other."""
    worker = cluster.add_worker(5)
    variables = {n: v for n, v in cluster.environment.items() if n.startswith("RAY_")}
    started = [
        RunningService(
            PRETRAINED,
            options=("--engine", "ray", "--workers", "1"),
            timeout=300,
            variables={**variables, "RAY_ADDRESS": cluster.address},
        )
        for _ in range(2)
    ]
    first, second = started
    try:
        assert workers_of(first) == workers_of(second) != []
        with Load(second.url, 8) as load:
            load.wait_for_answers(50)
            first.stop()
            load.wait_for_answers(50)
            assert set(load.counts) == {"ok"}, load.counts
            cluster.add_worker(5)  # the replicas need a place
            cluster.kill(worker)
            time.sleep(1)  # answers that were on their way
            load.wait_for_answers(50)
        assert set(load.counts) <= {"ok", "503"}, load.counts
    finally:
        for service in started:
            service.stop()
