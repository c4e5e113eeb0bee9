"""What the application on Ray must know, on one machine and on a cluster."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ade_base.errors import UserError
from handlers.front.settings import TOKEN_VARIABLE, TokenError, given_token
from handlers.service.options import ServingOptions
from serving.engine.backends import BACKENDS, DEVICES
from serving.engine.signatures import OPERATIONS

LOGS = "~/.cache/ade/logs"  # not in /tmp, where other users could prepare links


class SettingsError(UserError, ValueError):
    """The arguments of the application cannot be used."""


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """The application, wherever it runs; ``args`` of ``deploy/ray/serve-config.yaml``.

    Attributes:
        bundles: their folders, which every node must have; the first is served under the plain
            names.
        replicas: of each operation at least and at most.
        fronts: replicas of the front at least and at most; each batches nothing and computes
            nothing, but reads and checks requests.
        cpus: of a node that a replica counts as.
        gpus: likewise.
        backend, device: as for ``ade serve``.
        allowed_hosts: names by which clients may address the service, besides IP addresses.
        exposes_metrics: whether the front answers ``/metrics`` too.
        logs: a folder of each node, created if it is missing; ``~`` is the home of Ray's user.
    """

    bundles: tuple[str, ...]
    replicas: dict[str, tuple[int, int]] = field(
        default_factory=lambda: dict.fromkeys(OPERATIONS, (1, 1))
    )
    fronts: tuple[int, int] = (1, 1)
    cpus: float = 1.0
    gpus: float = 0.0
    backend: str = "onnxruntime"
    device: str = "cpu"
    allowed_hosts: tuple[str, ...] = ()
    exposes_metrics: bool = False
    logs: str = LOGS

    @classmethod
    def of(cls, args: dict[str, Any]) -> ServeSettings:
        """Check arguments as a configuration file has them.

        Raises:
            SettingsError: one is missing, unknown, or cannot be used.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if "bundles" not in args or not args.keys() <= known:
            raise SettingsError(
                f"the arguments are {', '.join(sorted(known))}, bundles required, got "
                f"{', '.join(sorted(args)) or 'none'}"
            )
        for name, (is_usable, expected) in _EXPECTED.items():
            if name in args and not is_usable(args[name]):
                raise SettingsError(f"{name} must be {expected}, got {args[name]!r}")
        given: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in args.items()}
        if "replicas" in given:
            given["replicas"] = _ranges(given["replicas"])
        given["fronts"] = _range("fronts", given.get("fronts", (1, 1)))
        return cls(**given)

    @property
    def options(self) -> ServingOptions:
        return ServingOptions(self.backend, self.device)


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may use the service.

    Attributes:
        token: that clients must send, if any.
        probe_secret: marks health checks, which are not counted as traffic.
    """

    token: str | None = field(repr=False)
    probe_secret: str = field(repr=False)

    @classmethod
    def of_cluster(cls) -> Access:
        """By the variable ``ADE_TOKEN``, without which the service does not start.

        Raises:
            SettingsError: it is not set, or cannot be used.
        """
        try:
            token = given_token()
        except TokenError as error:
            raise SettingsError(str(error)) from None
        if token is None:
            raise SettingsError(f"{TOKEN_VARIABLE} must be set for the nodes")
        return cls(token=token, probe_secret=os.urandom(16).hex())


def _are_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 0


_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "bundles": (lambda value: _are_texts(value) and bool(value), "a list of at least one folder"),
    "cpus": (_is_number, "a number from 0"),
    "gpus": (_is_number, "a number from 0"),
    "backend": (lambda value: value in BACKENDS, f"one of {', '.join(BACKENDS)}"),
    "device": (lambda value: value in DEVICES, f"one of {', '.join(DEVICES)}"),
    "allowed_hosts": (_are_texts, "a list of names"),
    "exposes_metrics": (lambda value: isinstance(value, bool), "true or false"),
    "logs": (lambda value: isinstance(value, str), "a folder"),
}


def _ranges(given: Any) -> dict[str, tuple[int, int]]:
    if not isinstance(given, dict) or not given.keys() <= set(OPERATIONS):
        raise SettingsError(f"replicas must have the keys {', '.join(OPERATIONS)}, got {given!r}")
    return dict.fromkeys(OPERATIONS, (1, 1)) | {
        name: _range(f"replicas of {name}", value) for name, value in given.items()
    }


def _range(name: str, value: Any) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (list, tuple)) else (value, value)
    if (
        len(pair) != 2
        or not all(isinstance(n, int) and not isinstance(n, bool) for n in pair)
        or not 1 <= pair[0] <= pair[1]
    ):
        raise SettingsError(
            f"{name} must be a number from 1, or the least and the most, got {value!r}"
        )
    return pair
