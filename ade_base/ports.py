"""The three TCP ports of a service, each with its environment variable, and free ports."""

from __future__ import annotations

import errno
import os
import random
import socket
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from ade_base.errors import UserError

VARIABLES = {
    "inference": ("ADE_INFERENCE_PORT", 8080),
    "metrics": ("ADE_METRICS_PORT", 8082),
    "ui": ("ADE_UI_PORT", 7860),
}

LOOPBACK = ("127.0.0.1", "localhost")
UNASSIGNED = range(20_000, 32_768)  # below the ports that Linux and macOS choose from
USER = "ade"  # user name of the page if the service requires a token, which is the password


def local_address(host: str) -> str:
    """The address at which this machine reaches a server that listens on ``host``."""
    return "127.0.0.1" if host in ("0.0.0.0", "localhost") else host


def free_ports(count: int) -> list[int]:
    """Different TCP ports that nothing listens on.

    They are not among those from which systems choose by themselves, such as for a connection:
    another program could get one of these before it is used.

    Raises:
        OSError: there are not as many.
    """
    found: list[int] = []
    with ExitStack() as stack:
        for port in random.SystemRandom().sample(UNASSIGNED, len(UNASSIGNED)):
            one = stack.enter_context(socket.socket())
            with suppress(OSError):
                one.bind(("127.0.0.1", port))
                found.append(port)
            if len(found) == count:
                return found
    raise OSError(
        errno.EADDRINUSE, f"only {len(found)} ports of {UNASSIGNED} are free, not {count}"
    )


class PortError(UserError, ValueError):
    """The service cannot listen on a port or host."""


def check_host(host: str) -> None:
    """Reject IPv6 hosts, which the service does not listen on, and what cannot be a name.

    An empty host, as of a variable that is not set, would be every address.

    Raises:
        PortError: it is one.
    """
    if not host:
        raise PortError("--host takes an address of this machine or a name, got an empty text")
    if ":" in host:
        raise PortError(f"--host takes an IPv4 address or a name, got {host}")
    try:
        host.encode("idna")  # as sockets do
    except UnicodeError as error:
        raise PortError(
            f"cannot listen on {host} ({error}): --host must be an address of this machine"
        ) from None


@dataclass(frozen=True)
class Ports:
    """TCP ports."""

    inference: int
    metrics: int
    ui: int

    @classmethod
    def from_environment(cls) -> Ports:
        """Read the ports from the environment, with defaults.

        Raises:
            PortError: a variable is not a port, or two ports are equal.
        """
        values = {}
        for name, (variable, default) in VARIABLES.items():
            text = os.environ.get(variable, str(default))
            if not text.isdecimal() or not 0 < int(text) < 65536:
                raise PortError(f"{variable} must be a port from 1 to 65535, got {text!r}")
            values[name] = int(text)
        if len(set(values.values())) != len(values):
            raise PortError(
                "two of the ports are the same: "
                + ", ".join(f"{VARIABLES[name][0]}={port}" for name, port in values.items())
            )
        return cls(**values)

    def check_free(self, host: str, exposes_metrics: bool = False) -> None:
        """Check that every port is free.

        Args:
            host: of the API and the page.
            exposes_metrics: whether the metrics are served there, beside loopback.

        Raises:
            PortError: a port is in use; the error names the variable that sets it.
        """
        check_host(host)
        for name in VARIABLES:
            hosts = [LOOPBACK[0]] if name == "metrics" else [host]
            if name == "metrics" and exposes_metrics:
                hosts.append(host)
            for one in hosts:
                self.bound(name, one).close()

    def bound(self, name: str, host: str) -> socket.socket:
        """A socket that is bound to one of the ports and does not listen yet.

        Args:
            name: of the port, of :data:`VARIABLES`.
            host: to listen on.

        Raises:
            PortError: the port is in use; the error names the variable that sets it.
        """
        variable, port = VARIABLES[name][0], getattr(self, name)
        bound = socket.socket()
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((host, port))
        except OSError as error:
            bound.close()
            if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
                raise PortError(
                    f"cannot listen on {host} ({error.strerror}): --host must be an address of "
                    "this machine"
                ) from None
            raise PortError(
                f"cannot listen on port {port} ({error.strerror}): free it, or set {variable} to "
                "another port"
            ) from None
        return bound
