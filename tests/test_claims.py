"""Verdicts: what decides between supported, not supported and undecided."""

import random

import pytest

from diffusers_edu.evaluation.claims import CLAIMS, NOT_SUPPORTED, SUPPORTED, UNDECIDED, Check, Claim, gain, judge
from diffusers_edu.evaluation.estimates import Estimate
from diffusers_edu.rungs import RUNGS


def runs(*figures):
    return [
        {"rung": {name: Estimate(value, (value - arm, value + arm), 100) for name, (value, arm) in run.items()}}
        for run in figures
    ]


def claim(*checks):
    return Claim("it is so", checks, "because")


def check(name, **bounds):
    return Check(name, lambda run: run["rung"][name], **bounds)


@pytest.mark.parametrize(
    ("value", "arm", "bounds", "word"),
    [
        (1.0, 0.5, {"above": 0}, SUPPORTED),
        (1.0, 1.5, {"above": 0}, UNDECIDED),
        (-1.0, 0.5, {"above": 0}, NOT_SUPPORTED),
        (1.0, 0.05, {"above": 0.9, "below": 1.1}, SUPPORTED),
        (1.09, 0.05, {"above": 0.9, "below": 1.1}, UNDECIDED),
        (1.2, 0.05, {"above": 0.9, "below": 1.1}, NOT_SUPPORTED),
        (0.0, 0.0, {"above": 0}, NOT_SUPPORTED),  # nothing gained is nothing gained
    ],
)
def test_the_whole_interval_decides(value, arm, bounds, word):
    (verdict,) = judge([claim(check("x", **bounds))], runs({"x": (value, arm)}))
    assert verdict.word == word
    assert verdict.as_json()["verdict"] == word
    assert verdict.findings[0].estimate.value == value


def test_a_claim_is_as_good_as_its_worst_figure():
    checks = {"yes": check("yes", above=0), "no": check("no", above=0), "open": check("open", above=0)}
    figures = runs({"yes": (1, 0.5), "no": (-1, 0.5), "open": (0.1, 0.5)})
    for names, word in (
        (["yes"], SUPPORTED), (["yes", "open"], UNDECIDED), (["yes", "open", "no"], NOT_SUPPORTED)
    ):  # fmt: skip
        assert judge([claim(*(checks[name] for name in names))], figures)[0].word == word


def test_more_seeds_decide_by_their_spread_and_what_they_share_cancels():
    # Seed by seed the difference is 0.1, though each figure varies by more.
    figures = [
        {"rung": {"x": Estimate(v, (v - 0.01, v + 0.01), 100)}, "other": {"x": Estimate(v + 0.1, (v, v + 0.2), 100)}}
        for v in (0.1, 0.5, 0.9)
    ]
    better = claim(Check("gained", gain("rung", "other", name="x"), above=0))
    assert judge([better], figures)[0].word == SUPPORTED
    alone = claim(check("x", above=0))
    assert judge([alone], figures)[0].word == UNDECIDED


def test_the_gain_is_over_the_best_of_the_others():
    run = {name: {"frechet_distance": Estimate(v, (v, v), 100)} for name, v in {"a": 0.5, "b": 0.3, "c": 0.1}.items()}
    assert gain("c", "a", "b")(run).value == pytest.approx(0.2)


@pytest.mark.parametrize("each", [claim for claims in CLAIMS.values() for claim in claims], ids=lambda claim: claim.statement)
def test_every_claim_can_turn_out_either_way(each):
    class Figures(dict):
        def __missing__(self, name):
            value = chance.choice([-0.3, 0.01, 0.3, 0.96, 1.5, 4.0])
            return self.setdefault(name, Estimate(value, (value, value), 1000))

    class Run(dict):
        def __missing__(self, name):
            return self.setdefault(name, Figures())

    chance = random.Random(0)
    words = {judge([each], [Run()])[0].word for _ in range(1000)}
    assert words == {SUPPORTED, NOT_SUPPORTED}


def test_every_rung_has_claims_that_say_what_they_rest_on():
    assert list(CLAIMS) == list(RUNGS)
    for claims in CLAIMS.values():
        assert claims
        for each in claims:
            assert each.statement.endswith(".") and each.why.endswith(".")
            assert each.checks
            assert all(check.above > float("-inf") or check.below < float("inf") for check in each.checks)
