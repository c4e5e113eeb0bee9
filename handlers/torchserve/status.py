"""What a running service says of itself: whether it answers, who answers, with how many workers,
and what went wrong.
"""

from __future__ import annotations

import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import psutil

from handlers.launch.run_folder import RunFolder, find_service
from serving.api.journal import last_errors
from serving.api.requests import PROBE_HEADER
from serving.ports import Ports, local_address

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


def read_status(ports: Ports, token: str | None = None, host: str = "127.0.0.1") -> dict[str, Any]:
    """Ask every part of a service on this machine; what does not answer is ``None``.

    Workers, queues and errors are known to the user that serves, and to nobody else.

    Args:
        ports: where it listens.
        token: where it asks for one and is another user's.
        host: on which address its API and page listen.
    """
    address = local_address(host)
    folder = find_service(ports)
    probe = None
    if folder is not None:
        probe, token = folder.read(folder.probe_file), token or folder.read(folder.token_file)
    headers = {**({} if probe is None else {PROBE_HEADER: probe}), **_bearer(token)}
    with httpx.Client(timeout=TIMEOUT_S, headers=headers) as http:
        ready = _get(http, f"http://{address}:{ports.ui}/readyz", {200, 503})
        metrics = _get(http, f"http://127.0.0.1:{ports.metrics}/metrics", {200})
        answers = _who_answers(http, f"http://{address}:{ports.inference}")
    described = {} if folder is None else describe_models(folder)
    return {
        "ready": ready is not None and bool(ready.json().get("ready")),
        "answers": answers,
        "models": {name: _model(model) for name, model in described.items()} or None,
        "requests": _requests(metrics.text) if metrics else None,
        "last_errors": folder and _last_errors(folder),
        "versions": versions(),
    }


def describe_models(folder: RunFolder, timeout: float = TIMEOUT_S) -> dict[str, dict[str, Any]]:
    """What TorchServe tells of each model that it serves; empty where it does not answer.

    Args:
        folder: of the service; its socket and key are this user's.
        timeout: seconds for each answer.
    """
    transport = httpx.HTTPTransport(uds=str(folder.management_socket))
    headers = _bearer(folder.server_key("management"))
    try:
        with httpx.Client(
            base_url="http://torchserve", transport=transport, timeout=timeout, headers=headers
        ) as http:
            names = [
                model["modelName"] for model in http.get("/models?limit=1000").json()["models"]
            ]
            return {name: http.get(f"/models/{name}").json()[0] for name in names}
    except (httpx.TransportError, ValueError, KeyError, IndexError, TypeError):
        return {}


def queued_requests(folder: RunFolder) -> int:
    """How many requests wait for a worker; 0 where that is not to be known, as of a service that is
    going down.
    """
    return sum(
        model.get("jobQueueStatus", {}).get("pendingRequests", 0)
        for model in describe_models(folder, timeout=2.0).values()
    )


def _bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def _get(http: httpx.Client, url: str, statuses: set[int]) -> httpx.Response | None:
    try:
        answer = http.get(url)
    except httpx.TransportError:
        return None
    return answer if answer.status_code in statuses else None


def _who_answers(http: httpx.Client, url: str) -> dict[str, str] | None:
    try:
        answer = http.post(f"{url}/predictions/sample", json={"seed": 0})
    except httpx.TransportError:
        return None
    found = {name: answer.headers.get(f"X-Ade-{name}") for name in ("Model", "Backend")}
    return {name.lower(): value for name, value in found.items() if value} or None


def _model(described: dict[str, Any]) -> dict[str, Any]:
    queue = described.get("jobQueueStatus", {})
    return {
        "workers": [
            {
                "pid": w["pid"],
                "state": w["status"],
                "memory_mib": _memory(w["pid"]),
                "since": w["startTime"],
            }
            for w in described["workers"]
        ],
        "queued": queue.get("pendingRequests"),
        "queue_room": queue.get("remainingCapacity"),
    }


def _memory(pid: int) -> int | None:
    """Resident MiB; TorchServe's own figure is 0 where its system metrics are off."""
    try:
        return round(psutil.Process(pid).memory_info().rss / 2**20)
    except (psutil.Error, ValueError):  # -1 until TorchServe knows the process
        return None


def _last_errors(folder: RunFolder) -> list[dict[str, Any]] | None:
    """From the journals of the service's workers; ``None`` if there are none."""
    try:
        return last_errors(Path((folder.read_description() or {})["logs"]))
    except (KeyError, ValueError, OSError):
        return None


def _requests(metrics: str) -> dict[str, float]:
    """How many were answered, by the first digit of their status."""
    found: dict[str, float] = {}
    for digit, value in re.findall(
        r"^Requests([245])XX\{[^}]*\} ([0-9.eE+]+)$", metrics, re.MULTILINE
    ):
        found[f"{digit}xx"] = found.get(f"{digit}xx", 0.0) + float(value)
    return found


def versions() -> dict[str, str]:
    """Of the packages that answers depend on, and of Python."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
