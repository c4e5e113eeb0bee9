"""``report.html``: what a fitting found, in one file that needs no other."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fitting.plan import Plan
from fitting.survey import SHOWN, Survey
from serving.api.responses import psnr
from serving.engine.bundle import Bundle
from serving.files import replacing
from serving.images import tile, write_png
from serving.verdict.false_alarms import false_alarm_band

ALPHAS = (0.1, 0.05, 0.01)
LEAST_EPOCHS = 3.0
LEAST_CALIBRATED = 1000
LEAST_CAUGHT = 0.9  # of each gross corruption, at the alpha of VERDICT_ALPHA
VERDICT_ALPHA = 0.05
CSS = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { border-bottom: 1px solid var(--line); padding: .3rem .8rem; text-align: left; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
img { image-rendering: pixelated; max-width: 100%; height: auto; }
code, pre { background: #8882; border-radius: 4px; padding: .1rem .3rem; }
pre { padding: .8rem; overflow-x: auto; } .bad { color: #c0392b; } figure { margin: 0; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); gap: 1rem; }
.grid img { width: 100%; } figcaption { font-size: .8rem; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Unusual:
    """One of the images that were trained on, with its verdict; pixels uint8 ``(H, W, C)``."""

    path: str
    p_value: float
    bpd: float
    pixels: np.ndarray


@dataclass(frozen=True)
class FalseAlarms:
    """At one alpha: the share of test images that was flagged, and the band where it should lie."""

    alpha: float
    flagged: float
    low: float
    high: float


@dataclass(frozen=True)
class Caught:
    """Shares of corrupted held-out images that are rejected at each of :data:`ALPHAS`; ``gross``
    ones should all be.
    """

    corruption: str
    gross: bool
    rejected: tuple[float, ...]


@dataclass(frozen=True)
class Findings:
    """All that the report shows.

    Attributes:
        plan: what was done.
        survey: of the folder.
        bundle: what came out.
        samples: uint8 ``(N, H, W, C)``.
        held_out: some test images; ``rebuilt`` their reconstructions.
        tested: test images that were judged.
        alarms: of those.
        scanned: images trained on that were judged, for ``unusual``.
        corrupted: held-out images that were corrupted, for ``caught``.
    """

    plan: Plan
    survey: Survey
    bundle: Bundle
    samples: np.ndarray
    held_out: np.ndarray
    rebuilt: np.ndarray
    tested: int
    alarms: list[FalseAlarms]
    scanned: int
    unusual: list[Unusual]
    corrupted: int
    caught: list[Caught]


def false_alarms(p_values: Sequence[float], bundle: Bundle) -> list[FalseAlarms]:
    """How often usual images are flagged, and the band for that: of this calibration, and of so few
    tests.
    """
    calibrated = int((bundle.manifest.get("calibration") or {}).get("images", 0))
    found = []
    for alpha in ALPHAS:
        flagged = float(np.mean(np.asarray(p_values) <= alpha)) if p_values else 0.0
        found.append(
            FalseAlarms(alpha, flagged, *false_alarm_band(calibrated, alpha, tested=len(p_values)))
        )
    return found


def write_report(findings: Findings, path: Path) -> None:
    """Write the page."""
    f = findings
    evaluation = f.bundle.manifest["evaluation"]
    elbo = evaluation["elbo"]
    decibels = [
        found
        for a, b in zip(f.held_out, f.rebuilt, strict=True)
        if (found := psnr(a, b)) is not None
    ]
    body = [
        f"<h1>{escape(f.plan.name)}</h1>",
        f"<p>{escape(f.bundle.model_id)}: trained on {f.survey.parts['train']:,} images of "
        f"<code>{escape(f.plan.folder)}</code> at {f.plan.image_size} × {f.plan.image_size} pixels, "
        f"{', then '.join(s.recipe for s in f.plan.stages)}, size {f.plan.size}, "
        f"{sum(s.minutes for s in f.plan.stages):.0f} minutes on the {f.plan.device}. Test images cost "
        f"<b>{elbo['bpd']:.3f} ± {elbo['standard_error']:.3f} bits per dimension</b>"
        + (f", reconstructions have {np.mean(decibels):.1f} dB.</p>" if decibels else ".</p>"),
        "<h2>The gate</h2>",
        _verdict(f),
        _caught(f),
        _alarms(f),
        "<h2>Use it</h2>",
        f"<pre>ade serve {escape(str(f.bundle.folder))}\n"
        f"ade score IMAGES --bundle {escape(str(f.bundle.folder))} --resize fit</pre>",
        "<h2>The images</h2>",
        _survey(f.survey),
        "<h2>The most unusual of the images trained on</h2>",
        f"<p>Of {f.scanned:,} that were looked at. Wrong labels, broken pictures and strays come up here.</p>",
        '<div class="grid">' + "".join(_unusual(u) for u in f.unusual) + "</div>",
        "<h2>Samples</h2>",
        _picture(tile(f.samples, 16), "samples", 3),
        "<h2>Reconstructions</h2><p>Test images above, what the model makes of them below.</p>",
        _picture(
            tile(np.concatenate([f.held_out, f.rebuilt]), len(f.held_out)), "reconstructions", 3
        ),
    ]
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(f.plan.name)}</title><style>{CSS}</style><body>{''.join(body)}</body></html>\n"
    )
    with replacing(path) as file:
        file.write(page.encode(errors="backslashreplace"))  # names of files may be no UTF-8


def epochs(training: dict[str, Any] | None, images: int) -> float:
    """How often a model has seen each of its training images, in all the runs that it came from."""
    seen = 0
    while training:
        seen += training.get("images_seen") or 0
        training = training.get("started_from")
    return seen / max(images, 1)


def weaknesses(f: Findings) -> list[str]:
    """Why the gate is not to be relied on yet; empty if nothing was found."""
    found = []
    calibrated = int((f.bundle.manifest.get("calibration") or {}).get("images", 0))
    seen = epochs(f.bundle.manifest.get("training"), f.survey.parts["train"])
    if seen < LEAST_EPOCHS:
        found.append(
            f"The model has seen each training image {seen:.1f} times; {LEAST_EPOCHS:g} or more are advisable: "
            "give it a larger --budget."
        )
    if calibrated < LEAST_CALIBRATED:
        low, high = false_alarm_band(calibrated, VERDICT_ALPHA)
        found.append(
            f"{calibrated:,} images calibrated the verdict; {LEAST_CALIBRATED:,} or more are advisable: at alpha "
            f"{VERDICT_ALPHA:g} the false-alarm rate may lie anywhere from {low:.3f} to {high:.3f}."
        )
    for alarm in f.alarms:
        if alarm.high and not alarm.low <= alarm.flagged <= alarm.high:
            found.append(
                f"At alpha {alarm.alpha:g}, {alarm.flagged:.3f} of the test images are rejected; {alarm.low:.3f} "
                f"to {alarm.high:.3f} are expected."
            )
    column = ALPHAS.index(VERDICT_ALPHA)
    for caught in f.caught:
        if caught.gross and caught.rejected[column] < LEAST_CAUGHT:
            found.append(
                f"At alpha {VERDICT_ALPHA:g}, only {caught.rejected[column]:.0%} of corrupted images are "
                f"rejected: {caught.corruption}."
            )
    return found


def _verdict(f: Findings) -> str:
    found = weaknesses(f)
    if not found:
        return (
            "<p><b>No weakness was found</b>: false alarms come at the rate that is chosen, and gross corruptions are "
            "rejected. Other OOD images may still pass: try those that you expect, <code>ade ood-bench</code>.</p>"
        )
    items = "".join(f"<li>{escape(line)}</li>" for line in found)
    return f"<p><b class=bad>Do not rely on this gate yet.</b></p><ul class=bad>{items}</ul>"


def _caught(f: Findings) -> str:
    head = "".join(f"<th>at alpha {alpha:g}" for alpha in ALPHAS)
    possible = {alarm.alpha: alarm.high > 0 for alarm in f.alarms}
    rows = "".join(
        f"<tr><td>{escape(c.corruption)}</td>"
        + "".join(
            f"<td class=n>{f'{share:.0%}' if possible[alpha] else 'no verdict'}</td>"
            for alpha, share in zip(ALPHAS, c.rejected, strict=True)
        )
        + "</tr>"
        for c in f.caught
    )
    return (
        f"<p>Of {f.corrupted:,} test images, corrupted in each of these ways, this share is rejected; the last "
        f"{sum(not c.gross for c in f.caught)} are subtle.</p><table><tr><th>corruption{head}</tr>{rows}</table>"
    )


def _survey(found: Survey) -> str:
    sizes = "".join(
        f"<tr><td>{escape(size)}</td><td class=n>{count:,}</td></tr>"
        for size, count in list(found.sizes.items())[:SHOWN]
    )
    parts = "".join(
        f"<tr><td>{part}</td><td class=n>{count:,}</td></tr>" for part, count in found.parts.items()
    )
    warnings = "".join(f"<li>{escape(line)}</li>" for line in found.warnings)
    return (
        f"<p>{found.files:,} files.</p><table><tr><th>part<th>images</tr>{parts}</table>"
        f"<table><tr><th>pixels<th>files</tr>{sizes}</table><ul class=bad>{warnings}</ul>"
        + _list("Files that cannot be used", found.broken)
        + _list("Files with the same pixels", [" = ".join(group) for group in found.twice])
    )


def _list(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li><code>{escape(line)}</code></li>" for line in lines[:SHOWN])
    more = (
        f"<p>… and {len(lines) - SHOWN:,} more, in <code>survey.json</code></p>"
        if len(lines) > SHOWN
        else ""
    )
    return f"<details><summary>{title}: {len(lines):,}</summary><ul>{items}</ul>{more}</details>"


def _alarms(f: Findings) -> str:
    rows = ""
    for alarm in f.alarms:
        if alarm.high == 0:
            rows += (
                f"<tr><td class=n>{alarm.alpha:g}</td><td colspan=3>the calibration has too few images to flag any at "
                "this rate</td></tr>"
            )
            continue
        inside = alarm.low <= alarm.flagged <= alarm.high
        rows += (
            f"<tr><td class=n>{alarm.alpha:g}</td><td class=n>{alarm.flagged:.4f}</td><td class=n>{alarm.low:.4f} to "
            f"{alarm.high:.4f}</td><td>{'as expected' if inside else '<b class=bad>not as expected</b>'}</td></tr>"
        )
    return (
        f"<p>False alarms: of {f.tested:,} test images, which nothing was fitted to, this share is rejected. It does "
        "not show how good the model is.</p>"
        f"<table><tr><th>alpha<th>rejected<th>expected (95 %)<th></tr>{rows}</table>"
    )


def _unusual(image: Unusual) -> str:
    return (
        f"<figure>{_picture(image.pixels, image.path, 2)}<figcaption>{escape(image.path)}<br>p {image.p_value:.2g}, "
        f"{image.bpd:.2f} bpd</figcaption></figure>"
    )


def _picture(pixels: np.ndarray, name: str, scale: int) -> str:
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    size = (picture.width * scale, picture.height * scale)
    data = base64.b64encode(write_png(pixels)).decode()
    return f'<img alt="{escape(name)}" width={size[0]} height={size[1]} src="data:image/png;base64,{data}">'
