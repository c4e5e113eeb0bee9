"""Attacks on a running service by a hostile web page, another local user and a client."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from ade_base.ports import PortError, Ports
from ade_client.client import AdeClient, AdeError
from handlers.launch.page_process import Page
from handlers.launch.serve import _token
from handlers.launch.status import read_status
from handlers.processes.environment import child_environment
from handlers.torchserve.configuration import BROADCAST, NO_FOLDER, unreachable_address
from handlers.torchserve.reporter import REPORTS_VARIABLE
from tests.attacks import HOSTILE, fetch_addresses, register, upload, was_run, workflow_archive
from tests.helpers import PRETRAINED, address_beyond_loopback
from tests.service import CANARIES, RunningService, error_of_serve

NOBODY = 65534


def family(service):
    return [psutil.Process(service.process.pid), *service.descendants()]


def listening(service):
    return {
        tuple(c.laddr)
        for p in family(service)
        for c in p.net_connections("inet")
        if c.status == psutil.CONN_LISTEN
    }


def connects(address):
    try:
        socket.create_connection(address, timeout=3).close()
        return True
    except OSError:
        return False


@pytest.fixture
def management(service):
    """TorchServe's management API, which only the serving user can reach."""
    key = service.torchserve.key("management")
    transport = httpx.HTTPTransport(uds=str(service.torchserve.management_socket))
    with httpx.Client(
        base_url="http://torchserve",
        transport=transport,
        headers={"Authorization": f"Bearer {key}"},
        timeout=60,
    ) as client:
        yield client


@pytest.fixture
def planted(service, tmp_path):
    """A hostile archive in every folder of the service, as if it had been uploaded; its marker."""
    marker, archive = tmp_path / "marker", workflow_archive(tmp_path / "marker")
    places = [
        service.torchserve.store,
        service.torchserve.temporary,
        service.folder.path / "page-files" / "hash",
    ]
    for place in places:
        place.mkdir(exist_ok=True)
        (place / "evil.war").write_bytes(archive)
    yield places[-1] / "evil.war", marker
    for place in places:
        (place / "evil.war").unlink()
    shutil.rmtree(places[-1])


def test_no_archive_is_fetched_registered_or_run(service, management, planted):
    """A visited web site uploads an archive and tries to register it at every open port.

    Then someone with the key to the management socket tries the same, and the names of archives
    that are in TorchServe's own folder.
    """
    archive, marker = planted
    before = sorted(service.folder.path.rglob("evil*"))
    path = upload(service.page, archive.read_bytes(), HOSTILE)
    addresses = fetch_addresses(Path(path) if path else archive, service.torchserve.store)
    for host, port in listening(service):
        if connects((host, port)):
            with httpx.Client(
                base_url=f"http://127.0.0.1:{port}", headers=HOSTILE, timeout=60
            ) as client:
                found = register(client, addresses)
                assert not {200, 409} & set(found), (port, found)  # 409: its file exists
    statuses = register(management, addresses)
    assert set(statuses) <= {400, 404, 405}, statuses
    for name in ("evil.war", "../../page-files/hash/evil.war", "tmp/evil.war"):
        for api in ("/workflows", "/models"):
            by_query = management.post(api, params={"url": name, "initial_workers": 1})
            assert by_query.status_code in (400, 404, 405), (api, name)
            by_json = management.post(api, json={"url": name, "workflow_url": name})
            assert by_json.status_code in (400, 404, 405, 500), (api, name)
    assert not was_run(marker, 1.0) and sorted(service.folder.path.rglob("evil*")) == before
    assert management.get("/workflows").json()["workflows"] == []


def test_the_workflow_store_cannot_be_written_by_root():
    with pytest.raises(NotADirectoryError):
        Path(NO_FOLDER, "evil.war").write_bytes(b"")
    with pytest.raises(NotADirectoryError):
        Path(NO_FOLDER).mkdir(parents=True)


def test_nothing_can_be_unregistered(management):
    for path in ("/models/sample", "/models/sample/1.0", "/workflows/evil"):
        assert management.delete(path).status_code in (404, 405)
    assert len(management.get("/models").json()["models"]) == 4


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_torchserve_answers_nothing_without_its_key(service, method):
    """Tested on its sockets, which only the serving user can reach. Its metrics have no key."""
    folder = service.torchserve
    for path, key in (
        (folder.management_socket, "inference"),
        (folder.inference_socket, "management"),
    ):
        with httpx.Client(
            base_url="http://x", transport=httpx.HTTPTransport(uds=str(path))
        ) as client:
            for headers in (
                {},
                {"Authorization": "Bearer 0"},
                {"Authorization": f"Bearer {folder.key(key)}"},
            ):
                for url in (
                    "/models",
                    "/models/score?min_worker=0",
                    "/workflows?url=evil.war",
                    "/predictions/score",
                ):
                    answer = client.request(method, url, headers=headers)
                    assert (
                        answer.status_code == 400 and answer.json()["type"] == "InvalidKeyException"
                    ), (url, answer.text)


def test_only_our_ports_can_be_connected_to(service):
    """TorchServe's gRPC cannot be turned off, so it listens on an unreachable address."""
    found = listening(service)
    assert {host for host, _ in found} <= {"127.0.0.1", f"::ffff:{BROADCAST}"}
    assert {p for host, p in found if host == "127.0.0.1"} == set(service.ports.values())
    others = {port for _, port in found} - set(service.ports.values())
    assert len(others) == 2 and unreachable_address() == BROADCAST
    addresses = {
        address.address.split("%")[0]
        for found in psutil.net_if_addrs().values()
        for address in found
        if address.family in (socket.AF_INET, socket.AF_INET6)
    }
    for port in others:
        for address in addresses | {
            BROADCAST,
            f"::ffff:{BROADCAST}",
            "0.0.0.0",
            "::",
            "127.255.255.255",
        }:
            assert not connects((address, port)), address


def test_secrets_of_the_environment_reach_no_child(service):
    workers = service.workers()
    assert len(workers) >= 4
    for process in service.descendants():
        environment = process.environ()
        assert not set(CANARIES) & set(environment), process.cmdline()
        assert not set(CANARIES.values()) & set(environment.values())
    assert workers[0].environ()[REPORTS_VARIABLE] == str(service.torchserve.reports_socket)


def test_a_childs_environment_is_a_list_of_names(monkeypatch):
    for name in ("GITHUB_TOKEN", "DATABASE_URL", "ADE_TOKEN", "LC_ALL", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "x")
    found = child_environment(ADE_STOP_FOLDER="y")
    assert {"PATH", "LC_ALL", "CUDA_VISIBLE_DEVICES", "ADE_STOP_FOLDER"} <= set(found)
    assert not {"GITHUB_TOKEN", "DATABASE_URL", "ADE_TOKEN"} & set(found)


def test_the_working_folder_is_private(service):
    folder = service.folder
    assert folder.path.stat().st_mode & 0o777 == 0o700 and folder.path.stat().st_uid == os.getuid()
    assert Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) in folder.path.parents
    for file in (
        service.torchserve.key_file,
        folder.path / "front.json",
        folder.probe_file,
        folder.description,
    ):
        assert file.stat().st_mode & 0o777 == 0o600, file
    assert len(folder.probe_file.read_text()) == 32
    page_files = folder.path / "page-files"
    assert page_files.stat().st_mode & 0o777 == 0o700 and page_files.parent == folder.path


def test_short_tokens_and_bad_names_are_refused():
    short = error_of_serve("--host", "0.0.0.0", ADE_TOKEN="x" * 31)
    assert "at least 32 characters" in short and "xxx" not in short
    spaced = error_of_serve("--host", "0.0.0.0", ADE_TOKEN="secret " * 6)
    assert "without spaces" in spaced and "secret" not in spaced
    for name in ("http://ade.example.org", "ade.example.org:8080", "*", "a..b"):
        named = error_of_serve("--allowed-hosts", f"ok.example.org,{name}")
        assert "takes host names without scheme or port" in named


def test_a_token_that_would_protect_nothing_is_warned_of(monkeypatch, capsys):
    monkeypatch.setenv("ADE_TOKEN", "x" * 32)
    assert _token("127.0.0.1") is None
    said = capsys.readouterr().err
    assert "ADE_TOKEN has no effect with --host 127.0.0.1" in said and "xxx" not in said
    assert _token("127.0.0.2") == "x" * 32 and not capsys.readouterr().err


def test_a_host_that_is_not_of_this_machine_is_refused():
    """192.0.2.1 is reserved for documentation, and a..b cannot be a name."""
    error = error_of_serve("--host", "192.0.2.1")
    assert "cannot listen on 192.0.2.1 (" in error
    assert "--host must be an address of this machine" in error
    for host in ("a..b", "ü..b", "ü" * 80):
        with pytest.raises(PortError, match=rf"{host} \(.*--host must be an address of this"):
            Ports.from_environment().check_free(host)
        assert f"cannot listen on {host} (" in error_of_serve("--host", host)


def test_a_page_port_that_is_taken_after_the_check_is_named():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        plan: Any = SimpleNamespace(host="127.0.0.1", ports=Ports(1, 2, port))
        parts: Any = SimpleNamespace(path=Path())
        taken = rf"cannot listen on port {port} \(.*\): free it, or set ADE_UI_PORT to another port"
        with pytest.raises(PortError, match=taken):
            Page(plan, parts, parts)


def as_nobody(attack):
    """Call a function in a child process of another user; returns its result."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            os.write(writer, json.dumps(attack()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        found = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(found)


@pytest.fixture(scope="module")
def exposed():
    """A service beyond loopback, with the operator's token and host name."""
    running = RunningService(
        PRETRAINED,
        options=(
            *("--host", "0.0.0.0", "--expose-metrics", "--workers", "1"),
            *("--allowed-hosts", "ade.example.org"),
        ),
    )
    yield running
    assert running.stop() == []


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_of_the_machine(exposed, tmp_path):
    """Tries every port, socket and file: nothing changes, and no secret is revealed."""
    folder, marker = exposed.folder, tmp_path / "marker"
    secrets = [
        folder.token_file.read_text(),
        folder.probe_file.read_text(),
        str(folder.path),
        *(exposed.torchserve.key(kind) for kind in ("inference", "management")),
    ]
    assert all(secrets)
    files = sorted(folder.path.rglob("*"))
    sockets = [str(file) for file in files if file.is_socket()]
    assert len(sockets) >= 7
    ports = sorted({port for _, port in listening(exposed)})
    pids = [p.pid for p in family(exposed)]
    ours = b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids).decode()
    paths = (
        "/",
        "/models",
        "/models/score",
        "/workflows",
        "/metrics",
        "/ping",
        "/api-description",
        "/predictions/score",
        "/config",
        "/openapi.json",
        "/readyz",
        "/gradio_api/info",
        f"/gradio_api/file={folder.token_file}",
        "/gradio_api/file=/etc/passwd",
    )

    def attack():
        opened, answers = [], []
        for file in [folder.path, *files]:
            for way in (
                os.listdir,
                lambda f: open(f, "rb").close(),
                lambda f: open(f, "ab").close(),
                os.unlink,
            ):
                try:
                    way(file)
                    opened.append(str(file))
                except OSError:
                    pass
        for path in sockets:
            with socket.socket(socket.AF_UNIX) as s:
                opened += [path] if s.connect_ex(path) == 0 else []
        for pid in pids:
            for name in ("environ", "mem", "cwd", "fd"):
                try:
                    (os.listdir if name in ("cwd", "fd") else lambda f: open(f, "rb").read(1))(
                        f"/proc/{pid}/{name}"
                    )
                    opened.append(f"/proc/{pid}/{name}")
                except OSError:
                    pass
            try:
                os.kill(pid, 0)
                opened.append(f"kill {pid}")
            except OSError:
                pass
        for port in ports:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as client:
                for path in paths:
                    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
                        try:
                            answer = client.request(
                                method, path, headers={"Authorization": "Bearer 0"}
                            )
                            answers.append(
                                [
                                    port,
                                    method,
                                    path,
                                    answer.status_code,
                                    answer.text + str(answer.headers.multi_items()),
                                ]
                            )
                        except httpx.TransportError:
                            pass
                with contextlib.suppress(httpx.TransportError):
                    register(client, [f"file://{tmp_path}/evil.war"])
        return {"opened": opened, "answers": answers}

    tmp_path.chmod(0o755)
    (tmp_path / "evil.war").write_bytes(workflow_archive(marker))
    found = as_nobody(attack)
    assert isinstance(found, dict) and found["opened"] == []
    answers = found["answers"]
    assert {answer[0] for answer in answers} == set(exposed.ports.values())
    for port, method, path, status, text in answers:
        assert not [s for s in secrets if s in text], (port, method, path, text)
        assert not [sign for sign in ("root:x:", "PNG\r\n", "iVBORw0KGgo") if sign in text], (
            port,
            method,
            path,
        )
        if port == exposed.ports["inference"] and (method, path) != ("GET", "/readyz"):
            assert status in (401, 403, 404, 405), (method, path, status)
    assert not [s for s in secrets if s in ours and s != str(folder.path)]
    assert not was_run(marker, 1.0) and folder.is_held()
    with AdeClient(exposed.url, token=folder.token_file.read_text()) as client:
        assert client.sample(seed=1).images.shape == (1, 32, 32, 3)


@pytest.mark.slow
def test_off_loopback_a_token_is_required_and_never_printed(exposed, tmp_path):
    token, output = exposed.folder.token_file.read_text(), "".join(exposed.output)
    assert len(token) == 43 and exposed.folder.token_file.stat().st_mode & 0o777 == 0o600
    for wrong in (None, "0", token[:-1], token + "x", token.swapcase()):
        with AdeClient(exposed.url, token=wrong) as outsider, pytest.raises(AdeError) as caught:
            outsider.sample()
        assert (caught.value.status, caught.value.code) == (401, "bad_token")
    with AdeClient(exposed.url, token=token) as client:
        assert client.sample(seed=1).images.shape == (1, 32, 32, 3)
    headers = {"Authorization": f"Bearer {token}"}
    for host, status in (("ADE.example.org:80", 200), ("rebound.example.org", 421)):
        answer = httpx.get(f"{exposed.url}/ping", headers={**headers, "Host": host})
        assert answer.status_code == status, (host, answer.text)
    metrics = f"http://{address_beyond_loopback()}:{exposed.ports['metrics']}/metrics"
    assert httpx.get(metrics).status_code == 401
    assert "ade_worker_starts_total" in httpx.get(metrics, headers=headers).text
    assert httpx.get(f"{exposed.page}/readyz", timeout=60).status_code == 200
    # The page requires the login as well.
    assert httpx.get(f"{exposed.page}/config", timeout=60).status_code == 401
    (line,) = [
        line
        for line in output.splitlines()
        if line.startswith("curl") and "/predictions/sample" in line
    ]
    subprocess.run(["sh", "-c", f"{line} -sS --fail"], cwd=tmp_path, check=True)
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert token not in output and str(exposed.folder.token_file) in output
    assert not any(token in " ".join(p.cmdline()) for p in family(exposed))
    known = {
        exposed.folder.token_file,
        exposed.folder.header_file,
        exposed.folder.path / "front.json",
    }
    holders = {
        file
        for file in exposed.folder.path.rglob("*")
        if file.is_file() and token.encode() in file.read_bytes()
    }
    assert holders <= known
    assert os.environ.get("ADE_TOKEN") is None
    found = read_status(Ports(**exposed.ports))
    assert found["ready"] and found["answers"] and found["models"]["sample"]["queued"] == 0, found
