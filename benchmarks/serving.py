"""Throughput and latency of the service, its engine, and other servers with the same engine.

``make bench``. All servers run at the same time, and all but the one under test are idle. Each
round measures all cases on all servers in turn, and medians over the rounds are printed, since
machines are noisy and shared. Clients run on the same cores: their share is in the table.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import functools
import io
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
import psutil

from ade_base.pictures.show import write_png
from ade_base.ports import VARIABLES
from ade_model.checkpoint import save_model
from ade_model.config import ModelConfig
from ade_model.model import ADEModel
from benchmarks.traffic import new_session, pictures_of
from export.write import export_bundle
from serving.engine.engine import MAX_ROWS, InferenceEngine

CORES = len(os.sched_getaffinity(0))
WORKERS = min(CORES, 4)
SECONDS = 4.0
OURS = "ade serve"
# The smallest possible model, so that nearly all time is spent by the server.
EMPTY = ModelConfig(
    image_size=8,
    channels=3,
    widths=(4,),
    latent_channels=(2,),
    decoder_blocks=(1,),
    flow_couplings=1,
    flow_width=4,
)


@dataclass(frozen=True)
class Load:
    """Requests of ``images`` each, from ``clients`` in turn or at a ``rate`` per second."""

    name: str
    operation: str
    body: bytes
    content_type: str
    images: int
    clients: int
    rate: float | None = None
    seconds: float = SECONDS


@dataclass
class Server:
    """A server under test, and whether it takes an image as JSON."""

    name: str
    process: subprocess.Popen
    url: str
    wants_json: bool = False


@dataclass
class Outcome:
    """The result of one load on one server."""

    images_a_second: float
    latencies: list[float]
    errors: int
    server_cpu: float  # cores
    client_cpu: float


@dataclass
class Row:
    outcomes: list[Outcome] = field(default_factory=list)

    def median(self, value: Callable[[Outcome], float]) -> float:
        return statistics.median(map(value, self.outcomes))


async def _ask(session: aiohttp.ClientSession, url: str, load: Load) -> bool:
    try:
        async with session.post(
            url, data=load.body, headers={"Content-Type": load.content_type}
        ) as answer:
            await answer.read()
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False


async def _drive(url: str, load: Load) -> tuple[list[float], int, float]:
    """Latencies in seconds, the number of failures, and the duration in seconds.

    At a fixed rate, a latency starts when the request was due.
    """
    latencies: list[float] = []
    failures = 0

    async def one(session: aiohttp.ClientSession, due: float) -> None:
        nonlocal failures
        if await _ask(session, url, load):
            latencies.append(time.perf_counter() - due)
        else:
            failures += 1

    async with new_session() as session:
        started = time.perf_counter()
        if load.rate is None:

            async def client() -> None:
                while time.perf_counter() - started < load.seconds:
                    await one(session, time.perf_counter())

            await asyncio.gather(*(client() for _ in range(load.clients)))
        else:
            tasks = []
            for i in range(int(load.seconds * load.rate)):
                due = started + i / load.rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                tasks.append(asyncio.create_task(one(session, due)))
            await asyncio.gather(*tasks)
        return latencies, failures, time.perf_counter() - started


def _cpu(processes: list[psutil.Process]) -> float:
    total = 0.0
    for process in processes:
        try:
            times = process.cpu_times()
            total += times.user + times.system
        except psutil.Error:
            continue
    return total


def _family(server: Server) -> list[psutil.Process]:
    parent = psutil.Process(server.process.pid)
    return [parent, *parent.children(recursive=True)]


def _memory(server: Server) -> float:
    """MiB, with shared pages divided among the processes that share them."""
    return sum(process.memory_full_info().pss for process in _family(server)) / 2**20


def measure(server: Server, load: Load) -> Outcome:
    family = _family(server)
    before, mine = _cpu(family), time.process_time()
    latencies, failures, seconds = asyncio.run(_drive(f"{server.url}/{load.operation}", load))
    return Outcome(
        load.images * len(latencies) / seconds,
        latencies or [float("nan")],
        failures,
        (_cpu(family) - before) / seconds,
        (time.process_time() - mine) / seconds,
    )


def measure_engine(call: Callable[[], Any], images: int, seconds: float = SECONDS) -> Outcome:
    started, mine = time.perf_counter(), time.process_time()
    latencies = []
    while time.perf_counter() - started < seconds:
        begun = time.perf_counter()
        call()
        latencies.append(time.perf_counter() - begun)
    took = time.perf_counter() - started
    return Outcome(
        images * len(latencies) / took, latencies, 0, (time.process_time() - mine) / took, 0.0
    )


def _engine_process(bundle: Path, seconds: float, go: Any, outcomes: Any) -> None:
    engine = InferenceEngine(bundle, device="cpu", operations=["score"])
    engine.warm_up()
    images = example_images(engine.image_shape, MAX_ROWS)
    outcomes.put(None)  # ready
    while True:
        go.wait()
        outcomes.put(measure_engine(lambda: engine.score(images), MAX_ROWS, seconds))
        go.wait()


@contextmanager
def engines(bundle: Path, seconds: float = SECONDS) -> Iterator[Callable[[], Outcome]]:
    """One engine per core, each in its own process: the maximum of the machine."""
    context = multiprocessing.get_context("spawn")
    go, outcomes = context.Barrier(CORES + 1), context.Queue()
    children = [
        context.Process(target=_engine_process, args=(bundle, seconds, go, outcomes), daemon=True)
        for _ in range(CORES)
    ]
    for child in children:
        child.start()
    for _ in children:
        outcomes.get()

    def run() -> Outcome:
        go.wait()
        made = [outcomes.get() for _ in children]
        go.wait()
        return Outcome(
            sum(one.images_a_second for one in made),
            [latency for one in made for latency in one.latencies],
            0,
            sum(one.server_cpu for one in made),
            0.0,
        )

    try:
        yield run
    finally:
        for child in children:
            child.kill()


def example_images(shape: tuple[int, int, int], count: int) -> np.ndarray:
    """The example pictures, uint8 ``(count, H, W, C)``, brightened a little in each repetition."""
    pictures = pictures_of(shape)
    return np.stack(
        [
            np.clip(pictures[i % len(pictures)].astype(int) + i // len(pictures), 0, 255).astype(
                np.uint8
            )
            for i in range(count)
        ]
    )


@contextmanager
def _started(
    name: str,
    command: list[str],
    changes: dict[str, str],
    url: str,
    ready: Callable[[], bool],
    wants_json: bool = False,
) -> Iterator[Server]:
    process = subprocess.Popen(
        command, env={**os.environ, **changes}, stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 180
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{name} did not start")
            time.sleep(0.5)
        yield Server(name, process, url, wants_json)
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with suppress(ProcessLookupError):  # some servers leave their workers behind
            os.killpg(process.pid, signal.SIGKILL)


def start_servers(
    stack: ExitStack, bundle: Path, first_port: int, operations: tuple[str, ...]
) -> list[Server]:
    """Start the service with both of its engines, and three peers, on ports from ``first_port``.

    The service with its usual engine is first.
    """
    python = [sys.executable, "-m"]
    command = [*python, "ade_cli.main", "serve", str(bundle), "--device", "cpu"]
    if operations == ("score",):
        command += ["--workers", str(WORKERS)]
    servers = []
    for name in (OURS, f"{OURS} --engine process"):
        ports = {
            variable: str(first_port + i) for i, (variable, _) in enumerate(VARIABLES.values())
        }
        page = f"http://127.0.0.1:{ports[VARIABLES['ui'][0]]}/readyz"
        servers.append(
            stack.enter_context(
                _started(
                    name,
                    [*command, *name.removeprefix(OURS).split()],
                    ports,
                    f"http://127.0.0.1:{first_port}/predictions",
                    functools.partial(_answers, page, None),
                )
            )
        )
        first_port += len(VARIABLES)
    picture = _png(bundle)
    as_json = {"images": [base64.b64encode(picture).decode()]}
    bento = ["bentoml", "serve", "benchmarks.peers.bento:Score", "--host", "127.0.0.1", "--port"]
    peers = {
        "FastAPI": ([*python, "benchmarks.peers.fast_api"], False),
        "LitServe": ([*python, "benchmarks.peers.lit_serve"], True),
        "BentoML": ([*python, *bento], True),
    }
    for i, (name, (command, wants_json)) in enumerate(peers.items()):
        port = first_port + i
        url = f"http://127.0.0.1:{port}"
        changes = {
            "PEER_PORT": str(port),
            "PEER_BUNDLE": str(bundle),
            "PEER_WORKERS": str(WORKERS),
            "OMP_NUM_THREADS": "1",
            "BENTOML_DO_NOT_TRACK": "True",
        }
        question = {"json": as_json} if wants_json else {"content": picture}
        servers.append(
            stack.enter_context(
                _started(
                    name,
                    command + [str(port)] * (command[-1] == "--port"),
                    changes,
                    url,
                    lambda url=url, question=question: _answers(f"{url}/score", question),
                    wants_json,
                )
            )
        )
    return servers


def _answers(url: str, question: dict[str, Any] | None) -> bool:
    try:
        answer = (
            httpx.get(url, timeout=60)
            if question is None
            else httpx.post(url, timeout=60, **question)
        )
        return answer.status_code == 200
    except httpx.TransportError:
        return False


def _png(bundle: Path) -> bytes:
    return write_png(
        example_images(InferenceEngine(bundle, device="cpu", operations=["score"]).image_shape, 1)[
            0
        ]
    )


def one_image(
    server: Server,
    picture: bytes,
    clients: int,
    rate: float | None = None,
    seconds: float = SECONDS,
) -> Load:
    name = (
        f"score, one PNG, {clients} clients"
        if rate is None
        else f"score, one PNG, {rate:.0f} per second"
    )
    if server.wants_json:
        body = b'{"images": ["' + base64.b64encode(picture) + b'"]}'
        return Load(name, "score", body, "application/json", 1, clients, rate, seconds)
    return Load(name, "score", picture, "image/png", 1, clients, rate, seconds)


def npy(images: np.ndarray, clients: int, seconds: float) -> Load:
    out = io.BytesIO()
    np.save(out, images)
    return Load(
        f"score, {len(images)}-image npy, {clients} clients",
        "score",
        out.getvalue(),
        "application/x-npy",
        len(images),
        clients,
        seconds=seconds,
    )


def samples(n: int, clients: int) -> Load:
    body = f'{{"n": {n}, "seed": 7, "format": "npy"}}'.encode()
    return Load(f"sample n={n}, {clients} clients", "sample", body, "application/json", n, clients)


def empty_bundle(folder: Path) -> Path:
    """The bundle of a model with almost no weights."""
    (folder / "run").mkdir()
    save_model(
        ADEModel(EMPTY).eval(),
        folder / "run",
        {"recipe": "av-ade", "data": "none", "splits": {}, "seed": 0, "images_seen": 0},
    )
    export_bundle(folder / "run", folder / "bundle", "empty", example_images((8, 8, 3), 32), None)
    return folder / "bundle"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    engine = InferenceEngine(args.bundle, device="cpu")
    engine.warm_up()
    images = example_images(engine.image_shape, 256)
    picture = write_png(images[0])
    rows: dict[tuple[str, str], Row] = {}

    def note(case: str, who: str, outcome: Outcome) -> None:
        rows.setdefault((case, who), Row()).outcomes.append(outcome)

    with ExitStack() as stack:
        empty = empty_bundle(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        servers = start_servers(
            stack, args.bundle.resolve(), 18080, ("sample", "encode", "reconstruct", "score")
        )
        bare = start_servers(stack, empty, 18180, ("score",))
        all_engines = stack.enter_context(engines(args.bundle.resolve()))
        ours = servers[0]
        little = _png(empty)
        for round_ in range(args.rounds):
            print(f"round {round_ + 1} of {args.rounds}", file=sys.stderr, flush=True)
            note(
                "score, batches of 1", "engine", measure_engine(lambda: engine.score(images[:1]), 1)
            )
            note(
                f"score, batches of {MAX_ROWS}",
                "engine",
                measure_engine(lambda: engine.score(images), 256),
            )
            note(f"score, batches of {MAX_ROWS}", f"{CORES} engines", all_engines())
            note(
                "sample n=64",
                "engine",
                measure_engine(lambda: engine.sample([7] * 64, range(64)), 64),
            )
            for load in (npy(images, 1, 6), npy(images, 8, 12)):
                note(load.name, ours.name, measure(ours, load))
            for clients in (1, 8, 64):
                for server in servers:
                    load = one_image(server, picture, clients)
                    note(load.name, server.name, measure(server, load))
            if round_ == 0:  # the same rate for all and in all rounds
                rate = 0.7 * max(
                    rows["score, one PNG, 64 clients", s.name].outcomes[0].images_a_second
                    for s in servers
                )
            for server in servers:
                load = one_image(server, picture, 1, round(rate))
                note(load.name, server.name, measure(server, load))
            for load in (
                samples(1, 1),
                samples(1, 8),
                samples(1, 64),
                samples(64, 1),
                samples(64, 8),
            ):
                note(load.name, ours.name, measure(ours, load))
            for clients in (1, 64):
                for server in bare:
                    load = one_image(server, little, clients)
                    note(f"near-empty graph, {load.name}", server.name, measure(server, load))
        memory = {server.name: _memory(server) for server in servers}
    _print(rows, memory, engine.backend.name, args.rounds)


def _print(
    rows: dict[tuple[str, str], Row], memory: dict[str, float], backend: str, rounds: int
) -> None:
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    print(
        f"{model}, {CORES} cores, {backend}, {WORKERS} workers for score, "
        f"medians of {rounds} rounds\n"
    )
    print(
        "| case | server | images/s | p50 ms | p95 ms | p99 ms | errors | cores, server "
        "| cores, client |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for (case, who), row in rows.items():
        times = [
            row.median(lambda o, q=q: 1000 * float(np.quantile(o.latencies, q)))
            for q in (0.5, 0.95, 0.99)
        ]
        print(
            f"| {case} | {who} | {row.median(lambda o: o.images_a_second):.0f} | "
            + " | ".join(f"{t:.1f}" for t in times)
            + f" | {sum(o.errors for o in row.outcomes)} | "
            f"{row.median(lambda o: o.server_cpu):.2f} | {row.median(lambda o: o.client_cpu):.2f} |"
        )
    print(
        "\nMemory at the end, MiB (PSS): "
        + ", ".join(f"{name} {size:.0f}" for name, size in memory.items())
    )


if __name__ == "__main__":
    main()
