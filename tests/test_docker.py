"""The Dockerfile's files, steps and commands, checked without a Docker engine."""

import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ade_base.ports import VARIABLES, Ports, free_ports
from ade_client.client import AdeClient, AdeError
from handlers.launch.page_process import page_is_ready
from handlers.launch.status import read_status
from tests.helpers import ROOT
from tests.house import PACKAGES

TEXT = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
STEPS = re.findall(r"^([A-Z]+) +(.*)$", TEXT, re.MULTILINE)
USER = 10001
HEALTH = json.loads(re.findall(r"^HEALTHCHECK .* CMD (\[.*\])$", TEXT, re.MULTILINE)[0])


def test_every_copied_file_exists_and_is_in_the_context():
    kept = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for kind, arguments in STEPS:
        if kind == "COPY" and not arguments.startswith("--from"):
            for source in arguments.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source in kept, f"{source} is not in the build's context"


def test_every_package_is_copied():
    copied = " ".join(arguments for kind, arguments in STEPS if kind == "COPY")
    assert set(PACKAGES) <= set(copied.split())


def test_libraries_are_a_layer_without_the_sources(tmp_path):
    """Otherwise each change of a source would install them again. Only pip is replaced here."""
    (at,) = [i for i, (_, step) in enumerate(STEPS) if '".[${DEVICE},${ENGINE}]"' in step]
    (before,) = [i for i in range(at) if STEPS[i] == ("FROM", "python:${PYTHON}-slim AS libraries")]
    (files,) = [step for kind, step in STEPS[before:at] if kind == "COPY"]
    assert files == "pyproject.toml README.md LICENSE ./"
    for source in files.split()[:-1]:
        shutil.copy(ROOT / source, tmp_path)
    script = re.sub(r"/opt/venv/bin/pip|python -m venv", "echo", STEPS[at][1])
    subprocess.run(["sh", "-ec", script], cwd=tmp_path, check=True)


def test_it_runs_unprivileged_and_has_a_health_check():
    kinds = [kind for kind, _ in STEPS]
    assert kinds.index("USER") > len(kinds) - 1 - kinds[::-1].index("FROM")
    assert ("USER", f"{USER}:{USER}") in STEPS and f"--uid {USER} ade" in TEXT
    assert HEALTH[0] == "python" and "/readyz" in HEALTH[-1]


def test_no_proxy_stands_between_the_service_and_its_own_checks(monkeypatch):
    """A proxy of the environment cannot reach this machine's loopback interface."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"ready": true}')

        do_POST = do_GET

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever).start()
        other, dead = free_ports(2)
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{dead}")
        for name in ("all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"socks5://127.0.0.1:{dead}")  # takes a package of its own
        try:
            ports = Ports(inference=server.server_port, metrics=other, ui=server.server_port)
            assert page_is_ready(ports, "127.0.0.1")
            assert read_status(ports)["ready"]
            for host in ("127.0.0.1", "localhost"):
                with (
                    AdeClient(f"http://{host}:{server.server_port}", retries=0) as client,
                    pytest.raises(AdeError),  # it got that answer, which is not the API's
                ):
                    client.sample()
            monkeypatch.setenv(VARIABLES["ui"][0], str(server.server_port))
            subprocess.run([sys.executable, *HEALTH[1:]], check=True)
        finally:
            server.shutdown()


def test_the_entry_point_passes_arguments_on():
    entry = json.loads(next(arguments for kind, arguments in STEPS if kind == "ENTRYPOINT"))
    command = json.loads(next(arguments for kind, arguments in STEPS if kind == "CMD"))
    assert entry[:2] == ["tini", "--"] and "install --yes --no-install-recommends tini" in TEXT
    entry = [word.replace("exec ade", "echo ade") for word in entry[2:]]
    done = subprocess.run(
        [*entry, *command],
        capture_output=True,
        text=True,
        env={"ADE_DEVICE": "cpu", "PATH": "/usr/bin:/bin"},
        check=True,
    )
    assert done.stdout.strip() == "ade serve --host 0.0.0.0 --device cpu /bundles/cifar10"
