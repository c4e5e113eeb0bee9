"""The report of a comparison: our figures beside the paper's, its claims, samples and curves."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ade_model.checkpoint import load_model
from serving.brand import verdict_card
from serving.files import write_text
from serving.images import tile
from serving.reports import from_markdown, markdown_table, render
from training.comparison.compare import SMOOTHING, keep_rows
from training.comparison.paper import (
    BPD_ERROR,
    CITED,
    PAPER,
    SEED_SPREAD_BPD,
    SEED_SPREAD_DISTANCE,
    Finding,
    claims,
)
from training.evaluate import sample_images
from training.measure import EFFICIENTNET, INCEPTION, RESNET20
from training.recipes import recipe_names
from training.runs import RunError, latest_checkpoint
from training.weights import count_weights

GRID = 8  # samples per side
COLUMNS = 3  # of grids of samples
SAME_BUDGET = 0.01  # relative difference up to which numbers of images count as equal
LONGEST_WHY = 200  # characters of the reason why a run failed, which may fill pages
PLURALS = {Finding.HOLDS: "hold", Finding.FAILS: "do not hold here"}
SPACES = {RESNET20: "Fréchet ResNet-20", EFFICIENTNET: "Fréchet EfficientNet", INCEPTION: "FID 50k"}
CAPTIONS = {
    "bpd": "L_C, bits per dimension",
    "quality_loss": "L_Q, nats",
    "d_loss": "discriminator, nats",
}


def write_comparison(rows: Sequence[dict[str, Any]], out: Path, device: torch.device) -> Path:
    """Write ``OUT/report.md`` with its pictures, ``OUT/report.html`` and ``OUT/rows.json``.

    The two reports say the same; the HTML page needs no other file.

    Args:
        rows: from :func:`training.comparison.compare.read_rows`.
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
    # For each system the first seed that was measured, or else its first seed.
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        known = best.setdefault(row["config"].recipe, row)
        if known["measured"] is None and row["measured"] is not None:
            best[row["config"].recipe] = row
    first = list(best.values())
    sizes = " and ".join(sorted({row["config"].size for row in rows}))
    data = " and ".join(sorted({row["data"] for row in rows}))
    lines = [
        f"# {len(rows)} runs of {len(first)} systems, size {sizes}, on {data}",
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
    ]
    _sample_pictures(first, pictures, device)
    lines += [
        f"{GRID**2} mean samples of each system, as the discriminator sees them. Systems whose "
        "latents have the same shape use the same noise.",
        "",
    ]
    lines += _gallery(first)
    lines += [
        "",
        "## Training curves",
        "",
        f"Running means over {SMOOTHING} logged steps. Sudden high peaks are of steps before a "
        "rescue: training diverged, and resumed with the averaged weights.",
        "",
    ]
    for file, caption in _curve_pictures(rows, pictures):
        lines += [f"![{caption}](pictures/{file})", ""]
    keep_rows(rows, out)
    path = out / "report.md"
    write_text(path, "\n".join(lines).rstrip() + "\n")
    title, *rest = lines
    page = render(title.removeprefix("# "), _verdict(rows), content=from_markdown(rest, out))
    write_text(out / "report.html", page)
    return path


def _verdict(rows: Sequence[dict[str, Any]]) -> str:
    """The head of the page: how many of the paper's claims these runs confirm."""
    found = Counter(finding for finding, _ in _judged(rows))
    total = sum(found.values())
    if not total:
        return verdict_card(
            "no_verdict", "Too few systems were measured.", heading="No verdict yet"
        )
    counts = ", ".join(
        f"{count} {PLURALS.get(finding, singular) if count > 1 else singular}"
        for finding, count in found.most_common()
        for singular in [finding.value.strip("*")]
    )
    holds = found[Finding.HOLDS]
    return verdict_card(
        "accept" if 2 * holds >= total else "no_verdict",
        f"Of {total} claims of the paper that these runs can test: {counts}.",
        notes=["Sizes and budgets are those of the rows: compare rows with each other."],
        heading=f"{holds} of {total} claims hold here",
    )


def _figures(row: dict[str, Any]) -> dict[str, float | None]:
    measured = row["measured"] or {}
    mean = measured.get("distances", {}).get("mean", {})
    return {
        "bpd": measured.get("elbo", {}).get("bpd"),
        **{space: mean.get(space, {}).get("frechet") for space in (RESNET20, EFFICIENTNET)},
        INCEPTION: measured.get("inception", {}).get("fid", {}).get("50000", {}).get("fid"),
    }


def _deciding(row: dict[str, Any]) -> dict[str, float | None]:
    """The figures that decide claims: reliable ones, and the standard error of the bits."""
    measured = row["measured"] or {}
    found = dict(measured.get("distances", {}).get("mean", {}))
    found[INCEPTION] = measured.get("inception", {}).get("fid", {}).get("50000", {})
    unreliable = dict.fromkeys(s for s, value in found.items() if "rank_deficient" in value)
    error = measured.get("elbo", {}).get("standard_error")
    return {**_figures(row), **unreliable, BPD_ERROR: error}


def _used_spaces(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [space for space in SPACES if any(_figures(row)[space] is not None for row in rows)]


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if abs(value) < 1e4 else f"{value:.1e}"


def _mark(row: dict[str, Any], space: str) -> str:
    """A remark on a figure in features that the model was trained against."""
    distances = (row["measured"] or {}).get("distances", {}).get("mean", {})
    return " (not independent)" if distances.get(space, {}).get("independent") else ""


def _label(row: dict[str, Any]) -> str:
    recipe: str = row["config"].recipe
    return f"{recipe} (seed {row['seed']})" if row["seed"] else recipe


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    spaces = _used_spaces(rows)
    header = [
        "system",
        "images",
        "f",
        "adv",
        "mle",
        "BPD",
        "IWAE",
        *(SPACES[s] for s in spaces),
        "class score",
        "paper: BPD",
        "IS",
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
        about = [_label(row), f"{_learned(row) / 1000:,.0f}k", *marks]
        bracket = "[{}]" if config.inference_share else "{}"
        cited = [
            ("[{}]" if paper.bracketed else "{}").format(_number(paper.bpd, 1)),
            _number(paper.inception_score, 1),
            _number(paper.fid, 1),
        ]
        if measured is None:
            why = _short(row["failure"]["why"]) if row["failure"] else "not finished"
            body.append(
                [
                    *about,
                    f"**failed: {why}**" if row["failure"] else why,
                    *[""] * (2 + len(spaces)),
                    *cited,
                ]
            )
            continue
        figures = _figures(row)
        elbo = measured.get("elbo")
        bpd = (
            bracket.format(f"{_number(elbo['bpd'], 3)} ± {_number(elbo['standard_error'], 3)}")
            if elbo
            else "–"
        )
        iwae = next(
            (
                bracket.format(_number(v["bpd"], 3))
                for k, v in measured.items()
                if k.startswith("iwae-")
            ),
            "–",
        )
        score = (
            measured.get("distances", {})
            .get("mean", {})
            .get(RESNET20, {})
            .get("class_score", {})
            .get("mean")
        )
        body.append(
            [
                *about,
                bpd,
                iwae,
                *(_number(figures[s], 1) + _mark(row, s) for s in spaces),
                _number(score),
                *cited,
            ]
        )
    return markdown_table(header, body)


def _short(why: str) -> str:
    return why if len(why) <= LONGEST_WHY else f"{why[:LONGEST_WHY]}…"


def _notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """How each column was measured; for which rows, if it differs between rows."""
    columns: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for column, how in _how(row["measured"] or {}).items():
            columns.setdefault(column, {}).setdefault(how, []).append(_label(row))
    lines = []
    for column, hows in columns.items():
        parts = [
            how + (f" ({', '.join(labels)})" if len(hows) > 1 else "")
            for how, labels in hows.items()
        ]
        lines.append(f"{column}: {'; '.join(parts)}.")
    if any(
        RESNET20 in row["measured"].get("distances", {}).get("mean", {})
        for row in rows
        if row["measured"]
    ):
        lines.append("Class score: the Inception score's formula on the ResNet-20's ten classes.")
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
    for name, value in measured.items():
        if name.startswith("iwae-"):
            found["IWAE"] = f"{name} of the first {value['images']:,} of them"
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


def _judged(rows: Sequence[dict[str, Any]]) -> list[tuple[Finding, str]]:
    """What these runs say about each claim that they can test, and the claim with its figures."""
    found = []
    for claim in claims(tuple(_used_spaces(rows))):
        chosen = _comparable([_measured_runs(rows, name) for name in claim.systems])
        if chosen is None:
            continue
        budget = _shared_budget(chosen)
        if budget is None:
            *first, last = (f"{_learned(row):,}" for row in chosen)
            counts = f"{', '.join(first)} and {last}"
            found.append((Finding.UNDECIDED, f"{claim.text} (after {counts} images)"))
            continue
        figures = [_deciding(row) for row in chosen]
        shown = [
            f"{SPACES.get(name, 'BPD')} {' against '.join(_number(f[name]) for f in figures)}"
            for name in claim.figures
            if all(f[name] is not None for f in figures)
        ]
        if shown:
            text = f"{claim.text} (after {budget}: {'; '.join(shown)})"
            found.append((claim.judge(figures), text))
    return found


def _claims(rows: Sequence[dict[str, Any]]) -> list[str]:
    judged = _judged(rows)
    if not judged:
        return ["Too few systems were measured."]
    return [
        *(f"- {finding.value}: {text}" for finding, text in judged),
        "",
        f"A difference decides only if it exceeds the spread of seeds: {SEED_SPREAD_BPD} bits "
        f"per dimension, {100 * SEED_SPREAD_DISTANCE:.0f} % of a Fréchet distance (three seeds of "
        "av-ade, size tiny, after 80,000 images), and in bits per dimension two of its standard "
        "errors. Otherwise, where the feature spaces disagree, and after different budgets, a "
        "claim is undecided. Unreliable distances decide nothing.",
    ]


def _measured_runs(rows: Sequence[dict[str, Any]], system: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["measured"] and row["config"].recipe == system]


def _comparable(runs: list[list[dict[str, Any]]]) -> tuple[dict[str, Any], ...] | None:
    """Choose one run of each system: among runs with equal budgets, those that learned most.

    Of several it is runs with the same seed, which were trained together, and of those the first;
    ``None`` if there are no runs of all systems that one version of the program trained on the same
    data and at the same size, and that were measured alike.
    """
    candidates = [rows for rows in itertools.product(*runs) if _are_alike(rows)]
    candidates = [rows for rows in candidates if _shared_budget(rows)] or candidates
    most = max((min(map(_learned, rows)) for rows in candidates), default=0)

    def preference(rows: tuple[dict[str, Any], ...]) -> tuple[bool, bool]:
        is_longest = math.isclose(min(map(_learned, rows)), most, rel_tol=SAME_BUDGET)
        return is_longest, len({row["seed"] for row in rows}) == 1

    return max(candidates, key=preference, default=None)


def _are_alike(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether data, sizes, the settings that a version's recipes share, and measurements agree."""

    def shared(row: dict[str, Any]) -> tuple[object, ...]:
        config, measured = row["config"], row["measured"]
        return (
            row["data"],
            config.size,
            config.model.image_size,
            config.cooldown,
            config.ema_decay,
            measured["split"],
            measured["images"],
            measured["how"]["samples"],
            measured["how"]["efficientnet_samples"],
        )

    return len({shared(row) for row in rows}) == 1


def _shared_budget(rows: Sequence[dict[str, Any]]) -> str | None:
    """The budget that runs share: a number of images or a time; ``None`` if neither."""
    first = rows[0]
    if all(math.isclose(_learned(first), _learned(row), rel_tol=SAME_BUDGET) for row in rows):
        return f"{_learned(first):,} images"
    minutes = first["budget"]["minutes"]
    timed = minutes is not None and all(
        row["budget"]["minutes"] == minutes and row["state"]["seconds"] >= 60 * minutes
        for row in rows
    )
    return f"{minutes:g} minutes" if timed else None


def _cited() -> list[str]:
    header = ["data", "trained by", "model", "BPD", "IS", "FID"]
    body = []
    for row in CITED:
        numbers = [
            "–" if value is None else f"{value:g}{mark}"
            for value, mark in (
                (row.bpd, ""),
                (row.inception_score, row.mark),
                (row.fid, row.mark),
            )
        ]
        body.append([row.data, row.group, row.model, *numbers])
    note = (
        "Cited from the paper's Tables 3 and 4: none of these was trained or measured here. Cells "
        "that the copy we read has lost are left out, and so are LSUN's. The paper's authors "
        "computed † with provided weights and ‡ by training with provided code."
    )
    return [*markdown_table(header, body), "", note]


def _further(rows: Sequence[dict[str, Any]]) -> list[str]:
    spaces = [s for s in _used_spaces(rows) if s != INCEPTION]
    header = ["system", "PSNR, dB", "GAN-train"]
    for space in spaces:
        short = SPACES[space].removeprefix("Fréchet ")
        header += [
            f"KD×10³ {short}",
            f"precision {short}",
            f"recall {short}",
            f"F₈ {short}",
            f"F₁⸝₈ {short}",
        ]
    header.append("Fréchet of density samples")
    body = []
    for row in rows:
        measured = row["measured"]
        if measured is None:
            continue
        psnr = measured.get("psnr", {})
        cells = [
            _label(row),
            "exact"
            if psnr and psnr["exact"] == psnr["images"]
            else _number(psnr.get("mean_db"), 1),
            _percent(measured.get("gan_train", {}).get("accuracy")),
        ]
        for space in spaces:
            found = measured.get("distances", {}).get("mean", {}).get(space, {})
            kernel = found.get("kernel", {}).get("mean")
            cells += [
                _number(None if kernel is None else 1e3 * kernel) + _mark(row, space),
                *(
                    _number(found.get(group, {}).get(name)) + _mark(row, space)
                    for group, name in (
                        ("neighbours", "precision"),
                        ("neighbours", "recall"),
                        ("prd", "f8"),
                        ("prd", "f1_8"),
                    )
                ),
            ]
        cells.append(
            _number(
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
    text = (
        "KD: kernel distance. F₈ and F₁⸝₈: Sajjadi's recall and precision. GAN-test is not defined "
        "for models without classes."
    )
    if real is not None:
        text += f" GAN-train of the same number of real images: {_percent(real)}."
    return [*markdown_table(header, body), "", text]


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _images(row: dict[str, Any]) -> int:
    return int((row["state"] or {}).get("images", 0))


def _learned(row: dict[str, Any]) -> int:
    """Number of images that the system was trained on, without those for the inference network."""
    return _images(row) - _for_inference(row)


def _for_inference(row: dict[str, Any]) -> int:
    """Number of images that the inference network of a frozen generator was trained on."""
    state = row["state"] or {}
    since = state.get("inferring_since")
    return 0 if since is None else int((state["step"] - since) * row["config"].batch_size)


def _budgets(rows: Sequence[dict[str, Any]]) -> list[str]:
    body = []
    for row in rows:
        state, counts = row["state"] or {}, count_weights(row["config"])
        images, seconds, inference = _images(row), state.get("seconds", 0.0), _for_inference(row)
        extra = f", of them {inference:,} for the inference network" if inference else ""
        body.append(
            [
                _label(row),
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
        "Minutes and images/s were measured on a machine that did other work too. The paper's f "
        "adds 1.4 % of weights, by which its generator is narrowed. Ours is narrowed at the size "
        "`paper` alone, where v-ade and av-ade have as many weights as vae and av-gde within 1 % "
        "(inference networks included), gan has 25 % more than av-ade, and av-ade-s2 19 % more."
    )
    return [*markdown_table(header, body), "", note]


def _sample_pictures(rows: Sequence[dict[str, Any]], pictures: Path, device: torch.device) -> None:
    for row in rows:
        if row["run"] is not None and row["state"] is not None and row["measured"] is not None:
            model = load_model(latest_checkpoint(row["run"])).to(device)
            grid = tile(sample_images(model, GRID**2, device, with_noise=False), GRID)
            # Lossy WebP has a tenth of a PNG's size, for repositories that hold reports.
            Image.fromarray(grid).save(pictures / f"{row['config'].recipe}.webp", quality=90)


def _gallery(rows: Sequence[dict[str, Any]]) -> list[str]:
    shown = [row["config"].recipe for row in rows if row["measured"] is not None]
    lines = []
    for first in range(0, len(shown), COLUMNS):
        names = shown[first : first + COLUMNS]
        table = markdown_table(names, [[f"![samples of {n}](pictures/{n}.webp)" for n in names]])
        lines += [*table, ""]
    return lines


def _curve_pictures(rows: Sequence[dict[str, Any]], pictures: Path) -> list[tuple[str, str]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    written = []
    for name, caption in CAPTIONS.items():
        figure = Figure(figsize=(9, 4), layout="constrained")
        axes = figure.subplots()
        for i, row in enumerate(rows):
            images, values = row["curves"][name]
            if values:
                axes.plot(
                    images,
                    values,
                    label=_label(row),
                    linewidth=1.1,
                    color=f"C{i % 10}",
                    linestyle=("-", "--", ":")[i // 10 % 3],
                )
        if not axes.lines:
            continue
        if name == "bpd":
            low, high = np.percentile(
                np.concatenate([line.get_ydata() for line in axes.lines]), [0, 97]
            )
            # Values at the start or before a rescue would flatten the rest.
            axes.set_ylim(low - 0.05 * (high - low), high)
        axes.set_xlabel("images seen")
        axes.set_ylabel(caption)
        axes.grid(alpha=0.25)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=7)
        FigureCanvasAgg(figure).print_figure(pictures / f"curve-{name}.png", dpi=110)
        written.append((f"curve-{name}.png", caption))
    return written
