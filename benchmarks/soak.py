"""Memory and failures over half an hour at 70 % of the peak, with all four operations.

``make bench-soak``
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from pathlib import Path

import numpy as np
import psutil

from benchmarks.traffic import (
    OUTCOMES,
    Known,
    Running,
    Tally,
    Traffic,
    ask,
    known_requests,
    new_session,
    running,
)
from serving.engine.bundle import open_bundle

SHARE = 0.7
SETTLE_S = 300.0
EVERY_S = 10.0


def _resident(service: Running) -> float:
    """MiB of all processes, with shared pages divided among those that share them."""
    total = 0.0
    for process in service.family():
        with contextlib.suppress(psutil.NoSuchProcess):  # it ended just then
            total += process.memory_full_info().pss
    return total / 2**20


async def _peak(service: Running, known: list[Known], seconds: float) -> float:
    """Requests per second of enough clients to keep the service busy."""
    async with Traffic(service.url, known, 64) as traffic:
        await asyncio.sleep(seconds)
        return sum(traffic.tally.outcomes.values()) / seconds


async def _soak(
    service: Running, known: list[Known], rate: float, minutes: float
) -> tuple[Tally, list[tuple[float, float]]]:
    """Outcomes of the requests, and the memory with the seconds at which it was measured."""
    tally = Tally()
    memory: list[tuple[float, float]] = []
    async with new_session() as session:
        started = time.monotonic()

        async def watch() -> None:
            while True:  # beside the requests, which it must not delay
                memory.append(
                    (time.monotonic() - started, await asyncio.to_thread(_resident, service))
                )
                await asyncio.sleep(EVERY_S)

        watching = asyncio.create_task(watch())
        tasks: set[asyncio.Task[None]] = set()
        for i in range(int(rate * minutes * 60)):
            await asyncio.sleep(max(0.0, started + i / rate - time.monotonic()))
            task = asyncio.create_task(ask(session, service.url, known[i % len(known)], tally))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        watching.cancel()
        await asyncio.gather(*tasks)
    return tally, memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--minutes", type=float, default=30.0)
    args = parser.parse_args()
    with running(args.bundle) as service:
        idle = _resident(service)
        known = known_requests(service.url, open_bundle(args.bundle).image_shape)
        asyncio.run(_peak(service, known, 5))
        rate = SHARE * asyncio.run(_peak(service, known, 15))
        tally, memory = asyncio.run(_soak(service, known, rate, args.minutes))
        before = {process.pid for process in service.family()}
        print(f"idle: {idle:.0f} MiB in {len(before)} processes (PSS)")
        print(
            f"{args.minutes:.0f} minutes of {rate:.0f} requests per second ({SHARE:.0%} of the "
            "peak), all operations: "
            + ", ".join(f"{name} {tally.outcomes[name]}" for name in OUTCOMES)
            + f"; p50 {1000 * np.median(tally.latencies):.0f} ms, "
            f"p99 {1000 * np.quantile(tally.latencies, 0.99):.0f} ms"
        )
    settled = [value for at, value in memory if SETTLE_S <= at < SETTLE_S + 60] or [memory[0][1]]
    last = [value for at, value in memory if at >= memory[-1][0] - 60]
    growth = float(np.median(last) / np.median(settled) - 1)
    print(
        f"memory after {SETTLE_S / 60:.0f} minutes {np.median(settled):.0f} MiB, "
        f"in the last minute {np.median(last):.0f} MiB: {growth:+.1%}; "
        f"highest {max(value for _, value in memory):.0f} MiB"
    )
    left = [pid for pid in before if psutil.pid_exists(pid)]
    raise SystemExit(
        bool(left or growth > 0.03 or tally.outcomes["right"] < sum(tally.outcomes.values()))
    )


if __name__ == "__main__":
    main()
