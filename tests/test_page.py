"""The page in Debian's Chromium: each tab's main path and what it says when something is wrong."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from serving.ui import REASONS
from tests.conftest import ROOT
from tests.service import RunningService

CHROMIUM = shutil.which("chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]
EXAMPLE = ROOT / "serving" / "examples" / "cat.png"
WAIT_MS = 60_000

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed (apt-get install chromium)")


@pytest.fixture(scope="module")
def page(service: RunningService) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(WAIT_MS)
        outside: list[str] = []
        page.on("request", lambda r: outside.append(r.url) if not r.url.startswith(
            (service.page, "data:", "blob:")) else None)
        page.goto(service.page)
        expect(page.get_by_role("tab", name="Sample")).to_be_visible()
        yield page
        assert outside == [], "the page asks an outside host"
        browser.close()


def show(page: Page, tab: str) -> None:
    page.get_by_role("tab", name=tab, exact=True).click()


def image_bytes(page: Page, selector: str) -> bytes:
    source = page.locator(selector).first.get_attribute("src")
    assert source is not None
    return page.request.get(source).body()


def test_sample(page: Page, tmp_path: Path) -> None:
    show(page, "Sample")
    page.get_by_role("button", name="Sample", exact=True).click()
    expect(page.locator("[role=tabpanel]:visible .ade-pixels img")).to_be_visible()
    data = image_bytes(page, "[role=tabpanel]:visible .ade-pixels img")
    picture = Image.open(io.BytesIO(data))
    assert picture.format == "PNG" and picture.size == (128, 128) and picture.text["ade:seed"] == "7"
    with page.expect_download() as download:
        page.get_by_role("button", name="Download PNG").or_(page.get_by_role("link", name="Download PNG")).first.click()
    download.value.save_as(tmp_path / "samples.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "samples.png")), np.asarray(picture))


def test_dice(page: Page) -> None:
    show(page, "Sample")
    before = image_bytes(page, "[role=tabpanel]:visible .ade-pixels img")
    page.get_by_role("button", name="New seed").click()
    page.wait_for_timeout(500)
    for _ in range(100):
        if image_bytes(page, "[role=tabpanel]:visible .ade-pixels img") != before:
            return
        page.wait_for_timeout(100)
    pytest.fail("the picture did not change")


def test_reconstruct(page: Page) -> None:
    show(page, "Reconstruct")
    page.locator("[role=tabpanel]:visible input[type=file]").first.set_input_files(str(EXAMPLE))
    page.get_by_role("button", name="Reconstruct", exact=True).click()
    expect(page.locator("[role=tabpanel]:visible").get_by_text("PSNR")).to_be_visible()
    expect(page.locator("[role=tabpanel]:visible .ade-pixels img")).to_have_count(4)


def test_score(page: Page) -> None:
    show(page, "Score")
    page.locator("[role=tabpanel]:visible input[type=file]").first.set_input_files(str(EXAMPLE))
    page.get_by_role("button", name="Score", exact=True).click()
    panel = page.locator("[role=tabpanel]:visible")
    expect(panel.get_by_text("bits per dimension")).to_be_visible()
    expect(panel.locator("svg[aria-label^='parts of the score']")).to_be_visible()
    expect(panel.locator("svg[aria-label*='calibration images']")).to_be_visible()
    expect(panel.locator("img[src*='map.png']")).to_be_visible()
    expect(panel.get_by_role("table").get_by_role("row")).to_have_count(1 + REASONS)


def test_errors_are_sentences(page: Page, tmp_path: Path) -> None:
    show(page, "Score")
    large = tmp_path / "large.png"
    Image.new("RGB", (100, 80)).save(large)
    panel = page.locator("[role=tabpanel]:visible")
    panel.get_by_role("button", name="Clear").or_(panel.get_by_label("Remove Image")).first.click()
    page.get_by_role("button", name="Score", exact=True).click()
    expect(page.get_by_text("There is no image yet").first).to_be_visible()
    panel.locator("input[type=file]").first.set_input_files(str(large))
    page.get_by_role("button", name="Score", exact=True).click()
    expect(page.get_by_text("must be 32 x 32 pixels, got 100 x 80").first).to_be_visible()
