"""Scoring a folder on Ray: speed compared with bare engines, memory, and what kills cost.

``python -m benchmarks.bulk_ray BUNDLE FOLDER``. The driver is killed three times, and the same
command resumes. The engines are measured alone, whenever no Ray process is left.

With ``--node``, the folder is scored on a cluster of two nodes instead, which are processes of this
machine. One of them is killed with everything on it, and another one joins.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
from pyarrow import dataset, parquet

from ade_base.files import image_paths
from benchmarks.bulk import Memory
from benchmarks.ray_cluster import Cluster, ray_cluster
from benchmarks.serving import CORES, Outcome, engines

KILLED_AFTER = (0.1, 0.2, 0.3)  # fractions of the files
NODE_KILLED_AFTER = 0.3
ENGINES_S = 10.0


def commits(out: Path) -> list[tuple[float, int]]:
    """Time and number of rows of each file of committed rows, in order."""
    found = []
    for path in (out / "rows").glob("*.parquet"):
        try:
            found.append((path.stat().st_mtime, parquet.read_metadata(path).num_rows))
        except (OSError, pa.ArrowInvalid):  # being written, or cut off by a kill
            continue
    return sorted(found)


def start(
    bundle: Path, folder: Path, out: Path, cluster: Cluster | None = None
) -> tuple[subprocess.Popen[bytes], Memory]:
    command = [sys.executable, "-m", "ade_cli.main", "score", str(folder), "--bundle", str(bundle)]
    command += ["--engine", "ray", "--workers", str(CORES), "--out", str(out)]
    environment = None
    if cluster is not None:
        command += ["--address", cluster.address]
        environment = cluster.environment
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    memory = Memory(process.pid)
    memory.start()
    return process, memory


def ray_processes() -> int:
    """Number of processes of any private Ray instance."""
    found = 0
    for process in psutil.process_iter():
        try:
            found += process.name().startswith(("raylet", "gcs_server", "ray::"))
        except psutil.Error:
            continue
    return found


def wait_for_rows(process: subprocess.Popen[bytes], out: Path, rows: float) -> None:
    while sum(n for _, n in commits(out)) < rows:
        if process.poll() is not None:
            raise SystemExit(f"ade score ended with {process.returncode}")
        time.sleep(1)


def measure_alone(all_engines: Callable[[], Outcome]) -> float:
    """Images per second of the engines, once Ray's processes have ended."""
    while ray_processes():
        time.sleep(0.5)
    return all_engines().images_a_second


def ids_of(out: Path) -> list[int]:
    """The ids of all committed rows."""
    ids: list[int] = dataset.dataset(out / "rows").to_table(columns=["id"])["id"].to_pylist()
    return ids


def kill_a_node(bundle: Path, folder: Path, out: Path, total: int) -> None:
    """Score a folder on two nodes, of which one is killed and replaced."""
    with ray_cluster() as cluster:
        # With the head's, two processors more than engines, as Ray needs to read and to write.
        nodes = [cluster.add_worker(2) for _ in range(CORES)]
        process, _ = start(bundle, folder, out, cluster)
        try:
            wait_for_rows(process, out, NODE_KILLED_AFTER * total)
            killed, before = time.time(), sum(n for _, n in commits(out))
            cluster.kill(nodes[0])
            cluster.add_worker(2)
            if process.wait() != 0:
                raise SystemExit(f"ade score ended with {process.returncode}")
        finally:
            process.kill()
        times, rows = np.array([one for one in commits(out) if one[0] > killed]).T
    ids = ids_of(out)
    print(
        f"{CORES} nodes, one killed after {before} rows and replaced: next rows after "
        f"{times[0] - killed:.0f} s, all after {times[-1] - killed:.0f} s; {len(ids)} rows, "
        f"{len(set(ids))} different ids of {total}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path, help="tens of thousands of image files")
    parser.add_argument("--node", action="store_true", help="kill a node instead of the driver")
    args = parser.parse_args()
    total = sum(1 for _ in image_paths(args.folder))
    if args.node:
        with tempfile.TemporaryDirectory() as scratch:
            kill_a_node(args.bundle.resolve(), args.folder, Path(scratch) / "scores", total)
        return
    ceilings = []
    with (
        tempfile.TemporaryDirectory() as scratch,
        engines(args.bundle.resolve(), ENGINES_S) as all_engines,
    ):
        out = Path(scratch) / "scores"
        ceilings.append(measure_alone(all_engines))
        for fraction in KILLED_AFTER:
            process, _ = start(args.bundle, args.folder, out)
            wait_for_rows(process, out, fraction * total)
            process.send_signal(signal.SIGKILL)
            process.wait()
            ceilings.append(measure_alone(all_engines))
        resumed = time.time()
        process, memory = start(args.bundle, args.folder, out)
        if process.wait() != 0:
            raise SystemExit(f"ade score ended with {process.returncode}")
        ceilings.append(measure_alone(all_engines))
        # The slope: rows are committed in blocks, so a difference of two times has a large error.
        times, rows = np.array([one for one in commits(out) if one[0] > resumed]).T
        rate = np.polyfit(times - times[0], np.cumsum(rows), 1)[0]
        ids = ids_of(out)
    ceiling = statistics.median(ceilings)
    print(
        f"{total} files, {CORES} workers: {rate:.0f} images per second after the last kill, "
        f"bare engines {ceiling:.0f} ({min(ceilings):.0f} to {max(ceilings):.0f}): "
        f"{rate / ceiling:.2f}"
    )
    print(
        f"killed {len(KILLED_AFTER)} times: {len(ids)} rows at the end, "
        f"{len(set(ids))} different ids of {total}"
    )
    print(
        "memory after the last kill, MiB in the second, third and last quarter: "
        f"{memory.quarters()}"
    )


if __name__ == "__main__":
    main()
