"""Requests with known answers, and a tally of the answers that arrive."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import httpx
import numpy as np
import psutil

from ade_base.pictures.read import read_image
from ade_base.pictures.show import write_png
from ade_base.ports import VARIABLES, Ports, free_ports
from handlers.launch.publish import DESCRIBE
from handlers.processes import channel
from handlers.processes.run_folder import find_service
from serving.page.models import EXAMPLES

OUTCOMES = ("right", "refused", "failed", "silent", "wrong")


@dataclass(frozen=True)
class Known:
    """A request and the bytes of its answer."""

    operation: str
    body: bytes
    content_type: str
    answer: bytes


@dataclass
class Tally:
    """Outcomes: ``refused`` is a 503, ``failed`` another error, ``silent`` no answer.

    ``wrong`` is an answer with other bytes, or an error of another shape.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)
    words: Counter[str] = field(default_factory=Counter)  # of errors

    def add(self, status: int | None, is_right: bool, seconds: float, words: str = "") -> None:
        self.statuses[status or 0] += 1
        if words:
            self.words[words] += 1
        if status is None:
            self.outcomes["silent"] += 1
        elif not is_right:
            self.outcomes["wrong"] += 1
        elif status == 200:
            self.outcomes["right"] += 1
            self.latencies.append(seconds)
        else:
            self.outcomes["refused" if status == 503 else "failed"] += 1


@dataclass(frozen=True)
class Running:
    """A running ``ade serve`` on its own ports."""

    process: subprocess.Popen
    ports: Ports

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports.inference}/predictions"

    def family(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def workers(self) -> dict[int, tuple[str, str]]:
        """Model and state by process id, as the engine reports them."""
        folder = find_service(self.ports)
        if folder is None:
            return {}
        try:
            described = channel.ask(folder.control_socket, {"do": DESCRIBE})["workers"] or {}
        except channel.ChannelError:
            return {}
        return {
            w["pid"]: (name, w["state"])
            for name, model in described.items()
            for w in model["workers"]
        }


@contextmanager
def running(*bundles: Path, options: tuple[str, ...] = ()) -> Iterator[Running]:
    """Start a service and wait until it is ready."""
    numbers = dict(zip(VARIABLES, free_ports(len(VARIABLES)), strict=True))
    environment = {
        **os.environ,
        **{VARIABLES[name][0]: str(port) for name, port in numbers.items()},
    }
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "ade_cli.main", "serve", *map(str, bundles)),
            *("--device", "cpu", *options),
        ],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("Ctrl-C"):
                break
        else:
            raise SystemExit(f"ade serve ended with the status {process.wait()}")
        yield Running(process, Ports(**numbers))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(90)


def pictures_of(shape: tuple[int, int, int]) -> list[np.ndarray]:
    """The page's example pictures, uint8, repeated or cut to a shape ``(H, W, C)``."""
    return [np.resize(read_image(path.read_bytes()).pixels, shape) for path in EXAMPLES]


def known_requests(url: str, shape: tuple[int, int, int]) -> list[Known]:
    """One request for each operation and format, sent once to record its answer."""
    pictures = pictures_of(shape)
    out = io.BytesIO()
    np.save(out, np.stack([pictures[i % len(pictures)] for i in range(8)]))
    requests = [
        ("sample", b'{"n": 4, "seed": 3, "format": "npy"}', "application/json"),
        ("score", write_png(pictures[0]), "image/png"),
        ("score", out.getvalue(), "application/x-npy"),
        ("score", write_png(pictures[1]), "image/png"),
        ("encode", write_png(pictures[0]), "image/png"),
        ("reconstruct", write_png(pictures[1]), "image/png"),
    ]
    known = []
    for operation, body, content_type in requests:
        answer = httpx.post(
            f"{url}/{operation}", content=body, headers={"Content-Type": content_type}, timeout=60
        )
        answer.raise_for_status()
        known.append(Known(operation, body, content_type, answer.content))
    return known


async def ask(session: aiohttp.ClientSession, url: str, known: Known, tally: Tally) -> None:
    started = time.perf_counter()
    try:
        async with session.post(
            f"{url}/{known.operation}",
            data=known.body,
            headers={"Content-Type": known.content_type},
        ) as answer:
            content = await answer.read()
            words = (
                ""
                if answer.status == 200
                else " ".join(content.decode(errors="replace").split())[:150]
            )
            is_right = content == known.answer if answer.status == 200 else is_error(content)
            tally.add(answer.status, is_right, time.perf_counter() - started, words)
    except (aiohttp.ClientError, TimeoutError) as error:
        tally.add(None, False, time.perf_counter() - started, repr(error))


def is_error(content: bytes) -> bool:
    """Whether an answer has the shape of an error."""
    try:
        error = json.loads(content)["error"]
        return isinstance(error["code"], str) and isinstance(error["message"], str)
    except (ValueError, LookupError, TypeError):
        return False


def new_session() -> aiohttp.ClientSession:
    """A session with a long timeout and any number of connections."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(300)
    )


@dataclass
class Traffic:
    """Clients that send one request after another until the block ends."""

    url: str
    known: Sequence[Known]
    clients: int
    tally: Tally = field(default_factory=Tally)
    pause: float = 0.0  # seconds between a client's requests

    async def __aenter__(self) -> Traffic:
        self._session = new_session()
        self._stopped = False
        self._tasks = [asyncio.create_task(self._client(i)) for i in range(self.clients)]
        return self

    async def __aexit__(self, *error: object) -> None:
        self._stopped = True
        await asyncio.gather(*self._tasks)
        await self._session.close()

    async def _client(self, number: int) -> None:
        turn = number
        while not self._stopped:
            await ask(self._session, self.url, self.known[turn % len(self.known)], self.tally)
            turn += 1
            if self.pause or self.tally.outcomes["silent"]:
                await asyncio.sleep(self.pause or 0.05)
