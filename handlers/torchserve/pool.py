"""A TorchServe for each release, behind Unix domain sockets.

TorchServe is no longer maintained, reads bodies without a time limit, has a weak token and many
paths that are not needed, loses a request in the millisecond in which a worker ends, and computes
what nobody waits for any more. So the requests wait here, and a worker gets a batch when it is
free: one request of HTTP, with the pool's key and without a form or a header of a client's.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from handlers.limits import RESPONSE_TIMEOUT_S, STARTUP_TIMEOUT_S
from handlers.processes.channel import peer_is_own_user
from handlers.service import pool, wire
from handlers.service.pool import MAX_PAUSE_S, PAUSE_S, PooledModel, WorkerError
from handlers.torchserve.archives import write_archive
from handlers.torchserve.configuration import ServerFolder, write_configuration
from handlers.torchserve.handler import BATCH_TYPE
from serving.ingest.errors import overloaded

logger = logging.getLogger(__name__)
OVERLOADED, WORKER_DIED = 507, "Worker died"  # which has that status after SIGKILL
SPARE_S = 5.0  # TorchServe itself ends a worker that takes too long


class Pool(pool.Pool):
    """TorchServe with the models of a release."""

    def __init__(self, models: Sequence[PooledModel], folder: Path) -> None:
        super().__init__(models, folder)
        self._by_name = {model.name: model for model in models}
        self._folder = ServerFolder(folder)
        self._output = Path(models[0].settings[0].logs, "torchserve.out")
        self._stack = contextlib.AsyncExitStack()
        self._workers: set[asyncio.Task[None]] = set()  # and their connections
        self._has_started: asyncio.Future[None]
        self._server: asyncio.subprocess.Process
        self._http: aiohttp.ClientSession

    async def start(self) -> None:
        """See :class:`handlers.service.pool.Pool`."""
        self._has_started = asyncio.get_running_loop().create_future()
        self._stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(mode=0o700)
        self._folder.store.mkdir()
        for model in self.models:
            one, count = model.settings[0], len(model.settings)
            await asyncio.to_thread(write_archive, one, self._folder.store, count, max_batch=1)
        command = write_configuration(
            self._folder, list(self._by_name), one.options, Path(one.logs)
        )
        await self._stack.enter_async_context(
            await asyncio.start_unix_server(self._accept, str(self._folder.reports_socket))
        )
        self._http = await self._stack.enter_async_context(
            aiohttp.ClientSession(
                "http://localhost",
                connector=aiohttp.UnixConnector(str(self._folder.inference_socket), limit=0),
                timeout=aiohttp.ClientTimeout(total=RESPONSE_TIMEOUT_S + SPARE_S),
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
            )
        )
        await self._start_server(*command)
        keeping = asyncio.create_task(self._keep(*command))
        self._stack.push_async_callback(_end, keeping)
        try:
            async with asyncio.timeout(STARTUP_TIMEOUT_S):
                await self._has_started
        except TimeoutError:
            raise WorkerError(f"no workers within {STARTUP_TIMEOUT_S} s") from None

    async def stop(self) -> None:
        """See :class:`handlers.service.pool.Pool`."""
        await self._stack.aclose()

    async def _start_server(self, command: list[str], environment: dict[str, str]) -> None:
        self._folder.key_file.unlink(missing_ok=True)  # it makes new ones
        with open(self._output, "ab") as output:
            self._server = await asyncio.create_subprocess_exec(
                *command,
                cwd=self.folder,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )

    async def _keep(self, command: list[str], environment: dict[str, str]) -> None:
        """Start TorchServe again whenever it ends; at the end, kill it with its workers."""
        pause = PAUSE_S
        try:
            while True:
                code = await self._server.wait()
                error = WorkerError(f"the model server ended with {code}")
                if not self._has_started.done():
                    self._has_started.set_exception(error)
                logger.error("%s", error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, MAX_PAUSE_S)
                await self._leave_workers()
                await self._start_server(command, environment)
        finally:
            await self._leave_workers()
            # First itself, or it would start others.
            with contextlib.suppress(psutil.NoSuchProcess):
                workers = psutil.Process(self._server.pid).children(recursive=True)
                for process in (self._server, *workers):
                    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                        process.kill()
            await self._server.wait()

    async def _leave_workers(self) -> None:
        """Close the connections to workers, which ends those that still run."""
        for worker in list(self._workers):
            await _end(worker)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._hear(reader, writer))
        self._workers.add(task)
        task.add_done_callback(self._workers.discard)

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Keep a worker, from its first report until its process has ended."""
        with contextlib.closing(writer):
            if not peer_is_own_user(writer.get_extra_info("socket")):
                return
            try:
                head, _ = await wire.receive(reader)
                model, name = self._by_name[head["model"]], str(head["worker"])
                if "error" in head:
                    self._note_failure(model, name, head["error"])
                    return
                await self._use(model, _Worker(name, head["pid"]), head, reader)
            except (EOFError, OSError, LookupError, TypeError, ValueError, WorkerError) as error:
                logger.error("a worker's report is invalid: %r", error)

    def _note_failure(self, model: PooledModel, name: str, text: str) -> None:
        error = WorkerError(f"worker {model.settings[0].name} did not start: {text}")
        if not self._has_started.done():
            self._has_started.set_exception(error)
            return
        logger.error("%s", error)
        model.count_failed_start(name)

    async def _use(
        self, model: PooledModel, worker: _Worker, head: wire.Head, reader: asyncio.StreamReader
    ) -> None:
        """Give a worker batches until it ends, and take its measurements."""
        model.drop_gauges(worker.name)
        model.measure(worker.name, head)
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asking = asyncio.create_task(self._ask_while_there(model, gone))
        model.workers.append(worker)
        if not self._has_started.done() and all(
            len(one.workers) == one.num_workers for one in self.models
        ):
            self._has_started.set_result(None)
        try:
            try:
                while True:
                    head, _ = await wire.receive(reader)
                    model.measure(worker.name, head)
            except (EOFError, OSError):
                logger.error("worker %s of %s ended", worker.name, model.name)
            finally:
                model.workers.remove(worker)
                model.drop_gauges(worker.name)
            gone.set_result(None)
            await asking  # what it asked may be computed by another worker
        finally:
            await _end(asking)

    async def _ask_while_there(self, model: PooledModel, gone: asyncio.Future[None]) -> None:
        """Have batches computed, one at a time, for as long as a worker is there.

        TorchServe gives each to any free worker.
        """
        with contextlib.suppress(WorkerError):  # it is gone
            while batch := await model.next_batch(gone):
                try:
                    await model.compute(batch, lambda parts: self._ask(model.name, parts))
                except WorkerError as error:
                    logger.error("%s: no answer: %s", model.name, error)
                    await asyncio.wait((gone,), timeout=PAUSE_S)

    async def _ask(self, name: str, parts: list[wire.Body]) -> wire.Message:
        """Post a batch.

        Raises:
            WorkerError: the worker ended, or did not answer in time.
            ApiError: 507: there is no memory for it.
        """
        headers = {
            "Authorization": f"Bearer {self._folder.key('inference')}",
            "Content-Type": BATCH_TYPE,
        }
        async with self._http.post(
            f"/predictions/{name}", data=b"".join(parts), headers=headers
        ) as response:
            body = await response.read()
        if response.status != 200:
            text = body[:500].decode(errors="replace")
            if response.status == OVERLOADED and WORKER_DIED not in text:
                raise overloaded("the service cannot take the request now")
            raise WorkerError(f"the model server answered {response.status}: {text}")
        return wire.unpack(body)


class _Worker:
    """A worker that can compute."""

    is_ready = True

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self._pid = pid

    def describe(self) -> dict[str, Any]:
        return {"pid": self._pid, "state": "READY"}


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
