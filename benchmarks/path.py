"""Which of our modules one request runs: from a picture's bytes to its score, in both processes.

A hook (:func:`sys.setprofile`) in the processes of ``ade serve --engine process`` notes which
functions are called while one picture is scored. Their modules are what a reader has to know to
follow a picture; docs/architecture.md describes the way.

``python -m benchmarks.path``
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[1]
PRETRAINED = ROOT / "pretrained" / "cifar10"
PROCESSES = {
    "handlers.service.application": "front",
    "handlers.service.worker": "worker",
}
WARM_UP = 3  # requests, after which everything is imported and cached
SETTLE_S = 1.0  # until processes that finished a request have nothing left to do
POLL_S = 0.02
# Of every process that Python starts with this file's folder on PYTHONPATH.
HOOK = "import sys; sys.path.append({root!r}); from benchmarks.path import trace; trace({folder!r})"


def trace(folder: str) -> None:
    """Note the functions that this process calls between ``begin`` and ``end``.

    Args:
        folder: where files of these names appear, and where ``PROCESS-PID.json`` is written then:
            functions by module.
    """
    name = next((PROCESSES[one] for one in sys.orig_argv if one in PROCESSES), None)
    if name is None:
        return
    root = f"{ROOT}{os.sep}"
    called: dict[str, set[str]] = {}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(root) and f"{os.sep}." not in file:
            called.setdefault(file[len(root) :], set()).add(frame.f_code.co_qualname)

    def wait_for(file: Path) -> None:
        while not file.exists():
            time.sleep(POLL_S)

    def watch() -> None:
        wait_for(Path(folder, "begin"))
        called.clear()
        wait_for(Path(folder, "end"))
        found = {module: sorted(called[module]) for module in sorted(called)}
        Path(folder, f"{name}-{os.getpid()}.json").write_text(json.dumps(found))

    threading.Thread(target=watch, daemon=True).start()
    threading.setprofile(note)
    sys.setprofile(note)


def _score_once(bundle: Path, folder: Path) -> None:
    """Score a picture in a service whose processes write what they called into the folder."""
    import httpx

    from benchmarks.traffic import EXAMPLES, running

    hook = folder / "sitecustomize.py"
    hook.write_text(HOOK.format(root=str(ROOT), folder=str(folder)))
    os.environ["PYTHONPATH"] = str(folder)
    data = EXAMPLES[0].read_bytes()
    with running(bundle, options=("--engine", "process")) as service:

        def score() -> None:
            headers = {"Content-Type": "image/png"}
            answer = httpx.post(f"{service.url}/score", content=data, headers=headers, timeout=60)
            answer.raise_for_status()

        for _ in range(WARM_UP):
            score()
        time.sleep(SETTLE_S)
        (folder / "begin").touch()
        time.sleep(10 * POLL_S)
        score()
        (folder / "end").touch()
        time.sleep(SETTLE_S)


def main() -> None:
    """Print the modules of the request, each with the process and the functions that ran."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path, nargs="?", default=PRETRAINED)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _score_once(parser.parse_args().bundle.resolve(), folder)
        modules: dict[str, dict[str, list[str]]] = {}
        for path in folder.glob("*.json"):
            process = path.name.partition("-")[0]
            for module, functions in json.loads(path.read_text()).items():
                modules.setdefault(module, {})[process] = functions
    workers = [each for each in modules.values() if "worker" in each]
    for module in sorted(modules, key=lambda one: ("front" not in modules[one], one)):
        for process, functions in modules[module].items():
            print(f"{process:8}{module:44}{', '.join(functions)}")
    print(f"{len(modules)} modules, {len(workers)} of them in the worker")


if __name__ == "__main__":
    main()
