"""``ade serve BUNDLE [BUNDLE …]``."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path

import httpx

from handlers.archives import ServingOptions, write_archives
from handlers.torchserve import STOP_FOLDER, write_configuration
from serving.backends import BACKENDS, DEVICES, BackendError
from serving.bundle import Bundle, BundleError, open_bundle
from serving.images import coder_version
from serving.launcher import (
    Child,
    LaunchError,
    drain,
    inference_url,
    page_is_ready,
    start_child,
    start_page,
    stop_child,
    wait_until,
    working_folder,
)
from serving.ports import LOOPBACK, USER, PortError, Ports
from serving.profile import Totals, profile_table, read_totals
from serving.signatures import OPERATIONS

ERRORS = (BundleError, PortError, LaunchError, BackendError)
MAX_SCORE_WORKERS = 4
PROFILE_S = 10.0
PACKAGES = {"onnxruntime": "onnxruntime", "torchscript": "torch"}  # that workers compute with
SIGNS_OF_A_GPU = (Path("/dev/nvidiactl"), Path("/proc/driver/nvidia/version"), Path("/dev/dxg"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE",
                        help="the first is served under the plain names, a further one NAME as NAME-{op}")
    parser.add_argument("--host", default="127.0.0.1",
                        help="address of the API and the page; off loopback a token is asked for (default: %(default)s)")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0], help="default: %(default)s")
    parser.add_argument("--workers", type=int, metavar="N",
                        help="processes of each operation, each computing with one thread (default: 1, and for score one a "
                             f"core, at most {MAX_SCORE_WORKERS})")
    parser.add_argument("--logs", type=Path, metavar="DIR",
                        help="keep logs there, such as one JSON line a request (default: a folder that is gone afterwards)")
    parser.add_argument("--profile", action="store_true",
                        help=f"say every {PROFILE_S:.0f} seconds where the time of requests went")
    parser.add_argument("--cuda-graphs", action="store_true",
                        help="on a GPU with onnxruntime: replay recorded kernels (not tried on a GPU yet)")


def run(args: argparse.Namespace) -> None:
    if args.workers is not None and args.workers < 1:
        raise LaunchError(f"--workers must be at least 1, got {args.workers}")
    if importlib.util.find_spec(PACKAGES[args.backend]) is None:  # here, not in a worker's log
        raise ModuleNotFoundError(f"--backend {args.backend}", name=PACKAGES[args.backend])
    started = time.monotonic()
    signal.signal(signal.SIGTERM, _stop)
    bundles = [open_bundle(folder.resolve()) for folder in args.bundles]
    names = [bundle.name for bundle in bundles]
    if len(set(names)) < len(names):
        raise BundleError(f"bundles served side by side need different names, got {', '.join(names)}")
    for bundle in bundles:
        _warn_of_another_coder(bundle)
    on_gpu = _gpu_for(args.device)
    ports = Ports.from_environment()
    ports.check_free(args.host)
    cores = len(os.sched_getaffinity(0))
    workers = {operation: args.workers or (min(cores, MAX_SCORE_WORKERS) if operation == "score" else 1)
               for operation in OPERATIONS}
    threads = max(1, cores // (len(bundles) * sum(workers.values())))
    options = ServingOptions(args.backend, "cuda" if on_gpu else "cpu", threads, args.cuda_graphs)
    if args.logs is not None:
        args.logs.mkdir(parents=True, exist_ok=True)
    with working_folder() as folder:
        children: list[Child] = []
        is_serving = False
        try:
            store = folder / "store"
            store.mkdir()
            models = []
            for i, bundle in enumerate(bundles):
                models += write_archives(bundle, store, options, workers, bundle.name if i else None)
            logs = folder / "logs" if args.logs is None else args.logs.resolve()
            command, environment = write_configuration(folder, store, models, ports, args.host, options, logs)
            children.append(start_child("torchserve", command, environment, folder))
            token = None
            if args.host not in LOOPBACK:
                keys = folder / "key_file.json"
                wait_until(lambda: keys.is_file() and keys.stat().st_size > 0, children)
                token = json.loads(keys.read_text())["inference"]["key"]
            children.append(start_page(ports, args.host, folder, token, [b.folder for b in bundles]))
            wait_until(lambda: page_is_ready(ports, args.host), children)
            _print_addresses(bundles, ports, args.host, token, logs, time.monotonic() - started)
            is_serving = True
            _watch(children, ports if args.profile else None)
            ended = next(child for child in children if child.process.poll() is not None)
            raise LaunchError(f"{ended.name} ended with {ended.process.returncode}:\n{ended.tail()}")
        except (KeyboardInterrupt, SystemExit):
            print("stopping", file=sys.stderr, flush=True)
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave processes behind
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            try:
                if is_serving:
                    drain(folder / STOP_FOLDER, len(bundles) * sum(workers.values()), ports, children[0])
            finally:
                for child in reversed(children):
                    stop_child(child)


def _watch(children: list[Child], profiled: Ports | None) -> None:
    """Wait until a child ends; meanwhile say where time goes, if the ports to ask at are given."""
    totals: Totals = {}
    next_profile = time.monotonic() + PROFILE_S
    while all(child.process.poll() is None for child in children):
        time.sleep(0.5)
        if profiled is not None and time.monotonic() > next_profile:
            next_profile += PROFILE_S
            try:
                now = read_totals(httpx.get(f"http://127.0.0.1:{profiled.metrics}/metrics", timeout=PROFILE_S).text)
            except httpx.TransportError:  # busy: the next time will do
                continue
            table = profile_table(totals, now)
            totals = now
            if table:
                print(table, end="\n\n", flush=True)


def _warn_of_another_coder(bundle: Bundle) -> None:
    calibration = bundle.manifest.get("calibration") or {}
    coder = calibration.get("webp", coder_version())
    if coder != coder_version():
        print(f"warning: {bundle.name} was calibrated with libwebp {coder}, here is {coder_version()}: verdicts may be off "
              "a little until ade calibrate makes another", file=sys.stderr, flush=True)


def _stop(number: int, frame: object) -> None:
    raise SystemExit(0)


def _gpu_for(device: str) -> bool:
    """Whether to serve on a GPU; asking for one that is not there is an error here, not in a worker."""
    if device == "cpu":
        return False
    found = False
    # Without a driver, spare the second that PyTorch takes to say no; without PyTorch, serve on the CPU.
    if any(path.exists() for path in SIGNS_OF_A_GPU) and importlib.util.find_spec("torch") is not None:
        import torch

        found = torch.cuda.is_available()
    if device == "cuda" and not found:
        raise BackendError("--device cuda: PyTorch sees no CUDA device here, or is not installed (extra cuda)")
    return found


def _print_addresses(bundles: list[Bundle], ports: Ports, host: str, token: str | None, logs: Path,
                     seconds: float) -> None:
    url = inference_url(ports, host)
    auth = "" if token is None else f' -H "Authorization: Bearer {token}"'
    login = "" if token is None else f"  (user {USER}, password {token})"
    lines = {"sample": "sample -H 'Content-Type: application/json' -d '{\"n\": 16, \"seed\": 7}' -o samples.png",
             "score": "score -T image.png", "reconstruct": "reconstruct -T image.png -o reconstruction.png",
             "encode": "encode -T image.png -o latents.json"}
    curls = [f"curl{auth} {url}/predictions/{line}" for operation, line in lines.items()
             if operation in bundles[0].operations]
    print(f"ready in {seconds:.1f} s: {', '.join(b.model_id for b in bundles)}\n"
          f"page     http://{host}:{ports.ui}{login}\n"
          f"API      {url}/predictions/{{sample|encode|reconstruct|score}}\n"
          f"metrics  http://127.0.0.1:{ports.metrics}/metrics\n"
          f"logs     {logs}\n", *curls, "\nCtrl-C stops everything.", sep="\n", flush=True)
