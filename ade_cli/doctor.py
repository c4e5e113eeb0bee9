"""``ade doctor``."""

from __future__ import annotations

import argparse
import os
import platform
import re
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from ade_base.ports import LOOPBACK, PortError, Ports
from ade_cli.install import PROJECT, install_command, installed, runtime
from ade_cli.main import VERBS
from ade_cli.paths import SHIPPED, given_bundle
from handlers.launch.engines import ENGINES, default_engine
from handlers.launch.serve import SIGNS_OF_A_GPU
from handlers.processes.run_folder import find_service
from serving.engine.bundle import BundleError, verify_bundle

PROBLEM = "problem"  # what keeps the service from starting
PROXIES = ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY")


class Finding(NamedTuple):
    """A row of the report.

    Attributes:
        state: ``ok``, ``missing`` (of what not everybody needs), ``note`` or :data:`PROBLEM`.
        text: what was found.
        cure: a command or an advice, if any.
    """

    state: str
    text: str
    cure: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Report what is installed, what is missing for what, and the command that adds it; whether "
        "the bundle is complete, the ports of ADE_…_PORT are free and a proxy is in the way. Exit "
        "status 0 if ade serve can start, 1 if not."
    )
    parser.add_argument(
        "bundle",
        type=given_bundle,
        nargs="?",
        default=SHIPPED,
        metavar="BUNDLE",
        help="folder of a bundle to verify (default: the shipped one)",
    )


def run(args: argparse.Namespace) -> int:
    versions = installed()
    findings = [
        Finding(
            "ok",
            f"{PROJECT} {metadata.version(PROJECT)}, Python {platform.python_version()}, in "
            f"{Path(__file__).parents[1]}",
        ),
        *_computing(versions),
        *_extras(versions),
        _bundle(args.bundle),
        *_ports(),
        *_proxies(),
    ]
    for state, text, cure in findings:
        print(f"{state:8} {text}" + (f"\n         {cure}" if cure else ""))
    return 1 if any(each.state == PROBLEM for each in findings) else 0


def _computing(versions: dict[str, str]) -> Iterator[Finding]:
    """ONNX Runtime and the GPU's driver."""
    names = [name for name in ("onnxruntime", "onnxruntime-gpu") if name in versions]
    has_driver = any(path.exists() for path in SIGNS_OF_A_GPU)
    if not names:
        extra = "cuda" if has_driver else "cpu"
        yield Finding(PROBLEM, "ONNX Runtime is not installed", install_command([extra]))
    elif len(names) > 1:
        yield Finding(
            PROBLEM,
            "onnxruntime and onnxruntime-gpu overwrite each other's files",
            "uninstall both, then install one of the extras cpu and cuda",
        )
    else:
        where = "NVIDIA GPUs" if names[0].endswith("gpu") else "CPUs"
        yield Finding("ok", f"ONNX Runtime {versions[names[0]]} for {where}")
    if has_driver and names == ["onnxruntime"]:
        yield Finding(
            "missing",
            "there is an NVIDIA driver, but ONNX Runtime computes on the CPU alone",
            f"uninstall onnxruntime, then {install_command(['cuda'])}",
        )
    elif not has_driver:
        yield Finding("note", "there is no NVIDIA driver: everything computes on the CPU")


def _extras(versions: dict[str, str]) -> Iterator[Finding]:
    """The packages of each extra that a verb or an engine needs."""
    uses: dict[str, list[str]] = defaultdict(list)
    for name, verb in VERBS.items():
        if verb.extra is not None:
            uses[verb.extra].append(f"ade {name}")
    for name, engine in ENGINES.items():
        if engine.extra not in (None, VERBS["serve"].extra):
            uses[str(engine.extra)].append(f"ade serve --engine {name}")
    uses["heif"] = ["HEIC files"]
    for extra, names in uses.items():
        packages = _packages(extra)
        missing = sorted(packages - versions.keys())
        if not packages:  # since a `git pull`
            text = f"the extra {extra} is newer than this installation: install again"
            yield Finding("note", text, install_command([runtime(), extra]))
            continue
        if not missing:
            its = f", with the engine {default_engine()}" if "ade serve" in names else ""
            yield Finding("ok", f"{', '.join(names)} (extra {extra}){its}")
            continue
        text = f"{', '.join(names)} (extra {extra}): {', '.join(missing)}"
        state = PROBLEM if extra == VERBS["serve"].extra else "missing"
        yield Finding(state, text, install_command([runtime(), extra]))


def _packages(extra: str) -> set[str]:
    """Names of an extra's packages, with those of the extras that it consists of."""
    found = set()
    for line in metadata.requires(PROJECT) or []:
        if re.search(rf"extra == ['\"]{extra}['\"]", line):
            name, inner = re.findall(r"^([\w.-]+)(?:\[(.*?)\])?", line)[0]
            if name == PROJECT:
                found |= {each for one in inner.split(",") for each in _packages(one)}
            else:
                found.add(name.lower().replace("_", "-"))
    return found


def _bundle(folder: Path) -> Finding:
    try:
        bundle = verify_bundle(folder.resolve())
    except BundleError as error:
        return Finding(PROBLEM, str(error))
    return Finding("ok", f"the bundle {bundle.model_id} is complete: {folder}")


def _ports() -> Iterator[Finding]:
    try:
        ports = Ports.from_environment()
        if find_service(ports) is not None:
            yield Finding("note", "your service runs on these ports: ade status shows its state")
            return
        ports.check_free(LOOPBACK[0])
    except PortError as error:
        yield Finding(PROBLEM, str(error))
        return
    yield Finding("ok", f"the ports {ports.inference}, {ports.ui} and {ports.metrics} are free")


def _proxies() -> Iterator[Finding]:
    given = [name for name in PROXIES if os.environ.get(name)]
    direct = {os.environ.get(name, "") for name in ("no_proxy", "NO_PROXY")}
    if given and not any("127.0.0.1" in text or text == "*" for text in direct):
        yield Finding(
            "note",
            f"{given[0]} is set: curl and other programs ask the proxy for this machine, too",
            "export NO_PROXY=127.0.0.1,localhost no_proxy=127.0.0.1,localhost",
        )
