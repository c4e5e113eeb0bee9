"""The frame of all reports: complete in itself, the verdict first, every text escaped."""

import re
from pathlib import Path

from ade_base.brand import MARK, percent, verdict_card
from ade_base.reports import from_markdown, markdown_table, render
from serving.verdict.false_alarms import false_alarm_band
from serving.verdict.summary import summarize
from tests.helpers import ROOT


def is_complete(page):
    """It loads nothing."""
    loaded = re.findall(r"(?:src|href)=[\"']?([^\"' >]+)", page)
    return all(address.startswith("data:") for address in loaded) and "<script" not in page


def test_a_report_needs_no_other_file():
    folder = ROOT / "docs" / "ood"
    title, *lines = (folder / "report.md").read_text().splitlines()
    files = {path.name: path for path in folder.glob("*.png")}
    card = verdict_card("accept", "It works.", heading="Good")
    page = render(title, card, content=from_markdown(lines, files))
    assert is_complete(page) and MARK in page and page.count("data:image/png;base64,") > 3
    assert page.index("It works.") < page.index("False alarms")
    assert "prefers-reduced-motion" in page and "@media print" in page
    assert page.count("<table") == page.count("<thead") >= 3 and "|---" not in page


def test_markdown_is_escaped():
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


def test_a_cell_holds_any_text():
    lines = markdown_table(["set", "share"], [["a | b\nc", "0.5"], ["|", ""]])
    assert lines == ["| set | share |", "|---|---|", r"| a \| b c | 0.5 |", r"| \| |  |"]
    found = from_markdown(lines)
    assert "<td>a | b c</td><td class=ade-number>0.5</td>" in found
    assert "<td>|</td><td class=ade-number></td>" in found


def test_the_summary_says_what_is_caught_and_what_more_images_bring():
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
