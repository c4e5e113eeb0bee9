"""FastAPI, whose worker processes batch the requests that arrived while they computed.

``python -m benchmarks.peers.fast_api``
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress

import uvicorn
from fastapi import FastAPI, Request, Response

from benchmarks.peers.scorer import BATCH, DELAY_S, PORT, WORKERS, Scorer
from serving.ingest.requests import RawRequest

waiting: asyncio.Queue[tuple[RawRequest, asyncio.Future[bytes]]] = asyncio.Queue()


async def _serve_batches(scorer: Scorer) -> None:
    loop = asyncio.get_running_loop()
    computing = ThreadPoolExecutor(1)
    while True:
        batch = [await waiting.get()]
        with suppress(TimeoutError):
            async with asyncio.timeout(DELAY_S):
                while len(batch) < BATCH:
                    batch.append(await waiting.get())  # at once if there is one
        bodies = await loop.run_in_executor(computing, scorer, [request for request, _ in batch])
        for (_, future), body in zip(batch, bodies, strict=True):
            if not future.cancelled():
                future.set_result(body)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    task = asyncio.create_task(_serve_batches(Scorer()))
    yield
    task.cancel()


app = FastAPI(lifespan=lifespan)


@app.post("/score")
async def score(request: Request) -> Response:
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
    waiting.put_nowait(
        (RawRequest(request.headers.get("content-type", ""), await request.body()), future)
    )
    return Response(await future, media_type="application/json")


if __name__ == "__main__":
    uvicorn.run(
        "benchmarks.peers.fast_api:app",
        host="127.0.0.1",
        port=PORT,
        workers=WORKERS,
        log_level="warning",
        access_log=False,
    )
