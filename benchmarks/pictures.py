"""The pictures of the README and of docs/, made from a bundle.

    python -m benchmarks.pictures pretrained/cifar10            # samples, reconstructions, gate
    python -m benchmarks.pictures pretrained/cifar10 --page URL  # and the page, scoring a drawing

``docs/pictures/vade-mean.png`` is of another model: ``--out`` with that model's bundle draws it.
``docs/pictures/page.webp`` is the sheet of ``python -m benchmarks.screenshots``.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from ade_base.brand import STYLE
from ade_base.pictures.show import tile
from serving.engine.engine import InferenceEngine
from serving.gate import Gate
from serving.page.models import EXAMPLES

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "pictures"
HELD_OUT = ROOT / "tests" / "data" / "cifar10_test_300.webp"  # of CIFAR-10's test images
GRID = 8  # samples a side
SCALE = 2
REBUILT = 16
ALPHA = 0.01
CELL, EDGE, GAP = 140, 6, 10  # pixels of gate.png
PAGE_SIZE = (1180, 1210)


def enlarged(pixels: np.ndarray, scale: int) -> Image.Image:
    """Pixels as squares; uint8 ``(H, W, 3)``."""
    return Image.fromarray(pixels.repeat(scale, 0).repeat(scale, 1))


def grids(engine: InferenceEngine) -> dict[str, Image.Image]:
    """Samples, not chosen, and reconstructions below their images."""
    count = GRID**2
    made = {
        name: engine.sample([7] * count, range(count), [kind] * count)
        for name, kind in (("samples", "mean"), ("avade-density", "density"))
    }
    found = {name: enlarged(tile(images, GRID), SCALE) for name, images in made.items()}
    height, width, _ = engine.image_shape
    with Image.open(HELD_OUT) as picture:
        images = np.asarray(picture.convert("RGB")).reshape(-1, 32, 32, 3)[:REBUILT]
    if (height, width) == images.shape[1:3]:
        both = np.concatenate([images, engine.reconstruct(images)])
        found["reconstructions"] = enlarged(tile(both, REBUILT), SCALE)
    return found


def gate_images() -> list[tuple[str, np.ndarray]]:
    """Three photographs and three images that are none, each with its title."""
    paths = [path for path in EXAMPLES if path.stem in ("cat", "horse", "truck")]
    photographs = [Image.open(path).convert("RGB") for path in paths]
    first = photographs[0]
    character = Image.new("RGB", first.size, "#1f5a38")
    font = ImageFont.load_default(0.8 * first.height)
    middle = (first.width / 2, first.height / 2)
    ImageDraw.Draw(character).text(middle, "R", "white", font, anchor="mm")
    shown = [("photograph", photograph) for photograph in photographs] + [
        ("character", character),
        ("blurred photograph", first.filter(ImageFilter.GaussianBlur(2))),
        ("one colour", Image.new("RGB", first.size, "#426aa0")),
    ]
    return [(title, np.asarray(image)) for title, image in shown]


def gate_picture(bundle: Path) -> Image.Image:
    """What the gate decides on these images."""
    shown = gate_images()
    decisions = Gate(bundle, ALPHA).check([pixels for _, pixels in shown])
    colours = dict(re.findall(r"--ade-(\w+): light-dark\((#\w+)", STYLE))
    step = CELL + GAP
    picture = Image.new("RGB", (len(shown) * step + 2 * GAP, CELL + 78), "white")
    draw = ImageDraw.Draw(picture)
    for i, ((name, pixels), decision) in enumerate(zip(shown, decisions, strict=True)):
        colour = colours.get(decision.decision, colours["none"])
        left = GAP + i * step + (GAP if name != "photograph" else 0)
        side = CELL - 2 * EDGE
        draw.rectangle((left, 22, left + CELL - 1, 22 + CELL - 1), colour)
        inside = Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST)
        picture.paste(inside, (left + EDGE, 22 + EDGE))
        word = {"accept": "accepted", "reject": "rejected"}.get(decision.decision, "no verdict")
        figures = f"p = {decision.p_value:.2g}, {decision.bpd:.2f} bpd"
        for text, y, size, fill in (
            (name, 11, 15, colours["ink"]),
            (word, CELL + 36, 18, colour),
            (figures, CELL + 60, 14, colours["ink"]),
        ):
            font = ImageFont.load_default(size)
            draw.text((left + CELL / 2, y), text, fill, font, anchor="mm")
    return picture


def page_picture(url: str, path: Path) -> None:
    """*Score* with a drawing that is out-of-distribution."""
    from playwright.sync_api import sync_playwright

    from benchmarks.screenshots import FILL, WAIT_MS, launch, show

    with sync_playwright() as playwright:
        browser = launch(playwright)
        width, height = PAGE_SIZE
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme="light")
        page.set_default_timeout(WAIT_MS)
        page.goto(url)
        FILL["Score"](show(page, "Score"))
        page.mouse.move(0, 0)
        page.wait_for_timeout(700)
        page.screenshot(path=path)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--page", metavar="URL", help="of the running page, for score.png")
    parser.add_argument("--out", type=Path, default=OUT, help="folder (default: docs/pictures)")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    engine = InferenceEngine(args.bundle, device="cpu", operations=["sample", "reconstruct"])
    made = {**grids(engine), "gate": gate_picture(args.bundle)}
    for name, picture in made.items():
        picture.save(args.out / f"{name}.png", optimize=True)
        print(args.out / f"{name}.png")
    if args.page is not None:
        page_picture(args.page, args.out / "score.png")
        print(args.out / "score.png")


if __name__ == "__main__":
    main()
