"""``ade status``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ade_base.ports import Ports, check_host
from handlers.front.settings import given_token
from handlers.launch.status import read_status


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", help="address, as for `ade serve` (default: that of this user's service)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.description = (
        "Report the state of the service on this machine, on the ports that ADE_…_PORT set. Exit "
        "status 0 if all operations answer, 1 if not. Only the user who started the service sees "
        "workers, queues and errors. For a service of another user, set ADE_TOKEN to its token."
    )


def run(args: argparse.Namespace) -> int:
    if args.host is not None:
        check_host(args.host)
    found = read_status(Ports.from_environment(), given_token(), args.host)
    print(json.dumps(found, indent=2) if args.json else _text(found))
    return 0 if found["ready"] else 1


def _publishing(last: dict[str, Any] | None) -> list[str]:
    """The last `ade publish`, and how far it came."""
    if last is None:
        return []
    text = "{began} {command}: {state}: {detail}".format(**last)
    return [f"publish     {text}".replace("\n", "\n            ")]


def _place(worker: dict[str, Any]) -> str:
    """Its memory, or the other machine on which it runs."""
    memory = worker["memory_mib"]
    return f"on {worker['host']}" if memory is None and "host" in worker else f"{memory} MiB"


def _text(found: dict[str, Any]) -> str:
    answers = found["answers"] or {}
    if found["ready"]:
        ready = "yes, all operations answer"
    elif found["silent"]:
        ready = "no: " + "; ".join(f"{part} does not answer" for part in found["silent"])
    else:
        ready = "no: not all operations answer"
    lines = [
        f"ready       {ready}",
        f"model       {answers.get('model', 'no answer')}",
        f"backend     {answers.get('backend', 'no answer')}",
    ]
    if found["models"] is None:
        reason = (
            "the service does not answer"
            if found["is_own"]
            else "no service of this user is on these ports"
        )
        lines.append(f"workers     unknown: {reason}")
    for name, model in (found["models"] or {}).items():
        states = (
            ", ".join(f"{w['state']} (pid {w['pid']}, {_place(w)})" for w in model["workers"])
            or "none"
        )
        lines.append(f"{name:11} workers: {states}; queued: {model['queued']}")
    if found["requests"] is not None:
        counts = ", ".join(
            f"{kind}: {count:.0f}" for kind, count in sorted(found["requests"].items())
        )
        lines.append(f"requests    {counts or 'none yet'}")
    lines += _publishing(found["publishing"])
    for name, its in (found["calibrations"] or {}).items():
        text = f"{its['rejected']:.0f} rejected, {its['expected']:.0f} expected"
        lines.append(f"calibration {name}: {text}")
    for error in found["last_errors"] or []:
        text = "error       {time} {operation} {status} {code}: {message}".format(**error)
        # Messages quote what clients sent.
        lines.append("".join(c if c.isprintable() else "?" for c in text))
    lines.append(
        "versions    "
        + ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    )
    return "\n".join(lines)
