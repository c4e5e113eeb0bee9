"""Takes pictures of the running page: every tab, filled and with an error.

    python -m benchmarks.screenshots URL screenshots --sheet docs/pictures/page.webp

Needs the extra ``dev`` and Debian's ``chromium``. Each picture is of the whole tab; the sheet has
all of them, small, of at most 600 kB.
"""

from __future__ import annotations

import argparse
import io
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from serving.page.app import TABS
from serving.page.drawings import DRAWINGS, draw
from serving.page.served import EXAMPLES

WIDTHS = (1280, 768, 390)
SCHEMES = ("light", "dark")
SHEET_BYTES = 600_000
WAIT_MS = 240_000  # the machine may be busy
expect.set_options(timeout=WAIT_MS)
SHEET_ROW = 460  # pixels, height of a row of the sheet


def panel_of(page: Page) -> Locator:
    return page.locator("[role=tabpanel]:visible")


def show(page: Page, tab: str) -> Locator:
    page.get_by_role("tab", name=tab, exact=True).click()
    return panel_of(page)


def _broken(panel: Locator) -> None:
    panel.get_by_role("button", name="Clear").or_(panel.get_by_label("Remove Image")).first.click()
    file = {"name": "broken.png", "mimeType": "image/png", "buffer": b"nothing"}
    panel.locator("input[type=file]").first.set_input_files(file)


def _no_files(panel: Locator) -> None:
    panel.get_by_label("Clear").first.click()
    panel.get_by_role("button", name="Score all").click()


def _no_seed(panel: Locator) -> None:
    panel.get_by_label("Seed", exact=True).fill("")
    panel.get_by_role("button", name="Sample", exact=True).click()


def _score(panel: Locator) -> None:
    panel.get_by_role("button").filter(has=panel.page.locator("img")).nth(6).click()
    expect(panel.locator(".ade-chart").first).to_be_visible()
    expect(panel.locator("img[src*='map.png']")).to_be_visible()


def _many(panel: Locator) -> None:
    files = [
        {"name": path.name, "mimeType": "image/png", "buffer": path.read_bytes()}
        for path in EXAMPLES
    ]
    files += [
        {"name": f"{name}.png", "mimeType": "image/png", "buffer": draw(name)} for name in DRAWINGS
    ]
    files.append({"name": "broken.png", "mimeType": "image/png", "buffer": b"nothing"})
    panel.locator("input[type=file]").first.set_input_files(files)
    panel.get_by_role("row", name="broken.png").wait_for()
    panel.get_by_role("button", name="Score all").click()
    expect(panel.locator(".ade-results tbody tr").first).to_be_visible()


def _sample(panel: Locator) -> None:
    expect(panel.locator(".ade-grid img").first).to_be_visible()


def _reconstruct(panel: Locator) -> None:
    panel.get_by_role("button").filter(has=panel.page.locator("img")).first.click()
    expect(panel.locator("img[src*='strip.png']")).to_be_visible()


def _explore(panel: Locator) -> None:
    expect(panel.locator("img[src*='strip.png']")).to_be_visible()


def _compare(panel: Locator) -> None:
    panel.get_by_role("button").filter(has=panel.page.locator("img")).first.click()
    expect(panel.locator(".ade-verdict").first).to_be_visible()


def _about(panel: Locator) -> None:
    expect(panel.locator(".ade-figure").first).to_be_visible()


FILL: dict[str, Callable[[Locator], None]] = {
    "Score": _score,
    "Score many": _many,
    "Sample": _sample,
    "Reconstruct": _reconstruct,
    "Explore": _explore,
    "Compare": _compare,
    "About": _about,
}
ERRORS: dict[str, Callable[[Locator], None]] = {
    "Score": _broken,
    "Score many": _no_files,
    "Sample": _no_seed,
    "Reconstruct": _broken,
    "Explore": _broken,
    "Compare": _broken,
}


def pictures(browser: Browser, url: str, width: int, scheme: str, out: Path) -> list[Path]:
    """Write PNG files of every tab at one width and in one colour scheme."""
    found: list[Path] = []

    def keep(name: str) -> None:
        page.mouse.move(0, 0)
        page.wait_for_timeout(700)
        page.evaluate("document.querySelectorAll('img').forEach((i) => { i.loading = 'eager'; })")
        page.wait_for_function("[...document.images].every((image) => image.complete)")
        path = out / f"{name}-{width}-{scheme}.png".lower().replace(" ", "-")
        page.screenshot(full_page=True, path=path)
        print(path, flush=True)
        found.append(path)

    page = browser.new_page(
        viewport={"width": width, "height": 900 if width > 500 else 844}, color_scheme=scheme
    )
    page.set_default_timeout(WAIT_MS)
    page.goto(url)
    expect(page.get_by_role("tab", name="Score", exact=True)).to_be_visible()
    # Without Compare, if there is a single model.
    shown = [tab for tab in TABS if page.get_by_role("tab", name=tab, exact=True).count()]
    for tab in shown:
        FILL[tab](show(page, tab))
        keep(tab)
    for tab in [tab for tab in ERRORS if tab in shown]:
        ERRORS[tab](show(page, tab))
        # By its place: Score many keeps the words of its errors in the page.
        message = page.locator(".toast-body").first
        expect(message).to_be_visible()
        keep(f"{tab}-error")
        expect(message).to_be_hidden()  # by itself, after ten seconds
    page.close()
    return found


def contact_sheet(rows: list[list[Path]]) -> bytes:
    """All pictures in one WebP file, a row per width and scheme; the tops of the long ones."""
    drawn = []
    for row in rows:
        tiles = []
        for path in row:
            with Image.open(path) as picture:
                shown = picture.convert("RGB").crop((0, 0, picture.width, int(picture.width * 1.6)))
                if picture.width > 500:
                    shown = shown.crop((0, 0, picture.width, picture.width))
                shown.thumbnail((10_000, SHEET_ROW), Image.Resampling.LANCZOS)
                tiles.append(np.asarray(shown))
        height = max(tile.shape[0] for tile in tiles)
        padded = [
            np.pad(tile, ((6, 6 + height - tile.shape[0]), (6, 6), (0, 0)), constant_values=128)
            for tile in tiles
        ]
        drawn.append(np.concatenate(padded, axis=1))
    width = max(row.shape[1] for row in drawn)
    sheet = np.concatenate(
        [
            np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=128)
            for row in drawn
        ]
    )
    for quality in range(85, 10, -10):
        out = io.BytesIO()
        Image.fromarray(sheet).save(out, "WEBP", quality=quality, method=6)
        if out.tell() <= SHEET_BYTES:
            break
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url", help="of a running page")
    parser.add_argument("out", type=Path, help="folder for the pictures")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet (WebP) too")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        for width, scheme in product(args.widths, args.schemes):
            rows.append(pictures(browser, args.url, width, scheme, args.out))
        browser.close()
    if args.sheet:
        args.sheet.write_bytes(contact_sheet(rows))
        print(f"{args.sheet}: {args.sheet.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
