"""Takes pictures of the page: every tab, filled and with an error.

    python -m benchmarks.screenshots screenshots --sheet docs/pictures/page.webp

Serves ``pretrained/cifar10`` and, for the tab *Compare*, the model that the repository had before
it. Needs the extra ``dev`` and Debian's ``chromium``. Each picture is of the whole tab; the sheet
has all of them, small, of at most 600 kB.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Playwright, expect, sync_playwright

from benchmarks.traffic import running
from serving.engine.bundle import (
    CALIBRATION_NAME,
    FORMAT_VERSION,
    MANIFEST_NAME,
    WEIGHTS_NAME,
)
from serving.page.app import TABS
from serving.page.drawings import DRAWINGS, draw
from serving.page.models import EXAMPLES
from serving.verdict.calibration import CalibrationError
from serving.verdict.calibration_file import CalibrationPair

BUNDLE = Path("pretrained") / "cifar10"
WIDTHS = {1280: 900, 768: 1024, 390: 844}  # and heights of the windows
SCHEMES = ("light", "dark")
SHEET_BYTES = 600_000
WAIT_MS = 240_000  # the machine may be busy
SETTLE_MS = 400
expect.set_options(timeout=WAIT_MS)
TILES = {1280: (1.0, 340), 768: (1.0, 340), 390: (2.4, 510)}  # height by width; height in the sheet


def show(page: Page, tab: str) -> Locator:
    button = page.get_by_role("tab", name=tab, exact=True)
    button.click()
    # Until then, the visible panel may be that of the tab before.
    expect(button).to_have_attribute("aria-selected", "true")
    return page.locator("[role=tabpanel]:visible")


def _drop_broken(panel: Locator) -> None:
    panel.get_by_label("Remove Image").first.click()
    file = {"name": "broken.png", "mimeType": "image/png", "buffer": b"nothing"}
    panel.locator("input[type=file]").first.set_input_files(file)


def _no_files(panel: Locator) -> None:
    panel.get_by_label("Clear").first.click()
    panel.get_by_role("button", name="Score all").click()


def _no_seed(panel: Locator) -> None:
    panel.get_by_label("Seed", exact=True).fill("")
    panel.get_by_role("button", name="Draw this seed").click()


def _score(panel: Locator) -> None:
    panel.get_by_role("button").filter(has=panel.page.locator("img")).nth(6).click()
    expect(panel.locator(".ade-chart").first).to_be_visible()
    expect(panel.locator("img[src*='seen.png']")).to_be_visible()


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
# How each tab gets its first error, and the button that repeats it.
ERRORS: dict[str, tuple[Callable[[Locator], None], str]] = {
    "Score": (_drop_broken, "Score"),
    "Score many": (_no_files, "Score all"),
    "Sample": (_no_seed, "Draw this seed"),
    "Reconstruct": (_drop_broken, "Reconstruct"),
    "Explore": (_drop_broken, "Explore"),
    "Compare": (_drop_broken, "Compare"),
}


def launch(playwright: Playwright) -> Browser:
    """The system's Chromium."""
    return playwright.chromium.launch(
        executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
    )


def pictures(browser: Browser, url: str, out: Path) -> list[list[Path]]:
    """Write PNG files of every tab, filled and with an error; a list per width and scheme.

    All of them are of one visit, whose window changes.
    """
    page = browser.new_page()
    page.set_default_timeout(WAIT_MS)
    page.goto(url)
    expect(page.get_by_role("tab", name="Score", exact=True)).to_be_visible()
    # Without Compare, if there is a single model.
    shown = [tab for tab in TABS if page.get_by_role("tab", name=tab, exact=True).count()]
    looks = list(product(WIDTHS, SCHEMES))
    found: dict[tuple[int, str], list[Path]] = {look: [] for look in looks}

    def change(width: int, scheme: str) -> None:
        page.set_viewport_size({"width": width, "height": WIDTHS[width]})
        page.emulate_media(color_scheme=scheme)

    def keep(name: str, width: int, scheme: str) -> None:
        page.mouse.move(0, 0)
        page.evaluate("scrollTo(0, 0)")
        page.evaluate("document.querySelectorAll('img').forEach((i) => { i.loading = 'eager'; })")
        page.wait_for_function("[...document.images].every((image) => image.complete)")
        page.wait_for_timeout(SETTLE_MS)
        path = out / f"{name}-{width}-{scheme}.png".lower().replace(" ", "-")
        page.screenshot(full_page=True, path=path)
        print(path, flush=True)
        found[width, scheme].append(path)

    for tab in shown:
        FILL[tab](show(page, tab))
        for look in looks:
            change(*look)
            keep(tab, *look)
    for tab in [tab for tab in ERRORS if tab in shown]:
        fail, button = ERRORS[tab]
        panel = show(page, tab)
        fail(panel)
        for i, look in enumerate(looks):
            # By its place: Score many keeps the words of its errors in the page.
            message = page.locator(".toast-body")
            if i:
                panel.get_by_role("button", name=button, exact=True).click()
            expect(message).to_be_visible()
            change(*look)
            keep(f"{tab}-error", *look)
            message.get_by_label("Close").click()
            expect(message).to_be_hidden()
    page.close()
    return list(found.values())


def contact_sheet(rows: list[list[Path]]) -> bytes:
    """All pictures in one WebP file, a row per width and scheme; the tops of the long ones."""
    drawn = []
    for row in rows:
        tiles = []
        for path in row:
            with Image.open(path) as picture:
                ratio, row_height = TILES[picture.width]
                top = min(picture.height, round(picture.width * ratio))
                shown = picture.convert("RGB").crop((0, 0, picture.width, top))
                scale = row_height / (picture.width * ratio)
                shown = shown.resize(
                    (round(picture.width * scale), round(top * scale)), Image.Resampling.LANCZOS
                )
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
    for quality in range(75, 10, -10):
        out = io.BytesIO()
        Image.fromarray(sheet).save(out, "WEBP", quality=quality, method=4)
        if out.tell() <= SHEET_BYTES:
            break
    return out.getvalue()


def model_before(bundle: Path, into: Path) -> Path | None:
    """Unpack the newest earlier model that this version can serve, under the name ``previous``.

    Returns:
        The folder; ``None`` if the history is missing or has none.
    """

    def git(*command: str) -> bytes:
        return subprocess.run(("git", *command), check=True, capture_output=True).stdout

    present = json.loads((bundle / MANIFEST_NAME).read_bytes())["files"][WEIGHTS_NAME]
    name = (bundle / MANIFEST_NAME).as_posix()
    try:
        commits = git("log", "--format=%H", "--", name).decode().split()
    except (OSError, subprocess.CalledProcessError):
        return None
    for commit in commits:
        manifest = json.loads(git("show", f"{commit}:{name}"))
        if (
            manifest["format_version"] == FORMAT_VERSION
            and manifest["files"][WEIGHTS_NAME] != present
        ):
            packed = io.BytesIO(git("archive", commit, bundle.as_posix()))
            with tarfile.open(fileobj=packed) as archive:
                archive.extractall(into, filter="data")
            try:
                CalibrationPair.load(into / bundle / CALIBRATION_NAME)
            except CalibrationError:
                continue  # a version before made it
            manifest["name"] = "previous"
            (into / name).write_text(json.dumps(manifest))
            return into / bundle
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the pictures")
    parser.add_argument("--sheet", type=Path, help="write a contact sheet (WebP) too")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stops the service, too
    with ExitStack() as stack:
        before = model_before(BUNDLE, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        if before is None:
            print("no earlier model in the history: no tab Compare")
        bundles = [BUNDLE, *([] if before is None else [before])]
        service = stack.enter_context(
            running(*bundles, options=("--engine", "process", "--workers", "1"))
        )
        playwright = stack.enter_context(sync_playwright())
        browser = launch(playwright)
        rows = pictures(browser, f"http://127.0.0.1:{service.ports.ui}", args.out)
        browser.close()
    if args.sheet:
        args.sheet.write_bytes(contact_sheet(rows))
        print(f"{args.sheet}: {args.sheet.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
