"""Short runs and trainers of narrow networks, for tests of training."""

import dataclasses
import json
import shlex
from contextlib import nullcontext

import torch

from tests.helpers import TINY, narrow
from training.config import DiscriminatorConfig
from training.data import ImageSet
from training.datasets import load_dataset
from training.loop import train
from training.recipes import recipe
from training.run_options import RunOptions
from training.step import Trainer

SMALL = dataclasses.replace(
    recipe("av-ade", 8, 3),
    model=TINY,
    discriminator=DiscriminatorConfig(widths=(8, 8)),
    batch_size=16,
)


def trainer(config=SMALL, seed=0):
    return Trainer(config, torch.device("cpu"), nullcontext, lambda flat: flat, seed)


def batches(images, steps, config=SMALL):
    sizes = [*([config.batch_size] if config.discriminator else []), config.joint_batch_size]
    source = ImageSet(images).batches(sum(sizes), 0)
    return [list(torch.from_numpy(next(source)).split(sizes)) for _ in range(steps)]


TRAIN = shlex.split(
    "--size tiny --image-size 8 --precision float32 --checkpoint-steps 20 --evaluate-steps 50 "
    "--set batch_size=16"
)
NARROW = shlex.split(
    "--set widths=8,8,8 latent_channels=3,2,2 decoder_blocks=1,1,1 flow_couplings=2 flow_width=8"
)


def losses_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        row["step"]: tuple(row.get(name) for name in ("bpd", "d_loss", "quality_loss"))
        for row in rows
        if "bpd" in row
    }


def trained_on(folder, run):
    """A short run that names its data set, as ``ade train`` makes them."""
    options = RunOptions(images=16, device="cpu", precision="float32")
    source = {"data": str(folder), "root": None}
    dataset = load_dataset(str(folder), None, 8)
    train(narrow("vae"), dataset, run, options, resume=False, source=source)
    return run
