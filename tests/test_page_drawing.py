"""The page in a browser: the main paths of the other tabs."""

import io

import numpy as np
from PIL import Image, PngImagePlugin
from playwright.sync_api import expect

from ade_base.pictures.show import untile
from ade_client.client import AdeClient
from serving.api.latents import with_level
from serving.engine.bundle import open_bundle
from serving.engine.noise import NoiseStream, sample_key
from serving.page.tab_about import PAPER
from serving.page.tab_explore import VARIATIONS
from tests import browsing as ui
from tests.helpers import PRETRAINED


def cat():
    return np.asarray(Image.open(ui.EXAMPLE).convert("RGB"))


def test_sample(page, tmp_path):
    """The tab opens with samples, whose files say how to reproduce them; the npz has the same."""
    panel = ui.show(page, "Sample")
    samples = panel.locator(".ade-grid img").filter(visible=True)
    expect(samples).to_have_count(16)
    third = ui.image_of(samples.nth(2))
    text = {key: third.text[f"ade:{key}"] for key in ("seed", "index", "n")}
    assert third.format == "PNG" and text == {"seed": "7", "index": "2", "n": "1"}
    ui.unfold(panel, "More")
    grid = Image.open(ui.download(panel, "Download all (PNG)", tmp_path / "samples.png"))
    assert grid.size == (128, 128) and grid.info["ade:seed"] == "7"
    with np.load(ui.download(panel, "Download all (npz)", tmp_path / "samples.npz")) as arrays:
        images, seed, index = (arrays[name] for name in ("images", "seed", "index"))
    assert seed == "7" and index.tolist() == list(range(16))
    assert np.array_equal(images[2], third)
    assert np.array_equal(untile(np.asarray(grid), 16, (32, 32, 3)), images)
    keep = ui.button(panel, "Download it")
    expect(keep).to_be_disabled()
    samples.nth(2).click()
    expect(keep).to_be_enabled()
    chosen = Image.open(ui.download(panel, "Download it", tmp_path / "chosen.png"))
    assert chosen.info["ade:index"] == "2" and np.array_equal(chosen, third)


def test_new_samples_and_history(page):
    """Each click draws another seed; the field, the button beside it and the history repeat one."""
    panel = ui.show(page, "Sample")
    first = panel.locator(".ade-grid img").first
    seed = panel.get_by_label("Seed", exact=True)
    expect(first).to_be_visible()
    before, seeds = ui.pixels(first), []

    def is_as_before():
        return np.array_equal(ui.pixels(first), before)

    for _ in range(2):
        source = first.get_attribute("src") or ""
        ui.button(panel, "⚄ Draw new samples").click()
        expect(first).not_to_have_attribute("src", source)
        seeds.append(seed.input_value())
        assert f"sample-{seeds[-1]}-0.png" in (first.get_attribute("src") or "")
    assert len({"7", *seeds}) == 3 and not is_as_before()
    ui.unfold(panel, "Earlier samples of this session")
    past = panel.locator(".ade-grid").nth(1)
    expect(past.locator("img")).to_have_count(3)
    past.locator("button:has(img)").nth(2).click()
    expect(seed).to_have_value("7")
    ui.wait_for(page, is_as_before)
    expect(past.locator("img")).to_have_count(3)
    seed.fill(seeds[0])
    ui.button(panel, "Draw this seed").click()
    expect(ui.shown(panel, f"sample-{seeds[0]}-0.png").first).to_be_visible()
    seed.fill("7")
    seed.press("Enter")
    ui.wait_for(page, is_as_before)
    seed.fill("")  # an error is one message, and the samples stay
    ui.button(panel, "Draw this seed").click()
    expect(page.get_by_text("The seed is empty")).to_have_count(1)
    expect(first).to_be_visible()
    seed.fill("7")


def test_a_sample_is_sent_to_another_tab(page):
    """Uses only the keyboard. The other tab gets the sample itself, not an encoding of it."""
    panel = ui.show(page, "Sample")
    chosen = panel.locator(".ade-grid button:has(img)").nth(5)
    sample = ui.pixels(chosen.locator("img"))
    for name in ("Explore from it", "Explore to it"):
        ui.show(page, "Sample")
        ui.unfold(panel, "More")
        chosen.focus()
        page.keyboard.press("Enter")
        expect(ui.button(panel, name)).to_be_enabled()
        ui.button(panel, name).focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("tab", name="Explore")).to_have_attribute("aria-selected", "true")
    expect(ui.shown(panel, "sample-7-5")).to_have_count(2)
    strip = ui.shown(panel, "strip.png")

    def is_of_the_sample():
        ends = ui.pixels(strip) if strip.count() else np.zeros((32, 64, 3))
        return np.array_equal(ends[:, :32], sample) and np.array_equal(ends[:, -32:], sample)

    ui.wait_for(page, is_of_the_sample)
    for _ in range(2):
        ui.remover(panel).click()


def test_reconstruct(page):
    panel = ui.show(page, "Reconstruct")
    go = ui.button(panel, "Reconstruct")
    expect(go).to_be_disabled()
    ui.drop(panel, ui.EXAMPLE)
    expect(panel.get_by_text("root mean square")).to_be_visible()
    for name in ("input.png", "reconstruction.png", "strip.png"):
        expect(ui.shown(panel, name).first).to_be_visible()
    strip = ui.pixels(ui.shown(panel, "strip.png"))
    assert strip.shape == (32, 4 * 32, 3) and np.array_equal(strip[:, -32:], cat())
    ui.unfold(panel, "Technical details")
    expect(panel.locator("svg[aria-label^='bits by latent level: level 0']")).to_be_visible()

    def decibels():
        return float((panel.get_by_text("PSNR").text_content() or "").split()[1])

    before = decibels()
    ui.number(panel, "Latent levels kept").fill("1")
    go.click()
    ui.wait_for(page, lambda: decibels() < before - 0.5)


def test_explore(page):
    panel = ui.show(page, "Explore")
    go, strip = ui.button(panel, "Explore"), ui.shown(panel, "strip.png")
    expect(ui.shown(panel, "seed-")).to_have_count(2)
    expect(strip).to_be_visible()
    for _ in range(2):
        ui.remover(panel).click()
    expect(strip).to_have_count(0)
    expect(panel.get_by_text("The interpolation appears here")).to_be_visible()
    ui.unfold(panel, "Choose other images")
    for i in range(2):
        expect(go).to_be_disabled()
        panel.get_by_role("button", name="Draw this seed").nth(i).click()
    expect(go).to_be_enabled()
    expect(strip).to_be_visible()
    expect(ui.shown(panel, "step-4.png")).to_be_visible()
    ui.unfold(panel, "What coarse and fine levels hold")
    expect(ui.shown(panel, "levels.png")).to_be_visible()
    steps = ui.pixels(strip)
    assert steps.shape == (32, 9 * 32, 3) and len(np.unique(steps)) > 50
    ui.number(panel, "Position").fill("8")
    ui.number(panel, "Position").press("Tab")
    expect(ui.shown(panel, "step-8.png")).to_be_visible()
    assert np.array_equal(steps[:, -32:], ui.pixels(ui.shown(panel, "seed-2.png")))
    assert ui.image_of(ui.shown(panel, "interpolation.webp")).n_frames == 16


def test_levels(page, service):
    panel = ui.show(page, "Explore")
    ui.unfold(panel, "The first image, level by level")
    panel.get_by_role("radio", name="2", exact=True).check()
    ui.button(panel, "Show its levels").click()
    expect(ui.shown(panel, "varied.png")).to_be_visible()
    first, coarse, varied = (
        ui.pixels(ui.shown(panel, name)) for name in ("seed-1", "coarse.png", "varied.png")
    )
    pieces = coarse.reshape(32, 3, 32, 3).swapaxes(0, 1)
    assert np.array_equal(pieces[2], first)

    def noise(seed, indices):
        streams = [NoiseStream(sample_key(seed, i)) for i in indices]
        shapes = open_bundle(PRETRAINED).latent_shapes
        return [np.stack([s.normal(shape) for s in streams]) for shape in shapes]

    own = noise(1, range(1))
    alone = [
        np.concatenate([n * (level <= most) for most in range(3)]) for level, n in enumerate(own)
    ]
    with AdeClient(service.url) as client:
        coarser = client.sample_with(alone)
        expected = client.sample_with(with_level(own, noise(1, range(1, 1 + VARIATIONS)), 2))
    assert np.array_equal(pieces, coarser)
    assert np.array_equal(varied.reshape(32, VARIATIONS, 32, 3).swapaxes(0, 1), expected)
    assert not any(np.array_equal(piece, first) for piece in expected)


def test_reproduce(page, service, tmp_path):
    with AdeClient(service.url) as client:
        data, _ = client.sample_png(4, seed=11, kind="density")
    (tmp_path / "made.png").write_bytes(data)
    edited = Image.open(io.BytesIO(data))
    edited.putpixel((3, 3), (255, 0, 255))
    for name, model in (("edited", ""), ("unknown", "![a](http://elsewhere.example/a.png)")):
        text = PngImagePlugin.PngInfo()
        for key, value in (edited.info | ({"ade:model": model} if model else {})).items():
            text.add_text(str(key), value)
        edited.save(tmp_path / f"{name}.png", pnginfo=text)
    panel = ui.show(page, "Sample")
    ui.unfold(panel, "Reproduce: how was this PNG made?")
    for path, words in (
        (tmp_path / "made.png", "The same picture, pixel for pixel"),
        (tmp_path / "edited.png", "the picture was changed"),
        (tmp_path / "unknown.png", "it was made by an unknown model"),
        (ui.EXAMPLE, "does not say how it was made"),
    ):
        if panel.get_by_label("Clear").or_(panel.get_by_label("Remove")).count():
            ui.clear_files(panel)
        ui.give_files(panel, path)
        ui.button(panel, "Make it again").click()
        expect(page.get_by_text(words).first).to_be_visible()
        if path != ui.EXAMPLE:  # of which there is a message
            expect(panel.locator("[aria-live]").filter(has_text=words)).to_have_count(1)


def test_about(page, service):
    """A card with figures and samples, and the API's reference, folded."""
    panel = ui.show(page, "About")
    about = open_bundle(PRETRAINED).manifest
    for words in (
        f"{about['evaluation']['test']['figures']['bpd']['value']:.3f}",
        f"{about['calibration']['images']:,} images",
        "What it is good for",
        "45,000 images to train",
        about["licence"],
    ):
        expect(panel.get_by_text(words).first).to_be_visible()
    limits = panel.get_by_role("heading", name="What it is not good for")
    for part in (limits, panel.get_by_text("To compare likelihoods of different sizes")):
        expect(part).to_be_in_viewport(ratio=1)
    expect(panel.get_by_alt_text("16 samples of")).to_be_visible()
    panel.get_by_text("How exact the exports are").click()
    expect(panel.get_by_text("of the values one level apart")).to_be_visible()
    panel.get_by_text("POST /predictions/score").click()
    for words in (
        f"write its address instead of {service.url}",
        f"curl {service.url}/predictions/score -F image=@image.png",
    ):
        expect(panel.get_by_text(words)).to_be_visible()
    meaning = panel.get_by_role("cell", name="false-alarm rate: an image is rejected")
    expect(meaning.first).to_be_visible()
    expect(panel.get_by_role("link", name="The paper")).to_have_attribute("href", PAPER)
    href = panel.get_by_role("link", name="OpenAPI document").get_attribute("href")
    assert href == "/openapi.json"
    assert page.request.get(f"{service.page}{href}").json()["openapi"] == "3.1.0"
