"""Scoring a folder: speed compared with bare engines, memory, and the cost of a kill.

``make bench-bulk DATA=FOLDER``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil

from ade_base.files import image_paths
from benchmarks.serving import CORES, engines

KILLED_AFTER = 0.4  # fraction of the files
INTERVAL_S = 2.0


def rows_of(part: Path) -> int:
    return max(0, sum(1 for _ in open(part, "rb")) - 1) if part.exists() else 0


class Memory(threading.Thread):
    """Records the MiB (PSS) of a process and its children every two seconds."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.seen: list[float] = []

    def run(self) -> None:
        while True:
            try:
                root = psutil.Process(self.pid)
                family = root.children(recursive=True)
                total = root.memory_full_info().pss
            except psutil.Error:
                return
            for process in family:
                with contextlib.suppress(psutil.Error):  # it has just ended
                    total += process.memory_full_info().pss
            self.seen.append(total / 2**20)
            time.sleep(INTERVAL_S)

    def quarters(self) -> str:
        """The medians of the second, third and last quarter of the time."""
        size = len(self.seen)
        if size < 4:
            return f"only {size} measurements"
        parts = [self.seen[size * i // 4 : size * (i + 1) // 4] for i in range(1, 4)]
        medians = ", ".join(f"{statistics.median(part):.0f}" for part in parts)
        return f"{medians} ({size} measurements)"


def start(bundle: Path, folder: Path, out: Path) -> tuple[subprocess.Popen, Memory]:
    command = [
        sys.executable,
        "-m",
        "ade_cli.main",
        "score",
        str(folder),
        "--bundle",
        str(bundle),
        "--out",
        str(out),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    memory = Memory(process.pid)
    memory.start()
    return process, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument(
        "folder", type=Path, help="tens of thousands of image files of the model's size"
    )
    args = parser.parse_args()
    paths = list(image_paths(args.folder))
    ceilings: list[float] = []
    rates: list[float] = []
    with tempfile.TemporaryDirectory() as scratch, engines(args.bundle.resolve()) as all_engines:
        out = Path(scratch) / "scores.jsonl"
        part = out.with_name(out.name + ".part")
        process, memory = start(args.bundle, args.folder, out)
        while rows_of(part) == 0:
            if process.poll() is not None:
                raise SystemExit(f"ade score ended with {process.returncode}")
            time.sleep(0.1)
        stopped = False
        while process.poll() is None:
            before, began = rows_of(part), time.monotonic()
            time.sleep(15)
            if process.poll() is not None or not part.exists():
                break
            rates.append((rows_of(part) - before) / (time.monotonic() - began))
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
            if not stopped and rows_of(part) > KILLED_AFTER * len(paths):
                process.send_signal(signal.SIGKILL)
                process.wait()
                first, kept = memory, rows_of(part)
                psutil.wait_procs(family, timeout=10)
                left = sum(p.is_running() for p in family)
                process, memory = start(args.bundle, args.folder, out)
                while rows_of(part) <= kept and process.poll() is None:
                    time.sleep(0.1)
                stopped = True
                continue
            for p in family:  # measure the engines while the scoring is stopped
                os.kill(p.pid, signal.SIGSTOP)
            ceilings.append(all_engines().images_a_second)
            for p in family:
                os.kill(p.pid, signal.SIGCONT)
        process.wait()
        if not stopped:
            raise SystemExit("scoring ended before it could be killed: use a folder of more files")
        names = [json.loads(line)["path"] for line in open(out)]
    ratio = statistics.median(rates) / statistics.median(ceilings)
    print(
        f"{len(paths)} files, {CORES} processes: {statistics.median(rates):.0f} images per second, "
        f"bare engines {statistics.median(ceilings):.0f}: {ratio:.2f}"
    )
    print(
        f"killed at {kept} rows, {left} processes left behind; {len(names)} rows at the end, "
        f"{len(set(names))} different: {'' if names == paths else 'NOT '}the files in order"
    )
    for when, seen in (("before the kill", first), ("after it", memory)):
        print(f"memory {when}, MiB in the second, third and last quarter: {seen.quarters()}")


if __name__ == "__main__":
    main()
