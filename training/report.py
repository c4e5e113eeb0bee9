"""The report of a training run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from ade_base.files import write_text
from ade_base.panel import panel_rows
from ade_base.pictures.show import write_png
from ade_model.checkpoint import read_config
from ade_model.model import ADEModel
from training.data import Dataset
from training.evaluate import likelihood_figures, reconstruction_grid, sample_grid, sample_kinds
from training.runs import read_state

REPORT_IMAGES = 2000
HEADINGS = {
    "mean": "Mean samples, f⁻¹(μ(z))",
    "density": "Density samples, f⁻¹(μ(z) + σε)",
}


def write_report(
    run: Path, checkpoint: Path, dataset: Dataset, model: ADEModel, device: torch.device
) -> None:
    """Write ``RUN/report.md`` with samples, reconstructions and held-out bits per dimension."""
    about, state = read_config(checkpoint), read_state(checkpoint)
    pictures = run / "pictures"
    pictures.mkdir(exist_ok=True)
    kinds = sample_kinds(model, about["operations"])
    for kind in kinds:
        (pictures / f"samples-{kind}.png").write_bytes(
            write_png(sample_grid(model, 100, device, with_noise=kind == "density"))
        )
    images, seconds = state["images"], state["seconds"]
    lines = [
        f"# {about['recipe']} on {dataset.name}",
        "",
        f"- {images:,} training images in {state['step']:,} steps and {seconds / 60:.1f} minutes "
        f"({images / max(seconds, 1e-9):.0f} images/s), seed {about['seed']}",
        f"- {sum(p.numel() for p in model.parameters()):,} weights, of them "
        f"{sum(p.numel() for p in model.flow.parameters()):,} in the flow",
    ]
    held_out = dataset.parts["select"].images[:REPORT_IMAGES]
    if len(held_out) > 1 and "score" in about["operations"]:
        found = likelihood_figures(model, np.asarray(held_out), device)
        lines += [
            f"- {title}, on the part `select`: {text} {about}".rstrip()
            for title, text, about in panel_rows(found)
        ]
        grid = reconstruction_grid(model, np.asarray(held_out[:16]), device)
        (pictures / "reconstructions.png").write_bytes(write_png(grid))
        lines += [
            "",
            "## Reconstructions (above: held-out images, below: reconstructed)",
            "",
            "![reconstructions](pictures/reconstructions.png)",
        ]
    for kind in kinds:
        lines += ["", f"## {HEADINGS[kind]}", "", f"![{kind} samples](pictures/samples-{kind}.png)"]
    if dataset.skipped:
        lines += [
            "",
            f"## Files left out ({len(dataset.skipped)})",
            "",
            *(f"- {name}: {why}" for name, why in dataset.skipped.items()),
        ]
    write_text(run / "report.md", "\n".join(lines) + "\n")
