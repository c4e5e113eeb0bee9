"""The promises of docs/ood.md about the shipped bundle, checked on real images."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from export.gate.corruptions import CORRUPTIONS
from export.gate.density_fit import fit_seen
from export.gate.measuring import statistics_of
from export.gate.rejection import p_values
from export.gate.separation import COMBINED, NO_MODEL, RAW_BPD, compare_scores, scores_of
from serving.engine.bundle import open_bundle
from serving.ingest.picture import Picture, prepare_image
from serving.verdict.conformal import conformal_p_values
from tests.helpers import PRETRAINED, ROOT, large_data, needs_data

ALPHAS = (0.1, 0.05, 0.01)
LEAST = {"chars74k": 0.95, "textures": 0.94, **dict.fromkeys(CORRUPTIONS, 0.99)}


@pytest.fixture
def engine(pretrained_engine):
    return pretrained_engine


def test_corrupted_images_are_found_among_a_few(engine, real_images):
    """Uses only the images of this repository, so that it always runs."""
    look_of = engine.calibrations.look_of
    typical = scores_of(
        engine.calibration, statistics_of(engine, real_images, "real", look_of=look_of)
    )
    assert (
        conformal_p_values(engine.calibration.scores, typical[COMBINED]) <= 0.1
    ).mean() < 0.1 + 4 * math.sqrt(0.09 / 300)
    for name, corrupt in CORRUPTIONS.items():
        corrupted = corrupt(real_images[:40], np.random.default_rng(0))
        unusual = scores_of(
            engine.calibration, statistics_of(engine, corrupted, name, look_of=look_of)
        )
        assert compare_scores(typical[COMBINED], unusual[COMBINED]).auroc > 0.985, name


def test_resized_images_have_a_verdict_of_their_own(engine, real_images):
    """On images enlarged by factors that the shipped bundle's calibration did not use."""

    def p_values_of(images):
        larger = (
            np.asarray(Image.fromarray(image).resize((75, 75), Image.Resampling.HAMMING))
            for image in images
        )
        made = [
            prepare_image(image, (32, 32, 3), True, engine.calibrations.look_of) for image in larger
        ]
        pictures = [image for image in made if isinstance(image, Picture)]
        return p_values(engine, engine.calibrations, pictures)

    typical = p_values_of(real_images[:150])
    assert (typical <= 0.1).mean() < 0.1 + 4 * math.sqrt(0.09 / 150) and np.median(typical) > 0.3
    for name in ("constant", "uniform noise", "permuted pixels"):
        unusual = p_values_of(CORRUPTIONS[name](real_images[:20], np.random.default_rng(0)))
        assert (unusual <= 0.05).mean() > 0.9, name


@pytest.mark.slow
@needs_data("data/cifar10", "data/ood/chars74k.npz", "data/ood/textures.npz")
def test_false_alarms_and_detection_on_whole_data_sets(engine):
    from training.datasets import load_dataset

    parts = load_dataset("cifar10", str(large_data("data/cifar10"))).parts
    test_images = np.asarray(parts["test"].images[:])
    look_of = engine.calibrations.look_of
    test = statistics_of(engine, test_images, "test", look_of=look_of)
    held_out = statistics_of(
        engine,
        np.concatenate([parts["select"].images[:], parts["calibrate"].images[:]]),
        "held out",
        look_of=look_of,
    )
    level = 1 - 0.05 / 9
    for split in range(3):
        order = np.random.default_rng(split).permutation(5000) if split else np.arange(5000)
        fitted = fit_seen(
            {k: v[order[:2000]] for k, v in held_out.items()},
            {k: v[order[2000:]] for k, v in held_out.items()},
            look_of(False),
        )
        found = conformal_p_values(fitted.scores, fitted.scores_of(test))
        for alpha in ALPHAS:
            k = math.floor(alpha * 3001)
            low, high = stats.betabinom.ppf([(1 - level) / 2, (1 + level) / 2], 10_000, k, 3001 - k)
            assert low <= (found <= alpha).sum() <= high, (split, alpha)
    typical = scores_of(engine.calibration, test)
    for name, least in LEAST.items():
        images = (
            np.load(large_data(f"data/ood/{name}.npz"))["images"]
            if name not in CORRUPTIONS
            else CORRUPTIONS[name](test_images[:500], np.random.default_rng(0))
        )
        unusual = scores_of(
            engine.calibration, statistics_of(engine, images, name, look_of=look_of)
        )
        found = {
            score: compare_scores(typical[score], unusual[score]).auroc
            for score in (COMBINED, RAW_BPD, NO_MODEL)
        }
        assert found[COMBINED] >= least and found[COMBINED] >= found[RAW_BPD] - 0.01, (name, found)


def test_the_documented_figures_are_those_of_the_report():
    """docs/ood.md repeats figures of docs/ood/report.md, which is of the shipped bundle."""
    text, report = (Path(ROOT / "docs" / name).read_text() for name in ("ood.md", "ood/report.md"))
    assert report.startswith(f"# OOD detection by {open_bundle(PRETRAINED).model_id}\n")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.splitlines()]
    (place,) = [i for i, line in enumerate(lines) if line[:2] == ["score", "chars74k"]]
    header, scores = lines[place], {line[0]: line for line in lines[place + 2 :] if line}
    for row, name in (
        ("characters", "chars74k"),
        ("textures", "textures"),
        ("one colour", "constant"),
        ("uniform noise", "uniform noise"),
        ("blurred (σ = 2 pixels)", "blurred, σ = 2"),
        ("2 bits per value", "posterised to 2 bits"),
        ("pixels permuted", "permuted pixels"),
    ):
        (first,) = [line for line in lines if line and line[0].startswith(f"{name} (")]
        aurocs = [scores[score][header.index(name)] for score in (COMBINED, *list(scores)[1:4])]
        found = f"{float(first[6].removesuffix(' %')):.0f} %"
        (documented,) = re.findall(rf"^\| {re.escape(row)} \| (.*) \|$", text, re.MULTILINE)
        assert re.sub(r"\*\*| ± [\d.]+", "", documented).split(" | ") == [*aurocs, found], row
    alphas = {line[0]: line[1:] for line in lines if len(line) == 3 and "to" in line[2]}
    rates, bands = zip(*(alphas[alpha] for alpha in ("0.1", "0.05", "0.01")), strict=True)
    written = " ".join(text.split())
    assert f"test images: {rates[0]}, {rates[1]} and {rates[2]} at alpha" in written
    assert f"(95 % bands {', '.join(bands)})" in written
