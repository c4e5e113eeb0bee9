"""Measures how well a bundle's verdict detects OOD images.

Each set of OOD images gets figures for the verdict, for the likelihood alone and for statistics
that need no model.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from export.verdict.corruptions import CORRUPTIONS
from export.verdict.images import Images, Prepared, Report, digests_of, others, prepared
from export.verdict.measuring import Measured, measured
from serving.api.requests import InputImage
from serving.brand import verdict_card
from serving.engine.engine import InferenceEngine
from serving.files import write_text
from serving.reports import from_markdown, markdown_table, render
from serving.tables import safe_cell
from serving.verdict.calibration import Calibration, CalibrationError
from serving.verdict.calibration_file import Calibrations
from serving.verdict.conformal import conformal_p_values
from serving.verdict.false_alarms import false_alarm_band, flagging_rank
from serving.verdict.summary import summarize

COMBINED, RAW_BPD, NO_MODEL = "combined", "bpd, raw", "pixels alone"
NO_FEATURES = "without features"  # only of bundles with a network of features
ALPHAS = (0.1, 0.05, 0.01)
VERDICT_ALPHA = 0.05
BINS = 60
HEADLINES = (COMBINED, NO_FEATURES, RAW_BPD, NO_MODEL)


@dataclass(frozen=True)
class Figures:
    """How one score separates one set of OOD images from in-distribution (ID) images.

    Attributes:
        auroc: probability that an OOD image scores higher than an ID image.
        standard_error: of the AUROC.
        aupr: average precision, with OOD images as positives.
        fpr95: false-alarm rate at the threshold that finds 95 % of the OOD images.
        flagged: share of the OOD images that is flagged at each of :data:`ALPHAS`, ``None`` where
            there is no verdict; for the combined score only.
    """

    auroc: float
    standard_error: float
    aupr: float
    fpr95: float
    flagged: tuple[float | None, ...] | None = None


@dataclass(frozen=True)
class Judged:
    """Images, each judged by the calibration for its kind: of the model's size, or resized.

    Attributes:
        scores: of :func:`scores_of`, those that all kinds of these images have.
        p_values: float64 ``(N,)``.
        resized: bool ``(N,)``.
        calibrated: number of calibration images by kind.
    """

    scores: dict[str, np.ndarray]
    p_values: np.ndarray
    resized: np.ndarray
    calibrated: dict[bool, int]

    @classmethod
    def of(cls, calibrations: Calibrations, images: Measured) -> Judged:
        """Judge images; there must be a calibration for each of their kinds."""
        found: dict[str, np.ndarray] = {}
        p_values = np.empty(len(images.resized))
        calibrated = {}
        for kind in np.unique(images.resized).tolist():
            calibration = calibrations.of(kind)
            assert calibration is not None
            rows = images.resized == kind
            scores = scores_of(calibration, {k: v[rows] for k, v in images.statistics.items()})
            for name, values in scores.items():
                found.setdefault(name, np.full(len(rows), np.nan))[rows] = values
            p_values[rows] = conformal_p_values(calibration.scores, scores[COMBINED])
            calibrated[kind] = len(calibration.scores)
        whole = {name: values for name, values in found.items() if not np.isnan(values).any()}
        return cls(whole, p_values, images.resized, calibrated)

    def flagged(self) -> tuple[float | None, ...]:
        """The share that is flagged at each alpha; ``None`` if a kind gets no verdict."""
        n = min(self.calibrated.values())
        return tuple(
            float((self.p_values <= alpha).mean()) if flagging_rank(n, alpha) else None
            for alpha in ALPHAS
        )


def bench(
    engine: InferenceEngine,
    id_name: str,
    id_images: Images,
    ood_sets: Mapping[str, Images],
    corrupt: int,
    resize: bool,
    out: Path,
    report: Report,
) -> Path:
    """Measure how well the default calibration detects OOD images, as :func:`write_report` says.

    Corrupted ID images are added to the sets; a kind of them without any finite likelihood is left
    out.

    Args:
        engine: with ``score``.
        id_name: describes the ID images.
        id_images: those that made the calibration, and their copies, are left out.
        ood_sets: sets of OOD images by name.
        corrupt: number of ID images that are corrupted in each way.
        resize: whether to resize images of other sizes, or to leave them out.
        out: a folder.
        report: called with each line of progress.

    Returns:
        The report's path.

    Raises:
        CalibrationError: no image of a set can be used.
    """
    calibrations, shape = engine.store.usable(), engine.image_shape
    known = digests_of(calibrations)

    def unused(report: Report) -> Iterator[Prepared]:
        return others(id_name, prepared(id_images, shape, resize), known, report)

    id_set = measured(engine, unused(report), id_name, report)
    sets = {
        name: measured(engine, prepared(images, shape, resize), name, report)
        for name, images in ood_sets.items()
    }
    found = (image for _, image in unused(lambda line: None) if isinstance(image, InputImage))
    few = list(islice(found, corrupt))
    pixels = np.stack([image.pixels for image in few])
    for name, change in CORRUPTIONS.items():
        changed = change(pixels, np.random.default_rng(0))
        its = [("", replace(image, pixels=p)) for image, p in zip(few, changed, strict=True)]
        try:
            sets[name] = measured(engine, its, name, report)
        except CalibrationError as error:
            report(f"left out {error}")
    return write_report(calibrations, engine.bundle.model_id, id_name, id_set, sets, out)


def scores_of(
    calibration: Calibration, statistics: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Scores by name; a higher score is more unusual.

    They are the combined score, the same without the network's features if the bundle has any, the
    raw bpd, the score without a model, and the score of each single statistic, which is the
    absolute value of its normal score.
    """
    rows = calibration.rows(statistics)
    normal = calibration.normal(rows)
    found = {COMBINED: calibration.surprise(normal)}
    if calibration.known is not None:
        found[NO_FEATURES] = replace(calibration, known=None).surprise(normal)
    return {
        **found,
        RAW_BPD: statistics["bpd"].astype(np.float64),
        NO_MODEL: calibration.baseline.surprise(normal[:, calibration.pixel_columns]),
        **dict(zip(calibration.names, np.abs(normal).T, strict=True)),
    }


def compare_scores(id_values: np.ndarray, ood_values: np.ndarray) -> Figures:
    """Figures of one score, given its values for ID images, ``(N,)``, and OOD images, ``(M,)``."""
    truth = np.concatenate([np.zeros(len(id_values)), np.ones(len(ood_values))])
    values = np.concatenate([id_values, ood_values])
    auroc = float(roc_auc_score(truth, values))
    return Figures(
        auroc,
        _standard_error(auroc, len(id_values), len(ood_values)),
        float(average_precision_score(truth, values)),
        float((id_values >= np.quantile(ood_values, 0.05)).mean()),
    )


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()  # names of folders need not be UTF-8


def _standard_error(auroc: float, num_id: int, num_ood: int) -> float:
    """Hanley and McNeil, "The meaning and use of the area under a ROC curve", 1982, eq. 2."""
    q1, q2 = auroc / (2 - auroc), 2 * auroc**2 / (1 + auroc)
    variance = (
        auroc * (1 - auroc) + (num_ood - 1) * (q1 - auroc**2) + (num_id - 1) * (q2 - auroc**2)
    )
    return math.sqrt(max(variance, 0.0) / (num_id * num_ood))


def write_report(
    calibrations: Calibrations,
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
    id_name = _printable(id_name)
    of_id = Judged.of(calibrations, id_images)
    judged = {_printable(name): Judged.of(calibrations, its) for name, its in ood_sets.items()}
    table: dict[str, dict[str, Figures]] = {}
    for number, (name, its) in enumerate(judged.items()):
        table[name] = {
            score: compare_scores(of_id.scores[score], values)
            for score, values in its.scores.items()
            if score in of_id.scores
        }
        table[name][COMBINED] = replace(table[name][COMBINED], flagged=its.flagged())
        _histogram(of_id.scores, its.scores, id_name, name, out / f"histogram-{number}.png")
    has_features = any(NO_FEATURES in figures for figures in table.values())
    _write_csv(table, out / "figures.csv")
    lines = [
        f"# OOD detection by {model}",
        "",
        f"ID images: {len(of_id.resized):,} of {id_name}. Each image is judged by the calibration "
        "for its kind: of the model's size, or resized.",
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
        + (f" *{NO_FEATURES}*: without those of `features.onnx`." if has_features else ""),
        "",
        "## Each statistic by itself, AUROC",
        "",
        *_singles(table),
        "",
        "## Histograms",
        "",
        "Left: the combined score, higher is more unusual. Right: bits per dimension. The first "
        "and last bars hold all values beyond the axis.",
        "",
        *(f"![{name}](histogram-{number}.png)\n" for number, name in enumerate(judged)),
    ]
    path = out / "report.md"
    write_text(path, "\n".join(lines).rstrip() + "\n")
    title, *rest = lines
    page = render(
        title.removeprefix("# "),
        _verdict(table, min(of_id.calibrated.values())),
        content=from_markdown(rest, out),
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
    for kind, n in judged.calibrated.items():
        rows = judged.resized == kind
        its = replace(judged, p_values=judged.p_values[rows], calibrated={kind: n})
        body = []
        for alpha, share in zip(ALPHAS, its.flagged(), strict=True):
            if share is None:
                body.append([f"{alpha}", "no verdict", ""])
                continue
            low, high = false_alarm_band(n, alpha, tested=int(rows.sum()))
            body.append([f"{alpha}", f"{share:.4f}", f"{low:.4f} to {high:.4f}"])
        what = "resized images" if kind else "images of the model's size"
        lines += [
            f"{rows.sum():,} {what}, calibrated on {n:,} others:",
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
    scores = dict.fromkeys(score for figures in table.values() for score in figures)
    body = [
        [score, *(f"{table[s][score].auroc:.3f}" if score in table[s] else "" for s in sets)]
        for score in scores
    ]
    return markdown_table(["score", *sets], body)


def _write_csv(table: Mapping[str, Mapping[str, Figures]], path: Path) -> None:
    with open(path, "w", newline="") as file:
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
        legend = axes.legend(fontsize=7)
        names = (f"ID: {id_name}", f"OOD: {name}")
        for text, label in zip(legend.get_texts(), names, strict=True):
            text.set(text=label, parse_math=False)  # a name is not a formula, whatever its signs
    FigureCanvasAgg(figure).print_figure(path, dpi=80)
