"""The page as a process of its own, and requests that attack it."""

from __future__ import annotations

import json
import os
import secrets
import signal
import struct
import subprocess
import sys
import zipfile
from http.server import BaseHTTPRequestHandler

import httpx
import pytest

from ade_base.ports import free_ports
from tests.helpers import PRETRAINED, ROOT, wait_for

EXAMPLE = ROOT / "serving" / "examples" / "cat.png"

SECRET = "what-nobody-may-read"

TOKEN = "a-token-of-the-tests"
MODEL = "cifar10-av-ade"

# Inputs of these kinds take no file. All others are attacked, including those of a new tab.
PLAIN = {"button", "checkbox", "dataset", "dropdown", "number", "radio", "slider", "state"}


open_or_login = pytest.mark.parametrize("page", [None, TOKEN], ids=["open", "login"], indirect=True)


@pytest.fixture(name="page")
def page_process(request, page_processes):
    """A page without a login, unless the test is marked. For modules that import it."""
    started: RunningPage = page_processes(getattr(request, "param", None))
    return started


class RunningPage:
    """The page without the API, as the launcher starts it: process, folder and output."""

    def __init__(self, url, folder, token=None):
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self.inbox, self.output, self.token = folder / "page-files", folder / "page.out", token
        self._clients: list[httpx.Client] = []
        environment = {
            "PATH": os.environ["PATH"],
            "GRADIO_TEMP_DIR": str(self.inbox),
            "OMP_NUM_THREADS": "1",
            "GRADIO_ANALYTICS_ENABLED": "False",
            "PYTHONPATH": str(ROOT),
        }
        if token is not None:
            environment["ADE_TOKEN"] = token
        command = f"{sys.executable} -m serving.page.app {PRETRAINED} --url {url} --port {port}"
        with open(self.output, "wb") as out:
            self.process = subprocess.Popen(
                [*command.split(), "--allowed-hosts", "pictures.example"],
                cwd=folder,
                env=environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_for(self._answers, 120)
        except BaseException:
            self.process.kill()
            raise

    def _answers(self):
        assert self.process.poll() is None, self.output.read_text()
        try:
            return httpx.get(self.url).status_code == 200
        except httpx.TransportError:
            return False

    def client(self, **options):
        """A client, logged in if the page requires it. :meth:`stop` closes it."""
        client = httpx.Client(base_url=self.url, timeout=60, **options)
        self._clients.append(client)
        if self.token is not None:
            login = {"username": "ade", "password": self.token}
            assert client.post("/login", data=login).status_code == 200
        return client

    def stop(self):
        for client in self._clients:
            client.close()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(30)


class Asked(BaseHTTPRequestHandler):
    """A server on this machine to which a request could be forged."""

    paths: list[str] = []

    def do_GET(self):
        self.paths.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(SECRET.encode())

    def log_message(self, *args):
        pass


def outside(inbox, folder, inner):
    """Paths that no client may read, by kind; those created for the test are in ``folder``."""
    (folder / "key_file.json").write_text(json.dumps({"management": {"key": SECRET}}))
    (folder / "private.png").write_text(SECRET)
    (folder / "private.png").chmod(0o600)
    os.mkfifo(folder / "fifo.png")
    inbox.mkdir(exist_ok=True)
    for name, target in (("link.png", folder / "private.png"), ("loop.png", inbox / "loop.png")):
        if not (inbox / name).is_symlink():
            (inbox / name).symlink_to(target)
    if not (inbox / "waiting.png").exists():
        os.mkfifo(inbox / "waiting.png")
    return {
        "passwd": "/etc/passwd",
        "environment": "/proc/self/environ",
        "key": str(folder / "key_file.json"),
        "private": str(folder / "private.png"),
        "link": str(inbox / "link.png"),
        "loop": str(inbox / "loop.png"),
        "fifo": str(folder / "fifo.png"),
        "fifo inside": str(inbox / "waiting.png"),
        "zero": "/dev/zero",
        "dots": f"{inbox}/../../../../../../../../etc/passwd",
        "url": inner,
        "file url": "file:///etc/passwd",
        "folder": str(folder),
        "folder inside": str(inbox / "uploads"),
        "the inbox": str(inbox),
        "nothing": str(folder / "nothing.png"),
        "null": f"{inbox}/a\0b",
        "long": f"{inbox}/{'a' * 5000}",
    }


def shapes(path):
    """The ways in which components represent a file."""
    file = {"path": path, "meta": {"_type": "gradio.FileData"}}
    return [file, {"path": path}, [file, file], [{"image": file, "caption": None}]]


def targets(config):
    """Each function and input that takes a file, with usual values of all inputs."""
    components = {one["id"]: one for one in config["components"]}
    found = []
    for function in config["dependencies"]:
        usual = [components[i]["props"].get("value") for i in function["inputs"]]
        found += [
            (function["id"], place, usual)
            for place, i in enumerate(function["inputs"])
            if components[i]["type"] not in PLAIN
        ]
    return found


def call(client, function, data):
    """Whether an event succeeded, and the complete answer."""
    session = secrets.token_hex(8)
    joined = client.post(
        "/gradio_api/queue/join", json={"fn_index": function, "data": data, "session_hash": session}
    )
    if joined.status_code != 200:
        return False, joined.text
    answer = client.get("/gradio_api/queue/data", params={"session_hash": session}).text
    return '"success":true' in answer.replace(" ", ""), answer


def function_of(client, name):
    """The number of a function of Gradio's API."""
    functions = client.get("/config").json()["dependencies"]
    return next(function["id"] for function in functions if function["api_name"] == name)


def event_of(client, name, session):
    """The body of a request that calls ``about``."""
    return {"fn_index": function_of(client, name), "data": [MODEL], "session_hash": session}


def score_of(client):
    """The request that scores an uploaded example."""
    (path,) = upload(client, ("cat.png", EXAMPLE.read_bytes())).json()
    return function_of(client, "score"), [
        MODEL,
        {"path": path, "meta": {"_type": "gradio.FileData"}},
        1,
        0.01,
        False,
        None,  # the session's runs, which the server fills in
    ]


def upload(client, *files):
    return client.post("/gradio_api/upload", files=[("files", file) for file in files])


def lying_zip(path, name, size, declared):
    """A zip of one entry of ``size`` zeros whose headers declare another size."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, bytes(size))
    data = path.read_bytes().replace(struct.pack("<I", size), struct.pack("<I", declared))
    path.write_bytes(data)
    return path
