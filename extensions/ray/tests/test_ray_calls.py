"""How a front on Ray brings its requests to the replicas, and how many of them there are.

Ray itself is not needed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ade_cli.main import main
from extensions.ray.serve import reporter
from extensions.ray.serve.calls import MAX_BYTES, Answered, Asked, Calls, NotComputed
from extensions.ray.serve.reporter import MetricsReplica
from extensions.ray.serve.scaling import REQUESTS, WAITING, LastingQueue, by_requests
from handlers.launch import serve
from handlers.limits import MAX_BATCH
from handlers.processes.supervision import LaunchError
from handlers.service.metrics import MODEL
from serving.api.telemetry import IMAGES, VERSION

SMALL = Asked({}, b"image")
ASKING: ContextVar[str | None] = ContextVar("ASKING", default=None)


class Replicas:
    """Stands for a deployment's handle: records the calls, and answers when it is told to."""

    def __init__(self) -> None:
        self.calls: list[list[Asked]] = []
        self.contexts: list[str | None] = []  # of each call
        self.cancelled = 0
        self.may_answer = asyncio.Event()
        self.answers: Callable[[list[Asked]], list[Answered | None]] = lambda call: [
            (200, [], asked.body) for asked in call
        ]

    def remote(self, call: list[Asked]) -> asyncio.Task[list[Answered | None]]:
        self.calls.append(call)
        self.contexts.append(ASKING.get())
        return asyncio.create_task(self._answer(call))

    async def _answer(self, call: list[Asked]) -> list[Answered | None]:
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self.answers(call)

    @property
    def sizes(self) -> list[int]:
        return [len(call) for call in self.calls]


def run(test: Callable[[Replicas, Calls], Awaitable[None]]) -> None:
    async def inside() -> None:
        replicas = Replicas()
        async with asyncio.timeout(10):
            await test(replicas, Calls(replicas))

    asyncio.run(inside())


def ask(calls: Calls, *requests: Asked) -> list[asyncio.Task[Answered]]:
    return [asyncio.create_task(calls.answer(request)) for request in requests]


async def until(is_true: Callable[[], Any]) -> None:
    while not is_true():
        await asyncio.sleep(0.001)


def test_a_single_request_does_not_wait() -> None:
    async def test(replicas: Replicas, calls: Calls) -> None:
        for i in range(3):
            (task,) = ask(calls, SMALL)
            await asyncio.sleep(0)  # the request
            await asyncio.sleep(0)  # the call
            assert len(replicas.calls) == i + 1
            replicas.may_answer.set()
            assert await task == (200, [], b"image")

    run(test)


def test_requests_share_calls_while_another_is_under_way() -> None:
    async def test(replicas: Replicas, calls: Calls) -> None:
        count = 2 * MAX_BATCH + 7
        tasks = ask(calls, *(Asked({}, b"%d" % i) for i in range(count)))
        await until(lambda: sum(replicas.sizes) == count)
        assert replicas.sizes == [1, MAX_BATCH, MAX_BATCH, 6]
        replicas.may_answer.set()
        assert [body for _, _, body in await asyncio.gather(*tasks)] == [
            b"%d" % i for i in range(count)
        ]

    run(test)


def test_a_call_belongs_to_no_request() -> None:
    """Ray cancels what was called in the context of a request whose client leaves."""

    async def test(replicas: Replicas, calls: Calls) -> None:
        async def asking(name: str) -> Answered:
            ASKING.set(name)
            return await calls.answer(SMALL)

        tasks = [asyncio.create_task(asking(name)) for name in "abc"]
        await until(lambda: sum(replicas.sizes) == 3)
        assert replicas.sizes == [1, 2] and replicas.contexts == [None, None]
        replicas.may_answer.set()
        await asyncio.gather(*tasks)

    run(test)


def test_a_call_that_ray_cancels_fails_its_requests_at_once() -> None:
    async def test(replicas: Replicas, calls: Calls) -> None:
        made: list[asyncio.Task[list[Answered | None]]] = []
        remote = replicas.remote

        def kept(call: list[Asked]) -> asyncio.Task[list[Answered | None]]:
            made.append(remote(call))
            return made[-1]

        replicas.remote = kept  # type: ignore[method-assign]
        tasks = ask(calls, SMALL, SMALL, SMALL)
        await until(lambda: sum(replicas.sizes) == 3)
        for call in made:
            call.cancel()
        for task in tasks:
            with pytest.raises(NotComputed, match="cancelled"):
                await task

    run(test)


def test_large_bodies_do_not_share_a_call() -> None:
    async def test(replicas: Replicas, calls: Calls) -> None:
        large = Asked({}, bytes(MAX_BYTES * 2 // 3))
        tasks = ask(calls, SMALL, large, large, SMALL, SMALL)
        await until(lambda: sum(replicas.sizes) == 5)
        assert replicas.sizes == [1, 1, 3]
        replicas.may_answer.set()
        await asyncio.gather(*tasks)

    run(test)


def test_requests_whose_clients_are_gone_are_not_sent() -> None:
    async def test(replicas: Replicas, calls: Calls) -> None:
        first, second, third = ask(calls, SMALL, SMALL, SMALL)
        await asyncio.sleep(0)
        second.cancel()
        await until(lambda: len(replicas.calls) == 2)
        assert replicas.sizes == [1, 1]
        replicas.may_answer.set()
        await asyncio.gather(first, third)

    run(test)


def test_a_call_is_given_up_when_all_its_clients_are_gone() -> None:
    async def test(replicas: Replicas, calls: Calls) -> None:
        first, second, third = ask(calls, SMALL, SMALL, SMALL)
        await until(lambda: len(replicas.calls) == 2)
        second.cancel()
        await asyncio.sleep(0.01)
        assert replicas.cancelled == 0
        third.cancel()
        await until(lambda: replicas.cancelled == 1)
        replicas.may_answer.set()
        assert await first == (200, [], b"image")

    run(test)


def test_an_error_belongs_to_the_requests_of_its_call() -> None:
    async def test(replicas: Replicas, calls: Calls) -> None:
        def fail(call: list[Asked]) -> list[Answered | None]:
            raise ConnectionError("the replica died")

        first, second = ask(calls, SMALL, SMALL)
        await until(lambda: len(replicas.calls) == 2)
        replicas.answers = fail
        replicas.may_answer.set()
        for task in (first, second):
            with pytest.raises(ConnectionError, match="the replica died"):
                await task
        replicas.answers = lambda call: [None] + [(200, [], b"") for _ in call[1:]]
        tasks = ask(calls, SMALL, SMALL, SMALL)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert [isinstance(result, NotComputed) for result in results] == [True, True, False]

    run(test)


@pytest.mark.parametrize(
    ("requests", "replicas"),
    [
        (None, 1),
        ({}, 1),
        ({"a": 0.4}, 1),
        ({"a": 32.0}, 1),
        ({"a": 32.1}, 2),
        ({"a": 60, "b": 60}, 4),
    ],
)
def test_replicas_follow_the_requests_and_not_the_calls(
    requests: dict[str, float] | None, replicas: int
) -> None:
    metrics = None if requests is None else {REQUESTS: requests}
    context: Any = SimpleNamespace(aggregated_metrics=metrics)
    assert by_requests(context) == (replicas, {})


def test_replicas_follow_the_requests_that_wait_in_the_fronts() -> None:
    """Of slow requests, a front lets the replicas have few at a time."""
    metrics = {
        REQUESTS: {"a": 10.0, "b": 6.0},
        WAITING + "one": {"a": 80.0, "b": 84.0},  # told by the same front
        WAITING + "another": {"b": 28.0},
    }
    context: Any = SimpleNamespace(aggregated_metrics=metrics)
    assert by_requests(context) == (4, {})


def test_a_queue_of_a_moment_asks_for_no_replica() -> None:
    queue, lengths = LastingQueue(), []
    for num_waiting in (200, 0, 0, 0, 200, 150, 180, 190, 0):
        queue.look(num_waiting)
        lengths.append(queue.length)
    assert lengths == [0, 0, 0, 0, 0, 0, 150, 150, 0]


# Metrics


def test_gauges_end_with_the_replica_that_set_them_last(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two living replicas may have one rank, and thus the same labels."""
    labels = {"model_name": "score", MODEL: "m@1", "worker": "0", "calibration": "default"}
    counted = {"model_name": "score", MODEL: "m@1", "worker": "0"}

    async def check() -> None:
        metrics = MetricsReplica()
        await metrics.update([(VERSION.name, labels, 1.0)], {}, "first")
        await metrics.update([(IMAGES.name, counted, 2.0)], {}, "first")
        await metrics.update([(VERSION.name, labels, 1.0)], {}, "second")
        await metrics.leave("first")
        text = await metrics.text()
        assert f"{VERSION.name}{{" in text and f"{IMAGES.name}{{" in text
        await metrics.leave("second")
        text = await metrics.text()
        assert f"{VERSION.name}{{" not in text and f"{IMAGES.name}{{" in text
        # One that was killed says nothing any more.
        await metrics.update([(VERSION.name, labels, 1.0)], {}, "third")
        monkeypatch.setattr(reporter, "SILENT_S", -1.0)
        text = await metrics.text()
        assert f"{VERSION.name}{{" not in text and f"{IMAGES.name}{{" in text

    asyncio.run(check())


def test_recorded_kernels_need_another_engine(
    tiny_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(tiny_bundle), "--engine", "ray", "--cuda-graphs"]) == 2
    assert "cannot be used with --engine" in capsys.readouterr().err


def test_the_nodes_of_a_cluster_listen_on_all_addresses(capfd: pytest.CaptureFixture[str]) -> None:
    args: Any = SimpleNamespace(workers=None, address="10.0.0.1:6379", engine="ray", host="x.lan")
    with pytest.raises(LaunchError, match=r"--address needs --host 0\.0\.0\.0, .*got 'x.lan'"):
        serve.run(args)
    for host, is_warned in (("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False)):
        serve._check_host_on_cluster(host)
        assert ("cluster of one node" in capfd.readouterr().err) == is_warned
