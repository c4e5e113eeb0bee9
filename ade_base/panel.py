"""The panel: the measures of a model, in one table that every report and page shares.

:mod:`training.measure` takes them. A figure is an object of JSON: its ``value``, with ``error``,
the value of ``real`` images and the number of ``images`` where there are such. A ``note`` marks a
figure that is not independent, or says why a value is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# The mark of figures in Lite2's features. No network that took part in training measures.
RELATIVE = "a relative of EfficientNet-Lite0, which took part in training"
LITE2, RANDOM = "lite2", "random"


@dataclass(frozen=True)
class Measure:
    """A row of the table.

    Attributes:
        name: key of the figure.
        title: for people.
        better: ``lower`` or ``higher``, empty if neither is.
        digits: after the decimal point.
        space: the network whose features it compares, if any.
    """

    name: str
    title: str
    better: str
    digits: int
    space: str = ""


PANEL = (
    Measure("bpd", "bits per dimension", "lower", 3),
    Measure(LITE2, "excess Fréchet distance, EfficientNet-Lite2", "lower", 1, LITE2),
    Measure(RANDOM, "excess Fréchet distance, random convolutions", "lower", 1, RANDOM),
    Measure("density_lite2", "that of density samples, EfficientNet-Lite2", "lower", 1, LITE2),
    Measure("density_random", "that of density samples, random convolutions", "lower", 1, RANDOM),
    Measure("precision", "precision", "higher", 2, LITE2),
    Measure("recall", "recall", "higher", 2, LITE2),
    Measure("gan_train", "GAN-train, accuracy", "higher", 3),
    Measure("psnr", "PSNR of reconstructions, dB", "higher", 1),
    Measure("kl", "KL, bits per dimension", "", 3),
)


def figure_text(measure: Measure, figure: Mapping[str, Any] | None) -> str:
    """A figure as it is printed; a dash for a missing one."""
    value = (figure or {}).get("value")
    if figure is None or value is None:
        return "–"
    text = f"{value:.{measure.digits}f}"
    if "error" in figure:
        text += f" ± {figure['error']:.{measure.digits}f}"
    if "real" in figure:
        text += f" (real images: {figure['real']:.{measure.digits}f})"
    return text


def panel_rows(figures: Mapping[str, Any], table: Sequence[Measure] = PANEL) -> list[list[str]]:
    """The measures in words, their figures, and what is to be known of each.

    Figures of a model that was measured by an earlier version may be missing.
    """
    rows = []
    for measure in table:
        figure = figures.get(measure.name)
        if figure is None:
            continue
        about = [f"of {figure['images']:,} images"] if "images" in figure else []
        about += [figure["note"]] if "note" in figure else []
        better = f" ({measure.better} is better)" if measure.better else ""
        rows.append([measure.title + better, figure_text(measure, figure), "; ".join(about)])
    return rows
