"""Faults under load and their effect on the service. ``make bench-faults``

Every answer must be byte-identical to the right one, or be a well-formed error.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import os
import resource
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import psutil
from PIL import Image

from benchmarks.traffic import (
    OUTCOMES,
    Known,
    Running,
    Tally,
    Traffic,
    ask,
    is_error,
    known_requests,
    new_session,
    running,
)
from handlers.launch.engines import ENGINES, default_engine
from handlers.limits import RESPONSE_TIMEOUT_S
from serving.engine.bundle import open_bundle

CLIENTS = 16
RECOVERY_S = 10.0
AT_ONCE = 1000
BIG_BODY = 15 * 2**20
STALLED = 136
STALLED_BODY = 6 * 2**20
STALLED_AFTER = 5 * 2**20
ROOM = 8 * 2**20  # memory left to a worker that should run out of it


@dataclass(frozen=True)
class Result:
    """The effect of a fault: seconds until full recovery, and how many are allowed."""

    name: str
    tally: Tally
    seconds: float | None = None
    allowed: float | None = None


async def _until_whole(service: Running, lost: int, started: float, limit: float) -> float:
    """Seconds until the worker ``lost`` is replaced and all workers are ready."""
    while time.monotonic() - started < limit:
        workers = await asyncio.to_thread(service.workers)
        if lost not in workers and all(state == "READY" for _, state in workers.values()):
            return time.monotonic() - started
        await asyncio.sleep(0.1)
    return float("inf")


async def kill_each(service: Running, known: list[Known]) -> list[Result]:
    results = []
    for pid, (model, _) in service.workers().items():
        async with Traffic(service.url, known, CLIENTS) as traffic:
            await asyncio.sleep(1)
            os.kill(pid, signal.SIGKILL)
            seconds = await _until_whole(service, pid, time.monotonic(), 60)
            await asyncio.sleep(1)
        results.append(
            Result(f"SIGKILL of a worker of {model}", traffic.tally, seconds, RECOVERY_S)
        )
    return results


async def hang(service: Running, known: list[Known]) -> list[Result]:
    pid = next(pid for pid, (model, _) in service.workers().items() if model == "score")
    async with Traffic(service.url, known, CLIENTS) as traffic:
        await asyncio.sleep(1)
        os.kill(pid, signal.SIGSTOP)
        limit = RESPONSE_TIMEOUT_S + RECOVERY_S
        seconds = await _until_whole(service, pid, time.monotonic(), limit + 60)
    return [Result("a worker of score hangs (SIGSTOP)", traffic.tally, seconds, limit)]


async def exhaust(service: Running, known: list[Known]) -> list[Result]:
    """Limit the memory of a worker, and send large pictures to resize, which need more."""
    out = io.BytesIO()
    Image.linear_gradient("L").resize((4000, 3900)).convert("RGB").save(out, "PNG")
    body = b'{"resize": "fit", "images": ["' + base64.b64encode(out.getvalue()) + b'"]}'
    answer = httpx.post(
        f"{service.url}/score",
        content=body,
        headers={"Content-Type": "application/json"},
        timeout=60,
    )
    large = Known("score", body, "application/json", answer.raise_for_status().content)
    pid = next(pid for pid, (model, _) in service.workers().items() if model == "score")
    limit = psutil.Process(pid).memory_info().vms + ROOM  # while it has no picture in its memory
    async with Traffic(service.url, [*known, large], CLIENTS) as traffic:
        await asyncio.sleep(1)
        resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
        started = time.monotonic()
        while pid in await asyncio.to_thread(service.workers) and time.monotonic() - started < 60:
            await asyncio.sleep(0.1)
        seconds = await _until_whole(service, pid, time.monotonic(), 60)
        await asyncio.sleep(1)
    return [Result("a worker of score runs out of memory", traffic.tally, seconds, RECOVERY_S)]


async def disconnect(service: Running, known: list[Known]) -> list[Result]:
    """Clients that disconnect while they send, and before the answer."""

    async def leave(whole: bool) -> None:
        body = known[2].body
        _, writer = await _announce(service, len(body))
        writer.write(body if whole else body[: len(body) // 2])
        await writer.drain()
        writer.transport.abort()

    async with Traffic(service.url, known, CLIENTS) as traffic:
        for i in range(200):
            await leave(whole=bool(i % 2))
            await asyncio.sleep(0.02)
    return [Result("200 clients leave mid-request", traffic.tally)]


async def _announce(
    service: Running, length: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A new connection, with the head of a request that has a body of this length."""
    reader, writer = await asyncio.open_connection("127.0.0.1", service.ports.inference)
    head = "POST /predictions/score HTTP/1.1\r\nHost: localhost\r\n"
    writer.write(f"{head}Content-Length: {length}\r\n\r\n".encode())
    return reader, writer


async def stall(service: Running, known: list[Known]) -> list[Result]:
    """Bodies that stop arriving, together far more than the service holds."""
    stalled, part = Tally(), bytes(2**16)

    async def send_most() -> None:
        started = time.perf_counter()
        reader, writer = await _announce(service, STALLED_BODY)
        try:
            with contextlib.suppress(ConnectionError):  # it is refused before all has been sent
                for _ in range(STALLED_AFTER // len(part)):
                    writer.write(part)
                    await writer.drain()
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            status, words = int(head.split()[1]), body.decode()
            stalled.add(status, is_error(body), time.perf_counter() - started, words)
        except (ConnectionError, LookupError) as error:  # no answer
            stalled.add(None, False, time.perf_counter() - started, repr(error))
        finally:
            writer.close()

    async with Traffic(service.url, known, CLIENTS) as traffic:
        await asyncio.gather(*(send_most() for _ in range(STALLED)))
        await asyncio.sleep(1)
    # The time that a body may stall ended: 408 is the right answer.
    stalled.outcomes["right"] += stalled.statuses[408]
    stalled.outcomes["failed"] -= stalled.statuses[408]
    sizes = f"{STALLED_BODY >> 20} MiB stall after {STALLED_AFTER >> 20}"
    return [
        Result(f"{STALLED} bodies of {sizes}: other clients", traffic.tally),
        Result("the stalled requests themselves", stalled),
    ]


async def flood(service: Running, known: list[Known]) -> list[Result]:
    tally = Tally()
    async with new_session() as session:
        await asyncio.gather(
            *(ask(session, service.url, known[1 + i % 5], tally) for i in range(AT_ONCE))
        )
    return [Result(f"{AT_ONCE} clients at once", tally)]


async def fill_queue(service: Running, known: list[Known]) -> list[Result]:
    """More large requests than the queue holds."""
    big = Known(known[2].operation, np.random.default_rng(0).bytes(BIG_BODY), "image/png", b"")
    slow = known[2]
    tally, large = Tally(), Tally()
    async with new_session() as session:
        await asyncio.gather(
            *(ask(session, service.url, slow, tally) for _ in range(600)),
            *(ask(session, service.url, big, large) for _ in range(64)),
        )
    # The large bodies are not images: 415 is the right answer to them.
    large.outcomes["right"] += large.statuses[415]
    large.outcomes["failed"] -= large.statuses[415]
    return [
        Result("600 requests of 8 images in a queue of 256", tally),
        Result(f"at the same time, 64 bodies of {BIG_BODY >> 20} MiB", large),
    ]


async def stop(service: Running, known: list[Known]) -> list[Result]:
    """SIGTERM while requests are computed: those sent before it must be answered."""
    tally = Tally()
    async with new_session() as session:
        sent = [
            asyncio.create_task(ask(session, service.url, known[i % len(known)], tally))
            for i in range(64)
        ]
        await asyncio.sleep(0.2)
        started = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        await asyncio.gather(*sent)
    await asyncio.to_thread(service.process.wait, 90)
    return [Result("SIGTERM with 64 open requests", tally, time.monotonic() - started, 60)]


FAULTS: tuple[Callable[[Running, list[Known]], Awaitable[list[Result]]], ...] = (
    kill_each,
    exhaust,
    disconnect,
    stall,
    flood,
    fill_queue,
    hang,
    stop,
)


def _held(service: Running) -> dict[str, int]:
    """Resources that could leak."""
    family = service.family()
    sockets = 0
    for process in family:
        sockets += len(process.net_connections("inet"))
    return {"processes": len(family), "files": sum(p.num_fds() for p in family), "sockets": sockets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--only", help="names of faults, such as hang,stop")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default=default_engine(),
        help="(default: %(default)s)",
    )
    args = parser.parse_args()
    chosen = [
        fault for fault in FAULTS if args.only is None or fault.__name__ in args.only.split(",")
    ]
    if not chosen:
        parser.error(f"--only must name some of {', '.join(fault.__name__ for fault in FAULTS)}")
    bad = 0
    words: dict[str, str] = {}  # texts of errors, with the fault
    with running(args.bundle, options=("--engine", args.engine)) as service:
        known = known_requests(service.url, open_bundle(args.bundle).image_shape)
        asyncio.run(_warm(service, known))
        time.sleep(5)
        before = _held(service)
        print(
            "| fault | "
            + " | ".join(OUTCOMES)
            + " | statuses | p99 s | recovered after s | allowed |"
        )
        print("|---" * (len(OUTCOMES) + 5) + "|")
        for fault in chosen:
            family = service.family()
            for result in asyncio.run(fault(service, known)):  # type: ignore[arg-type]
                counts = result.tally.outcomes
                p99 = (
                    f"{np.quantile(result.tally.latencies, 0.99):.2f}"
                    if result.tally.latencies
                    else "–"
                )
                seconds = "–" if result.seconds is None else f"{result.seconds:.1f}"
                allowed = "–" if result.allowed is None else f"{result.allowed:.0f}"
                statuses = ", ".join(
                    f"{status or 'none'}: {n}"
                    for status, n in sorted(result.tally.statuses.items())
                )
                print(
                    f"| {result.name} | "
                    + " | ".join(str(counts[o]) for o in OUTCOMES)
                    + f" | {statuses} | {p99} | {seconds} | {allowed} |",
                    flush=True,
                )
                words |= dict.fromkeys(result.tally.words, result.name)
                bad += counts["wrong"] + counts["silent"] + (not counts["right"])
                bad += (
                    result.allowed is not None
                    and result.seconds is not None
                    and result.seconds > result.allowed
                )
            if fault is not stop:
                asyncio.run(_warm(service, known))
        if service.process.poll() is None:
            time.sleep(5)
            after = _held(service)
            print(
                "\nheld before and after: "
                + ", ".join(f"{name} {before[name]} and {after[name]}" for name in before)
            )
    for text, name in words.items():
        print(f"- {name}: {text}")
    alive = psutil.wait_procs(family, timeout=5)[1]
    print(f"processes left: {len(alive)}")
    raise SystemExit(bool(bad or alive))


async def _warm(service: Running, known: list[Known]) -> None:
    async with Traffic(service.url, known, 4):
        await asyncio.sleep(2)


if __name__ == "__main__":
    main()
