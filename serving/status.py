"""What a running service says of itself: whether it answers, who answers, with how many workers, and what went wrong."""

from __future__ import annotations

import json
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import psutil

from serving.journal import last_errors
from serving.ports import Ports, local_address
from serving.requests import PROBE_HEADER

PACKAGES = ("av-ade", "torchserve", "torch", "onnxruntime-gpu", "onnxruntime", "gradio", "pillow", "numpy")
TIMEOUT_S = 30.0


def read_status(ports: Ports, token: str | None = None, host: str = "127.0.0.1") -> dict[str, Any]:
    """Ask every part of a service on this machine; what does not answer is ``None``.

    Args:
        ports: where it listens.
        token: where it asks for one.
        host: on which address its API and page listen.
    """
    address = local_address(host)
    headers = {PROBE_HEADER: "1", **_bearer(token)}
    with httpx.Client(timeout=TIMEOUT_S, headers=headers) as http:
        ready = _get(http, f"http://{address}:{ports.ui}/readyz", {200, 503})
        metrics = _get(http, f"http://127.0.0.1:{ports.metrics}/metrics", {200})
        answers = _who_answers(http, f"http://{address}:{ports.inference}")
        http.headers.update(_bearer(None if token is None else _running_key(ports)))  # management has a key of its own
        listed = _get(http, f"http://127.0.0.1:{ports.management}/models?limit=1000", {200})
        names = [model["modelName"] for model in listed.json()["models"]] if listed else []
        models = {}
        for name in names:
            described = _get(http, f"http://127.0.0.1:{ports.management}/models/{name}", {200})
            models[name] = _model(described.json()[0]) if described else None
        pids = [w["pid"] for model in models.values() if model for w in model["workers"]]
        return {"ready": ready is not None and bool(ready.json().get("ready")),
                "answers": answers, "models": models or None,
                "requests": _requests(metrics.text) if metrics else None,
                "last_errors": _last_errors(pids), "versions": versions()}


def management_key(folder: Path) -> str | None:
    """The key of the management API, which TorchServe leaves in its folder; ``None`` where it asks for none."""
    try:
        return str(json.loads((folder / "key_file.json").read_text())["management"]["key"])
    except (OSError, ValueError, KeyError):
        return None


def _running_key(ports: Ports) -> str | None:
    """The same of the service on these ports, found by the environment of its processes."""
    for process in psutil.process_iter():
        try:
            folder = Path(process.environ()["ADE_STOP_FOLDER"]).parent
            if f"management_address=http://127.0.0.1:{ports.management}\n" in (folder / "config.properties").read_text():
                return management_key(folder)
        except (psutil.Error, KeyError, OSError):
            continue
    return None


def _bearer(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def queued_requests(ports: Ports, key: str | None = None) -> int:
    """How many requests wait for a worker; 0 where that is not to be known, as of a service that is going down.

    Args:
        ports: where the service listens.
        key: of :func:`management_key`.
    """
    try:
        with httpx.Client(timeout=2.0, headers=_bearer(key)) as http:
            listed = _get(http, f"http://127.0.0.1:{ports.management}/models?limit=1000", {200})
            described = [_get(http, f"http://127.0.0.1:{ports.management}/models/{model['modelName']}", {200})
                         for model in (listed.json()["models"] if listed else [])]
        return sum(answer.json()[0].get("jobQueueStatus", {}).get("pendingRequests", 0) for answer in described if answer)
    except (ValueError, KeyError, IndexError, TypeError):
        return 0


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
    return {"workers": [{"pid": w["pid"], "state": w["status"], "memory_mib": _memory(w["pid"]),
                         "since": w["startTime"]} for w in described["workers"]],
            "queued": queue.get("pendingRequests"), "queue_room": queue.get("remainingCapacity")}


def _memory(pid: int) -> int | None:
    """Resident MiB; TorchServe's own figure is 0 where its system metrics are off."""
    try:
        return round(psutil.Process(pid).memory_info().rss / 2**20)
    except (psutil.Error, ValueError):  # -1 until TorchServe knows the process
        return None


def _last_errors(pids: list[int]) -> list[dict[str, Any]] | None:
    """From the journals in the folder that the workers were told to log to; ``None`` if that is not to be known."""
    for pid in pids:
        try:
            return last_errors(Path(psutil.Process(pid).environ()["LOG_LOCATION"]))
        except (psutil.Error, KeyError, ValueError, OSError):
            continue
    return None


def _requests(metrics: str) -> dict[str, float]:
    """How many were answered, by the first digit of their status."""
    found: dict[str, float] = {}
    for digit, value in re.findall(r"^Requests([245])XX\{[^}]*\} ([0-9.eE+]+)$", metrics, re.MULTILINE):
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
