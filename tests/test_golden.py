"""Golden verdicts: 300 pictures get the scores and decisions in ``data/golden.json``.

The pictures are made below. Half have the model's size; the others are resized, and judged by the
calibration for resized pictures. All go through the code that requests use, as PNG files or arrays.

In an environment of the record (versions, processor), every number must be equal to the last digit.
Elsewhere ONNX Runtime may use other kernels: there, p-values and decisions must still be equal, and
the other numbers within a tolerance. If another result is intended, or to make the comparison exact
on one more kind of processor, record::

    python -m tests.test_golden --record
"""

import argparse
import hashlib
import json

import numpy as np
import pytest
from PIL import Image, ImageFilter

from ade_base.pictures.show import write_png
from ade_base.system import numerics
from serving.engine.engine import InferenceEngine, Score
from serving.ingest.picture import Picture, prepare_image
from serving.verdict.decision import decide
from tests.helpers import DATA, PRETRAINED, ROOT

RECORD = DATA / "golden.json"
EXAMPLES = ROOT / "serving" / "examples"
COUNT = 150  # of each way
SIZES = ((80, 48), (16, 16), (33, 32), (200, 133), (64, 64), (31, 90))  # (width, height)
ALPHA = 0.05
TOLERANCE = 1e-4  # relative, or absolute below 1


def pictures(count=COUNT):
    """Pictures by name: ``count`` of the model's size, and as many of other sizes."""
    random = np.random.RandomState(0)  # NumPy promises that its numbers stay the same
    photos = [Image.open(path).convert("RGB") for path in sorted(EXAMPLES.glob("*.png"))]
    sheet = np.asarray(Image.open(DATA / "cifar10_test_300.webp").convert("RGB"))
    photos += map(Image.fromarray, sheet.reshape(-1, 32, 32, 3))
    kinds = (photo, mixture, photo, changed, blurred, mixture, noisy, gradient, flat, noise)
    for i in range(2 * count):
        kind = kinds[i % len(kinds)]
        width, height = (32, 32) if i < count else SIZES[i % len(SIZES)]
        yield f"{i}: {kind.__name__}, {width} x {height}", kind(random, photos, (width, height))


def photo(random, photos, size):
    """One of the photographs, enlarged or reduced."""
    one = photos[random.randint(len(photos))]
    return np.asarray(one if one.size == size else one.resize(size, Image.Resampling.BICUBIC))


def mixture(random, photos, size):
    """Two photographs, one through the other."""
    a, b = (photo(random, photos, size).astype(int) for _ in range(2))
    weight = random.randint(1, 8)
    return ((weight * a + (8 - weight) * b) // 8).astype(np.uint8)


def changed(random, photos, size):
    """One of the ten examples, mirrored, lighter or darker, with exchanged colours."""
    pixels = photo(random, photos[:10], size)[:, :: random.choice([-1, 1])].astype(int)
    lighter = np.clip(pixels + random.randint(-60, 60), 0, 255)
    return lighter[:, :, random.permutation(3)].astype(np.uint8)


def blurred(random, photos, size):
    radius = random.randint(1, 4)
    made = Image.fromarray(photo(random, photos, size)).filter(ImageFilter.BoxBlur(radius))
    return np.asarray(made)


def noisy(random, photos, size):
    pixels = photo(random, photos, size).astype(int)
    strength = random.randint(1, 12)
    return np.clip(pixels + random.randint(-strength, strength, pixels.shape), 0, 255).astype(
        np.uint8
    )


def gradient(random, photos, size):
    x, y = np.arange(size[0])[None, :, None], np.arange(size[1])[:, None, None]
    return ((random.randint(9, size=3) * x + random.randint(9, size=3) * y) % 256).astype(np.uint8)


def flat(random, photos, size):
    return np.full((size[1], size[0], 3), random.randint(256, size=3), np.uint8)


def noise(random, photos, size):
    return random.randint(256, size=(size[1], size[0], 3)).astype(np.uint8)


def prepared():
    """The pictures as model and encoder see them, every other one read from a PNG file."""
    found, look_of = {}, InferenceEngine(PRETRAINED, device="cpu").calibrations.look_of
    for i, (name, pixels) in enumerate(pictures()):
        source = write_png(pixels) if i % 2 else pixels
        image = prepare_image(source, (32, 32, 3), True, look_of)
        assert isinstance(image, Picture), image
        found[name] = image
    return found


def digest(images):
    return hashlib.sha256(b"".join(image.pixels.tobytes() for image in images.values())).hexdigest()


def verdicts(images, backend="onnxruntime"):
    """By name: bits per dimension, their parts, the score of the verdict, p-value, decision."""
    engine = InferenceEngine(PRETRAINED, backend, device="cpu", operations=("score",))
    resized = [image.resized for image in images.values()]
    pixels = np.stack([image.pixels for image in images.values()])
    views = [image.view for image in images.values()]
    scores = engine.score(pixels, resized=resized, views=views)
    found = {}
    for name, is_resized, score in zip(images, resized, scores, strict=True):
        assert isinstance(score, Score) and score.verdict is not None, name
        decision = decide(score.verdict.p_value, score.calibrations, is_resized, ALPHA)
        # The parts are float32, whose digits are fewer.
        parts = {part: float(str(np.float32(value))) for part, value in score.parts.items()}
        found[name] = {
            "bpd": score.bpd,
            **parts,
            "ood_score": score.verdict.ood_score,
            "p_value": score.verdict.p_value,
            "decision": decision.choice,
        }
    return found


def environment():
    """Everything that the last digits may depend on."""
    return json.dumps(numerics())


def digest_of(found):
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def differences(found, expected):
    """Where results differ by more than rounding."""
    assert list(found) == list(expected)
    return [
        f"{name}: {key} is {value}, not {expected[name][key]}"
        for name, values in found.items()
        for key, value in values.items()
        if value
        != (
            expected[name][key]
            if key in ("p_value", "decision")
            else pytest.approx(expected[name][key], rel=TOLERANCE, abs=TOLERANCE)
        )
    ]


@pytest.fixture(scope="module")
def images():
    return prepared()


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text())


def test_pictures_are_as_recorded(images, record):
    assert digest(images) == record["pixels"]
    assert [image.resized for image in images.values()] == [False] * COUNT + [True] * COUNT


def test_verdicts_are_as_recorded(images, record):
    found = verdicts(images)
    assert not differences(found, record["verdicts"])  # first, because its error is the clearest
    exact = record["environments"].get(environment())
    assert exact in (None, digest_of(found)), "the last digits differ"


def test_other_kernels_change_no_decision(images, record):
    """Those of PyTorch, which round differently, as those of other processors do."""
    assert not differences(verdicts(images, "torchscript"), record["verdicts"])


def test_every_decision_and_many_p_values_are_recorded(record):
    """If all pictures were rejected, the record would notice little."""
    for half in (slice(COUNT), slice(COUNT, None)):
        found = list(record["verdicts"].values())[half]
        choices = [one["decision"] for one in found]
        assert min(choices.count("accept"), choices.count("reject")) > COUNT // 4
        assert len({one["p_value"] for one in found}) > COUNT // 3


def write_record():
    """Add this environment to the record if only rounding differs there; otherwise start again."""
    images, here = prepared(), environment()
    found = verdicts(images)
    environments, rows = {here: digest_of(found)}, found
    if RECORD.exists():
        before = json.loads(RECORD.read_text())
        is_new = here not in before["environments"] and list(found) == list(before["verdicts"])
        if is_new and not differences(found, before["verdicts"]):
            environments, rows = before["environments"] | environments, before["verdicts"]
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    RECORD.write_text(
        f'{{\n"environments": {json.dumps(environments, indent=0)},\n'
        f'"pixels": "{digest(images)}",\n"verdicts": {{\n{lines}\n}}\n}}\n'
    )
    print(f"{RECORD.relative_to(ROOT)}: {len(rows)} verdicts of {len(environments)} environments")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Record the verdicts of this work tree.")
    parser.add_argument("--record", action="store_true", required=True)
    parser.parse_args()
    write_record()
