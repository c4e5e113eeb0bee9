"""What known bad pictures teach a gate, and what they cannot change."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from ade_cli.main import main
from export.gate.calibrate import calibrate_bundle
from export.gate.density_fit import fit_calibration
from export.gate.images import NamedFile
from export.gate.teach import taught
from serving.engine.engine import InferenceEngine, Score
from serving.ingest.picture import Picture, prepare_image
from serving.verdict.calibration import CalibrationError
from serving.verdict.calibration_file import CalibrationPair
from serving.verdict.conformal import conformal_p_values
from serving.verdict.lesson import LESSON
from serving.verdict.semantic import FEATURES
from tests.test_ood import draw

Statistics = dict[str, np.ndarray]
WIDTH = 12


def pictures(rng, n, shift=0.0):
    """Statistics of good pictures, or of others that differ in one of the features."""
    features = rng.normal(4, 1, (n, WIDTH)).astype(np.float32)
    features[:, 3] += np.float32(shift)
    return {**draw(rng, n), FEATURES: features}


@pytest.fixture(scope="module")
def fitting():
    return pictures(np.random.default_rng(0), 300)


@pytest.fixture(scope="module")
def untaught(fitting):
    return fit_calibration(fitting, pictures(np.random.default_rng(1), 199))


@pytest.fixture(scope="module")
def lesson(fitting, untaught):
    rng = np.random.default_rng(2)
    sets = [fitting, pictures(rng, 199), pictures(rng, 100), pictures(rng, 30, 2.0)]
    return taught(untaught, sets, lambda line: None)


def test_misleading_known_bad_pictures_change_no_false_alarm_rate(fitting, untaught, monkeypatch):
    """They are good ones, the most unlike the others in one way: a lesson that is learnt well."""
    monkeypatch.setattr("export.gate.teach.ROUNDS", 1)  # for time
    rates = []
    for seed in range(60):
        rng = np.random.default_rng(100 + seed)
        calibrating, kept, new, good = (pictures(rng, n) for n in (199, 100, 500, 300))
        rows = np.argsort(good[FEATURES][:, seed % WIDTH])[-30:]
        bad = {name: its[rows] for name, its in good.items()}
        made = taught(untaught, [fitting, calibrating, kept, bad], lambda line: None)
        assert made.lesson is not None and len(made.scores) == 199
        p_values = conformal_p_values(made.scores, made.scores_of(new))
        rates.append([(p_values <= alpha).mean() for alpha in (0.1, 0.05, 0.01)])
    # With 199 pictures, a rate has a standard deviation of 0.021 (0.015, 0.007), and 60 a mean.
    assert np.abs(np.mean(rates, axis=0) - (0.1, 0.05, 0.01)).max() < 0.01
    assert (np.std(rates, axis=0) < (0.035, 0.027, 0.014)).all()


def test_a_lesson_is_used_only_if_it_finds_more(fitting, untaught, lesson):
    lines: list[str] = []
    rng = np.random.default_rng(5)
    calibrating, kept, good, bad = (pictures(rng, n) for n in (199, 100, 30, 300))
    assert taught(untaught, [fitting, calibrating, kept, good], lines.append) is untaught
    assert "left out what they teach" in lines[0] and "30 of them and 100 good ones" in lines[0]
    bad[FEATURES][:, 3] += 2
    found = [
        (conformal_p_values(its.scores, its.scores_of(bad)) <= 0.05).mean()
        for its in (untaught, lesson)
    ]
    assert found[1] > found[0] + 0.15
    assert lesson.names[-1] == LESSON and lesson.verdicts(bad)[0].explain


def test_no_batch_changes_a_taught_score(lesson):
    many = pictures(np.random.default_rng(6), 33)
    alone = [
        lesson.scores_of({name: its[i : i + 1] for name, its in many.items()})[0] for i in range(33)
    ]
    assert lesson.scores_of(many).tolist() == alone


def test_a_lesson_is_stored_and_checked(lesson, tmp_path):
    path = tmp_path / "calibration.npz"
    path.write_bytes(CalibrationPair(lesson, lesson).to_bytes())
    read = CalibrationPair.load(path).exact
    many = pictures(np.random.default_rng(6), 9)
    assert read is not None and (read.scores_of(many) == lesson.scores_of(many)).all()
    its = lesson.lesson
    assert its is not None
    for change, message in (
        ({"inputs": ()}, "lesson_inputs must be some of features"),
        ({"inputs": ("pooled",)}, "lesson_inputs must be some of features"),
        ({"inputs": (FEATURES, FEATURES)}, "lesson_slopes must be float64 of shape .24,."),
        ({"slopes": its.slopes[1:]}, "lesson_slopes must be float64 of shape .12,."),
        ({"slopes": its.slopes.astype(str)}, "lesson_slopes must be float64"),
        ({"slopes": its.slopes * np.nan}, "must be finite"),
        ({"weight": -1.0}, "the weight at least 0"),
        ({"weight": np.inf}, "must be finite"),
    ):
        wrong = dataclasses.replace(its, **change)
        with pytest.raises(CalibrationError, match=message):
            dataclasses.replace(lesson, lesson=wrong).check_values()
    with pytest.raises(CalibrationError, match="semantic statistics must come last"):
        dataclasses.replace(lesson, lesson=None).check_values()
    names = (*lesson.names[:-2], LESSON, lesson.names[-2])
    with pytest.raises(CalibrationError, match="semantic_lesson must be the last"):
        dataclasses.replace(lesson, names=names).check_values()


def large(images):
    return [np.kron(image, np.ones((5, 5, 1), np.uint8)) for image in images]


def test_tinted_pictures_are_known_to_be_bad(tiny_bundle, small_images, tmp_path):
    """By the encoder that sees originals. Copies and unreadable files are named."""
    good, tinted = large(small_images[:150]), large(small_images[150:200])
    for image in tinted:
        image[:, :, 2] //= 2
    known_bad = [*tinted[:20], good[0], tinted[0], NamedFile.of("broken.png", b"GIF89a")]
    lines: list[str] = []
    out = tmp_path / "taught"
    made = calibrate_bundle(
        tiny_bundle, out, good[:50], good[50:], "c", lines.append, known_bad=known_bad
    )
    assert made.exact is not None and made.exact.lesson is not None
    assert made.exact.lesson.inputs == ("pooled", "unusual_patches")
    assert len(made.exact.scores) == 66 and len(made.exact.fitted_digests) == 50 + 34 + 20
    told = "\n".join(lines)
    assert "known bad pictures: left out 1 image: broken.png" in told
    assert "image 20: a copy of a good picture; image 21: a copy of another one" in told
    assert "known bad pictures: what they teach counts. Pictures like them: AUROC" in told
    assert "corrupted images, rejected at alpha 0.05:" in told
    engine = InferenceEngine(out, device="cpu", operations=["score"])
    assert engine.bundle.manifest["calibration"]["known_bad"] == 20
    look_of = engine.calibrations.look_of
    new = [prepare_image(image, engine.image_shape, True, look_of) for image in tinted[20:]]
    seen = [image for image in new if isinstance(image, Picture)]
    scores = engine.score(
        np.stack([image.pixels for image in seen]),
        resized=[True] * len(seen),
        views=[image.view for image in seen],
    )
    verdicts = [score.verdict for score in scores if isinstance(score, Score)]
    assert np.mean([its is not None and its.p_value <= 0.05 for its in verdicts]) > 0.2


def test_too_few_known_bad_pictures_are_refused_at_once(
    tiny_bundle, small_images, tmp_path, capsys
):
    good = small_images[:90]

    def refused(message, known_bad, data):
        with pytest.raises(CalibrationError, match=message):
            calibrate_bundle(
                tiny_bundle, tmp_path / "out", data[:40], data[40:], "c", known_bad=known_bad
            )
        assert not (tmp_path / "out").exists()

    refused("at least 10 are needed .* got 3 pictures", list(small_images[100:103]), good)
    refused("at least 10 are needed .* got 9 pictures", [*good[:20], *small_images[100:109]], good)
    refused("teach only what a network sees", list(small_images[100:120]), good)
    refused("a third of the 25 calibration images", large(small_images[100:120]), large(good[:65]))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"")
    words = ["calibrate", str(tiny_bundle), str(tmp_path / "out"), "--data", str(tmp_path)]
    assert main([*words, "--known-bad", str(tmp_path / "bad")]) == 2
    assert "at least 10 are needed that can be read and are no copies, got 1" in (
        capsys.readouterr().err
    )
