"""Pictures of numbers: bars for the parts of a score, a histogram for its place (SVG), a heat map
of its pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from serving.verdict.calibration import Unusual
from serving.verdict.statistics import meaning

WIDTH, HEIGHT = 440, 170
BINS = 48


def explain_table(reasons: Sequence[Unusual]) -> str:
    """The most unusual statistics in a table: name, what it is of, p-value."""
    rows = "".join(
        f"<tr><td><code>{escape(r.statistic)}</code><br><small>{escape(meaning(r.statistic))}</small></td>"
        f"<td>{r.value:.3g}</td><td>{r.p_value:.2g}</td></tr>"
        for r in reasons
    )
    return (
        '<table class="ade-why"><caption>The most unusual statistics</caption>'
        f"<thead><tr><th>statistic</th><th>value</th><th>p</th></tr></thead><tbody>{rows}</tbody></table>"
    )


def parts_chart(parts: dict[str, float], bpd: float) -> str:
    """Horizontal bars, one a part, bits per dimension; negative ones go left."""
    return _bars([*parts.items(), ("bpd", bpd)], f"parts of the score: {', '.join(parts)}", "+.3f")


def levels_chart(
    parts: dict[str, float], latent_shapes: Sequence[tuple[int, int, int]], num_dims: int
) -> str:
    """Bars of the bits that an image takes in each latent level.

    Args:
        parts: of its score, bits per dimension.
        latent_shapes: ``(c, h, w)`` of each level, coarsest first.
        num_dims: values of the image.
    """
    rows = [
        (f"level {i}: {c}×{h}×{w}", parts[f"kl_{i}"] * num_dims)
        for i, (c, h, w) in enumerate(latent_shapes)
    ]
    return _bars(rows, "bits by latent level", ",.0f")


def _bars(rows: Sequence[tuple[str, float]], label: str, form: str) -> str:
    low = min(0.0, *(v for _, v in rows))
    high = max(0.0, *(v for _, v in rows))
    left, row_height = 136, 26
    scale = (WIDTH - left - 70) / (high - low or 1)
    zero = left - low * scale
    bars = []
    for i, (name, value) in enumerate(rows):
        y = i * row_height
        x = zero if value >= 0 else zero + value * scale
        kind = "ade-total" if name == "bpd" else "ade-bar"
        bars.append(
            f'<text x="{left - 8}" y="{y + 17}" text-anchor="end" class="ade-label">{escape(name)}</text>'
            f'<rect x="{x:.1f}" y="{y + 4}" width="{max(1.0, abs(value) * scale):.1f}" height="18" rx="3" class="{kind}"/>'
            f'<text x="{max(x + abs(value) * scale, zero) + 6:.1f}" y="{y + 17}" class="ade-label">{value:{form}}</text>'
        )
    return _svg("".join(bars), len(rows) * row_height, label)


def histogram_chart(reference: np.ndarray, value: float) -> str:
    """Where a bpd lies among those of the calibration images."""
    low = min(float(reference.min()), value) - 0.1
    high = max(float(reference.max()), value) + 0.1
    counts, edges = np.histogram(reference, BINS, (low, high))
    base = HEIGHT - 24
    step = WIDTH / BINS
    bars = [
        f'<rect x="{i * step + 1:.1f}" y="{base - (base - 16) * c / counts.max():.1f}" width="{step - 2:.1f}" '
        f'height="{(base - 16) * c / counts.max():.1f}" class="ade-bar"/>'
        for i, c in enumerate(counts)
        if c
    ]
    x = (value - low) / (high - low) * WIDTH
    anchor = "end" if x > WIDTH - 90 else "start"
    mark = (
        f'<line x1="{x:.1f}" y1="2" x2="{x:.1f}" y2="{base}" class="ade-mark"/>'
        f'<text x="{x + (-6 if anchor == "end" else 6):.1f}" y="14" text-anchor="{anchor}" class="ade-label">'
        f"this image: {value:.2f}</text>"
    )
    ticks = "".join(
        f'<text x="{(t - low) / (high - low) * WIDTH:.1f}" y="{HEIGHT - 6}" text-anchor="middle" class="ade-label">{t:g}'
        "</text>"
        for t in _ticks(float(edges[0]), float(edges[-1]))
    )
    return _svg(
        "".join(bars) + mark + ticks, HEIGHT, f"{len(reference)} calibration images and this one"
    )


def _ticks(low: float, high: float) -> list[float]:
    step = 1.0 if high - low > 3 else 0.5
    return [float(t) for t in np.arange(np.ceil(low / step) * step, high, step)]


def _svg(content: str, height: int, label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}" '
        f'style="width:100%;max-width:560px;height:auto">{content}</svg>'
    )
