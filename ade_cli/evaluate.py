"""``ade evaluate RUN_OR_BUNDLE``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from ade_cli.data_options import add_data_arguments, dataset_of
from ade_model.checkpoint import load_model
from ade_model.errors import ConfigError
from training.data import PARTS, DataError
from training.evaluate import evaluate, sample_images
from training.metrics.features import FeatureError, ResNet20, features_of
from training.metrics.frechet import frechet_distance
from training.runs import RunError, latest_checkpoint, write_json

ERRORS = (RunError, DataError, ConfigError, FeatureError)
FRECHET_SAMPLES = 10_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN_OR_BUNDLE")
    add_data_arguments(parser, required=False)
    parser.add_argument("--part", choices=PARTS, default="test", help="default: %(default)s")
    parser.add_argument("--samples", type=int, default=8, metavar="K",
                        help="draws of the importance-weighted bound, beside the ELBO (default: %(default)s)")
    parser.add_argument("--images", type=int, metavar="N", help="only the first N of the part")
    parser.add_argument("--resnet20", type=Path, metavar="NPZ",
                        help="weights of a CIFAR-10 ResNet-20: adds the Fréchet distance of "
                             f"{FRECHET_SAMPLES} samples to the part in its feature space (this is not the FID)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def run(args: argparse.Namespace) -> None:
    if args.samples < 1 or (args.images is not None and args.images < 2):
        raise RunError("--samples must be at least 1 and --images at least 2")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise RunError("--device cuda: PyTorch sees no CUDA device here")
    on_gpu = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    torch.backends.cudnn.allow_tf32 = False
    folder = latest_checkpoint(args.run)
    model = load_model(folder).to(device)
    dataset = dataset_of(args, args.run, model.config.image_size)
    images = np.asarray(dataset.parts[args.part].images[:args.images])
    if len(images) < 2:
        raise DataError(f"the part {args.part} of {dataset.name} has {len(images)} images")
    result = {"data": dataset.name, "part": args.part, "split": dataset.splits[args.part],
              **evaluate(model, images, device, args.samples, args.seed)}
    if args.resnet20 is not None:
        network = ResNet20(args.resnet20).to(device)
        real = features_of(network, images, device)
        result["frechet_resnet20"] = {"samples": FRECHET_SAMPLES, **{
            kind: frechet_distance(real, features_of(network, sample_images(
                model, FRECHET_SAMPLES, device, kind, args.seed), device)) for kind in ("mean", "density")}}
    print(json.dumps(result, indent=2))
    if folder != args.run:  # a run's checkpoint: `ade export` puts this into the manifest
        write_json(folder / "evaluation.json", result)
