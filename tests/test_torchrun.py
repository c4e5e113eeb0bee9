"""Several processes and machines train as one."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from ade_base.ports import free_ports
from ade_cli.main import main
from tests.helpers import ROOT, narrow
from tests.training_runs import SMALL, TRAIN, losses_of, trainer
from training.data import Dataset, ImageSet
from training.loop import _check_alike, _with_others
from training.noise import Noise
from training.run_options import RunOptions
from training.run_start import check_start
from training.runs import RunError


@pytest.mark.parametrize("share", [0.5, 0.3, 1.0])
def test_noisy_images_are_those_of_the_whole_batch(share):
    """Whatever the number of processes that share it, down to one image each."""
    one = trainer(dataclasses.replace(SMALL, noisy_share=share))
    whole = one._noisy(8)
    assert int(whole.sum()) == int(8 * share)
    for processes in (2, 8):
        shares = []
        for one.rank in range(processes):
            shares.append(one._noisy(8 // processes))
        assert torch.equal(torch.cat(shares), whole)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_processes_share_the_reconstructions_of_one(processes):
    """The first images of the whole batch are reconstructed, whoever has them."""
    config = dataclasses.replace(SMALL, reconstruction_weight=1.0)
    features, x = torch.randn(12, 3, 8, 8), torch.rand(12, 3, 8, 8)

    def error(rank, processes):
        it = trainer(config)
        it.rank, it.processes = rank, processes
        shares = (values.chunk(processes)[rank] for values in (features, x))
        return it._reconstruction_error(*shares)

    every = torch.stack([error(rank, processes) for rank in range(processes)])
    assert every.mean().item() == pytest.approx(error(0, 1).item(), rel=1e-5)


def test_processes_draw_one_batch_of_noise():
    whole = Noise(3, 7, torch.device("cpu"), 0, 1)
    shares = [Noise(3, 7, torch.device("cpu"), rank, 2) for rank in range(2)]
    for draw in ("uniform", "normal"):
        assert torch.equal(
            getattr(whole, draw)(6, 2), torch.cat([getattr(share, draw)(3, 2) for share in shares])
        )


@pytest.mark.slow
def test_two_processes_train_as_one(folder, tmp_path):
    """Two nodes are compared with one process below."""
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["train", "av-ade", "--data", str(folder), *TRAIN, "--images", str(16 * 100)]
    # At low rates: a strong discriminator makes much of the last digits within thirty steps.
    arguments += ["--set", "g_learning_rate=1e-4", "d_learning_rate=1e-4", "--device", "cpu"]
    assert main([*arguments, "--out", str(one)]) == 0
    launcher = ["--standalone", "--nproc-per-node", "2"]
    text = tmp_path / "text"
    assert torchrun(launcher, [*arguments, "--out", str(two)], text).wait() == 0, text.read_text()
    a, b = losses_of(one), losses_of(two)
    assert a.keys() == b.keys()
    for step in a:
        assert a[step] == pytest.approx(b[step], abs=1e-4)
    rows = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()]
    assert all("gradient_penalty" in row for row in rows if "d_loss" in row)  # of every fourth step


def test_a_lost_process_is_an_error_of_the_run():
    """Of a single process there is nothing to lose: its errors are its own."""
    with (
        pytest.raises(RunError, match="process 1 of 2 has lost the others: .*resume.*Connection"),
        _with_others(SimpleNamespace(world_size=2, global_rank=1)),
    ):
        raise RuntimeError("Connection closed by peer\nand a stack")
    with (
        pytest.raises(RuntimeError, match="of its own"),
        _with_others(SimpleNamespace(world_size=1, global_rank=0)),
    ):
        raise RuntimeError("of its own")


def test_nodes_with_other_images_or_weights_are_refused(small_images):
    """Their gradients would be averaged all the same, and their models never become alike."""
    dataset = Dataset("d", {"train": ImageSet(small_images)}, {"train": "all"})

    def check(theirs, its, sketch="same files"):
        sent: list[torch.Tensor] = []

        def gather(value):
            sent.append(value)
            return torch.stack(sent)

        fabric: Any = SimpleNamespace(world_size=2, global_rank=0, all_gather=gather)
        _check_alike(fabric, dataset, ["same files"], trainer())
        _check_alike(fabric, its, [sketch], theirs)

    check(trainer(), dataset)
    check(
        trainer(), dataclasses.replace(dataset, name="a link", splits={"train": "all", "test": "1"})
    )
    fewer = {"train": dataset.parts["train"].slice(0, 9)}
    with pytest.raises(RunError, match="process 1 of 2 has other training images than process 0"):
        check(trainer(), dataclasses.replace(dataset, parts=fewer))
    with pytest.raises(RunError, match="process 1 of 2 has other training images than process 0"):
        check(trainer(), dataset, "others of the same names")
    with pytest.raises(RunError, match="has other initial weights than process 0"):
        check(trainer(seed=1), dataset)
    theirs = trainer()
    theirs.adversaries[0].network.load_state_dict(
        trainer(seed=1).adversaries[0].network.state_dict()
    )
    with pytest.raises(RunError, match="has other initial weights than process 0"):
        check(theirs, dataset)  # each would keep its own, and only one is saved
    theirs = trainer()
    theirs.adversaries[0].network.register_buffer("rounded", torch.ones(1))
    check(theirs, dataset)  # as spectral norms are, by each processor in its way


def torchrun(launcher, arguments, out):
    """``ade`` in processes that ``torchrun`` starts; its output goes to ``out``."""
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "ade_cli.main"]
    with open(out, "wb") as output:
        return subprocess.Popen(
            [*command, *arguments],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            start_new_session=True,  # so that all its processes can be killed at once
        )


@pytest.mark.slow
def test_a_node_dies_and_the_run_resumes_on_the_other(folder, tmp_path):
    """Two nodes train as one process; what is left after a death is resumed by one process."""
    one, two = tmp_path / "one", tmp_path / "two"
    arguments = ["train", "av-ade", "--data", str(folder), *TRAIN]
    arguments += ["--images", str(16 * 60), "--device", "cpu", "--checkpoint-steps", "10"]
    assert main([*arguments, "--out", str(one)]) == 0

    (port,) = free_ports(1)
    launcher = shlex.split(
        f"--nnodes 2 --nproc-per-node 1 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{port} "
        "--rdzv-id test --rdzv-conf"
    )
    texts = [tmp_path / f"node-{rank}.txt" for rank in range(2)]
    nodes = [
        torchrun([*launcher, f"is_host={int(not rank)}"], [*arguments, "--out", str(two)], text)
        for rank, text in enumerate(texts)
    ]
    try:
        deadline = time.monotonic() + 300
        while not (two / "checkpoints" / "step-000000010").is_dir():
            assert all(node.poll() is None for node in nodes), texts[0].read_text()
            assert time.monotonic() < deadline, "the nodes did not begin"
            time.sleep(0.02)
        # The one that does not write the checkpoints; torchrun's processes have no order.
        (dying,) = [
            node
            for node in nodes
            if "0" not in {rank_of(p) for p in psutil.Process(node.pid).children(recursive=True)}
        ]
        own = psutil.Process(dying.pid)
        for process in [*own.children(recursive=True), own]:
            process.kill()
        (other,) = [node for node in nodes if node is not dying]
        assert other.wait(120) != 0
    finally:
        for node in nodes:
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()
    text = texts[nodes.index(other)].read_text()
    assert "ade train: process 0 of 2 has lost the others: one ended" in text, text

    assert main([*arguments, "--out", str(two), "--resume"]) == 0
    a, b = losses_of(one), losses_of(two)
    assert a.keys() == b.keys() and 60 in a
    for step in a:
        assert a[step] == pytest.approx(b[step], abs=2e-4)


def rank_of(process):
    with suppress(psutil.Error):
        return process.environ().get("RANK")
    return None


@pytest.mark.parametrize(
    "here, nodes, total, message",
    [
        ("3", "1", "3", "batch_size must be a multiple of 3, the number of processes, got 16"),
        ("2", "2", "6", "every node needs the same number of processes, got 2 on this one and 6"),
        ("4", "2", "6", "every node needs the same number of processes, got 4 on this one and 6"),
        (None, None, "2", "several processes must be started by torchrun, which sets LOCAL_WORLD"),
        (None, None, "1", ""),  # some schedulers set it for a single process, too
    ],
)
def test_processes_that_cannot_train_together_are_refused(here, nodes, total, message, monkeypatch):
    names = ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "WORLD_SIZE")
    for name, value in zip(names, (here, nodes, total), strict=True):
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(RunError, match=message) if message else nullcontext():
        check_start(narrow("vae"), Path("new"), RunOptions(images=1), resume=False)
