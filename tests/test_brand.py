"""The look that page and reports share: readable in light and in dark, and complete in itself."""

import re
from xml.etree import ElementTree

import pytest

from ade_base.brand import MARK, STYLE

TEXTS = [  # a text's colour, and what is behind it
    ("ink", "paper"),
    ("ink", "surface"),
    ("muted", "paper"),
    ("muted", "surface"),
    ("muted", "sunken"),
    ("accent", "paper"),
    ("accent", "surface"),
    *((name, f"{name}-soft") for name in ("accept", "reject", "none")),
    *(("ink", f"{name}-soft") for name in ("accept", "reject", "none")),
    *(("muted", f"{name}-soft") for name in ("accept", "reject", "none")),
]


def luminance(colour):
    """Relative luminance of ``#rrggbb``, as WCAG 2 defines it."""
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_texts_can_be_read(scheme):
    """At the contrast of WCAG's level AA, 4.5."""
    pattern = r"--ade-([\w-]+): light-dark\((#\w{6}), (#\w{6})\)"
    colours = {name: pair[scheme] for name, *pair in re.findall(pattern, STYLE)}
    for text, behind in [*TEXTS, ("white", "action"), ("white", "action-hover")]:
        pair = [luminance({**colours, "white": "#ffffff"}[name]) for name in (text, behind)]
        contrast = (max(pair) + 0.05) / (min(pair) + 0.05)
        assert contrast >= 4.5, f"{text} on {behind}: {contrast:.2f}"


def test_no_other_host_is_named():
    """A report must work without a network, and the page must contact no other host."""
    assert ElementTree.fromstring(MARK).tag.endswith("svg")
    assert "url(" not in STYLE and "@import" not in STYLE and "http" not in STYLE
