"""The frame of all reports: complete in itself, the verdict first, every text escaped."""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from ade_base.brand import MARK, percent, verdict_card
from ade_base.reports import from_markdown, markdown_table, render
from export.gate.separation import COMBINED, RAW_BPD
from extensions.gate_reports.ood_bench_report import _histogram
from extensions.gate_reports.what_if import ALPHAS, Alarms, Way, WhatIf
from extensions.gate_reports.what_if_report import what_if_lines, write_what_if
from serving.verdict.false_alarms import false_alarm_band
from serving.verdict.summary import summarize
from tests.helpers import ROOT


def is_complete(page: str) -> bool:
    """It loads nothing."""
    loaded = re.findall(r"(?:src|href)=[\"']?([^\"' >]+)", page)
    return all(address.startswith("data:") for address in loaded) and "<script" not in page


def test_a_report_needs_no_other_file() -> None:
    folder = ROOT / "docs" / "ood"
    title, *lines = (folder / "report.md").read_text().splitlines()
    files = {path.name: path for path in folder.glob("*.png")}
    card = verdict_card("accept", "It works.", heading="Good")
    page = render(title, card, content=from_markdown(lines, files))
    assert is_complete(page) and MARK in page and page.count("data:image/png;base64,") > 3
    assert page.index("It works.") < page.index("False alarms")
    assert "prefers-reduced-motion" in page and "@media print" in page
    assert page.count("<table") == page.count("<thead") >= 3 and "|---" not in page


def test_markdown_is_escaped() -> None:
    lines = ["## A & B", "", "| set | at *0.1* |", "|---|---|", "| <script> | 0.5 |"]
    lines += ["", "- **bold** `<b>`", "- a_b", "", "![gone](nowhere.png)"]
    found = from_markdown(lines, {"nowhere.png": Path("nowhere.png")})
    assert "<h2>A &amp; B</h2>" in found and "<script" not in found
    assert "<td class=ade-number>0.5</td>" in found and "<em>0.1</em>" in found
    assert "<li><b>bold</b> <code>&lt;b&gt;</code></li><li>a_b</li>" in found
    assert "nowhere" not in found
    hostile = verdict_card("reject", "<img src=x>", ["<i>"], ["<u>"], "<script>")
    page = render("<script>", hostile, subtitle="<script>")
    assert page.count("&lt;script&gt;") == 4 and "<img" not in page and "<script" not in page


def test_a_cell_holds_any_text() -> None:
    lines = markdown_table(["set", "share"], [["a | b\nc", "0.5"], ["|", ""]])
    assert lines == ["| set | share |", "|---|---|", r"| a \| b c | 0.5 |", r"| \| |  |"]
    found = from_markdown(lines)
    assert "<td>a | b c</td><td class=ade-number>0.5</td>" in found
    assert "<td>|</td><td class=ade-number></td>" in found


def test_the_summary_says_what_is_caught_and_what_more_images_bring() -> None:
    found = summarize(
        {"noise": 1.0, "blur, σ = 2": 0.95, "JPEG, quality 10": 0.34, "dark": None}, 500, 0.01
    )
    assert found.choice == "reject" and found.heading == "Catches 2 of 3 kinds of images"
    assert (
        "rejects at least 90\u00a0% of the images of these kinds: noise; blur, σ = 2. It rejects "
        "only a part of these: JPEG, quality 10 (34\u00a0%)."
    ) in found.sentence
    low, high = false_alarm_band(1500, 0.01)
    assert (
        f"1,000 more calibration images would narrow the band to {percent(low)} to {percent(high)}"
        in found.notes[0]
    )
    assert summarize({"noise": 1.0}, 500, 0.01).choice == "accept"
    assert summarize({}, 500, 0.01).choice == "no_verdict"
    few = summarize({"noise": None}, 50, 0.01)
    assert few.choice == "no_verdict" and "needs 99 calibration images" in few.sentence


@pytest.mark.parametrize("unlike", [[], [0.1]])
def test_what_if_as_a_page(tmp_path: Path, unlike: list[float]) -> None:
    rows = [Alarms(alpha, 1000 * alpha, 0, 2000, alpha) for alpha in ALPHAS[:-1]]
    way = Way(False, 100, 1000, 999, [*rows, Alarms(0.001, None, None, None, None)], unlike)
    none = Way(True, 10, 100, 0, [], [])
    caught = {"noise": [1.0] * 6 + [None]}
    found = WhatIf(
        "m@1", {"name": "default", "version": "v"}, 110, 2, list(ALPHAS), [way, none], caught
    )
    write_what_if(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert is_complete(page) and "of these kinds: noise" in page and "no verdict" in page
    assert "m@1, calibration default, version v" in page and "2 files could not be used" in page
    assert ("is not like the calibration images" in page) == bool(unlike)
    assert "There is no calibration for them" in page
    assert "Images of another size, resized: no verdict at this rate" in page


def test_the_band_of_a_page_is_that_of_the_smaller_calibration(tmp_path: Path) -> None:
    rows = [Alarms(alpha, 1.0, 0, 2, alpha) for alpha in ALPHAS]
    ways = [Way(resized, 9, 9, n, rows, []) for resized, n in ((False, 5000), (True, 1234))]
    found = WhatIf("m@1", None, 18, 0, list(ALPHAS), ways, {"noise": [1.0] * len(ALPHAS)})
    write_what_if(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "1,234 images calibrated it" in page and "no verdict" not in page


def test_a_name_takes_no_file_into_a_report_and_controls_no_terminal(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("password secret")
    way = Way(False, 1, 1, 999, [], [])
    caught = {"![a](.netrc)\x1b[2J": [1.0] * len(ALPHAS)}
    found = WhatIf("m@1", None, 1, 0, list(ALPHAS), [way], caught)
    write_what_if(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "![a](.netrc)" in page
    assert base64.b64encode(b"password secret").decode() not in page
    assert all(line.isprintable() for line in what_if_lines(found))


def test_what_if_with_names_that_are_not_utf_8(tmp_path: Path) -> None:
    way = Way(False, 1, 1, 999, [], [])
    caught = {os.fsdecode(b"caf\xe9"): [1.0] * len(ALPHAS)}
    write_what_if(WhatIf("m@1", None, 1, 0, list(ALPHAS), [way], caught), tmp_path / "page.html")
    assert "of these kinds: caf\\udce9" in (tmp_path / "page.html").read_text()


def test_histograms_show_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dollar sign begins no formula, and an underscore hides nothing."""
    figures = []
    written = FigureCanvasAgg.print_figure
    monkeypatch.setattr(
        FigureCanvasAgg,
        "print_figure",
        lambda canvas, *args, **how: (figures.append(canvas.figure), written(canvas, *args, **how)),
    )
    scores = {name: np.arange(50.0) for name in (COMBINED, RAW_BPD)}
    _histogram(scores, scores, "price_$5_and_$6", "_hidden", tmp_path / "histogram.png")
    assert (tmp_path / "histogram.png").stat().st_size > 500
    for axes in figures[0].axes:
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            "ID: price_$5_and_$6",
            "OOD: _hidden",
        ]
