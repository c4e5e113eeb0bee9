"""The report of a comparison: our figures beside the paper's, its claims, samples and curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ade_base.files import write_text
from ade_base.reports import markdown_table
from extensions.comparison.judging import judge_claims
from extensions.comparison.paper import (
    CITED,
    NOT_RUN,
    PAPER,
    SEED_SPREAD_BPD,
    SEED_SPREAD_DISTANCE,
)
from extensions.comparison.pictures import GRID, curve_pictures, sample_pictures, samples_name
from extensions.comparison.rows import (
    EFFICIENTNET,
    INCEPTION,
    SMOOTHING,
    SPACES,
    Measured,
    Row,
    keep_rows,
    number_text,
    used_spaces,
)
from training.recipes import recipe_names
from training.runs import RunError
from training.weights import count_weights

COLUMNS = 3  # of grids of samples
LONGEST_WHY = 200  # characters of the reason why a run failed, which may fill pages


def write_comparison(rows: Sequence[Row], out: Path, device: torch.device) -> Path:
    """Write ``OUT/report.md`` with its pictures, and ``OUT/rows.json``.

    Args:
        rows: from :func:`extensions.comparison.rows.read_rows`.
        out: the comparison's folder.
        device: for the sample grids.

    Returns:
        The report's path.

    Raises:
        RunError: there are no rows.
    """
    order = list(recipe_names())
    rows = sorted(rows, key=lambda row: (order.index(row.system), row.seed))
    if not rows:
        raise RunError(f"{out} holds no runs to report on")
    pictures = out / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    systems = list(dict.fromkeys(row.system for row in rows))
    sizes = " and ".join(sorted({row.config.size for row in rows}))
    data = " and ".join(sorted({row.data for row in rows}))
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
            if any(row.rescues for row in rows)
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


def _mark(row: Row, space: str) -> str:
    """A remark on a figure in features that the model was trained against."""
    found = row.distance(space)
    return "" if found is None or found.is_independent else " (not independent)"


def _table(rows: Sequence[Row]) -> list[str]:
    spaces = used_spaces(rows)
    columns = [SPACES[space] for space in spaces]
    header = ["system", "images", "f", "adv", "mle", "BPD", "IWAE", *columns, "paper: BPD", "FID"]
    return markdown_table(header, [_table_row(row, spaces) for row in rows])


def _table_row(row: Row, spaces: Sequence[str]) -> list[str]:
    config, measured, paper = row.config, row.measured, PAPER[row.system]
    has = (config.model.flow_scales > 0, config.discriminator is not None, config.coverage)
    about = [row.label, f"{row.learned / 1000:,.0f}k", *("✓" if one else "" for one in has)]
    cited = [
        ("[{}]" if paper.bracketed else "{}").format(number_text(paper.bpd, 1)),
        number_text(paper.fid, 1) + paper.mark,
    ]
    if measured is None:
        why = f"**failed: {_short(row.failure)}**" if row.failure else "not finished"
        return [*about, why, *[""] * (1 + len(spaces)), *cited]
    bpd = iwae = "–"
    bracket = "[{}]" if config.inference_share else "{}"
    if measured.bpd is not None:
        error = number_text(measured.bpd_error, 3)
        bpd = bracket.format(f"{number_text(measured.bpd, 3)} ± {error}")
    if (bound := measured.bound) is not None:
        elbo = "" if bound.elbo is None else f" (ELBO {number_text(bound.elbo, 3)})"
        iwae = bracket.format(number_text(bound.bpd, 3) + elbo)
    return [*about, bpd, iwae, *(_distance(row, space) for space in spaces), *cited]


def _distance(row: Row, space: str) -> str:
    found = row.distance(space)
    return number_text(found.frechet if found else None, 1) + _mark(row, space)


def _short(why: str) -> str:
    return why if len(why) <= LONGEST_WHY else f"{why[:LONGEST_WHY]}…"


def _notes(rows: Sequence[Row]) -> list[str]:
    """How each column was measured; for which rows, if it differs between rows."""
    columns: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for column, how in _how(row.measured).items() if row.measured else ():
            columns.setdefault(column, {}).setdefault(how, []).append(row.label)
    lines = ["Ticks: f, with a flow; adv, with a discriminator; mle, trained by likelihood."]
    for column, hows in columns.items():
        parts = [
            how + (f" ({', '.join(labels)})" if len(hows) > 1 else "")
            for how, labels in hows.items()
        ]
        lines.append(f"{column}: {'; '.join(parts)}.")
    flows = {row.config.size for row in rows if row.system == "real-nvp"}
    for applies, note in (
        (
            "IWAE" in columns,
            "Compare an IWAE with another one, or with the ELBO beside it, which is of the same "
            "images, but not with BPD.",
        ),
        (
            flows - {"paper"},
            "real-nvp at the sizes tiny and small has channel couplings and rotations instead of "
            "checkerboards: it is not the published network.",
        ),
        (
            "paper" in flows,
            "real-nvp at the size paper has the published masks, but also learned rotations before "
            "its channel couplings and no batch normalisation.",
        ),
        (
            any(PAPER[row.system].mark for row in rows),
            "†: computed by the paper's authors with provided weights.",
        ),
        (
            any(_mark(row, EFFICIENTNET) for row in rows),
            "Not independent: the model was trained against these features.",
        ),
    ):
        lines += [note] * bool(applies)
    return [" ".join(lines)]


def _how(measured: Measured) -> dict[str, str]:
    found = {}
    if measured.bpd is not None:
        found["BPD"] = (
            f"the ELBO of {measured.images:,} held-out images ({measured.split}), "
            "± its standard error; in brackets where an inference network was trained for a frozen "
            "generator"
        )
    if (bound := measured.bound) is not None:
        found["IWAE"] = f"iwae-{bound.draws} of the first {bound.images:,} of them"
    for space, value in measured.distances.items():
        found[SPACES[space]] = (
            f"between {value.samples:,} mean samples and {value.reference}"
            + ("" if space == INCEPTION else "; it is not the FID")
            + ("" if value.is_reliable else "; unreliable, of fewer images than features")
        )
    return found


def _claims(rows: Sequence[Row]) -> list[str]:
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
        numbers = ((row.bpd, row.bpd_mark), (row.fid, row.mark))
        texts = ["–" if value is None else f"{value:g}{mark}" for value, mark in numbers]
        body.append([row.data, row.group, row.model, *texts])
    note = (
        "Cited from the paper's Tables 3 and 4: none of these was trained or measured here. Cells "
        "that the copy we read has lost are left out, and so are LSUN's, Inception scores and "
        "models with nothing else. The paper's authors "
        "computed † with provided weights and ‡ by training with provided code."
    )
    not_run = ["Not run here:", "", *(f"- {what}" for what in NOT_RUN)]
    return [*markdown_table(header, body), "", note, "", *not_run]


def _further(rows: Sequence[Row]) -> list[str]:
    spaces = [s for s in used_spaces(rows) if s != INCEPTION]
    header = ["system", "PSNR, dB", "GAN-train"]
    for space in spaces:
        short = SPACES[space].removeprefix("Fréchet ")
        header += [f"precision {short}", f"recall {short}"]
    header.append("Fréchet of density samples")
    body = []
    for row in rows:
        measured = row.measured
        if measured is None:
            continue
        is_exact = measured.bpd is not None and measured.psnr is None
        psnr = "exact" if is_exact else number_text(measured.psnr, 1)
        cells = [row.label, psnr, _percent(measured.gan_train)]
        for space in spaces:
            found = row.distance(space)
            both = (found.precision, found.recall) if found else (None, None)
            cells += [number_text(value) + _mark(row, space) for value in both]
        body.append([*cells, number_text(measured.density, 1)])
    text = "GAN-test is not defined for models without classes."
    real = [row.measured.gan_train_of_real for row in rows if row.measured]
    known = next((value for value in real if value is not None), None)
    if known is not None:
        text += f" GAN-train of the same number of real images: {_percent(known)}."
    return [*markdown_table(header, body), "", text]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _budgets(rows: Sequence[Row]) -> list[str]:
    body = []
    for row in rows:
        counts, inference = count_weights(row.config), row.for_inference
        extra = f", of them {inference:,} for the inference network" if inference else ""
        columns = {
            "system": row.label,
            "seed": str(row.seed),
            "images seen": f"{row.images:,}{extra}",
            "steps": f"{row.step:,}",
            "minutes": f"{row.seconds / 60:.1f}",
            "images/s": f"{row.images / row.seconds:.0f}" if row.seconds else "–",
            "weights": f"{counts.model:,}",
            "in the flow": _percent(counts.flow_share),
            "discriminator": f"{counts.discriminator:,}",
            "rescues": str(row.rescues),
        }
        body.append(list(columns.values()))
    note = (
        "The paper's f adds 1.4 % of weights, by which its generator is narrowed. Ours is narrowed "
        "at the size `paper` alone, where v-ade and av-ade have as many weights as vae and av-gde "
        "within 1 % (inference networks included); for images of 32x32 pixels, gan has 25 % more "
        "than av-ade, and av-ade-s2 19 % more. The images are those that a model sees. In "
        "each of its steps, a discriminator sees a further batch of training images."
    )
    return [*markdown_table(list(columns), body), "", note]


def _gallery(systems: Sequence[str], shown: Sequence[Row]) -> list[str]:
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
        titles = [f"{row.system}, seed {row.seed}, {row.learned:,} images" for row in rows]
        links = [f"![samples of {row.label}](pictures/{samples_name(row)})" for row in rows]
        lines += [*markdown_table(titles, [links]), ""]
    absent = [name for name in systems if name not in {row.system for row in shown}]
    if absent:
        lines += [
            f"No samples are shown of {', '.join(absent)}: no measured run, and no earlier "
            "picture of one, is in the folder.",
            "",
        ]
    return lines
