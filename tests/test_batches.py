"""The queue that gives batches to those who are free."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from handlers.limits import LARGE_BYTES, MAX_BATCH
from handlers.service import batches
from handlers.service.batches import BatchQueue


@dataclasses.dataclass(eq=False)
class Job:
    number: int
    answer: asyncio.Future[None]
    num_bytes: int = 1


def jobs(count, num_bytes=1):
    loop = asyncio.get_running_loop()
    return [Job(number, loop.create_future(), num_bytes) for number in range(count)]


def numbers(batch):
    return [job.number for job in batch]


def test_a_batch_has_all_that_waits_when_it_can_be_computed():
    """Not only what came within a moment of the first: Serve's own queue had that fault."""

    async def main():
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


def test_a_large_request_ends_its_batch():
    async def main():
        queue: BatchQueue[Job] = BatchQueue()
        small, large, rest = jobs(2), jobs(2, LARGE_BYTES), jobs(MAX_BATCH)
        queue.put(*small, *large, *rest)
        assert await queue.next_batch() == [*small, large[0]]
        assert await queue.next_batch() == [large[1]]
        assert await queue.next_batch() == rest

    asyncio.run(main())


def test_a_batch_waits_for_more_only_in_company(monkeypatch):
    monkeypatch.setattr(batches, "MAX_BATCH_DELAY_S", 60.0)

    async def main():
        queue: BatchQueue[Job] = BatchQueue()
        alone, *together = jobs(2 + MAX_BATCH)
        queue.put(alone)
        async with asyncio.timeout(10):
            assert numbers(await queue.next_batch()) == [0]
            queue.put(*together)
            assert numbers(await queue.next_batch()) == list(range(1, MAX_BATCH + 1))
            collecting = asyncio.create_task(queue.next_batch())  # gets the last and waits
            await asyncio.sleep(0.05)
            assert not collecting.done()
            queue.put(*jobs(MAX_BATCH - 1))
            assert len(await collecting) == MAX_BATCH

    asyncio.run(main())


def test_a_batch_leaves_out_those_whose_client_is_gone():
    async def main():
        queue: BatchQueue[Job] = BatchQueue()
        waiting = jobs(4)
        queue.put(*waiting)
        waiting[0].answer.cancel()
        waiting[2].answer.set_result(None)
        assert numbers(await queue.next_batch()) == [1, 3]

    asyncio.run(main())


def test_a_client_that_leaves_takes_its_request_along():
    """Although no worker is free: bodies that nobody bounds any more would fill the memory."""

    async def main():
        queue: BatchQueue[Job] = BatchQueue()
        waiting = jobs(3)
        queue.put(*waiting)
        waiting[1].answer.cancel()
        await asyncio.sleep(0)
        assert len(queue) == 2
        assert numbers(queue.clear()) == [0, 2] and len(queue) == 0

    asyncio.run(main())


@pytest.mark.parametrize("has_some", [False, True])
def test_nothing_is_lost_if_whoever_collects_is_cancelled(has_some):
    async def main():
        queue: BatchQueue[Job] = BatchQueue()
        first, second = jobs(2)
        collecting = asyncio.create_task(queue.next_batch())
        await asyncio.sleep(0)
        if has_some:
            queue.put(first, second)
            await asyncio.sleep(0)
            assert len(queue) == 0 and not collecting.done()
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)
        if not has_some:
            queue.put(first, second)
        assert numbers(await queue.next_batch()) == [0, 1]
        queue.put(first)
        assert queue.clear() == [first] and len(queue) == 0

    asyncio.run(main())


def test_whoever_became_free_last_gets_the_next_batch():
    async def main():
        queue: BatchQueue[Job] = BatchQueue()
        served = []

        async def work(name):
            while True:
                for job in await queue.next_batch():
                    served.append(name)
                    job.answer.set_result(None)

        workers = [asyncio.create_task(work(name)) for name in ("first", "second")]
        await asyncio.sleep(0)
        for job in jobs(4):
            queue.put(job)
            await job.answer
            await asyncio.sleep(0)
        for worker in workers:
            worker.cancel()
        assert served == ["second"] * 4

    asyncio.run(main())


def test_a_cancelled_caller_leaves_its_turn_to_another():
    async def main():
        queue: BatchQueue[Job] = BatchQueue()
        callers = [asyncio.create_task(queue.next_batch()) for _ in range(3)]
        await asyncio.sleep(0)
        (job,) = jobs(1)
        callers[2].cancel()  # before its turn
        queue.put(job)
        callers[1].cancel()  # just as its turn has come
        assert numbers(await callers[0]) == [0]
        await asyncio.gather(*callers, return_exceptions=True)
        assert [caller.cancelled() for caller in callers] == [False, True, True]

    asyncio.run(main())
