"""The report of a comparison: our figures beside the paper's, its claims, samples and curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ade_base.files import write_text
from ade_base.reports import markdown_table
from extensions.comparison.compare import SMOOTHING, keep_rows
from extensions.comparison.judging import judge_claims
from extensions.comparison.measure import EFFICIENTNET, INCEPTION, RESNET20
from extensions.comparison.paper import (
    CITED,
    NOT_RUN,
    PAPER,
    SEED_SPREAD_BPD,
    SEED_SPREAD_DISTANCE,
)
from extensions.comparison.pictures import GRID, curve_pictures, sample_pictures, samples_name
from extensions.comparison.rows import (
    SPACES,
    figures_of,
    for_inference,
    images_seen,
    learned,
    number_text,
    row_label,
    used_spaces,
)
from training.recipes import recipe_names
from training.runs import RunError
from training.weights import count_weights

COLUMNS = 3  # of grids of samples
LONGEST_WHY = 200  # characters of the reason why a run failed, which may fill pages


def write_comparison(rows: Sequence[dict[str, Any]], out: Path, device: torch.device) -> Path:
    """Write ``OUT/report.md`` with its pictures, and ``OUT/rows.json``.

    Args:
        rows: from :func:`extensions.comparison.compare.read_rows`.
        out: the comparison's folder.
        device: for the sample grids.

    Returns:
        The report's path.

    Raises:
        RunError: there are no rows.
    """
    order = list(recipe_names())
    rows = sorted(rows, key=lambda row: (order.index(row["config"].recipe), row["seed"]))
    if not rows:
        raise RunError(f"{out} holds no runs to report on")
    pictures = out / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    systems = list(dict.fromkeys(row["config"].recipe for row in rows))
    sizes = " and ".join(sorted({row["config"].size for row in rows}))
    data = " and ".join(sorted({row["data"] for row in rows}))
    lines = [
        f"# {len(rows)} runs of {len(systems)} systems, size {sizes}, on {data}",
        "",
        "Written by `ade compare`. The paper's figures are those of CIFAR-10 at full scale. Ours "
        "have the size and budget of their row: compare rows with each other, not with the paper.",
        "",
        "## Likelihood and samples",
        "",
        *_table(rows),
        "",
        *_notes(rows),
        "",
        "## The paper's claims, and what we found",
        "",
        *_claims(rows),
        "",
        "## Other systems in the paper",
        "",
        *_cited(),
        "",
        "## Further measures",
        "",
        *_further(rows),
        "",
        "## Budgets",
        "",
        *_budgets(rows),
        "",
        "## Samples",
        "",
        *_gallery(systems, sample_pictures(rows, pictures, device)),
        "## Training curves",
        "",
        f"Running means over {SMOOTHING} logged steps."
        + (
            " Sudden high peaks are of steps before a rescue: training diverged, and resumed with "
            "the averaged weights."
            if any((row["state"] or {}).get("rescued_at") for row in rows)
            else ""
        ),
        "",
    ]
    for file, caption in curve_pictures(rows, pictures):
        lines += [f"![{caption}](pictures/{file})", ""]
    keep_rows(rows, out)
    path = out / "report.md"
    write_text(path, "\n".join(lines).rstrip() + "\n")
    return path


def _mark(row: dict[str, Any], space: str) -> str:
    """A remark on a figure in features that the model was trained against."""
    distances = (row["measured"] or {}).get("distances", {}).get("mean", {})
    return " (not independent)" if distances.get(space, {}).get("independent") else ""


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    spaces = used_spaces(rows)
    header = [
        "system",
        "images",
        "f",
        "adv",
        "mle",
        "BPD",
        "IWAE",
        *(SPACES[s] for s in spaces),
        "paper: BPD",
        "FID",
    ]
    body = []
    for row in rows:
        config, measured, paper = row["config"], row["measured"], PAPER[row["config"].recipe]
        marks = [
            ("✓" if has else "")
            for has in (
                config.model.flow_scales > 0,
                config.discriminator is not None,
                config.coverage,
            )
        ]
        about = [row_label(row), f"{learned(row) / 1000:,.0f}k", *marks]
        bracket = "[{}]" if config.inference_share else "{}"
        cited = [
            ("[{}]" if paper.bracketed else "{}").format(number_text(paper.bpd, 1)),
            number_text(paper.fid, 1) + paper.mark,
        ]
        if measured is None:
            why = _short(row["failure"]["why"]) if row["failure"] else "not finished"
            body.append(
                [
                    *about,
                    f"**failed: {why}**" if row["failure"] else why,
                    *[""] * (1 + len(spaces)),
                    *cited,
                ]
            )
            continue
        figures = figures_of(row)
        elbo = measured.get("elbo")
        bpd = (
            bracket.format(
                f"{number_text(elbo['bpd'], 3)} ± {number_text(elbo['standard_error'], 3)}"
            )
            if elbo
            else "–"
        )
        iwae = next(
            (bracket.format(_iwae(bound)) for bound in _bounds(measured).values()),
            "–",
        )
        body.append(
            [
                *about,
                bpd,
                iwae,
                *(number_text(figures[s], 1) + _mark(row, s) for s in spaces),
                *cited,
            ]
        )
    return markdown_table(header, body)


def _bounds(measured: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The importance-weighted bounds, by name."""
    return {name: bound for name, bound in measured.items() if name.startswith("iwae-")}


def _iwae(bound: dict[str, Any]) -> str:
    """The bound, and the ELBO of the same images if it was measured."""
    text = number_text(bound["bpd"], 3)
    return f"{text} (ELBO {number_text(bound['elbo'], 3)})" if "elbo" in bound else text


def _short(why: str) -> str:
    return why if len(why) <= LONGEST_WHY else f"{why[:LONGEST_WHY]}…"


def _notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How each column was measured; for which rows, if it differs between rows."""
    columns: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for column, how in _how(row["measured"] or {}).items():
            columns.setdefault(column, {}).setdefault(how, []).append(row_label(row))
    lines = ["Ticks: f, with a flow; adv, with a discriminator; mle, trained by likelihood."]
    for column, hows in columns.items():
        parts = [
            how + (f" ({', '.join(labels)})" if len(hows) > 1 else "")
            for how, labels in hows.items()
        ]
        lines.append(f"{column}: {'; '.join(parts)}.")
    if any(_bounds(row["measured"] or {}) for row in rows):
        lines.append(
            "Compare an IWAE with another one, or with the ELBO beside it, which is of the same "
            "images, but not with BPD."
        )
    flows = {row["config"].size for row in rows if row["config"].recipe == "real-nvp"}
    if flows - {"paper"}:
        lines.append(
            "real-nvp at the sizes tiny and small has channel couplings and rotations instead of "
            "checkerboards: it is not the published network."
        )
    if "paper" in flows:
        lines.append(
            "real-nvp at the size paper has the published masks, but also learned rotations before "
            "its channel couplings and no batch normalisation."
        )
    if any(PAPER[row["config"].recipe].mark for row in rows):
        lines.append("†: computed by the paper's authors with provided weights.")
    if any(_mark(row, EFFICIENTNET) for row in rows):
        lines.append("Not independent: the model was trained against these features.")
    return [" ".join(lines)]


def _how(measured: dict[str, Any]) -> dict[str, str]:
    found = {}
    if "elbo" in measured:
        found["BPD"] = (
            f"the ELBO of {measured['images']:,} held-out images ({measured['split']}), "
            "± its standard error; in brackets where an inference network was trained for a frozen "
            "generator"
        )
    for name, bound in _bounds(measured).items():
        found["IWAE"] = f"{name} of the first {bound['images']:,} of them"
    for space, value in measured.get("distances", {}).get("mean", {}).items():
        found[SPACES[space]] = (
            f"between {value['samples']:,} mean samples and {value['reference']}; it is not the FID"
            + _unreliable(value)
        )
    fid = measured.get("inception", {}).get("fid", {}).get("50000")
    if fid:
        found[SPACES[INCEPTION]] = (
            f"between 50,000 mean samples and {fid['reference']}{_unreliable(fid)}"
        )
    return found


def _unreliable(distance: dict[str, Any]) -> str:
    """A remark on a Fréchet distance between singular covariances."""
    return "; unreliable, of fewer images than features" if "rank_deficient" in distance else ""


def _claims(rows: Sequence[dict[str, Any]]) -> list[str]:
    judged = judge_claims(rows)
    if not judged:
        return ["Too few systems were measured."]
    return [
        *(f"- {finding.value}: {text}" for finding, text in judged),
        "",
        "A difference decides only if it exceeds that which 95 % of two seeds do not reach: "
        f"{SEED_SPREAD_BPD} bits per dimension, {100 * SEED_SPREAD_DISTANCE:.0f} % of a Fréchet "
        "distance (from three seeds of av-ade, size tiny, after 80,000 images), and in bits per "
        "dimension two of its standard errors. Each seed is judged by itself. Otherwise, where the "
        "feature spaces or the seeds disagree, and after different budgets, a claim is undecided. "
        "Unreliable distances decide nothing.",
    ]


def _cited() -> list[str]:
    header = ["data", "trained by", "model", "BPD", "FID"]
    body = []
    for row in CITED:
        numbers = [
            "–" if value is None else f"{value:g}{mark}"
            for value, mark in (
                (row.bpd, row.bpd_mark),
                (row.fid, row.mark),
            )
        ]
        body.append([row.data, row.group, row.model, *numbers])
    note = (
        "Cited from the paper's Tables 3 and 4: none of these was trained or measured here. Cells "
        "that the copy we read has lost are left out, and so are LSUN's, Inception scores and "
        "models with nothing else. The paper's authors "
        "computed † with provided weights and ‡ by training with provided code."
    )
    not_run = ["Not run here:", "", *(f"- {what}" for what in NOT_RUN)]
    return [*markdown_table(header, body), "", note, "", *not_run]


def _further(rows: Sequence[dict[str, Any]]) -> list[str]:
    spaces = [s for s in used_spaces(rows) if s != INCEPTION]
    header = ["system", "PSNR, dB", "GAN-train"]
    for space in spaces:
        short = SPACES[space].removeprefix("Fréchet ")
        header += [f"precision {short}", f"recall {short}"]
    header.append("Fréchet of density samples")
    body = []
    for row in rows:
        measured = row["measured"]
        if measured is None:
            continue
        psnr = measured.get("psnr", {})
        cells = [
            row_label(row),
            "exact"
            if psnr and psnr["exact"] == psnr["images"]
            else number_text(psnr.get("mean_db"), 1),
            _percent(measured.get("gan_train", {}).get("accuracy")),
        ]
        for space in spaces:
            found = measured.get("distances", {}).get("mean", {}).get(space, {})
            cells += [
                number_text(found.get("neighbours", {}).get(name)) + _mark(row, space)
                for name in ("precision", "recall")
            ]
        cells.append(
            number_text(
                measured.get("distances", {}).get("density", {}).get(RESNET20, {}).get("frechet"), 1
            )
        )
        body.append(cells)
    real = next(
        (
            row["measured"]["gan_train"]["accuracy_of_real"]
            for row in rows
            if row["measured"] and row["measured"].get("gan_train")
        ),
        None,
    )
    text = "GAN-test is not defined for models without classes."
    if real is not None:
        text += f" GAN-train of the same number of real images: {_percent(real)}."
    return [*markdown_table(header, body), "", text]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _budgets(rows: Sequence[dict[str, Any]]) -> list[str]:
    body = []
    for row in rows:
        state, counts = row["state"] or {}, count_weights(row["config"])
        images, seconds, inference = images_seen(row), state.get("seconds", 0.0), for_inference(row)
        extra = f", of them {inference:,} for the inference network" if inference else ""
        body.append(
            [
                row_label(row),
                str(row["seed"]),
                f"{images:,}{extra}",
                f"{state.get('step', 0):,}",
                f"{seconds / 60:.1f}",
                f"{images / seconds:.0f}" if seconds else "–",
                f"{counts.model:,}",
                _percent(counts.flow_share),
                f"{counts.discriminator:,}",
                str(len(state.get("rescued_at", []))),
            ]
        )
    header = [
        "system",
        "seed",
        "images seen",
        "steps",
        "minutes",
        "images/s",
        "weights",
        "in the flow",
        "discriminator",
        "rescues",
    ]
    note = (
        "The paper's f adds 1.4 % of weights, by which its generator is narrowed. Ours is narrowed "
        "at the size `paper` alone, where v-ade and av-ade have as many weights as vae and av-gde "
        "within 1 % (inference networks included); for images of 32x32 pixels, gan has 25 % more "
        "than av-ade, and av-ade-s2 19 % more. The images are those that a model sees. In "
        "each of its steps, a discriminator sees a further batch of training images."
    )
    return [*markdown_table(header, body), "", note]


def _gallery(systems: Sequence[str], shown: Sequence[dict[str, Any]]) -> list[str]:
    """The grids of samples, and the systems that have none."""
    lines = []
    if shown:
        lines += [
            f"{GRID**2} mean samples of each system, as the discriminator sees them. Systems whose "
            "latents have the same shape use the same noise.",
            "",
        ]
    for first in range(0, len(shown), COLUMNS):
        rows = shown[first : first + COLUMNS]
        titles = [
            f"{row['config'].recipe}, seed {row['seed']}, {learned(row):,} images" for row in rows
        ]
        links = [f"![samples of {row_label(row)}](pictures/{samples_name(row)})" for row in rows]
        lines += [*markdown_table(titles, [links]), ""]
    absent = [name for name in systems if name not in {row["config"].recipe for row in shown}]
    if absent:
        lines += [
            f"No samples are shown of {', '.join(absent)}: no measured run, and no earlier "
            "picture of one, is in the folder.",
            "",
        ]
    return lines
