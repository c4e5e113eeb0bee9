"""Lets ``ade serve`` publish a release in the running application over a private channel."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, TypeVar

from handlers.processes.channel import MAX_LINE, READ_S, encode, peer_is_own_user
from handlers.service.release import Backend, CurrentRelease, Release
from serving.engine.bundle import BundleError

logger = logging.getLogger(__name__)
PUBLISH, DESCRIBE = "publish", "describe"


class Described(Backend, Protocol):
    """What answers for a release, with the workers that ``ade status`` shows."""

    def describe(self) -> dict[str, Any]:
        """Workers and queue by model."""


D = TypeVar("D", bound=Described)


@contextlib.asynccontextmanager
async def listen(path: Path, current: CurrentRelease[D]) -> AsyncIterator[None]:
    """Answer at a new Unix domain socket during the block."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def send(message: dict[str, Any]) -> None:
            writer.write(encode(message))

        with contextlib.closing(writer):
            if not peer_is_own_user(writer.get_extra_info("socket")):
                return
            try:
                async with asyncio.timeout(READ_S):
                    message = json.loads(await reader.readline())
                if message["do"] == PUBLISH:
                    await current.publish(Release.from_dict(message["release"]))
                described = {**asdict(current.release), "workers": current.backend.describe()}
                send({"result": described})
                await writer.drain()
            except (BundleError, RuntimeError, OSError) as error:  # such as a WorkerError
                logger.error("%s", error)
                send({"error": str(error)})
            except Exception:
                logger.exception("a command failed")
                send({"error": "internal error: front.out has the reason"})

    path.unlink(missing_ok=True)  # of a front that was killed
    server = await asyncio.start_unix_server(answer, str(path), limit=MAX_LINE)
    path.chmod(0o600)
    try:
        yield
    finally:
        server.close()
