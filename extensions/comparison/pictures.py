"""The pictures of a comparison's report: samples and training curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ade_base.pictures.show import tile
from ade_model.checkpoint import load_model
from extensions.comparison.rows import Row
from training.evaluate import sample_images
from training.runs import latest_checkpoint

GRID = 8  # samples per side
CAPTIONS = {
    "bpd": "L_C, bits per dimension",
    "quality_loss": "L_Q, nats",
    "d_loss": "discriminator, nats",
}
HINGED = ("quality_loss", "d_loss")  # without unit where the discriminator's loss is a hinge


def samples_name(row: Row) -> str:
    """File name of a row's grid of samples."""
    return f"{row.name}.webp"


def sample_pictures(rows: Sequence[Row], pictures: Path, device: torch.device) -> list[Row]:
    """Write a grid of mean samples of each system, where its run is still there.

    Returns:
        The row of each system whose picture is in the folder now: of the measured ones, the first
        that has a run, or a picture from before its run was deleted.
    """
    shown: dict[str, Row] = {}
    for row in rows:
        path = pictures / samples_name(row)
        if row.system in shown or row.measured is None:
            continue
        if row.run is not None:
            model = load_model(latest_checkpoint(row.run)).to(device)
            grid = tile(sample_images(model, GRID**2, device, with_noise=False), GRID)
            # Lossy WebP has a tenth of a PNG's size, for repositories that hold reports.
            Image.fromarray(grid).save(path, quality=90)
        if row.run is not None or path.is_file():
            shown[row.system] = row
    return list(shown.values())


def curve_pictures(rows: Sequence[Row], pictures: Path) -> list[tuple[str, str]]:
    """Write a picture of each loss over the images seen; returns file names and captions."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = []
    for name, caption in CAPTIONS.items():
        figure = Figure(figsize=(9, 4), layout="constrained")
        axes = figure.subplots()
        for i, row in enumerate(rows):
            images, values = row.curves[name]
            if values:
                axes.plot(
                    images,
                    values,
                    label=row.label,
                    linewidth=1.1,
                    color=f"C{i % 10}",
                    linestyle=("-", "--", ":")[i // 10 % 3],
                )
        if not axes.lines:
            continue
        hinged = dict.fromkeys(
            row.system
            for row in rows
            if name in HINGED and row.curves[name][1] and row.config.compares_images
        )
        if hinged:
            caption += f" ({', '.join(hinged)}: of a hinge loss, without unit)"
        if name == "bpd":
            low, high = np.percentile(
                np.concatenate([line.get_ydata() for line in axes.lines]), [0, 97]
            )
            # Values at the start or before a rescue would flatten the rest.
            axes.set_ylim(low - 0.05 * (high - low), high)
        axes.set_xlabel("images seen")
        axes.set_ylabel(caption.replace(" (", "\n("))
        axes.grid(alpha=0.25)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7)
        FigureCanvasAgg(figure).print_figure(pictures / f"curve-{name}.png", dpi=110)
        if hinged:
            caption += ". Logits of a hinge loss do not estimate the paper's KL"
        written.append((f"curve-{name}.png", caption))
    return written
