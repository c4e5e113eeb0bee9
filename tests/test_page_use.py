"""The page in a browser: results belong to what is shown, whatever a user does meanwhile."""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin
from playwright.sync_api import expect

from ade_base.pictures.read import MAX_FILE_BYTES
from ade_client.client import AdeClient
from serving.page.models import NOT_AN_IMAGE
from serving.page.routes import LOGGED_OUT
from serving.page.uploads import TOO_MANY
from tests import browsing as ui

HOSTILE = "<img src=x onerror=window.ran=1>"


def test_a_new_image_clears_the_old_verdict(page, tmp_path):
    """So does a removed image, and one that cannot be scored, with a single message."""
    panel = ui.show(page, "Score")
    verdict, waiting = panel.locator(".ade-verdict"), panel.get_by_text("The verdict appears here")
    ui.drop(panel, ui.EXAMPLE)
    ui.expect_verdict(panel, "Accepted")
    ui.remover(panel).click()
    expect(waiting).to_be_visible()
    expect(verdict).to_have_count(0)
    ui.drop(panel, ui.EXAMPLE)
    expect(verdict).to_be_visible()
    (tmp_path / "broken.png").write_bytes(ui.EXAMPLE.read_bytes()[:200])
    ui.drop(panel, tmp_path / "broken.png")
    expect(ui.toast(page).get_by_text("image is damaged")).to_have_count(1)
    expect(panel.get_by_text("image is damaged")).to_be_visible()
    for nothing in (waiting, verdict, ui.shown(panel, "map.png"), panel.locator(".error")):
        expect(nothing).to_have_count(0)
    # Nor is there anything to judge at another level.
    for value in ("0.02", "0.01"):
        ui.number(panel, "False-alarm rate (alpha)").fill(value)
        page.wait_for_timeout(500)
    expect(panel.get_by_text("image is damaged")).to_be_visible()
    (tmp_path / "nothing.png").write_bytes(b"nothing")
    ui.drop(panel, tmp_path / "nothing.png")
    expect(panel.get_by_text(NOT_AN_IMAGE)).to_be_visible()
    expect(panel.locator(".ade-unshown")).to_have_count(1)


def test_only_the_last_of_several_images_is_shown(page):
    panel = ui.empty_score(page)
    for i in (6, 7, 0, 8, 1, 6):
        ui.examples(panel).nth(i).click()
        page.wait_for_timeout(50)
    for _ in range(2):
        expect(panel.get_by_text("resized from 360 x 240")).to_be_visible()
        page.wait_for_timeout(1500)
    expect(ui.toast(page)).to_have_count(0)
    # A click counts even while the one before it is unanswered.
    held = ui.hold_first(page, "**/run/predict*")
    ui.examples(panel).nth(0).click()
    ui.wait_for(page, lambda: bool(held))
    ui.examples(panel).nth(1).click()
    held[0].continue_()
    ui.expect_source(panel.get_by_alt_text("the chosen image"), "/automobile.png")


def test_files_are_judged_as_they_are(page, service, tmp_path):
    """Nothing is converted before the API's own decoder sees it."""
    picture = Image.open(ui.EXAMPLE).convert("RGBA")
    picture.putalpha(Image.linear_gradient("L").resize((32, 32)))
    picture.save(tmp_path / "see through.png")
    with AdeClient(service.url) as client:
        expected = client.score([tmp_path / "see through.png"])[0]
    panel = ui.show(page, "Score")
    ui.drop(panel, tmp_path / "see through.png")
    expect(panel.get_by_text(f"{expected.bpd:.3f} bits per dimension")).to_be_visible()
    expect(panel.get_by_text("alpha composited on white")).to_be_visible()


def test_an_alpha_that_is_moved_while_an_image_is_scored(page):
    """The verdict is at the level that the page shows."""
    panel = ui.empty_score(page)
    ui.drop(panel, ui.FROG)
    ui.expect_verdict(panel, "Accepted")
    held = ui.hold_first(page)
    ui.button(panel, "Score").click()
    ui.wait_for(page, lambda: bool(held))
    ui.number(panel, "False-alarm rate (alpha)").fill("0.1")
    ui.expect_verdict(panel, "Rejected", "10 %")
    with page.expect_response(lambda answer: "map.png" in answer.url):
        held[0].continue_()
    page.wait_for_timeout(2000)
    ui.expect_verdict(panel, "Rejected", "10 %")
    ui.number(panel, "False-alarm rate (alpha)").fill("0.01")


def test_a_number_beside_a_slider_can_be_typed(browser, service):
    """Key by key it is empty, 0 or out of range meanwhile, which is no error."""
    with ui.opened(browser, service.page) as page:
        panel = ui.show(page, "Score")
        ui.drop(panel, ui.FROG)
        ui.expect_verdict(panel, "Accepted")
        ui.show(page, "Explore")
        expect(ui.shown(panel, "step-4.png")).to_be_visible()
        for tab, label, value in (("Score", "False-alarm rate (alpha)", "0.05"),
                                  ("Explore", "Position", "12")):  # fmt: skip
            box = ui.number(ui.show(page, tab), label)
            for key in ("Control+a", "Backspace", *value):
                box.press(key)
                page.wait_for_timeout(150)
        expect(ui.shown(panel, "step-1.png")).to_be_visible()
        ui.number(panel, "Position").press("Tab")
        expect(ui.shown(panel, "step-8.png")).to_be_visible()
        ui.expect_verdict(ui.show(page, "Score"), "Rejected", "5 %")
        expect(ui.toast(page)).to_have_count(0)


def test_a_refused_event_leaves_no_former_results(page):
    """A full queue, too many files, and a login that has ended."""
    ui.empty_score(page)
    panel = ui.filled(page, "Score")
    page.route("**/queue/join*", lambda route: route.fulfill(status=503, json={"detail": "full"}))
    ui.examples(panel).last.click()
    expect(panel.locator(".ade-verdict")).to_have_count(0)
    page.unroute("**/queue/join*")
    ui.button(panel, "Score").click()
    expect(panel.locator(".ade-verdict")).to_be_visible()
    ui.filled(page, "Score many")
    refused: dict[str, Any] = {"status": 413, "json": {"detail": TOO_MANY}}
    page.route("**/run/predict*", lambda route: route.fulfill(**refused), times=1)
    ui.clear_files(panel)
    expect(panel.get_by_text(f"The page could not take these files. {TOO_MANY}")).to_be_visible()
    expect(panel.locator(".ade-results tbody tr")).to_have_count(0)
    ui.give_files(panel, ui.EXAMPLE)  # the shared page must know again which files are chosen
    expect(panel.get_by_text("Verdicts appear here")).to_be_visible()
    ui.clear_files(panel)
    ui.show(page, "Score")
    page.wait_for_timeout(1000)
    refused = {"status": 401, "json": {"detail": LOGGED_OUT}}
    page.route(re.compile("queue/join|run/predict"), lambda route: route.fulfill(**refused))
    ui.examples(panel).last.click()
    expect(ui.toast(page).get_by_text(LOGGED_OUT)).to_have_count(1)


def test_what_is_done_with_a_sample(page):
    """It is in view, possible only while a sample is chosen, and that survives another tab."""
    panel = ui.show(page, "Sample")
    sample = panel.locator(".ade-grid button:has(img)").nth(5)
    ui.unfold(panel, "More")
    names = ("Score it", "Download it", "Reconstruct it", "Explore from it", "Explore to it")
    for _ in range(2):
        source = sample.locator("img").get_attribute("src") or ""
        ui.button(panel, "⚄ Draw new samples").click()
        expect(sample.locator("img")).not_to_have_attribute("src", source)
        for name in names:
            expect(ui.button(panel, name)).to_be_disabled()
        sample.click()
        for name in names:
            expect(ui.button(panel, name)).to_be_enabled()
    page.evaluate("scrollTo(0, 0)")
    for name in names[:2]:
        expect(ui.button(panel, name)).to_be_in_viewport(ratio=1)
    for _ in range(2):
        ui.button(ui.show(page, "Sample"), "Score it").click()
        expect(page.get_by_role("tab", name="Score", exact=True)).to_have_attribute(
            "aria-selected", "true"
        )
        expect(panel.get_by_alt_text("the chosen image")).to_be_visible()
        ui.empty_score(page)


def test_a_sample_that_comes_while_explore_fills_itself_stays(browser, service):
    """Images that the tab draws when it is opened replace no other image."""
    with ui.opened(browser, service.page) as page:
        panel = ui.show(page, "Sample")
        panel.locator(".ade-grid button:has(img)").nth(5).click()
        expect(ui.button(panel, "Score it")).to_be_enabled()
        held = ui.hold_first(page)
        ui.show(page, "Explore")
        ui.wait_for(page, lambda: bool(held))
        expect(ui.button(panel, "Show its levels")).to_be_hidden()
        ui.unfold(ui.show(page, "Sample"), "More")
        ui.button(panel, "Explore from it").click()
        expect(ui.shown(panel, "sample-7-5")).to_be_visible()
        held[0].continue_()
        for name in ("seed-2", "strip.png", "sample-7-5"):
            expect(ui.shown(panel, name)).to_be_visible()
        # Gradio's own upload icon would only remove the image.
        drawn = ui.shown(panel, "seed-2")
        with page.expect_file_chooser() as dialog:
            panel.get_by_label("Upload file").nth(1).click()
        expect(drawn).to_have_count(1)
        dialog.value.set_files(ui.EXAMPLE)
        expect(drawn).to_have_count(0)
        expect(ui.shown(panel, "cat.png")).to_have_count(1)


def test_two_images_under_a_divider(page):
    """It has a name, a value and keys. One finger and the wheel scroll the page; two zoom."""
    panel = ui.filled(page, "Score")
    divider = panel.get_by_role("slider", name="Divider: Image and unlikely pixels")
    expect(panel.get_by_alt_text("Image", exact=True)).to_be_visible()
    for key, value in (("Home", 0), ("ArrowRight", 5), ("ArrowLeft", 0), ("End", 100)):
        divider.press(key)  # focused again: the page may be drawn again meanwhile
        expect(divider).to_have_attribute("aria-valuenow", f"{value}")
    right = panel.get_by_alt_text("unlikely pixels")
    expect(right).to_have_css("clip-path", "inset(0px 0px 0px 100%)")
    content = panel.locator(".ade-pair .content")
    prevented = """(content, fingers) => {
      const touch = (i) => new Touch({ identifier: i, target: content });
      const touches = Array.from({ length: fingers }, (_, i) => touch(i));
      const start = { touches, bubbles: true, cancelable: true };
      return !content.dispatchEvent(new TouchEvent("touchstart", start));
    }"""
    assert [content.evaluate(prevented, fingers) for fingers in (1, 2)] == [False, True]
    content.scroll_into_view_if_needed()
    content.hover()
    before = page.evaluate("scrollY")
    page.mouse.wheel(0, -100 if before else 100)
    ui.wait_for(page, lambda: page.evaluate("scrollY") != before)
    page.keyboard.down("Control")
    page.mouse.wheel(0, -100)
    page.keyboard.up("Control")
    expect(content.locator("img").first).to_have_css("transform", re.compile(r"matrix\(1\.05"))
    ui.button(panel, "Undo").click()


def test_a_folder_with_other_files_and_hostile_names(page, tmp_path):
    """Other files of a folder are left out; names stay apart and are never interpreted as HTML."""
    folder = tmp_path / "folder"
    (folder / "inside").mkdir(parents=True)
    for name in ("cat.png", "inside/cat.png"):
        shutil.copy(ui.EXAMPLE, folder / name)
    alike = [Path(shutil.copy(ui.EXAMPLE, tmp_path / name)) for name in ("=#1.png", "=1.png")]
    (folder / "notes.txt").write_text("no image")
    (folder / "film.mp4").write_bytes(bytes(MAX_FILE_BYTES + 1))  # would have all refused
    with zipfile.ZipFile(tmp_path / "names.zip", "w") as archive:
        archive.write(ui.EXAMPLE, f"{HOSTILE}.png")
        archive.write(ui.EXAMPLE, "=1.png")
    with zipfile.ZipFile(tmp_path / "large.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{HOSTILE}.png", bytes(17 * 2**20))
    text = PngImagePlugin.PngInfo()
    for key in ("seed", "index", "n", "temperature"):
        text.add_text(f"ade:{key}", "1")
    kind = f"{HOSTILE}<img src=http://elsewhere.example/a.png>![a](http://elsewhere.example/b.png)"
    text.add_text("ade:kind", kind)
    Image.open(ui.EXAMPLE).save(tmp_path / "kind.png", pnginfo=text)
    panel = ui.show(page, "Score many")
    panel.locator("input[type=file]").nth(1).set_input_files(folder)
    ui.give_files(panel, *alike, tmp_path / "names.zip")
    ui.button(panel, "Score all").click()
    expect(panel.get_by_text("of 6 images rejected")).to_be_visible()
    names = {"cat.png", "cat.png (2)", "=#1.png", "=1.png", f"{HOSTILE}.png", "=1.png (2)"}
    assert set(panel.locator(".ade-results .ade-file").all_inner_texts()) == names
    table = ui.download(panel, "Download CSV", tmp_path / "scores.csv").read_text()
    assert "'=1.png" in table and "\n=1.png" not in table  # no cell is a formula
    ui.clear_files(panel)
    ui.give_files(panel, tmp_path / "large.zip")
    ui.button(panel, "Score all").click()
    expect(page.get_by_text(f"{HOSTILE}.png in large.zip is too large").first).to_be_visible()
    ui.unfold(ui.show(page, "Sample"), "Reproduce: how was this PNG made?")
    ui.give_files(panel, tmp_path / "kind.png")
    ui.button(panel, "Make it again").click()
    expect(page.get_by_text(f"got '{HOSTILE}").first).to_be_visible()
    page.wait_for_timeout(1000)
    assert page.evaluate("window.ran") is None
