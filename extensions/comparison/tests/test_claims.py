"""The paper's claims, judged by made-up figures."""

import dataclasses

import pytest

from extensions.comparison.judging import _comparable, _deciding, _shared_budget, judge_claims
from extensions.comparison.measure import EFFICIENTNET, INCEPTION, RESNET20
from extensions.comparison.paper import Claim, Finding, claims
from training.recipes import recipe, recipe_names

HOLDS, FAILS, UNDECIDED = Finding.HOLDS, Finding.FAILS, Finding.UNDECIDED


@pytest.mark.parametrize(
    "better, worse, lead, finding",
    [
        (3.90, 3.95, 0.0, HOLDS),
        (3.95, 3.90, 0.0, FAILS),
        (3.90, 3.91, 0.0, UNDECIDED),  # within the spread of seeds
        (3.91, 3.90, 0.0, UNDECIDED),
        (3.90, 4.40, 0.4, HOLDS),
        (3.90, 4.20, 0.4, FAILS),  # better, but by less than the claim says
        (3.90, 4.305, 0.4, UNDECIDED),
    ],
)
def test_bits_are_judged_by_the_spread_of_seeds(better, worse, lead, finding):
    claim = Claim("", ("a", "b"), ("bpd",), lead)
    assert claim.judge([{"bpd": better}, {"bpd": worse}]) is finding


def test_systems_are_comparable_unless_one_is_worse():
    claim = Claim("", ("a", "b"), ("bpd",), is_equality=True)
    for ours, finding in ((3.80, HOLDS), (3.92, HOLDS), (3.93, FAILS)):
        assert claim.judge([{"bpd": ours}, {"bpd": 3.90}]) is finding


def test_bits_must_differ_by_more_than_two_standard_errors():
    claim = Claim("", ("a", "b"), ("bpd",))
    better, worse = {"bpd": 3.90, "bpd_error": 0.03}, {"bpd": 3.98, "bpd_error": 0.04}
    assert claim.judge([better, worse]) is UNDECIDED
    assert claim.judge([better, {**worse, "bpd": 4.01}]) is HOLDS


@pytest.mark.parametrize(
    "a, b, finding",
    [
        ({"one": 10.0, "two": 100.0}, {"one": 12.0, "two": 120.0}, HOLDS),
        ({"one": 12.0, "two": 120.0}, {"one": 10.0, "two": 100.0}, FAILS),
        ({"one": 10.0, "two": 120.0}, {"one": 12.0, "two": 100.0}, UNDECIDED),  # they disagree
        ({"one": 10.0, "two": 100.0}, {"one": 12.0, "two": 101.0}, UNDECIDED),
        ({"one": 10.0, "two": None}, {"one": 12.0, "two": 100.0}, HOLDS),
    ],
)
def test_all_feature_spaces_must_agree(a, b, finding):
    assert Claim("", ("a", "b"), ("one", "two")).judge([a, b]) is finding


def test_a_system_between_two_others():
    claim = Claim("", ("a", "b", "c"), ("one",))
    assert claim.judge([{"one": 1.0}, {"one": 2.0}, {"one": 3.0}]) is HOLDS
    assert claim.judge([{"one": 1.0}, {"one": 4.0}, {"one": 3.0}]) is FAILS
    assert claim.judge([{"one": 1.0}, {"one": 2.0}, {"one": 2.01}]) is UNDECIDED
    both = Claim("", ("a", "b", "c"), ("one", "two"))
    undecided = {"one": 2.0, "two": 5.0}
    assert both.judge([{"one": 1.0, "two": 6.0}, undecided, {"one": 9.0, "two": 9.0}]) is UNDECIDED
    assert claim.judge([{"one": 5.0}, {"one": 4.0}, {"one": 3.0}]) is FAILS


def test_claims_are_of_systems_that_exist():
    assert {system for claim in claims(("one",)) for system in claim.systems} <= set(recipe_names())


def test_runs_of_equal_budgets_are_compared_and_of_one_seed_if_there_are():
    def run(seed, images, cooldown=0.2, **other):
        state = {"images": images, "inferring_since": None}
        size, pixels = other.pop("size", "tiny"), other.pop("pixels", 32)
        config = dataclasses.replace(recipe("av-ade", pixels, 3, size), cooldown=cooldown)
        counts = {"samples": other.pop("samples", 10), "efficientnet_samples": 5}
        counts["resnet20"] = other.pop("resnet20", "one")
        measured = {"split": "test[0:9]", "images": other.pop("measured", 9), "how": counts}
        row = {"seed": seed, "state": state, "budget": {"minutes": None}, "config": config}
        return {**row, "data": "cifar10", "measured": measured, **other}

    plain = [run(0, 400_000), run(1, 80_000), run(3, 150_000)]
    residual = [run(0, 150_016), run(3, 150_016)]
    assert _comparable([residual, plain]) == [(residual[1], plain[2])]
    assert _comparable([residual[:1], plain]) == [(residual[0], plain[2])]
    more = [run(0, 150_000), run(1, 150_100)]  # the difference counts as none
    assert _comparable([residual[:1], more]) == [(residual[0], more[0])]
    assert _comparable([residual, [*more, run(3, 150_000)]])[1][1]["seed"] == 3
    # Each seed by itself, those that learned most first.
    assert _comparable([plain, plain]) == [(plain[i], plain[i]) for i in (0, 2, 1)]
    assert _comparable([plain[:1], residual[:1]]) == [(plain[0], residual[0])]  # budgets differ
    assert _comparable([plain, []]) == []
    # Another version of the program had no cooldown.
    older = run(0, 150_000, cooldown=0.0)
    assert not _comparable([[older], plain])
    assert _comparable([[older], [*plain, run(1, 80_000, cooldown=0.0)]])
    for other in (
        {"data": "stl10"},
        {"size": "small"},
        {"pixels": 64},
        {"samples": 20},
        {"measured": 8},
        {"resnet20": "another"},
    ):
        assert not _comparable([[run(0, 80_000, **other)], plain])


def test_a_claim_is_undecided_if_its_seeds_disagree():
    def run(system, seed, bpd, images):
        return {
            "seed": seed,
            "state": {"images": images, "inferring_since": None},
            "budget": {"minutes": None},
            "config": recipe(system, 32, 3, "tiny"),
            "data": "cifar10",
            "measured": {
                "split": "test[0:9]",
                "images": 9,
                "how": {"samples": 10, "efficientnet_samples": 5},
                "elbo": {"bpd": bpd},
            },
        }

    first = [run("av-ade-s2", 0, 4.0, 400_000), run("av-ade", 0, 4.1, 400_000)]
    for images in (400_000, 150_000):
        for bpd, finding in ((3.9, HOLDS), (4.1, UNDECIDED), (4.2, UNDECIDED)):
            second = [run("av-ade-s2", 3, bpd, images), run("av-ade", 3, 4.1, images)]
            ((found, text),) = [
                one for one in judge_claims([*second, *first]) if one[1].startswith("two scales")
            ]
            assert found is finding
            assert "after 400,000 images, seed 0: BPD 4.00 against 4.10" in text
            assert f"after {images:,} images, seed 3: BPD {bpd:.2f} against 4.10" in text


def test_unreliable_distances_decide_nothing():
    far = {"frechet": 9.0, "rank_deficient": True}
    measured = {
        "elbo": {"bpd": 4.0, "standard_error": 0.1},
        "distances": {"mean": {RESNET20: {"frechet": 8.0}, EFFICIENTNET: far}},
        "inception": {"fid": {"50000": {"fid": 7.0, "rank_deficient": True}}},
    }
    found = {"bpd": 4.0, "bpd_error": 0.1, RESNET20: 8.0, EFFICIENTNET: None, INCEPTION: None}
    assert _deciding({"measured": measured}) == found


def test_the_time_of_an_inference_network_is_not_that_of_its_generator():
    def row(system, **state):
        config = recipe(system, 32, 3, "tiny")
        return {"config": config, "budget": {"minutes": 60}, "state": state}

    gan = row(
        "gan",
        images=500_000,
        step=15_625,
        inferring_since=12_500,
        seconds=3720.0,
        generator_seconds=3000.0,
    )
    timed = row(
        "av-ade",
        images=250_000,
        step=7_813,
        inferring_since=None,
        seconds=3601.0,
        generator_seconds=0.0,
    )
    assert _shared_budget([timed, gan]) is None
    gan["state"]["generator_seconds"] = 3600.5
    assert _shared_budget([timed, gan]) == "60 minutes"
