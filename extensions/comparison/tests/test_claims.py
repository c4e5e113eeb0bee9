"""The paper's claims, judged by made-up figures."""

import dataclasses

import pytest

from extensions.comparison.judging import _comparable, _deciding, _shared_budget, judge_claims
from extensions.comparison.paper import Claim, Finding, claims
from extensions.comparison.rows import EFFICIENTNET, INCEPTION, RESNET20, Distance
from extensions.comparison.tests.made import run
from training.recipes import recipe_names

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
    def plain_run(seed, images, **changes):
        return run("av-ade", seed, images, changes)

    plain = [plain_run(0, 400_000), plain_run(1, 80_000), plain_run(3, 150_000)]
    residual = [plain_run(0, 150_016), plain_run(3, 150_016)]
    assert _comparable([residual, plain]) == [(residual[1], plain[2])]
    assert _comparable([residual[:1], plain]) == [(residual[0], plain[2])]
    more = [plain_run(0, 150_000), plain_run(1, 150_100)]  # the difference counts as none
    assert _comparable([residual[:1], more]) == [(residual[0], more[0])]
    assert _comparable([residual, [*more, plain_run(3, 150_000)]])[1][1].seed == 3
    # Each seed by itself, those that learned most first.
    assert _comparable([plain, plain]) == [(plain[i], plain[i]) for i in (0, 2, 1)]
    assert _comparable([plain[:1], residual[:1]]) == [(plain[0], residual[0])]  # budgets differ
    assert _comparable([plain, []]) == []
    # Another version of the program had no cooldown.
    older = plain_run(0, 150_000, cooldown=0.0)
    assert not _comparable([[older], plain])
    assert _comparable([[older], [*plain, plain_run(1, 80_000, cooldown=0.0)]])
    for changes in (
        {"size": "small"},
        {"pixels": 64},
        {"measured": {"how": {"samples": 20, "resnet20": "one"}}},
        {"measured": {"how": {"samples": 10, "resnet20": "another"}}},
        {"measured": {"images": 8}},
    ):
        assert not _comparable([[plain_run(0, 80_000, **changes)], plain])
    assert not _comparable([[run("av-ade", 0, 80_000, data="stl10")], plain])


def with_bpd(system, seed, bpd, images):
    return run(system, seed, images, {"measured": {"bpd": bpd}})


@pytest.mark.parametrize("images", [400_000, 150_000])
@pytest.mark.parametrize(("bpd", "finding"), [(3.9, HOLDS), (4.1, UNDECIDED), (4.2, UNDECIDED)])
def test_a_claim_is_undecided_if_its_seeds_disagree(images, bpd, finding):
    first = [with_bpd("av-ade-s2", 0, 4.0, 400_000), with_bpd("av-ade", 0, 4.1, 400_000)]
    second = [with_bpd("av-ade-s2", 3, bpd, images), with_bpd("av-ade", 3, 4.1, images)]
    judged = judge_claims([*second, *first])
    ((found, text),) = [one for one in judged if one[1].startswith("two scales")]
    assert found is finding
    assert "after 400,000 images, seed 0: BPD 4.00 against 4.10" in text
    assert f"after {images:,} images, seed 3: BPD {bpd:.2f} against 4.10" in text


def test_unreliable_distances_decide_nothing():
    far = Distance(9.0, 10, "", is_reliable=False)
    distances = {RESNET20: Distance(8.0, 10, ""), EFFICIENTNET: far, INCEPTION: far}
    row = run("gan", changes={"measured": {"bpd": 4.0, "bpd_error": 0.1, "distances": distances}})
    found = {"bpd": 4.0, "bpd_error": 0.1, RESNET20: 8.0, EFFICIENTNET: None, INCEPTION: None}
    assert _deciding(row) == found


def test_minutes_are_a_budget_as_well_once_they_are_spent():
    """A GAN's are those of its generator, and of its inference network in addition."""
    gan = run("gan", images_budget=400_000, minutes_budget=60, images=500_000, inferring_since=9)
    timed = run("av-ade", images_budget=250_000, minutes_budget=60, images=250_016)
    assert _shared_budget([timed, gan]) == "60 minutes"
    for changed in (
        {"images": 499_000},  # the inference network is not finished
        {"minutes_budget": 30},
        {"minutes_budget": None},
    ):
        assert _shared_budget([timed, dataclasses.replace(gan, **changed)]) is None
