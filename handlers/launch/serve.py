"""Implements ``ade serve``: starts, watches and stops the service and its page."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import secrets
import shlex
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn
from urllib.request import getproxies, proxy_bypass

from ade_base import extensions as seam
from ade_base.errors import UserError
from ade_base.files import alone_in
from ade_base.ports import LOOPBACK, USER, Ports, check_host
from ade_base.system import available_cores
from handlers.front.settings import TOKEN_VARIABLE, given_token
from handlers.launch.engines import ENGINES
from handlers.launch.launcher import Launcher, Plan
from handlers.launch.page_process import Page, inference_url, page_is_ready, wait_until
from handlers.launch.publish import Publisher
from handlers.processes.channel import Listener
from handlers.processes.run_folder import RunFolder, run_folder
from handlers.processes.supervision import LaunchError, Supervisor, tell
from handlers.service.options import ServingOptions, check_names
from serving.api.guard import is_address
from serving.engine.backends import BackendError, has_cuda_provider
from serving.engine.bundle import Bundle, open_bundle
from serving.engine.signatures import OPERATIONS
from serving.verdict.calibration_file import CalibrationPair

MAX_SCORE_WORKERS = 4
WATCH_S = 0.5
PACKAGES = {"onnxruntime": "onnxruntime", "torchscript": "torch"}  # required by each backend
EXAMPLE = Path(__file__).parents[2] / "serving" / "examples" / "cat.png"
SIGNS_OF_A_GPU = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"), Path("/dev/dxg"))


def run(args: argparse.Namespace) -> None:
    _open_standard_streams()
    check_host(args.host)
    if args.workers is not None and args.workers < 1:
        raise LaunchError(f"--workers must be at least 1, got {args.workers}")
    # Report a missing package here, not in the log of a worker.
    if importlib.util.find_spec(PACKAGES[args.backend]) is None:
        raise ModuleNotFoundError(f"--backend {args.backend}", name=PACKAGES[args.backend])
    seam.load(ENGINES[args.engine].code)  # likewise
    started = time.monotonic()
    signal.signal(signal.SIGTERM, _stop)
    bundles = [open_bundle(folder.resolve()) for folder in args.bundles]
    check_names(bundles)
    for bundle in bundles:
        _warn_of_another_coder(bundle)
    allowed_hosts = _allowed_hosts(args.allowed_hosts, args.host)
    token = _token(args.host)
    on_gpu = _gpu_for(args.device, args.backend)
    ports = Ports.from_environment()
    ports.check_free(args.host, args.expose_metrics)
    cores = available_cores()
    workers = {
        operation: args.workers or (min(cores, MAX_SCORE_WORKERS) if operation == "score" else 1)
        for operation in OPERATIONS
    }
    threads = max(1, cores // (len(bundles) * sum(workers.values())))
    options = ServingOptions(args.backend, "cuda" if on_gpu else "cpu", threads, args.cuda_graphs)
    models = ", ".join(bundle.model_id for bundle in bundles)
    tell(f"starting {models} on the {options.device.upper()}, with --engine {args.engine}")
    with (
        _alone_with_logs(args.logs),
        run_folder() as folder,
        Supervisor(folder.path) as supervisor,
    ):
        plan = Plan(
            bundles,
            options,
            workers,
            args.host,
            ports,
            args.expose_metrics,
            token,
            allowed_hosts,
            secrets.token_hex(16),
            folder.path / "logs" if args.logs is None else args.logs.resolve(),
            args.engine,
        )
        engine, is_serving = Launcher(plan, folder, supervisor), False
        page = Page(plan, folder, supervisor)
        describing = threading.Lock()

        def describe() -> None:
            with describing:
                folder.describe(ports, args.host, plan.logs, supervisor.pids)

        try:
            folder.write(folder.probe_file, plan.probe_secret)
            if token is not None:
                folder.write(folder.token_file, token)
                folder.write(folder.header_file, f"Authorization: Bearer {token}\n")
            engine.start()
            page.start()
            wait_until(lambda: page_is_ready(ports, args.host), supervisor)
            describe()
            publisher = Publisher(plan, engine, page, describe)
            Listener(folder.control_socket, publisher.handle, (UserError, OSError))
            _print_addresses(plan, folder, time.monotonic() - started)
            is_serving = True
            _watch(supervisor, folder, engine, describe)
        except (KeyboardInterrupt, SystemExit):
            _ignore_signals()
            tell("stopping")
            if is_serving:
                engine.drain()
        finally:
            _ignore_signals()


@contextmanager
def _alone_with_logs(folder: Path | None) -> Iterator[None]:
    """Keep other services, which would rotate and delete its files, out of a folder of logs."""
    with ExitStack() as held:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                held.enter_context(alone_in(folder, lambda why: LaunchError(f"--logs: {why}")))
            except OSError as error:  # of a file system without locks
                tell(f"warning: no other service may use --logs {folder}: {error.strerror}")
        yield


def _open_standard_streams() -> None:
    """Open closed ones on the null device.

    Otherwise a socket that children inherit gets their number, which is another file in a child.
    """
    while (opened := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(opened)


def _ignore_signals() -> None:
    """Ignore further signals: a second Ctrl-C must not leave processes behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _token(host: str) -> str | None:
    """The token that API and page require beyond loopback: ``ADE_TOKEN``, or 256 random bits."""
    if host in LOOPBACK:
        if TOKEN_VARIABLE in os.environ:
            tell(
                f"warning: {TOKEN_VARIABLE} has no effect with --host {host}, where every user of "
                "this machine can use the service"
            )
        return None
    return given_token() or secrets.token_urlsafe(32)


def _allowed_hosts(text: str, host: str) -> list[str]:
    """Names by which clients may address the service, of which its own host is one."""
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    for name in names:
        if not re.fullmatch(r"[a-z0-9-]+(\.[a-z0-9-]+)*", name):
            raise LaunchError(
                f"--allowed-hosts takes host names without scheme or port, got {name!r}"
            )
    if host in LOOPBACK or is_address(host):
        return names
    return [*names, host.encode("idna").decode().lower()]  # as clients send it


def _watch(
    supervisor: Supervisor,
    folder: RunFolder,
    engine: Launcher,
    describe: Callable[[], None],
) -> NoReturn:
    """Watch the children until an exception.

    Raises:
        LaunchError: a child cannot be kept running, or the working folder is gone.
    """
    while True:
        if not (folder.is_held() and engine.is_whole()):
            raise LaunchError(
                f"the working folder {folder.path} was deleted or damaged while the service ran"
            )
        if supervisor.tend():
            describe()
        time.sleep(WATCH_S)


def _warn_of_another_coder(bundle: Bundle) -> None:
    calibration = bundle.manifest.get("calibration") or {}
    warning = CalibrationPair(name=bundle.name, webp=calibration.get("webp", "")).other_coder()
    if warning is not None:
        tell(f"warning: {warning}")


def _stop(number: int, frame: object) -> None:
    raise SystemExit(0)


def _gpu_for(device: str, backend: str) -> bool:
    """Whether to serve on a GPU.

    Raises:
        BackendError: a GPU is required and there is none. Reported here, not in a worker's log.
    """
    if device == "cpu":
        return False
    found = False
    has_driver = any(path.exists() for path in SIGNS_OF_A_GPU)
    # Without a driver, skip the import of PyTorch, which takes a second.
    if has_driver and importlib.util.find_spec("torch") is not None:
        import torch

        found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise BackendError(
            "--device cuda: PyTorch finds no CUDA device, or is not installed (extra cuda)"
            if has_driver
            else "--device cuda: there is no NVIDIA driver; leave --device out to use the CPU"
        )
    if found and backend == "onnxruntime" and not has_cuda_provider():
        cure = "pip uninstall onnxruntime, then install the extra cuda instead of cpu"
        if device == "cuda":
            raise BackendError(f"--device cuda: ONNX Runtime is installed for CPUs alone: {cure}")
        tell(f"warning: the GPU is not used: ONNX Runtime is installed for CPUs alone ({cure})")
        return False
    return found


def _print_addresses(plan: Plan, folder: RunFolder, seconds: float) -> None:
    url = inference_url(plan.ports, plan.host)
    needs_token = plan.token is not None
    auth = f" -H @{shlex.quote(str(folder.header_file))}" if needs_token else ""
    if getproxies() and not proxy_bypass(plan.host):
        auth += " --noproxy '*'"
    login = f"  (user {USER}, password: the token)" if needs_token else ""
    token = f"token    {folder.token_file}\n" if needs_token else ""
    file = f"-F {shlex.quote(f'image=@{EXAMPLE}')} -F resize=fit"
    requests = {
        "score": f"score {file}",
        "sample": "sample -H 'Content-Type: application/json'"
        ' -d \'{"n": 16, "seed": 7}\' -o samples.png',
        "reconstruct": f"reconstruct {file} -o reconstruction.png",
        "encode": f"encode {file} -o latents.json",
    }
    curls = [
        f"curl{auth} {url}/predictions/{line}"
        for operation, line in requests.items()
        if operation in plan.bundles[0].operations
    ]
    lines = [
        f"ready in {seconds:.1f} s: {', '.join(b.model_id for b in plan.bundles)}\n"
        f"page     http://{plan.host}:{plan.ports.ui}{login}\n"
        f"API      {url}/predictions/{{sample|encode|reconstruct|score}}\n"
        f"metrics  http://127.0.0.1:{plan.ports.metrics}/metrics\n{token}"
        f"logs     {plan.logs}\n",
        "Open the page, or try:",
        *curls,
        "\nCtrl-C stops everything.",
    ]
    tell("\n".join(lines), on_output=True)
