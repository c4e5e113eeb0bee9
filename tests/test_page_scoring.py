"""The page in a browser: the main paths of *Score* and *Score many*."""

import csv
import io
import re
import zipfile

import numpy as np
from PIL import Image
from playwright.sync_api import expect

from serving.page.models import NOT_AN_IMAGE
from serving.page.tab_score import REASONS
from tests import browsing as ui


def cat():
    return np.asarray(Image.open(ui.EXAMPLE).convert("RGB"))


def test_score(page, tmp_path):
    """A new image is scored without a click: decision, place, map of its pixels, reasons."""
    panel = ui.show(page, "Score")
    ui.drop(panel, ui.EXAMPLE)
    ui.expect_verdict(panel, "Accepted")
    expect(panel.get_by_text("For an in-distribution image, about 0.6 would be")).to_be_visible()
    place = panel.get_by_role("img", name="calibration images by how unusual they are")
    expect(place).to_have_accessible_name(re.compile("; this image is within the level of rej"))
    expect(panel.locator("[aria-live]").filter(has=page.locator(".ade-verdict"))).to_have_count(1)
    under = ui.pixels(ui.shown(panel, "image.png"))
    assert ui.pixels(ui.shown(panel, "map.png")).shape[:2] == under.shape[:2] == (256, 256)
    assert np.array_equal(under[::8, ::8], cat())
    ui.unfold(panel, "Technical details")
    expect(panel.locator("svg[aria-label^='parts of the score']")).to_be_visible()
    expect(panel.get_by_role("table").get_by_role("row")).to_have_count(1 + REASONS)
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    ui.drop(panel, tmp_path / "noise.png")
    ui.expect_verdict(panel, "Rejected")
    expect(place).to_have_accessible_name(re.compile("; this image is beyond the level of rej"))


def test_a_resized_image_has_no_map_of_its_pixels(page):
    """The map would show the resizing. The image is shown as the model sees it."""
    panel = ui.empty_score(page)
    expect(ui.examples(panel)).to_have_count(12)
    ui.examples(panel).nth(6).click()
    ui.expect_verdict(panel, "Rejected")
    expect(panel.get_by_text("resized from 360 x 240")).to_be_visible()
    expect(ui.shown(panel, "seen.png")).to_have_count(1)
    expect(ui.shown(panel, "map.png")).to_have_count(0)
    ui.examples(panel).nth(0).click()
    ui.expect_verdict(panel, "Accepted")
    expect(ui.shown(panel, "map.png")).to_have_count(1)
    expect(ui.shown(panel, "seen.png")).to_have_count(0)


def test_another_alpha_is_another_verdict_of_the_same_score(page):
    panel = ui.empty_score(page)
    ui.drop(panel, ui.FROG)
    ui.expect_verdict(panel, "Accepted")
    ui.number(panel, "False-alarm rate (alpha)").fill("0.1")
    ui.expect_verdict(panel, "Rejected", "10 %")
    expect(panel.get_by_text("rejected at 10 %")).to_be_visible()
    ui.number(panel, "False-alarm rate (alpha)").fill("0.01")


def test_what_if(page):
    """Moves the level by keyboard alone; what it would mean for a day follows."""
    panel = ui.show(page, "Score")
    ui.unfold(panel, "What if: alarms per day")
    outlook = panel.locator("[aria-live=polite]").filter(has_text="per day").filter(visible=True)
    panel.get_by_label("Images per day").fill("10000")
    level = panel.get_by_role("slider", name="False-alarm rate").first
    level.focus()
    page.keyboard.press("Home")  # 0.001: 3 of 3,001 ranks
    expect(outlook).to_contain_text("About 10 false alarms per day among 10,000")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    expect(outlook).to_contain_text("About 50 false alarms per day among 10,000")
    panel.get_by_label("Images per day").fill("")
    expect(panel.get_by_text("Images per day: a number from 1 to")).to_be_visible()
    panel.get_by_label("Images per day").fill("1000")
    for _ in range(5):
        level.press("ArrowRight")
    expect(outlook).to_contain_text("About 10 false alarms per day among 1,000")


def test_score_many(page, tmp_path, real_images):
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    for i, image in enumerate([*real_images[:6], *noise]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    with zipfile.ZipFile(tmp_path / "more.zip", "w") as archive:
        for i in range(4):
            archive.write(tmp_path / f"{i}.png", f"inside/{i}.png")
        archive.writestr("notes.txt", "no image")
    panel = ui.show(page, "Score many")
    ui.button(panel, "Score all").click()
    expect(page.get_by_text("There are no files yet").first).to_be_visible()
    names = [*(f"{i}.png" for i in range(8)), "broken.png", "more.zip"]
    ui.give_files(panel, *(tmp_path / name for name in names))
    ui.button(panel, "Score all").click()
    heading = panel.get_by_role("heading", name="2 of 12 images rejected")
    expect(heading).to_be_visible()
    for words in (
        "At a false-alarm rate of 1 %, about 0.12 of 12 images",
        "1 of 13 files got no verdict",
        "2 of 12 images are unusual enough for a list",
    ):
        expect(panel.get_by_text(words)).to_be_visible()
    check_table(panel)
    with open(ui.download(panel, "Download CSV", tmp_path / "scores.csv"), newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    rejected = {name for name, row in rows.items() if row["decision"] == "reject"}
    assert len(rows) == 13 and rejected == {"6.png", "7.png"}
    broken = rows["broken.png"]
    assert (broken["error"], broken["notes"]) == ("not_an_image", NOT_AN_IMAGE)
    assert rows["inside/0.png"]["bpd"] == rows["0.png"]["bpd"]
    ui.clear_files(panel)
    expect(panel.get_by_text("Verdicts appear here")).to_be_visible()
    expect(heading).to_have_count(0)


def check_table(panel):
    """Sort and filter it, also as cards on a phone."""
    table = panel.locator(".ade-results")
    rows = table.locator("tbody tr")
    expect(table.locator("tbody img[src^='data:image/webp']").first).to_be_visible()
    expect(rows).to_have_count(13)
    assert {rows.nth(i).locator("td").nth(1).inner_text() for i in range(2)} == {"6.png", "7.png"}
    expect(rows.nth(12).get_by_role("cell", name="broken.png")).to_be_visible()
    for first, order in (("0.png", "ascending"), ("inside/3.png", "descending")):
        table.get_by_role("button", name="file").click()
        expect(rows.first.locator("td").nth(1)).to_have_text(first)
        expect(table.get_by_role("columnheader", name="file")).to_have_attribute("aria-sort", order)
    table.get_by_role("combobox").select_option("rejected")
    expect(rows).to_have_count(2)
    table.get_by_role("combobox").select_option("all files")
    table.get_by_role("searchbox").fill("inside")
    expect(rows).to_have_count(4)
    expect(table.get_by_text("4 files found, of 13")).to_be_visible()
    panel.page.set_viewport_size({"width": 390, "height": 844})
    expect(table.get_by_role("button", name="file")).to_have_count(0)  # no head
    table.get_by_label("Sort by").select_option("file")
    expect(table.get_by_role("row").first.get_by_role("cell").nth(1)).to_have_text("inside/0.png")
    expect(table.get_by_role("table").get_by_role("row")).to_have_count(4)
    panel.page.set_viewport_size({"width": 1280, "height": 900})


def test_a_long_table_shows_a_part(page, tmp_path, real_images):
    """A thousand rows would take the browser seconds."""
    with zipfile.ZipFile(tmp_path / "many.zip", "w") as archive:
        for i in range(60):
            out = io.BytesIO()
            Image.fromarray(real_images[i]).save(out, "PNG")
            archive.writestr(f"{i}.png", out.getvalue())
    panel = ui.show(page, "Score many")
    ui.give_files(panel, tmp_path / "many.zip")
    ui.button(panel, "Score all").click()
    rows = panel.locator(".ade-results tbody tr")
    expect(rows).to_have_count(50)
    expect(panel.get_by_text("Showing the first 50 of 60 files")).to_be_visible()
    ui.button(panel, "Show more").click()
    expect(rows).to_have_count(60)
    ui.clear_files(panel)


def test_errors_are_sentences(page, tmp_path):
    Image.new("RGB", (100, 80)).save(tmp_path / "large.png")
    panel = ui.empty_score(page)
    go, resize = ui.button(panel, "Score"), panel.get_by_label("Resize other sizes to fit")
    expect(go).to_be_disabled()
    resize.uncheck()
    ui.drop(panel, tmp_path / "large.png")
    message = ui.toast(page).get_by_text("must be 32 x 32 pixels, got 100 x 80")
    expect(message).to_have_count(1)
    page.get_by_test_id("toast-close").click()
    expect(message).to_have_count(0)
    go.click()
    expect(message).to_have_count(1)
    ui.remover(panel).click()
    expect(go).to_be_disabled()
    resize.check()
