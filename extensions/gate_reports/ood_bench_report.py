"""The report of ``ade ood-bench``: figures, statistics one by one and histograms."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from ade_base.brand import verdict_card
from ade_base.files import replacing, write_text
from ade_base.messages import visible
from ade_base.reports import from_markdown, markdown_table, render
from ade_base.tables import safe_cell
from export.gate.measuring import Measured
from export.gate.separation import (
    ALPHAS,
    COMBINED,
    NO_FEATURES,
    NO_MODEL,
    RAW_BPD,
    Figures,
    Judged,
    compare_scores,
)
from serving.verdict.calibration_file import CalibrationPair
from serving.verdict.summary import summarize

VERDICT_ALPHA = 0.05
BINS = 60
MOST = 12  # statistics in the report; figures.csv has all of them
HEADLINES = (COMBINED, NO_FEATURES, RAW_BPD, NO_MODEL)


def write_report(
    calibrations: CalibrationPair,
    model: str,
    id_name: str,
    id_images: Measured,
    ood_sets: Mapping[str, Measured],
    out: Path,
) -> Path:
    """Write ``OUT/report.md``, ``OUT/report.html``, ``OUT/figures.csv`` and histograms.

    Args:
        calibrations: of the bundle; each image is judged by the one for its kind.
        model: name of the bundle's model in answers.
        id_name: describes the ID images.
        id_images: ID images that were not used for training or calibration.
        ood_sets: sets of OOD images by name.
        out: a folder.

    Returns:
        The report's path.
    """
    out.mkdir(parents=True, exist_ok=True)
    id_name = visible(id_name)
    of_id = Judged.of(calibrations, id_images)
    judged = {visible(name): Judged.of(calibrations, its) for name, its in ood_sets.items()}
    table: dict[str, dict[str, Figures]] = {}
    pictures = [f"histogram-{number}.png" for number in range(len(judged))]
    for file, (name, its) in zip(pictures, judged.items(), strict=True):
        table[name] = {
            score: compare_scores(of_id.scores[score], values)
            for score, values in its.scores.items()
            if score in of_id.scores
        }
        table[name][COMBINED] = replace(table[name][COMBINED], flagged=its.flagged())
        _histogram(of_id.scores, its.scores, id_name, name, out / file)
    has_features = any(NO_FEATURES in figures for figures in table.values())
    _write_csv(table, out / "figures.csv")
    lines = [
        f"# OOD detection by {model}",
        "",
        f"ID images: {len(of_id.resized):,} of {id_name}. Each image is judged by the calibration "
        "for its kind: of the model's size, or resized."
        + (
            ""
            if calibrations.resized
            else " The bundle has no calibration for resized images: they get no verdict, and "
            "their scores are by the calibration for images of the model's size."
        ),
        "",
        "## False alarms",
        "",
        *_false_alarms(of_id),
        "## OOD images",
        "",
        *_summary(table, judged),
        "",
        "AUROC ± its standard error; AUPR with OOD images as positives; FPR: false alarms where "
        "95 % of the OOD images are found; then the share of OOD images that is flagged at each "
        "alpha. "
        f"*{NO_MODEL}*: the same kind of density on statistics of the pixels, without any model."
        + (
            f" *{NO_FEATURES}*: without those of `features.onnx` and `encoder.onnx`."
            if has_features
            else ""
        ),
        "",
        "## The best single statistics, AUROC",
        "",
        *_singles(table),
        "",
        f"The {MOST} statistics with the highest means, below the scores. `figures.csv` has all.",
        "",
        "## Histograms",
        "",
        "Left: the combined score, higher is more unusual. Right: bits per dimension. The first "
        "and last bars hold all values beyond the axis.",
        "",
        *(f"![{name}]({file})\n" for name, file in zip(judged, pictures, strict=True)),
    ]
    path = out / "report.md"
    write_text(path, "\n".join(lines).rstrip() + "\n")
    title, *rest = lines
    page = render(
        title.removeprefix("# "),
        _verdict(table, of_id.calibrated),
        content=from_markdown(rest, {file: out / file for file in pictures}),
    )
    write_text(out / "report.html", page)
    return path


def _verdict(table: Mapping[str, Mapping[str, Figures]], calibrated: int) -> str:
    """The head of the page: what the gate catches and what it misses."""
    column = ALPHAS.index(VERDICT_ALPHA)
    shares = {
        name: flagged[column] for name, its in table.items() if (flagged := its[COMBINED].flagged)
    }
    summary = summarize(shares, calibrated, VERDICT_ALPHA)
    return verdict_card(summary.choice, summary.sentence, (), summary.notes, summary.heading)


def _false_alarms(judged: Judged) -> list[str]:
    """A table for each kind of images, because their bands differ."""
    lines = []
    for kind, calibration in judged.calibrations.items():
        rows = judged.resized == kind
        its = replace(judged, p_values=judged.p_values[rows], calibrations={kind: calibration})
        body = []
        for alpha, share in zip(ALPHAS, its.flagged(), strict=True):
            if share is None or calibration is None:
                body.append([f"{alpha}", "no verdict", ""])
                continue
            low, high = calibration.false_alarm_band(alpha, tested=int(rows.sum()))
            body.append([f"{alpha}", f"{share:.4f}", f"{low:.4f} to {high:.4f}"])
        what = "resized images" if kind else "images of the model's size"
        lines += [
            f"{rows.sum():,} {what}, calibrated on {its.calibrated:,} others:",
            "",
            *markdown_table(
                ["alpha", "flagged", "95 % band of calibrations and tests like these"], body
            ),
            "",
        ]
    return lines


def _summary(table: Mapping[str, Mapping[str, Figures]], judged: Mapping[str, Judged]) -> list[str]:
    body = []
    for name, figures in table.items():
        for score in (score for score in HEADLINES if score in figures):
            f = figures[score]
            flagged = [
                "no verdict" if share is None else f"{100 * share:.1f} %"
                for share in f.flagged or ()
            ] or [""] * len(ALPHAS)
            body.append(
                [
                    f"{name} ({len(judged[name].resized):,})" if score == COMBINED else "",
                    score,
                    f"{f.auroc:.4f} ± {f.standard_error:.4f}",
                    f"{f.aupr:.3f}",
                    f"{100 * f.fpr95:.1f} %",
                    *flagged,
                ]
            )
    return markdown_table(
        ["OOD images", "score", "AUROC", "AUPR", "FPR", *(f"at {alpha}" for alpha in ALPHAS)], body
    )


def _singles(table: Mapping[str, Mapping[str, Figures]]) -> list[str]:
    sets = list(table)
    found: dict[str, list[float]] = {}
    for figures in table.values():
        for score, its in figures.items():
            found.setdefault(score, []).append(its.auroc)
    singles = [score for score in found if score not in HEADLINES]
    singles.sort(key=lambda score: -np.mean(found[score]))
    scores = [*(score for score in HEADLINES if score in found), *singles[:MOST]]
    body = [
        [score, *(f"{table[s][score].auroc:.3f}" if score in table[s] else "" for s in sets)]
        for score in scores
    ]
    return markdown_table(["score", *sets], body)


def _write_csv(table: Mapping[str, Mapping[str, Figures]], path: Path) -> None:
    with replacing(path, text=True) as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "ood_set",
                "score",
                "auroc",
                "standard_error",
                "aupr",
                "fpr95",
                *(f"flagged_{alpha}" for alpha in ALPHAS),
            ]
        )
        for name, figures in table.items():
            for score, f in figures.items():
                writer.writerow(
                    [
                        safe_cell(name),
                        score,
                        f.auroc,
                        f.standard_error,
                        f.aupr,
                        f.fpr95,
                        *(f.flagged or ("",) * len(ALPHAS)),
                    ]
                )


def _histogram(
    id_scores: Mapping[str, np.ndarray],
    ood_scores: Mapping[str, np.ndarray],
    id_name: str,
    name: str,
    path: Path,
) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.8), layout="constrained")
    for axes, score in zip(figure.subplots(1, 2), (COMBINED, RAW_BPD), strict=True):
        both = np.concatenate([id_scores[score], ood_scores[score]])
        low, high = np.quantile(both, [0.002, 0.998])
        edges = np.linspace(low, max(high, low + 1e-6), BINS)
        for values, label in ((id_scores[score], "ID"), (ood_scores[score], "OOD")):
            axes.hist(np.clip(values, low, high), edges, density=True, alpha=0.55, label=label)
        axes.set_xlabel({COMBINED: "combined score, nats", RAW_BPD: "bits per dimension"}[score])
        axes.set_yticks([])
        legend = axes.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
        names = (f"ID: {id_name}", f"OOD: {name}")
        for text, label in zip(legend.get_texts(), names, strict=True):
            text.set(text=label, parse_math=False)  # a name is not a formula, whatever its signs
    FigureCanvasAgg(figure).print_figure(path, dpi=80)
