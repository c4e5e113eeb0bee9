"""Processes and the working folder when a process, or the whole service, is killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from ade_base.files import LOCK
from ade_base.ports import Ports, free_ports
from ade_client.client import AdeClient, AdeError
from handlers.launch import serve
from handlers.launch.page_process import Page
from handlers.processes import watchdog as hangs
from handlers.processes.run_folder import (
    PREFIX,
    RunFolder,
    RunFolderError,
    find_service,
    run_folder,
)
from handlers.processes.supervision import (
    MAX_DEATHS,
    MAX_OUTPUT_BYTES,
    LaunchError,
    Supervisor,
)
from handlers.processes.watchdog import MAX_UNANSWERED, MAX_UNANSWERED_AT_START
from serving.api.guard import check_host
from serving.engine.backends import BackendError
from serving.engine.bundle import open_bundle
from tests.helpers import PRETRAINED, ROOT, held_by_another
from tests.service import RunningService

EXAMPLE = ROOT / "serving" / "examples" / "cat.png"
SLEEP = ["sleep", "1000"]
PORTS = Ports(1, 2, 3)


def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def is_running(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def reapers(process):
    """Those below a process."""
    found = set()
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ade-reaper" in child.cmdline():
                found.add(child.pid)
    return found


@pytest.fixture
def supervisor(tmp_path):
    with Supervisor(tmp_path) as started:
        yield started


def start(supervisor, script="exec sleep 1000", **options):
    """Start a page that is a script of a shell."""
    given = {"restarts": True, **options}
    return supervisor.start("page", ["sh", "-c", script], dict(os.environ), **given)


def test_a_killed_child_is_restarted(tmp_path, capfd):
    """What it started ends before."""
    pids = tmp_path / "pids"
    with Supervisor(tmp_path) as supervisor:
        child = start(supervisor, f"sleep 1000 & echo $! >> {pids}; wait")
        first = child.process.pid
        assert not supervisor.tend()
        assert until(lambda: pids.exists() and pids.read_text())
        grandchild = int(pids.read_text().split()[0])
        os.kill(first, signal.SIGKILL)
        assert until(supervisor.tend) and until(lambda: not is_running(grandchild))
        assert supervisor.pids["page"] != first and is_running(supervisor.pids["page"])
    assert not is_running(supervisor.pids["page"])
    assert "page ended with -9: restarting it" in capfd.readouterr().err


def test_addresses_are_printed_for_any_proxy(tmp_path, monkeypatch, capsys):
    plan: Any = SimpleNamespace(
        bundles=[open_bundle(PRETRAINED)],
        ports=Ports(8080, 8082, 7860),
        host="127.0.0.1",
        token=None,
        logs=tmp_path,
    )
    for direct in (False, True):
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        monkeypatch.setenv("no_proxy", "127.0.0.1" if direct else "")
        serve._print_addresses(plan, RunFolder(tmp_path), 1.0)
        requests = re.findall("^curl.*", capsys.readouterr().out, re.MULTILINE)
        assert len(requests) == 4
        assert all(direct != ("--noproxy '*'" in request) for request in requests)


def test_a_gpu_is_left_alone_if_onnx_runtime_is_for_cpus(monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(serve, "SIGNS_OF_A_GPU", (ROOT,))
    monkeypatch.setattr(serve, "has_cuda_provider", lambda: False)
    assert not serve._gpu_for("auto", "onnxruntime")
    assert "the GPU is not used: ONNX Runtime is installed for CPUs" in capsys.readouterr().err
    with pytest.raises(BackendError, match="installed for CPUs alone: pip uninstall"):
        serve._gpu_for("cuda", "onnxruntime")
    assert serve._gpu_for("auto", "torchscript")
    monkeypatch.setattr(serve, "has_cuda_provider", lambda: True)
    assert serve._gpu_for("auto", "onnxruntime") and serve._gpu_for("cuda", "onnxruntime")


def test_a_service_answers_at_the_name_that_it_listens_on():
    """At which its readiness is asked, too."""
    assert serve._allowed_hosts("", "Box.lan") == ["box.lan"]
    assert serve._allowed_hosts("", "Bücher.lan") == ["xn--bcher-kva.lan"]  # as clients send it
    check_host(["box.lan:7860"], serve._allowed_hosts("a.example", "Box.lan"))
    for host in ("127.0.0.1", "localhost", "0.0.0.0", "10.0.0.1"):
        assert serve._allowed_hosts("a.example", host) == ["a.example"]


def test_a_child_that_cannot_be_started_again_for_a_moment(supervisor, monkeypatch, capsys):
    """Such as at a limit of processes: the other parts of the service continue."""
    child, other = start(supervisor), start(supervisor)
    first = child.process.pid

    def fail(self):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(type(child), "start", fail)
        child.process.kill()
        child.process.wait()
        for _ in range(2 * MAX_DEATHS):
            assert not supervisor.tend()
        assert other.process.poll() is None
        assert "page cannot be started, trying again: [Errno 11]" in capsys.readouterr().err
    assert supervisor.tend() and child.process.pid != first and child.process.poll() is None


def test_closed_standard_streams_leave_their_numbers_to_no_socket():
    """Children inherit the page's socket, but have files of their own under these numbers."""
    script = """if True:
        import argparse, socket, sys
        from handlers.launch import serve
        serve.seam.load = lambda name: sys.exit(10 + socket.socket().fileno())
        options = dict(workers=None, engine="process", backend="onnxruntime")
        options |= dict(host="127.0.0.1")
        serve.run(argparse.Namespace(**options, cuda_graphs=False))
    """
    shell = ["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, script]
    assert subprocess.run(shell, cwd=ROOT, timeout=60).returncode > 12


@pytest.mark.parametrize(
    ("restarts", "is_starting", "message"),
    [
        (False, False, "page ended with 3:"),
        (True, True, "page ended with 3:"),
        (True, False, f"page ended {MAX_DEATHS} times within 60 s, at last with 3:"),
    ],
    ids=["may not end", "while the service starts", "keeps dying"],
)
def test_a_child_whose_end_ends_the_service(restarts, is_starting, message, supervisor):
    script = "echo the reason; exit 3"
    child = start(supervisor, script, restarts=restarts)
    for _ in range(MAX_DEATHS - 1 if restarts and not is_starting else 0):
        child.process.wait()
        assert supervisor.tend()
    child.process.wait()
    with pytest.raises(LaunchError, match=f"{message}\nthe reason"):
        supervisor.tend(restarts=not is_starting)


def test_children_are_stopped_together(tmp_path, monkeypatch):
    """Containers get one grace period for all of them."""
    monkeypatch.setattr("handlers.processes.supervision.STOP_TIMEOUT_S", 3.0)
    stubborn = ["sh", "-c", "trap '' TERM; touch \"$0\"; exec sleep 1000"]
    with Supervisor(tmp_path) as supervisor:
        for name in ("one", "two", "three"):
            supervisor.start(name, [*stubborn, f"{name}.deaf"], dict(os.environ))
        assert until(lambda: len(list(tmp_path.glob("*.deaf"))) == 3)
        pids, started = list(supervisor.pids.values()), time.monotonic()
    assert 3.0 <= time.monotonic() - started < 8.5
    assert not any(map(is_running, pids))


def kills(answers, monkeypatch):
    """After how many checks a front is killed that answers them like this.

    It is replaced at once.
    """
    found, left = list[int](), list(answers)

    def kill():
        found.append(len(answers) - len(left))
        front.process = SimpleNamespace(kill=kill)

    class Service:
        is_closed = property(lambda self: not left)

    front: Any = SimpleNamespace(name="front", process=SimpleNamespace(kill=kill))
    service: Any = Service()
    monkeypatch.setattr(hangs, "_answers", lambda port: left.pop(0))
    monkeypatch.setattr(hangs, "time", SimpleNamespace(sleep=lambda seconds: None))
    hangs._watch(front, 0, service)
    return found


STARTS, RUNS = [False] * MAX_UNANSWERED_AT_START, [False] * MAX_UNANSWERED


@pytest.mark.parametrize(
    "answers, killed_after",
    [
        ([True, *RUNS[1:]], []),
        ([True, *RUNS], [7]),
        # What was missed before an answer, or before a refusal, does not count.
        ([True, *RUNS[1:], True, *RUNS[1:], None, *RUNS[1:]], []),
        (STARTS[1:], []),
        (STARTS, [30]),
        # So does a new front have the time to start.
        ([True, *RUNS, *STARTS[1:]], [7]),
        ([True, *RUNS, *STARTS], [7, 37]),
    ],
)
def test_a_front_that_hangs_is_killed(answers, killed_after, monkeypatch, capfd):
    assert kills(answers, monkeypatch) == killed_after
    said = capfd.readouterr().err
    assert said.count(" in a row unanswered for 20 s each: killing it\n") == len(killed_after)


def test_a_check_of_a_front(monkeypatch):
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(server.handle_request)
            assert hangs._answers(server.server_port) is True
        monkeypatch.setattr(hangs, "CHECK_TIMEOUT_S", 0.1)
        assert hangs._answers(server.server_port) is False  # it listens and accepts nothing
    assert hangs._answers(server.server_port) is None


def test_a_page_that_is_replaced_leaves_no_files(tmp_path):
    plan: Any = SimpleNamespace(
        bundles=[],
        host="127.0.0.1",
        ports=Ports(*free_ports(3)),
        probe_secret="",
        token=None,
        allowed_hosts=[],
    )
    folder: Any = SimpleNamespace(path=tmp_path)

    def files():
        return sorted(path.name for path in tmp_path.glob("page-*") if path.is_dir())

    with Supervisor(tmp_path) as supervisor:
        page = Page(plan, folder, supervisor)
        page.start()
        for i in (2, 3):
            (tmp_path / files()[0] / "upload.png").write_bytes(b"x")
            page.show([])
            assert files() == [f"page-files-{i}"] and list(supervisor.pids) == ["page"]


def test_output_may_be_kept_elsewhere(tmp_path):
    """Where it outlives the working folder; a folder that was removed is made again."""
    (work := tmp_path / "work").mkdir()
    kept = tmp_path / "logs" / "front.out"
    with Supervisor(work) as supervisor:
        child = supervisor.start(
            "front", ["sh", "-c", "echo said; sleep 60"], dict(os.environ), True, output=kept
        )
        assert until(lambda: kept.read_text() == "said\n") and child.tail() == "said"
        shutil.rmtree(kept.parent)
        os.killpg(child.process.pid, signal.SIGKILL)
        assert until(supervisor.tend)
        assert until(lambda: kept.exists() and kept.read_text() == "said\n")
    assert list(work.glob("*.out")) == []


def test_output_that_cannot_be_written_keeps_no_child_from_being_restarted(tmp_path, capsys):
    logs = tmp_path / "logs"
    with Supervisor(tmp_path) as supervisor:
        given: Any = ("front", SLEEP, dict(os.environ), True, (), logs / "front.out")
        child = supervisor.start(*given)
        shutil.rmtree(logs)
        logs.touch()
        child.process.kill()
        assert until(supervisor.tend) and is_running(child.process.pid)
        assert "the output of front is dropped until it is restarted: [" in capsys.readouterr().err
        with pytest.raises(FileExistsError):  # a first start fails
            supervisor.start(*given)


def test_output_is_bounded(tmp_path):
    with Supervisor(tmp_path) as supervisor:
        child = supervisor.start("page", ["sh", "-c", "yes 0123456789"], dict(os.environ))
        assert until(lambda: child.output.stat().st_size > MAX_OUTPUT_BYTES)
        os.kill(child.process.pid, signal.SIGSTOP)
        os.killpg(child.process.pid, signal.SIGSTOP)
        child.trim()
        assert (
            child.output.stat().st_size == 0
            and (tmp_path / "page.out.1").stat().st_size > MAX_OUTPUT_BYTES
        )
        os.killpg(child.process.pid, signal.SIGCONT)
        assert until(lambda: child.output.stat().st_size)
        # The file is not padded with zeros. One byte is read, since the child fills it quickly.
        with child.output.open("rb") as file:
            assert file.read(1).isdigit()


@pytest.mark.parametrize("kills_reaper", [False, True])
def test_children_and_folder_die_with_the_service(tmp_path, kills_reaper):
    """So do children of children, such as TorchServe's workers."""
    folder = tmp_path / "folder with space"
    folder.mkdir()
    script = (
        "import os, sys, time\nfrom pathlib import Path\n"
        "from handlers.processes.supervision import Supervisor\n"
        "with Supervisor(Path(sys.argv[1])) as supervisor:\n"
        "    environment = dict(os.environ)\n"
        "    supervisor.start('torchserve', ['sh', '-c', 'sleep 1000 & sleep 1000'], environment)\n"
        "    supervisor.start('page', ['sleep', '1000'], environment, restarts=True)\n"
        "    while True:\n        supervisor.tend()\n        time.sleep(0.1)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)], cwd=ROOT)
    try:

        def descendants():
            return psutil.Process(process.pid).children(recursive=True)

        assert until(lambda: len(descendants()) == 5)
        if kills_reaper:
            (first,) = reapers(psutil.Process(process.pid))
            os.kill(first, signal.SIGKILL)
            assert until(lambda: reapers(psutil.Process(process.pid)) - {first})
        everything = descendants()
        process.kill()
        process.wait(10)
        _, alive = psutil.wait_procs(everything, timeout=5)
        assert alive == [] and until(lambda: not folder.exists())
    finally:
        process.kill()


def test_the_folder_is_locked_found_and_gone(short_path, monkeypatch):
    """Cleaners leave it out: systemd-tmpfiles takes this lock before it looks for old files."""
    monkeypatch.setenv("ADE_RUN_DIR", str(short_path / "run"))
    with run_folder() as folder:
        assert folder.path.parent == short_path / "run"
        assert folder.path.stat().st_mode & 0o777 == 0o700
        assert find_service(PORTS) is None
        folder.describe(PORTS, "127.0.0.1", short_path, {"page": 1})
        assert find_service(PORTS) == folder and find_service(Ports(1, 2, 4)) is None
        cleaner = os.open(folder.path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(cleaner, fcntl.LOCK_EX | fcntl.LOCK_NB)
        folder.description.write_text("{")
        assert find_service(PORTS) is None
    assert not folder.path.exists()
    fcntl.flock(cleaner, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(cleaner)


def test_a_service_keeps_running_if_its_description_cannot_be_written_again(tmp_path):
    folder = RunFolder(tmp_path)
    full = tmp_path / "service.new"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match=re.escape(str(folder.description))):
        folder.describe(PORTS, "127.0.0.1", tmp_path, {"page": 1})
    full.unlink()
    folder.describe(PORTS, "127.0.0.1", tmp_path, {"page": 1})
    before = folder.read_description()
    full.symlink_to("/dev/full")
    folder.describe(PORTS, "127.0.0.1", tmp_path, {"page": 2})
    assert before is not None and folder.read_description() == before


def left_behind(base, name, has_lock=True):
    """The working folder of a service that nobody runs any more."""
    folder = RunFolder(base / f"{PREFIX}{name}")
    folder.path.mkdir(parents=True)
    if has_lock:
        (folder.path / LOCK).touch()
    folder.describe(PORTS, "127.0.0.1", base, {})
    return folder


def test_folders_of_dead_services_are_removed_and_of_living_ones_kept(short_path, monkeypatch):
    """Without a lock, a removal was interrupted; in the temporary folder, it may be a new one."""
    base = short_path / "run"
    monkeypatch.setenv("ADE_RUN_DIR", str(base))
    monkeypatch.setattr("tempfile.tempdir", str(short_path))
    dead, cut = left_behind(base, "dead"), left_behind(base, "cut", has_lock=False)
    new = left_behind(short_path, "new", has_lock=False)
    for _ in range(2):  # looking does not bring it to life
        assert find_service(PORTS) is None
    living, other = left_behind(base, "living"), base / "other"
    other.mkdir()
    (base / f"{PREFIX}link").symlink_to(other)
    with held_by_another(living.path / LOCK):
        assert find_service(PORTS) == living
        with run_folder() as mine, run_folder() as second:
            assert not dead.path.exists() and not cut.path.exists()
            kept = (living.path, new.path, other, mine.path, second.path)
            assert all(path.exists() for path in kept)


def test_where_the_cache_cannot_be_written(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("ADE_RUN_DIR", raising=False)
    (tmp_path / "file").touch()
    for cache in (tmp_path / "file", tmp_path / ("long" * 30), "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        with run_folder() as folder:
            assert tmp_path not in folder.path.parents
            assert folder.path.stat().st_mode & 0o777 == 0o700
            folder.describe(PORTS, "127.0.0.1", tmp_path, {})
            assert find_service(PORTS) == folder
        assert "using the temporary folder" in capfd.readouterr().err
    for chosen in (tmp_path / "file", tmp_path / ("long" * 30)):
        monkeypatch.setenv("ADE_RUN_DIR", str(chosen))
        with pytest.raises(RunFolderError, match="ADE_RUN_DIR must be a folder"), run_folder():
            pass


GIVEN_AWAY = pytest.param(
    None, marks=pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
)


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, GIVEN_AWAY])
def test_no_working_folder_where_others_can_write(mode, tmp_path, monkeypatch):
    """Others could replace the lock by a link, whose target is emptied, or rename the folder."""
    mine = tmp_path / "mine"
    mine.write_text("something")
    (tmp_path / LOCK).symlink_to(mine)
    if mode is None:
        os.chown(tmp_path, 12345, 12345)
    else:
        tmp_path.chmod(mode)
    monkeypatch.setenv("ADE_RUN_DIR", str(tmp_path))
    why = f"{tmp_path} belongs to another user" if mode is None else "others can write to"
    with pytest.raises(RunFolderError, match=f"only you can write to: {why}"), run_folder():
        pass
    assert mine.read_text() == "something"


def test_temporary_files_without_a_sticky_bit(short_path, monkeypatch):
    monkeypatch.delenv("ADE_RUN_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr("tempfile.tempdir", str(short_path))
    for mode in (0o1777, 0o700):
        short_path.chmod(mode)
        with run_folder() as folder:
            assert folder.path.parent == short_path
    short_path.chmod(0o777)
    with pytest.raises(RunFolderError, match="others can write"), run_folder():
        pass


def test_the_page_and_the_front_come_back(service):
    """The API answers while the page is gone."""
    pids = service.pids
    with AdeClient(service.url, retries=0) as client:
        expected = client.sample(seed=1).images
        os.kill(pids["page"], signal.SIGKILL)
        assert until(lambda: service.pids["page"] != pids["page"])

        def page_is_ready():
            assert (client.sample(seed=1).images == expected).all()
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{service.page}/readyz", timeout=30).status_code == 200
            return False

        assert until(page_is_ready, 120)
        os.kill(pids["front"], signal.SIGKILL)
        assert until(lambda: service.pids["front"] != pids["front"])

    def answers():
        with contextlib.suppress(httpx.TransportError), AdeClient(service.url) as other:
            return bool((other.sample(seed=1).images == expected).all())
        return False

    assert until(answers, 120) and httpx.get(f"{service.metrics}/metrics").status_code == 200
    text = "".join(service.output)
    assert (
        "page ended with -9: restarting it" in text and "front ended with -9: restarting it" in text
    )
    assert service.process.poll() is None
    logs = Path(str((service.folder.read_description() or {})["logs"]))
    assert (logs / "front.out").exists() and (logs / "torchserve.log").exists()


def test_a_worker_without_memory_is_replaced(service):
    """It ends even if there is no room for another thread, and until then refuses requests."""

    def workers():
        return service.worker_pids()["encode"]

    (pid,) = workers()
    room = 4 * 2**20  # less than a thread's stack
    limit = psutil.Process(pid).memory_info().vms + room
    with AdeClient(service.url, retries=0) as client:
        expected = client.encode([EXAMPLE]).z
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))

        def is_replaced():
            with contextlib.suppress(AdeError, httpx.TransportError):
                client.encode(np.zeros((256, 32, 32, 3), np.uint8))
            return pid not in workers()

        assert until(is_replaced, 60)

        def answers():
            with contextlib.suppress(AdeError, httpx.TransportError):
                found = client.encode([EXAMPLE]).z
                return all((a == b).all() for a, b in zip(found, expected, strict=True))
            return False

        assert until(answers, 60) and len(workers()) == 1


@pytest.fixture
def running():
    started = RunningService(PRETRAINED, options=("--workers", "1"))
    family = [psutil.Process(started.process.pid), *started.descendants()]
    assert len(family) >= 9  # serve, reaper, Java, four workers, front, page
    folder = started.folder.path
    try:
        yield started
        _, alive = psutil.wait_procs(family, timeout=10)
    finally:
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    assert alive == []
    assert until(lambda: not folder.exists())
    for port in started.ports.values():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))


@pytest.mark.slow
def test_a_service_whose_front_hangs_answers_again(tmp_path):
    """A stopped front still accepts connections, so that nothing but a check finds it."""
    impatient = tmp_path / "python"  # checks for 3 s instead of 20
    impatient.write_text(
        f"#!{sys.executable}\nimport runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from handlers.processes import watchdog\n"
        "watchdog.CHECK_TIMEOUT_S, watchdog.PAUSE_S = 3.0, 1.0\n"
        "del sys.argv[:2]\nrunpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
    )
    impatient.chmod(0o700)
    options = ("--workers", "1", "--engine", "process")
    running = RunningService(PRETRAINED, options=options, python=str(impatient))
    try:
        with AdeClient(running.url, retries=0) as client:
            expected = client.sample(seed=1).images
        first = running.pids["front"]
        address = ("127.0.0.1", running.ports["inference"])
        with socket.create_connection(address) as before:
            os.kill(first, signal.SIGSTOP)
            with socket.create_connection(address) as during:
                during.sendall(b"GET /ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
                assert until(lambda: running.pids["front"] != first, 200)
                for connection in (before, during):
                    connection.settimeout(10)
                    with contextlib.suppress(ConnectionResetError):
                        assert connection.recv(1) == b""

        def answers():
            with contextlib.suppress(httpx.TransportError), AdeClient(running.url) as other:
                return bool((other.sample(seed=1).images == expected).all())
            return False

        assert until(answers, 60) and httpx.get(f"{running.metrics}/metrics").status_code == 200
        assert httpx.get(f"{running.page}/readyz", timeout=30).status_code == 200
        assert re.search(  # 30 checks if it was stopped before it answered one
            "front hangs, it left (6|30) checks in a row unanswered for 3 s each: killing it\n"
            "front ended with -9: restarting it\n",
            "".join(running.output),
        )
    finally:
        assert running.stop() == []


@pytest.mark.slow
def test_the_working_folder_is_deleted(running):
    """Requests during this time are answered or refused; none hangs."""
    folder = running.folder.path
    shutil.rmtree(folder)
    try:
        answer = httpx.post(f"{running.url}/predictions/sample", json={}, timeout=20)
        assert answer.status_code in (200, 503)
    except httpx.TransportError as error:
        assert not isinstance(error, httpx.TimeoutException)
    assert running.process.wait(40) == 2
    assert until(
        lambda: f"the working folder {folder} was deleted or damaged" in "".join(running.output), 2
    )
