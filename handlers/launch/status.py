"""Reports the state of a running service: health, models, workers, queues and recent errors."""

from __future__ import annotations

import platform
import re
import socket
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import psutil

from ade_base.ports import LOOPBACK, VARIABLES, Ports, local_address
from ade_client.contract import PROBE_HEADER
from handlers.launch.publish import DESCRIBE
from handlers.processes.channel import DESCRIBE_S, ChannelError, ask
from handlers.processes.run_folder import RunFolder, find_service
from serving.api.journal import last_errors
from serving.api.telemetry import EXPECTED_FLAGS, OBSERVED_FLAGS, REQUESTS

PACKAGES = (
    "av-ade",
    "torchserve",
    "torch",
    "onnxruntime-gpu",
    "onnxruntime",
    "gradio",
    "pillow",
    "numpy",
)
TIMEOUT_S = 30.0
_NUMBER = r"([0-9.eE+]+)"


def read_status(ports: Ports, token: str | None = None, host: str | None = None) -> dict[str, Any]:
    """Query all parts of a service on this machine; values without an answer are ``None``.

    Only the user who runs the service can read its workers, queues and errors.

    Args:
        ports: ports of the service.
        token: required only if another user runs the service with a token.
        host: address on which its API and page listen; by default that of this user's service, or
            else loopback.
    """
    folder = find_service(ports)
    own = (folder and folder.read_description()) or {}
    address = local_address(host or own.get("host", LOOPBACK[0]))
    probe = None
    if folder is not None:
        probe, token = folder.read(folder.probe_file), token or folder.read(folder.token_file)
    headers = {**({} if probe is None else {PROBE_HEADER: probe}), **_bearer(token)}
    with httpx.Client(timeout=TIMEOUT_S, headers=headers, trust_env=False) as http:
        ready = _get(http, f"http://{address}:{ports.ui}/readyz", {200, 503})
        metrics = _get(http, f"http://127.0.0.1:{ports.metrics}/metrics", {200})
        answers = _who_answers(http, f"http://{address}:{ports.inference}")
    silent = [
        f"http://{address}:{getattr(ports, name)} ({VARIABLES[name][0]})"
        for name, answer in (("inference", answers), ("ui", ready))
        if answer is None
    ]
    release = {} if folder is None else _release(folder)
    return {
        "ready": ready is not None and _says_ready(ready),
        "is_own": folder is not None,
        "silent": silent,
        "answers": answers or None,
        "models": _workers(release) or None,
        "publishing": release.get("last"),
        "requests": _requests(metrics.text) if metrics else None,
        "calibrations": _calibrations(metrics.text) if metrics else None,
        "last_errors": folder and _last_errors(folder),
        "versions": versions(),
    }


def _release(folder: RunFolder) -> dict[str, Any]:
    """What the service says of its release; empty if it does not answer."""
    try:
        # The service may wait as long for its front, and then answers without it.
        return ask(folder.control_socket, {"do": DESCRIBE}, seconds=2 * DESCRIBE_S)
    except ChannelError:  # it is starting or stopping
        return {}


def _workers(release: dict[str, Any]) -> dict[str, Any]:
    """Workers and queues by model."""
    found = {}
    for name, model in (release.get("workers") or {}).items():
        workers = [{**one, "memory_mib": _memory(one)} for one in model["workers"]]
        found[name] = {**model, "workers": workers}
    return found


def _bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def _get(http: httpx.Client, url: str, statuses: set[int]) -> httpx.Response | None:
    try:
        answer = http.get(url)
    except httpx.TransportError:
        return None
    return answer if answer.status_code in statuses else None


def _says_ready(answer: httpx.Response) -> bool:
    try:
        return bool(answer.json()["ready"])
    except (ValueError, LookupError, TypeError):  # another program's answer
        return False


def _who_answers(http: httpx.Client, url: str) -> dict[str, str] | None:
    """Model and backend, as far as the answer names them; ``None`` without an answer."""
    try:
        answer = http.post(f"{url}/predictions/sample", json={"seed": 0})
    except httpx.TransportError:
        return None
    found = {name: answer.headers.get(f"X-Ade-{name}") for name in ("Model", "Backend")}
    return {name.lower(): value for name, value in found.items() if value}


def _memory(worker: dict[str, Any]) -> int | None:
    """Resident memory in MiB, unless it runs on another machine."""
    if worker.get("host", socket.gethostname()) != socket.gethostname():
        return None
    try:
        return round(psutil.Process(worker["pid"]).memory_info().rss / 2**20)
    except (psutil.Error, ValueError):  # it has just ended
        return None


def _last_errors(folder: RunFolder) -> list[dict[str, Any]] | None:
    """The last errors in the journals of the workers; ``None`` if there are no journals."""
    try:
        return last_errors(Path((folder.read_description() or {})["logs"]))
    except (KeyError, ValueError, OSError):
        return None


def _requests(metrics: str) -> dict[str, float]:
    """Count the requests that workers answered by the class of their status, such as ``2xx``."""
    answered = re.findall(
        rf'^{REQUESTS.name}\{{.*?status="(\d)\d\d".*\}} {_NUMBER}$', metrics, re.MULTILINE
    )
    found: dict[str, float] = {}
    for digit, value in answered:
        found[f"{digit}xx"] = found.get(f"{digit}xx", 0.0) + float(value)
    return found


def _calibrations(metrics: str) -> dict[str, dict[str, Any]]:
    """Rejected images and their expected number, by calibration that was used, and its model."""
    found: dict[str, dict[str, Any]] = {}
    for metric, key in ((OBSERVED_FLAGS, "rejected"), (EXPECTED_FLAGS, "expected")):
        pattern = rf'^{metric.name}\{{model_name="([^"]*)",.*?calibration="([^"]*)".*\}} (\S+)$'
        for model, name, value in re.findall(pattern, metrics, re.MULTILINE):
            label = name if model == "score" else f"{model.removesuffix('-score')}: {name}"
            its = found.setdefault(label, {"rejected": 0.0, "expected": 0.0})
            its[key] += float(value)
    return {name: its for name, its in found.items() if any(its.values())}


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that answers depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
