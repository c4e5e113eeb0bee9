"""Settings of a front process. They contain keys, so only the owner can read their file."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from ade_base.errors import UserError
from ade_base.ports import LOOPBACK

ANY_ADDRESS = "0.0.0.0"
TOKEN_VARIABLE = "ADE_TOKEN"
MIN_TOKEN = 32


class TokenError(UserError, ValueError):
    """``ADE_TOKEN`` cannot be used."""


def given_token() -> str | None:
    """The token in ``ADE_TOKEN``, if it is set.

    Raises:
        TokenError: it is too short, or has characters that a header cannot carry.
    """
    given = os.environ.get(TOKEN_VARIABLE)
    if given is not None and not re.fullmatch(rf"[\x21-\x7e]{{{MIN_TOKEN},}}", given):
        raise TokenError(
            f"{TOKEN_VARIABLE} must have at least {MIN_TOKEN} characters, printable ASCII "
            f"without spaces, got {len(given)} characters"
        )
    return given


@dataclass(frozen=True, kw_only=True)
class FrontSettings:
    """Settings of the front process of every engine.

    Attributes:
        host, port: address to listen on.
        metrics_port: port of the metrics, on loopback.
        exposes_metrics: whether the metrics are served on ``host`` too, where the token is
            required.
        token: the token that clients must send, if any.
        allowed_hosts: see :class:`serving.api.guard.Guard`.
        probe_secret: value of the header ``X-Ade-Probe`` that marks health checks, which are not
            counted as traffic.
    """

    host: str
    port: int
    metrics_port: int
    exposes_metrics: bool
    token: str | None = field(repr=False)
    allowed_hosts: tuple[str, ...]
    probe_secret: str = field(repr=False)

    def save(self, path: Path) -> None:
        """Write a new JSON file that only its owner can read.

        Raises:
            FileExistsError: the file exists.
        """
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as file:
            json.dump(dataclasses.asdict(self), file)

    def replace(self, path: Path) -> None:
        """Write the file in the place of an older one, atomically."""
        new = path.with_suffix(".new")
        new.unlink(missing_ok=True)
        self.save(new)
        os.replace(new, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file that :meth:`save` wrote.

        Raises:
            ValueError: it is not JSON, or has other keys.
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

    @property
    def metrics_hosts(self) -> list[str]:
        """The hosts that serve metrics, which always include one for programs on this machine."""
        if not self.exposes_metrics or self.host in LOOPBACK:
            return [LOOPBACK[0]]
        return [self.host] if self.host == ANY_ADDRESS else [LOOPBACK[0], self.host]
