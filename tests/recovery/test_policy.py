"""Policies are pure: the same situation, the same answer, in the order of the ladder, and an end to it."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.monitor.incidents import LOOK_AT_INPUT, PAGE, Incident
from equipoise.recovery.catalogue import REPAIRS
from equipoise.recovery.patience import Patience
from equipoise.recovery.policy import (
    SERVING_RUNGS,
    TRAINING_RUNGS,
    Ladder,
    OneRung,
    RoundRobinThenReload,
    Situation,
    policy_of,
)
from equipoise.types import Action, Finding

FINDING = Finding("collapse", "layers.1.mlp", 3, "critical", 0.9, 0.6, "it has collapsed", "repair it")
INCIDENT = Incident("layers.1.mlp:collapse", 40, 50, None, FINDING)
SITUATION = Situation(INCIDENT, training=True, damaged=True)


def after(*kinds, state="undone", situation=SITUATION):
    actions = tuple(Action(kind, FINDING.layer, 60, INCIDENT.key, {}, state) for kind in kinds)
    return replace(situation, incident=replace(situation.incident, actions=actions))


def climbed(policy, situation):
    """Every answer, when nothing ever helps."""
    answers = []
    while (answer := policy(after(*answers, situation=situation))) is not None:
        answers.append(answer)
        assert len(answers) < 20
    return answers


def test_the_ladder_of_a_collapse_from_the_gentlest_to_a_human():
    rungs = ["quantile_bias", "next_choice", "spill", "router_rollback", "full_rollback", "round_robin", PAGE]
    assert climbed(Ladder(), SITUATION) == rungs
    assert climbed(Ladder(), replace(SITUATION, training=False)) == rungs


def test_the_budget_ends_it_sooner():
    assert climbed(Ladder(budget=2), SITUATION) == ["quantile_bias", "next_choice", PAGE]


@pytest.mark.parametrize("state", ["applied", "kept", "undone", "failed"])
def test_what_was_tried_is_not_tried_again(state):
    assert Ladder()(after("quantile_bias", state=state)) == "next_choice"


def test_a_proposal_does_not_use_up_its_rung():
    assert Ladder()(after("quantile_bias", state="proposed")) == "quantile_bias"


def test_a_repair_that_did_not_last_is_not_the_first_choice_again():
    assert Ladder()(replace(SITUATION, kept_before=("quantile_bias",))) == "next_choice"


def test_an_undamaged_model_is_left_alone():
    assert Ladder()(replace(SITUATION, damaged=False)) == LOOK_AT_INPUT
    assert Ladder()(replace(SITUATION, damaged=None)) == "quantile_bias"


@pytest.mark.parametrize("rule", ["load_drift", "counters", "latency", "something"])
def test_rules_without_rungs_are_only_alerted(rule):
    assert Ladder()(replace(SITUATION, incident=replace(INCIDENT, finding=replace(FINDING, rule=rule)))) is None


def test_round_robin_then_reload_taken_literally():
    policy = RoundRobinThenReload()
    assert climbed(policy, SITUATION) == ["round_robin", "full_rollback", PAGE]
    assert policy(replace(SITUATION, damaged=False)) == "round_robin"  # it does not ask
    assert policy.interim == {"round_robin"}


@pytest.mark.parametrize("rungs", [TRAINING_RUNGS, SERVING_RUNGS])
def test_every_rung_is_in_the_catalogue(rungs):
    assert {kind for kinds in rungs.values() for kind in kinds} <= set(REPAIRS)
    assert all(len(set(kinds)) == len(kinds) for kinds in rungs.values())


@given(
    rule=st.sampled_from(sorted(TRAINING_RUNGS)),
    training=st.booleans(),
    budget=st.integers(1, 8),
    kept=st.lists(st.sampled_from(sorted(REPAIRS)), max_size=3, unique=True).map(tuple),
)
def test_every_climb_ends_with_one_page_and_no_rung_twice(rule, training, budget, kept):
    finding = replace(FINDING, rule=rule)
    situation = Situation(replace(INCIDENT, finding=finding), training, True, kept)
    answers = climbed(Ladder(budget=budget), situation)
    assert len(set(answers)) == len(answers)
    assert not set(answers) & set(kept)
    assert len(answers) <= budget + 1
    assert answers[-1:] == ([PAGE] if answers else [])


@pytest.mark.parametrize("policy", [RoundRobinThenReload(), OneRung("boost")])
def test_other_rules_are_not_for_them(policy):
    elsewhere = replace(SITUATION, incident=replace(INCIDENT, finding=replace(FINDING, rule="latency")))
    assert policy(elsewhere) is None
    assert policy(SITUATION) is not None


def test_one_rung_is_tried_once_and_then_a_human_is_asked():
    assert climbed(OneRung("boost"), SITUATION) == ["boost", PAGE]
    assert not OneRung("boost").interim


@pytest.mark.parametrize(
    "wrong", [{"trial_flushes": 0}, {"warning_flushes": 0}, {"relapse_steps": -1}, {"cool_down": -1}]
)
def test_patience_has_limits(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=rf"Patience: expected trial_flushes, warning_flushes >= 1 .*{name}={value}"):
        Patience(**wrong)


def test_names():
    assert isinstance(policy_of("ladder"), Ladder)
    assert isinstance(policy_of("round_robin_then_reload"), RoundRobinThenReload)
    with pytest.raises(ValueError, match=r"policy: expected one of ladder, round_robin_then_reload, got 'luck'"):
        policy_of("luck")
    with pytest.raises(ValueError, match=r"Ladder\.budget: expected at least 1 attempt, got 0"):
        Ladder(budget=0)
