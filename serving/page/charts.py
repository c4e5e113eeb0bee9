"""Draws a score as HTML and SVG: verdict, place among the calibration images, reasons, parts.

The classes are those of ``ade_base/style.css``, so that reports can use the same pieces.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from html import escape

import numpy as np

from ade_base.brand import percent, rounded
from ade_client.contract import Unusual
from serving.api.operations.score import DIGITS
from serving.verdict.calibration import Calibration
from serving.verdict.conformal import SLACK
from serving.verdict.false_alarms import flagging_rank
from serving.verdict.statistics import meaning

WIDTH = 520
BINS = 52
# How far the axis may extend for an image outside the range of the calibration images.
BEYOND = 1.35
FAMILIES = 4  # number of statistics that are named as reasons


def empty(text: str) -> str:
    """A placeholder for a result."""
    return f'<div class="ade-empty">{escape(text)}</div>'


def problem(text: str) -> str:
    """The reason why there is no result, in its place."""
    return f'<div class="ade-empty ade-problem">{escape(text)}</div>'


def caption(text: str) -> str:
    """What belongs to a picture."""
    return f'<div class="ade-caption"><p>{escape(text)}</p></div>'


def reasons(calibration: Calibration, explain: Sequence[Unusual], alpha: float) -> str:
    """The number of unusual statistics at a level, the number expected by chance, and their kinds.

    A statistic's two-sided p-value is a multiple of ``2 / (n + 1)`` for n calibration images. The
    level is the smallest of these if alpha, at which an image can be rejected, is below it.

    Args:
        calibration: of which the p-values are.
        explain: every statistic of an image, the most unusual first.
        alpha: the level.
    """
    step = 2 / (len(calibration.reference) + 1)
    level = max(alpha, step)
    # Half a unit more than the level: answers have six digits.
    unusual = [one for one in explain if one.p_value <= level + 0.5 * 10**-DIGITS]
    families: dict[str, list[float]] = defaultdict(list)
    for one in unusual:
        families[meaning(one.statistic)].append(one.p_value)
    count = len(explain)
    verb = "is" if len(unusual) == 1 else "are"
    head = (
        f"<strong>{len(unusual)} of {count} measurements</strong> of this image {verb} unusual. "
        f"For an in-distribution image, about {count * step * math.floor(level / step + 1e-9):.1f} "
        "would be."
    )
    rows = sorted(families.items(), key=lambda item: (-len(item[1]), min(item[1])))[:FAMILIES]
    listed = "".join(f"<li><b>{len(found)}</b> {escape(words)}</li>" for words, found in rows)
    rest = len(unusual) - sum(len(found) for _, found in rows)
    listed += f"<li><b>{rest}</b> others</li>" if rest else ""
    return (
        f'<div class="ade-part"><h3>Reasons</h3><p>{head} The verdict judges all of them together.'
        f"</p>{f'<ul class=ade-counts>{listed}</ul>' if listed else ''}</div>"
    )


def what_if(calibration: Calibration, alpha: float, per_day: int) -> str:
    """What a level means for a day of images: false alarms, and the corrupted images caught.

    Args:
        calibration: of the way that the images take to the model.
        alpha: the level.
        per_day: images per day.
    """
    count = len(calibration.scores)
    rank = flagging_rank(count, alpha)
    if rank == 0:
        note = calibration.too_small(alpha) or ""
        return (
            f'<div class="ade-part"><p><b>No image can be rejected:</b> {escape(note)}.</p></div>'
        )
    band = calibration.false_alarm_band(alpha, tested=per_day)
    low, high = (round(share * per_day) for share in band)
    shown = rounded(per_day * calibration.false_alarm_rate(alpha))
    caught = calibration.caught(alpha)
    said = (
        f"<p><b>About {shown} false {'alarm' if shown == '1' else 'alarms'} per day</b> among "
        f"{per_day:,} images like the calibration images; {low:,} to {high:,} with a probability "
        f"of 95 %, for a calibration with {count:,} images.</p>"
    )
    if not caught:
        return (
            f'<div class="ade-part">{said}<p><small>This calibration does not say which corrupted '
            "images it would reject: <code>ade calibrate</code> measures it.</small></p></div>"
        )
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="ade-share">'
        f'<span style="width: {100 * share:.1f}%"></span></td>'
        f'<td class="ade-number">{percent(share)}</td></tr>'
        for name, share in caught.items()
    )
    tested = max(map(len, calibration.corrupted.values()))
    return (
        f'<div class="ade-part">{said}<table class="ade-table ade-caught"><caption>'
        f"Share rejected of {tested:,} images corrupted in each of these ways</caption>"
        f"<tbody>{rows}</tbody></table></div>"
    )


def explain_table(explain: Sequence[Unusual]) -> str:
    """The statistics in a table: name, description, value, p-value."""
    rows = "".join(
        f"<tr><td><code>{escape(r.statistic).replace('_', '_<wbr>')}</code>"
        f"<br><small>{escape(meaning(r.statistic))}"
        f'</small></td><td class="ade-number">{r.value:.3g}</td>'
        f'<td class="ade-number">{r.p_value:.2g}</td></tr>'
        for r in explain
    )
    return (
        '<div class="ade-part"><table class="ade-table"><caption>The most unusual statistics'
        '</caption><thead><tr><th>statistic</th><th class="ade-number">value</th>'
        f'<th class="ade-number">p</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def parts_chart(parts: dict[str, float], bpd: float) -> str:
    """Horizontal bars, one per part, bits per dimension; negative ones extend to the left.

    The constant part, dequantization, is named in the caption: its bar would dwarf the others.
    """
    rows = [(name, value) for name, value in parts.items() if name != "dequantization"]
    constant = parts.get("dequantization", 0.0)
    caption = (
        f"{bpd:.3f} bits per dimension = {constant:g} for 8-bit pixels of equal probability, plus "
        "these parts; a negative part is what the model saves."
    )
    chart = _bars(rows, "parts of the score", "+.3f")
    return f'<div class="ade-part"><h3>Likelihood</h3><p><small>{caption}</small></p>{chart}</div>'


def levels_chart(
    parts: dict[str, float], latent_shapes: Sequence[tuple[int, int, int]], num_dims: int
) -> str:
    """Bars of the bits of an image in each latent level.

    Args:
        parts: of its score, bits per dimension.
        latent_shapes: ``(c, h, w)`` of each level, coarsest first.
        num_dims: values of the image.
    """
    rows = [
        (f"level {i}: {c}×{h}×{w}", parts[f"kl_{i}"] * num_dims)
        for i, (c, h, w) in enumerate(latent_shapes)
    ]
    return (
        '<div class="ade-part"><h3>Bits of the image by latent level, 0 is the coarsest</h3>'
        f"{_bars(rows, 'bits by latent level', ',.0f')}</div>"
    )


def _bars(rows: Sequence[tuple[str, float]], label: str, form: str) -> str:
    low = min(0.0, *(v for _, v in rows))
    high = max(0.0, *(v for _, v in rows))
    left = 9.5 * max(len(name) for name, _ in rows)  # on a phone, letters are larger
    row_height, room = 28, 64
    low_room = room if low < 0 else 0  # for the numbers of negative bars
    scale = (WIDTH - left - room - low_room) / (high - low or 1)
    zero = left + low_room - low * scale
    bars = []
    for i, (name, value) in enumerate(rows):
        y = i * row_height
        size = max(1.0, abs(value) * scale)
        x = zero if value >= 0 else zero - size
        at, anchor = (zero + size + 6, "start") if value >= 0 else (x - 6, "end")
        bars.append(
            f'<text x="0" y="{y + 18}" class="ade-axis">{escape(name)}</text>'
            f'<rect x="{x:.1f}" y="{y + 4}" width="{size:.1f}" height="19" rx="3" class="ade-bar"/>'
            f'<text x="{at:.1f}" y="{y + 18}" text-anchor="{anchor}">{value:{form}}</text>'
        )
    # A screen reader reads the label in place of the texts inside.
    values = "; ".join(f"{name}, {value:{form}}" for name, value in rows)
    return _svg("".join(bars), len(rows) * row_height, f"{label}: {values}")


def place_chart(calibration: Calibration, ood_score: float, alpha: float) -> str:
    """A histogram of the calibration images' scores, with the level and the mark of an image."""
    reference = calibration.scores
    count = len(reference)
    rank = flagging_rank(count, alpha)
    level = float(reference[count - rank]) + SLACK if rank else None
    low = float(reference[0])
    high = float(reference[-1]) if level is None else max(float(reference[-1]), level)
    most = low + BEYOND * (high - low)
    is_outside = ood_score > most
    left, right = min(low, ood_score), min(max(high, ood_score), most)
    pad = 0.03 * (right - left)
    left, right = left - pad, right + pad
    top, base, height = 30, 140, 184

    def place(value: float) -> float:
        return (value - left) / (right - left) * WIDTH

    counts, edges = np.histogram(reference, BINS, (left, right))
    step = WIDTH / BINS
    bars = []
    for i, number in enumerate(counts):
        if number:
            size = max(1.5, (base - top) * float(np.sqrt(number / counts.max())))
            kind = "ade-accepted" if level is None or edges[i] < level else "ade-rejected"
            bars.append(
                f'<rect x="{i * step + 0.5:.1f}" y="{base - size:.1f}" width="{step - 1:.1f}" '
                f'height="{size:.1f}" class="{kind}"/>'
            )
    axis = (
        f'<line x1="0" x2="{WIDTH}" y1="{base}" y2="{base}" class="ade-base"/>'
        f'<text x="0" y="{height - 4}" class="ade-axis ade-end">less unusual</text>'
        f'<text x="{WIDTH}" y="{height - 4}" text-anchor="end" class="ade-axis ade-end">'
        "more unusual →</text>"
    )
    shown = WIDTH - 10.0 if is_outside else place(ood_score)
    if level is not None:
        x = place(level)
        name = f"rejected at {percent(alpha)}"
        at, anchor = (x - 6, "end") if x > WIDTH - 150 else (x + 6, "start")
        axis += (
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top - 4}" y2="{base}" class="ade-level"/>'
            f'<text x="{at:.1f}" y="{base + 19}" text-anchor="{anchor}" class="ade-level-name">'
            f"{name}</text>"
        )
    anchor = "end" if shown > WIDTH - 120 else "start"
    text = "this image, far outside" if is_outside else "this image"
    mark = (
        f'<path d="M{shown:.1f} {base}V{top - 8}" class="ade-mark"/>'
        f'<path d="M{shown - 6:.1f} {base - 9}h12l-6 9z" class="ade-mark" stroke-width="0"/>'
        f'<text x="{shown + (-8 if anchor == "end" else 8):.1f}" y="{top - 10}" '
        f'text-anchor="{anchor}" class="ade-mark-name">{text}{" →" if is_outside else ""}</text>'
    )
    label = f"{count} calibration images by how unusual they are"
    if level is not None:
        label += f"; this image is {'beyond' if ood_score > level else 'within'} the level of "
        label += "rejection"
    chart = _svg("".join(bars) + axis + mark, height, label)
    return (
        '<div class="ade-part"><h3>Place among the calibration images</h3>'
        f"{chart}<p><small>{count:,} held-out images, by how unusual all their statistics are "
        "together. Bar heights are square roots, so that single images can be seen.</small></p>"
        "</div>"
    )


def histogram_chart(reference: np.ndarray, value: float) -> str:
    """A histogram of the calibration images' bits per dimension, with the mark of an image."""
    low = min(float(reference.min()), value) - 0.1
    high = max(float(reference.max()), value) + 0.1
    counts, edges = np.histogram(reference, BINS, (low, high))
    base, height = 120, 146
    step = WIDTH / BINS
    bars = [
        f'<rect x="{i * step + 0.5:.1f}" y="{base - (base - 26) * c / counts.max():.1f}" '
        f'width="{step - 1:.1f}" height="{(base - 26) * c / counts.max():.1f}" class="ade-bar"/>'
        for i, c in enumerate(counts)
        if c
    ]
    x = (value - low) / (high - low) * WIDTH
    anchor = "end" if x > WIDTH - 150 else "start"
    mark = (
        f'<line x1="{x:.1f}" y1="8" x2="{x:.1f}" y2="{base}" class="ade-mark"/>'
        f'<text x="{x + (-8 if anchor == "end" else 8):.1f}" y="18" text-anchor="{anchor}" '
        f'class="ade-mark-name">this image: {value:.2f}</text>'
    )
    ticks = "".join(
        f'<text x="{(t - low) / (high - low) * WIDTH:.1f}" y="{height - 6}" text-anchor="middle" '
        f'class="ade-axis">{t:g}</text>'
        for t in _ticks(float(edges[0]), float(edges[-1]))
    )
    chart = _svg("".join(bars) + mark + ticks, height, "bits per dimension of calibration images")
    return (
        '<div class="ade-part"><h3>Bits per dimension of the calibration images</h3>'
        f"{chart}<p><small>Likelihood alone decides little: an out-of-distribution image can have "
        "as many bits per dimension as an in-distribution one.</small></p></div>"
    )


def _ticks(low: float, high: float) -> list[float]:
    """At most eight or nine round numbers between two others."""
    least = (high - low) / 8
    unit = 10.0 ** math.floor(math.log10(least))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= least)
    return [float(t) + 0.0 for t in np.arange(np.ceil(low / step) * step, high, step)]  # no -0


def _svg(content: str, height: int, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}" '
        f'class="ade-chart">{content}</svg>'
    )
