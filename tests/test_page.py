"""The page in Debian's Chromium: each tab's main path and what it says when something is wrong."""

from __future__ import annotations

import csv
import io
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from playwright.sync_api import Page, expect, sync_playwright

from serving.client import AdeClient
from serving.page.score import REASONS
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


def test_explore(page: Page, tmp_path: Path) -> None:
    show(page, "Explore")
    panel = page.locator("[role=tabpanel]:visible")
    page.get_by_role("button", name="Explore", exact=True).click()
    expect(page.get_by_text("There is no image yet").first).to_be_visible()
    for side in ("From", "To"):
        panel.get_by_role("button", name=f"{side} a sample of this seed").click()
    expect(panel.locator("img[src*='seed-']")).to_have_count(2)
    page.get_by_role("button", name="Explore", exact=True).click()
    expect(panel.locator("img[src*='strip.png']")).to_be_visible()
    expect(panel.locator("img[src*='levels.png']")).to_be_visible()
    strip = Image.open(io.BytesIO(image_bytes(page, "[role=tabpanel]:visible img[src*='strip.png']")))
    assert strip.size == (9 * 32, 32) and len(strip.getcolors(10**5) or []) > 50
    with page.expect_download() as download:
        panel.locator("a[href*='interpolation.webp']").first.click()
    download.value.save_as(tmp_path / "moving.webp")
    assert Image.open(tmp_path / "moving.webp").n_frames == 16


def test_score_many(page: Page, tmp_path: Path, real_images: np.ndarray) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    for i, pixels in enumerate([*real_images[:6], *noise]):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        for i in range(4):
            archive.write(tmp_path / f"{i}.png", f"inside/{i}.png")
        archive.writestr("notes.txt", "no image")
    show(page, "Score many")
    panel = page.locator("[role=tabpanel]:visible")
    page.get_by_role("button", name="Score all").click()
    expect(page.get_by_text("There are no files yet").first).to_be_visible()
    panel.locator("input[type=file]").first.set_input_files(
        [str(tmp_path / name) for name in (*(f"{i}.png" for i in range(8)), "broken.png", "more.zip")])
    expect(panel.get_by_role("row", name="more.zip")).to_be_visible()
    page.get_by_role("button", name="Score all").click()
    expect(panel.get_by_text("2 of 13 images are unlike the training images")).to_be_visible()
    with page.expect_download() as download:
        panel.get_by_role("button", name="Download CSV").or_(panel.get_by_role("link", name="Download CSV")).first.click()
    download.value.save_as(tmp_path / "scores.csv")
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert len(rows) == 13 and {name for name, row in rows.items() if row["verdict"] == "unlike the training images"} == {
        "6.png", "7.png"}
    assert rows["broken.png"]["verdict"] == "could not be scored" and "not an image" in rows["broken.png"]["notes"]
    assert rows["inside/0.png"]["bpd"] == rows["0.png"]["bpd"]


def test_reproduce(page: Page, service: RunningService, tmp_path: Path) -> None:
    with AdeClient(service.url) as client:
        data, _ = client.sample_png(4, seed=11, kind="density")
    (tmp_path / "made.png").write_bytes(data)
    edited = Image.open(io.BytesIO(data))
    edited.putpixel((3, 3), (255, 0, 255))
    text = PngImagePlugin.PngInfo()
    for key, value in edited.info.items():
        text.add_text(key, value)
    edited.save(tmp_path / "edited.png", pnginfo=text)
    show(page, "Reproduce")
    panel = page.locator("[role=tabpanel]:visible")
    for name, words in (("made.png", "The same picture, pixel for pixel"), ("edited.png", "the picture was changed"),
                        (str(EXAMPLE), "does not say how it was made")):
        if panel.get_by_label("Clear").or_(panel.get_by_label("Remove")).count():
            panel.get_by_label("Clear").or_(panel.get_by_label("Remove")).first.click()
        panel.locator("input[type=file]").first.set_input_files(str(tmp_path / name))
        expect(panel.get_by_role("row", name=Path(name).name)).to_be_visible()
        page.get_by_role("button", name="Make it again").click()
        expect(page.get_by_text(words).first).to_be_visible()


def test_about(page: Page, service: RunningService) -> None:
    show(page, "About")
    panel = page.locator("[role=tabpanel]:visible")
    for words in ("3.920 ± 0.006 bits per dimension", "calibrated on 3,000 images", f"{service.url}/predictions/score"):
        expect(panel.get_by_text(words).first).to_be_visible()
    href = panel.get_by_role("link", name="OpenAPI document").get_attribute("href")
    assert href and page.request.get(f"{service.page}{href}" if href.startswith("/") else href).json()["openapi"] == "3.1.0"


def test_every_function_has_a_stable_name(page: Page, service: RunningService) -> None:
    from gradio_client import Client

    client = Client(service.page, verbose=False)
    names = set(client.view_api(return_format="dict")["named_endpoints"])
    assert names == {"/sample", "/explore", "/reconstruct", "/score", "/score_many", "/reproduce", "/about"}
    path, _ = client.predict("cifar10-av-ade", 4, 7, 1.0, "mean", api_name="/sample")
    assert Image.open(path["path"] if isinstance(path, dict) else path).size == (64, 64)


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
