"""What a front is given by ``ade serve``: a file that only its user can read, since keys are in it."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class FrontSettings:
    """What the front of every engine must know.

    Attributes:
        host, port: where it listens.
        metrics_port: on loopback.
        token: that clients must bring, if any.
        allowed_hosts: see :class:`serving.api.guard.Guard`.
        probe_secret: value of the header ``X-Ade-Probe`` of who may claim to be no traffic.
    """

    host: str
    port: int
    metrics_port: int
    token: str | None = field(repr=False)
    allowed_hosts: tuple[str, ...]
    probe_secret: str = field(repr=False)

    def save(self, path: Path) -> None:
        """Write a new JSON file that only its owner can read.

        Raises:
            FileExistsError: there is one already.
        """
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as file:
            json.dump(dataclasses.asdict(self), file)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: not JSON, or its keys are others.
        """
        values = json.loads(path.read_text())
        expected = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) != expected:
            raise ValueError(
                f"{path} must be a JSON object with the keys {', '.join(sorted(expected))}"
            )
        given: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**given)
