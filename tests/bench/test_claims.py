"""The registry of claims: whole, with controls that do not pass, and verdicts that follow from numbers alone."""

import itertools
import json
import random
from dataclasses import dataclass, field, replace

import pytest

from equipoise.bench.claims.arms import BALANCED, DENSE, HALF_TRAINED, NOISE, SAME_A, UNBALANCED
from equipoise.bench.claims.claim import Claim, Found, NotRunError, Reading, find, together
from equipoise.bench.claims.expert_choice import TAKING
from equipoise.bench.claims.healing_probe import FAULTS
from equipoise.bench.claims.registry import CLAIMS, chosen
from equipoise.bench.claims.saturation import after
from equipoise.bench.claims.statistics import above, below
from equipoise.bench.claims.store import fields_of, keep, kept
from equipoise.models.decoder import Decoder

VERDICTS = {  # of claims without training: what they come to is arithmetic, or far from the limit
    "r10-temperature-moves-load": "contradicted",
    "low-temperature-prevents-saturation": "contradicted",
    "five-times-std-would-have-fired": "contradicted",
    "loss-is-zero-at-collapse": "contradicted",
    "r6-hash-never-collapses": "contradicted",
    "r13-expert-choice-leaks": "supported",
    "r4-quantile-recovers-at-once": "supported",
    "r4-the-loss-recovers-from-saturation": "contradicted",
    "r4-sign-takes-gap-over-twice-the-rate": "supported",
    "r8-next-choice-loses-nothing": "supported",
    "r8-exact-capacity-drops": "supported",
    "factor-1.5-drops-nothing": "contradicted",
    "r8-drops-follow-the-binomial": "supported",
    "r12-a-single-token-is-computed": "contradicted",
    "r12-dropped-tokens-are-reported": "contradicted",
    "collapse-is-noticed-in-three-windows": "supported",
    "5-percent-rule-is-quiet-in-health": "contradicted",
    "80-percent-rule-catches-collapse": "contradicted",
    "probability-mass-shows-load": "contradicted",
    "checkpointing-experts-saves-40-percent": "supported",
    "checkpointing-a-layer-saves-40-percent": "contradicted",
    "8x7b-is-eight-times-7b": "contradicted",
    "20-percent-is-active": "contradicted",
    "co-location-saves-bytes": "supported",
}
TIMED = {claim.name for claim in CLAIMS if claim.theme == "speed"}  # depends on the machine and who else uses it
QUICK_S = 1.0
TRAINING = [claim for claim in CLAIMS if claim.arms]


class Numbers(dict):
    """Every number of a run is `value`, but for those that are in it."""

    def __init__(self, value, own=()):
        super().__init__(own)
        self.value = value

    def __missing__(self, key):
        return self.value


@dataclass
class Planted:
    """Runs with numbers of our own, by arm: one for all of a run's, or some by name; 1 is the usual one.

    spread: between runs, another in each.
    """

    numbers: dict = field(default_factory=dict)
    spread: float = 0.0
    noise: float = 0.1
    seeds: tuple = (0, 1, 2, 3, 4)
    trials: int = 8

    def result(self, arm, seed):
        own = self.numbers.get(arm, 1.0)
        chance = self.spread * random.Random(f"{arm.label} {seed}").gauss(0, 1)
        return Numbers(1.0 + chance, own) if isinstance(own, dict) else Numbers(own + chance)

    def floor(self, metric):
        return self.noise


def named(name):
    (claim,) = (claim for claim in CLAIMS if claim.name == name)
    return claim


# ------------------------------------------------------------------------------------------------------ the registry


def test_there_are_enough_and_each_stands_once():
    names = [claim.name for claim in CLAIMS]
    assert len(names) >= 24
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("number", range(1, 15))
def test_the_fourteen_reproductions_are_there(number):
    assert any(claim.name.startswith(f"r{number}-") for claim in CLAIMS)


def test_each_says_where_it_comes_from_and_what_was_tried():
    for claim in CLAIMS:
        assert all((claim.theme, claim.hypothesis, claim.where, claim.theirs, claim.method)), claim.name
        assert claim.untestable or claim.control_is, claim.name


def test_a_claim_without_a_control_is_refused():
    with pytest.raises(ValueError, match=r"claim x: expected measure, control and control_is, .*pass by construction"):
        replace(named("r8-exact-capacity-drops"), name="x", control=None)


def test_names_and_their_beginnings_choose():
    assert [claim.name for claim in chosen(("r12-",))] == [
        "r12-a-single-token-is-computed",
        "r12-dropped-tokens-are-reported",
    ]
    assert not any(claim.arms or claim.untestable for claim in chosen(cheap=True))
    assert len(chosen()) == len(CLAIMS)
    with pytest.raises(ValueError, match=r"claims: expected names or beginnings of r1-.*, got 'nonsense'"):
        chosen(("r1-", "nonsense"))


def test_every_arm_is_a_model_that_can_be_built():
    arms = dict.fromkeys(arm for claim in CLAIMS for arm in claim.arms)
    assert len({arm.label for arm in arms}) == len(arms)  # a progress line must say which
    assert len({(arm.config.to_json().replace(arm.config.name, ""), arm.probe) for arm in arms}) == len(arms)
    for arm in arms:
        assert Decoder(arm.config.model).moe_layers


# ------------------------------------------------------------------------------------------------ verdicts, controls


def reading(value, claimed):
    return Reading("a number", "", (value,), claimed, "exact")


def claim_of(setup, control, present):
    return Claim(
        name="x",
        theme="t",
        hypothesis="h",
        where="w",
        theirs="n",
        method="m",
        control_is="c",
        measure=lambda bench, value: [reading(value, above(0.0))],
        setup=setup,
        control=control,
        present=present,
    )


@pytest.mark.parametrize(
    ("setup", "control", "present", "verdict", "note"),
    [
        (1.0, 0.0, None, "supported", ""),
        (-1.0, 0.0, None, "contradicted", ""),
        (1.0, 1.0, None, "open", "the control shows the effect too"),
        (-1.0, 1.0, None, "open", "the control shows the effect too"),
        (-1.0, 0.0, 1.0, "contradicted", ""),
        (-1.0, 0.0, -1.0, "open", "isn't found where it is present"),
        (1.0, 0.0, -1.0, "supported", ""),
    ],
)
def test_a_control_that_passes_takes_the_verdict_away(setup, control, present, verdict, note):
    found = find(claim_of(setup, control, present), Planted())
    assert found.verdict == verdict
    assert note in found.note


def test_all_readings_must_support_and_one_can_contradict():
    yes, no = reading(1.0, above(0.0)), reading(1.0, below(0.0))
    unsure = Reading("a number", "", (1.0,), above(0.0))
    assert together([yes, yes]) == "supported"
    assert together([yes, unsure]) == "open"
    assert together([yes, unsure, no]) == "contradicted"
    assert together([]) == "open"


def test_what_needs_a_run_that_is_not_there_says_so():
    class Nothing(Planted):
        def result(self, arm, seed):
            raise NotRunError(f"the run {arm.label} is not there")

    found = find(named("r1-collapse-without-balancing"), Nothing())
    assert found.verdict == "not run yet"
    assert "is not there" in found.note
    assert find(named("all-to-all-takes-300-ms"), Nothing()).verdict == "can't be tested here"


# ----------------------------------------------------------------------------------------------------- about training


@pytest.mark.parametrize("claim", TRAINING, ids=lambda claim: claim.name)
def test_no_claim_about_training_is_supported_when_all_runs_are_alike(claim):
    assert find(claim, Planted()).verdict != "supported"
    assert find(claim, Planted(spread=0.01)).verdict != "supported"


@pytest.mark.parametrize("claim", TRAINING, ids=lambda claim: claim.name)
def test_every_claim_about_training_can_be_supported_and_contradicted(claim):
    """Some numbers of its arms support it, some contradict it: no verdict is built in."""
    verdicts = set()
    for value, arm in itertools.product((-50.0, -2.0, 2.0, 50.0), claim.setup.values()):
        verdicts.add(find(claim, Planted(WITHOUT | {arm: value})).verdict)
    for supporting, opposing in BY_NUMBER.get(claim.name, ()):
        (arm, *_) = claim.setup.values()
        verdicts |= {find(claim, Planted(WITHOUT | {arm: numbers})).verdict for numbers in (supporting, opposing)}
    assert {"supported", "contradicted"} <= verdicts


WITHOUT = {HALF_TRAINED: 100.0} | {after(fault, "nothing"): {"steps": 200.0} for fault in FAULTS}  # of controls
WITHOUT |= {TAKING.at("leak"): {"changed_share": 0.0}}
BY_NUMBER = {  # where numbers of one run are compared, or several are needed
    "r7-first-layer-is-worst": [({"first_violation": 2.0}, {"first_violation": 0.5})],
    "r10-low-temperature-at-inference": [({"loss_low": 0.9}, {"loss_low": 1.1})],
    "r11-round-robin-is-the-fallback": [({"loss_round_robin": 0.9}, {"loss_round_robin": 1.1})],
    "r11-a-bias-repairs-collapse": [({"loss_bias": 0.5, "violation_bias": 0.1}, {"loss_bias": 1.5})],
    "r2-the-valley-is-flat": [({"loss": 1.0}, {"loss": 2.0})],
    "r4-in-training-the-loss-recovers": [({"steps": 50.0}, {"steps": 150.0})],
    "r4-in-training-sign-takes-gap-over-twice-the-rate": [({"steps": 100.0}, {"steps": 10.0})],
    "r8-trained-routers-drop-like-fair-ones": [({"drop_share": 0.02}, {"drop_share": 0.2})],
    "r14-shared-expert-hides-collapse": [({"max_violation": 2.0}, {"max_violation": 2.0, "loss": 1.1})],
}


def test_superiority_needs_more_than_the_noise_floor():
    claim = named("r1-collapse-without-balancing")
    assert find(claim, Planted({UNBALANCED: 1.5}, noise=0.1)).verdict == "supported"
    assert find(claim, Planted({UNBALANCED: 1.5}, noise=0.6)).verdict == "open"  # more, but within noise
    assert find(claim, Planted({UNBALANCED: 1.5}, noise=0.1, spread=1.0)).verdict == "open"
    assert find(claim, Planted({UNBALANCED: 0.5}, noise=0.1)).verdict == "contradicted"


def test_a_contrast_is_its_sum_by_hand():
    """(dense - learned) - 3 (dense - hash) = (4.3 - 4.0) - 3 (4.3 - 4.2) = 0."""
    claim = named("r6-hash-loses-a-factor-of-3")
    planted = Planted({DENSE: 4.3, BALANCED: 4.0, claim.setup["hash"]: 4.2})
    (found,) = claim.measure(planted, claim.setup)
    assert found.values == pytest.approx([0.0] * 5, abs=1e-12)


def test_the_noise_floor_is_of_runs_that_differ_in_nothing_that_matters():
    for one, other in NOISE:
        assert one.config.model.moe.num_experts == other.config.model.moe.num_experts
        assert one != other
    assert SAME_A.config.model.moe.balance[0].coef == pytest.approx(BALANCED.config.model.moe.balance[0].coef, rel=2e-3)


# -------------------------------------------------------------------------------------------------- without training


@pytest.mark.parametrize(
    "claim",
    [pytest.param(c, marks=() if c.seconds < QUICK_S else pytest.mark.slow, id=c.name) for c in chosen(cheap=True)],
)
def test_claims_without_training_and_their_controls(claim):
    found = find(claim, Planted(trials=12 if claim.seconds < QUICK_S else 20))
    assert together(found.control) != "supported"
    if claim.present is not None:
        assert together(found.present) == "supported"
    if claim.name not in TIMED:
        assert found.verdict == VERDICTS.get(claim.name, found.verdict)
    assert found.verdict in ("supported", "contradicted", "open")


def test_the_expected_verdicts_are_of_claims_that_are_there():
    assert set(VERDICTS) <= {claim.name for claim in chosen(cheap=True)}


def test_the_same_trials_give_the_same_numbers():
    claim = named("r13-expert-choice-leaks")
    assert find(claim, Planted(trials=3)).readings == find(claim, Planted(trials=3)).readings


# -------------------------------------------------------------------------------------------------------------- kept


def test_what_was_found_is_kept_for_the_same_source_alone(tmp_path):
    found = find(named("r12-a-single-token-is-computed"), Planted())
    keep(found, tmp_path, "abc")
    assert kept(found.claim, tmp_path, "abc") == found
    assert kept(found.claim, tmp_path, "other") is None
    assert kept(named("r8-exact-capacity-drops"), tmp_path, "abc") is None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"source": "abc"}', '{"source": "abc", "verdict": "open"}'])
def test_what_can_not_be_read_is_measured_again(damage, tmp_path):
    found = find(named("r12-a-single-token-is-computed"), Planted())
    keep(found, tmp_path, "abc")
    (path,) = (tmp_path / "claims").iterdir()
    path.write_text(damage)
    assert kept(found.claim, tmp_path, "abc") is None


def test_json_has_no_infinities():
    found = Found(named("r8-exact-capacity-drops"), "open", (Reading("n", "", (1.0,), above(0.0)),))
    (plain,) = fields_of(found)["readings"]
    assert plain["interval_95"] is None
    json.dumps(fields_of(found), allow_nan=False)
