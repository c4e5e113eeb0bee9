"""The queue that gives batches to those who are free."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from handlers.asgi.batches import BatchQueue
from handlers.limits import MAX_BATCH


@dataclasses.dataclass(eq=False)
class Job:
    number: int
    answer: asyncio.Future[None]


def jobs(count: int) -> list[Job]:
    loop = asyncio.get_running_loop()
    return [Job(number, loop.create_future()) for number in range(count)]


def numbers(batch: list[Job]) -> list[int]:
    return [job.number for job in batch]


def test_a_batch_has_all_that_waits_when_it_can_be_computed() -> None:
    """Not only what came within a moment of the first: Serve's own queue had that fault."""

    async def main() -> None:
        queue: BatchQueue[Job] = BatchQueue()
        waiting = jobs(MAX_BATCH + 3)
        for job in waiting[:-1]:
            queue.put(job)
            await asyncio.sleep(0.002)  # longer than a batch waits for more
        queue.put(waiting[-1])
        assert numbers(await queue.next_batch()) == list(range(MAX_BATCH))
        assert numbers(await queue.next_batch()) == list(range(MAX_BATCH, MAX_BATCH + 3))
        assert len(queue) == 0

    asyncio.run(main())


def test_a_batch_leaves_out_those_whose_client_is_gone() -> None:
    async def main() -> None:
        queue: BatchQueue[Job] = BatchQueue()
        waiting = jobs(4)
        queue.put(*waiting)
        waiting[0].answer.cancel()
        waiting[2].answer.set_result(None)
        assert numbers(await queue.next_batch()) == [1, 3]

    asyncio.run(main())


@pytest.mark.parametrize("has_one", [False, True])
def test_nothing_is_lost_if_whoever_collects_is_cancelled(has_one: bool) -> None:
    async def main() -> None:
        queue: BatchQueue[Job] = BatchQueue()
        first, second = jobs(2)
        collecting = asyncio.create_task(queue.next_batch())
        await asyncio.sleep(0)
        if has_one:
            queue.put(first)
            await asyncio.sleep(0)
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)
        if not has_one:
            queue.put(first)
        queue.put(second)
        assert numbers(await queue.next_batch()) == [0, 1]
        queue.put(first)
        assert queue.clear() == [first] and len(queue) == 0

    asyncio.run(main())
