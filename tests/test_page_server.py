"""The page's server: ``/readyz``, and the files that it deletes."""

from __future__ import annotations

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from fastapi.testclient import TestClient

from serving.engine.bundle import open_bundle
from serving.page.app import READY_FOR_S, make_app
from serving.page.files import UPLOADS
from serving.page.models import Models
from serving.page.sweep import start_sweeping, sweep
from tests.helpers import wait_for


def client_of(bundle, url="http://127.0.0.1:1"):
    return TestClient(make_app(url, [open_bundle(bundle)], None))


def test_readiness_is_asked_once_for_all_who_wait(tiny_bundle, monkeypatch):
    asked: list[float] = []

    def is_ready(models):
        asked.append(time.monotonic())
        time.sleep(0.3)
        return len(asked) > 1

    monkeypatch.setattr(Models, "is_ready", is_ready)
    client = client_of(tiny_bundle)
    with ThreadPoolExecutor(4) as pool:
        assert {answer.status_code for answer in pool.map(client.get, ["/readyz"] * 4)} == {503}
    assert len(asked) == 1
    time.sleep(READY_FOR_S)
    assert client.get("/readyz").json() == {"ready": True} and len(asked) == 2


def test_readiness_under_load_is_what_it_was(tiny_bundle, monkeypatch):
    """A second caller does not find a service unready because its answers take some seconds."""
    monkeypatch.setattr("serving.page.app.READY_FOR_S", 0.0)
    monkeypatch.setattr("serving.page.app.READY_WAIT_S", 0.0)
    asked, answered = threading.Semaphore(0), threading.Event()
    answered.set()

    def is_ready(models):
        asked.release()
        return answered.wait(60)

    monkeypatch.setattr(Models, "is_ready", is_ready)
    client = client_of(tiny_bundle)
    assert client.get("/readyz").status_code == 200 and asked.acquire(timeout=60)
    answered.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.get, "/readyz")
        assert asked.acquire(timeout=60)
        second = client.get("/readyz")
        answered.set()
        assert second.json() == first.result().json() == {"ready": True}


def test_readiness_of_a_service_that_hangs(tiny_bundle, monkeypatch):
    """Neither the caller nor others wait for long, and no thread waits with them."""
    monkeypatch.setattr("serving.page.models.PROBE_TIMEOUT_S", 3.0)
    monkeypatch.setattr("serving.page.app.READY_WAIT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        client = client_of(tiny_bundle, f"http://127.0.0.1:{hanging.getsockname()[1]}")
        started = time.monotonic()

        def ask(_):
            status = client.get("/readyz").status_code
            return time.monotonic() - started, status

        with ThreadPoolExecutor(3) as pool:
            (_, first), (soon, second), (last, third) = sorted(pool.map(ask, range(3)))
    assert (first, second, third) == (503,) * 3
    assert soon < 2.9 < last < 10


def make(folder, age=0, size=9):
    folder.mkdir(parents=True)
    (folder / "picture.png").write_bytes(bytes(size))
    os.utime(folder, (time.time() - age,) * 2)


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_old_files_go_and_the_oldest_of_too_many(tmp_path):
    for name in ("example", "old"):
        make(tmp_path / name, age=10_000)
    for i in range(4):
        make(tmp_path / f"{i}", age=100 - i, size=2**20)
    sweep(tmp_path, {"example", "0"}, max_bytes=5 * 2**19)
    assert names(tmp_path) == {"example", "0", "2", "3"}


def test_sweeping(tmp_path, monkeypatch):
    """What a former page left goes; examples stay, and so does a quota that is full of small files.

    An error, here of a folder that is missing, does not end it.
    """
    monkeypatch.setattr("serving.page.sweep.EVERY_S", 0.05)
    monkeypatch.setattr("serving.page.sweep.MAX_UPLOAD_BYTES", 2 * 4096 * 10)
    for name in ("left", "example"):
        make(tmp_path / name, age=10_000)
    start_sweeping(tmp_path, ["left", UPLOADS])
    wait_for(lambda: not (tmp_path / "left").exists(), 10)
    for i in range(10):
        make(tmp_path / UPLOADS / f"{i}")
    make(tmp_path / UPLOADS / "old", age=10_000)
    wait_for(lambda: not (tmp_path / UPLOADS / "old").exists(), 10)
    assert names(tmp_path) == {"example", UPLOADS}
    assert names(tmp_path / UPLOADS) == {f"{i}" for i in range(10)}
