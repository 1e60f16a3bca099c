"""Alerts and repairs paired up, on histories worked out by hand; and what is said of a repair."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.monitor.incidents import (
    EXHAUSTED,
    LOOK_AT_INPUT,
    PAGE,
    REPAIR_COLUMNS,
    changes_of,
    effect_text,
    effects,
    incidents,
    other_numbers,
    pages_of,
    repair_row,
    repairs,
    state_text,
    tally,
    target,
    told,
    without_alert,
)
from equipoise.monitor.store import RunStore
from equipoise.types import Action, Alert, Finding

LAYER = "blocks.1.moe"
KEY = f"{LAYER}:collapse"
BEFORE = {"loss_before": 2.3, "max_violation_before": 6.9}


def alert(state, step, since, rule="collapse", layer=LAYER):
    finding = Finding(rule, layer, None, "critical", 1.0, 0.5, f"{layer} has it", "do something")
    return Alert(f"{layer}:{rule}", state, since, step, finding)


def action(kind, step, state, detail=None, note="", key=KEY, layer=LAYER):
    return Action(kind, layer, step, key, detail or {}, state, note)


FIRED, OVER = alert("firing", 250, 240), alert("resolved", 260, 240)
APPLIED = action("quantile_bias", 250, "applied", BEFORE | {"loss_after": 2.31}, "a bias of at most 3")
KEPT = action("quantile_bias", 260, "kept", {"max_violation_after": 0.2, "steps": 10.0}, "the alert is resolved")
WORSE = action("quantile_bias", 250, "undone", {"steps": 0.0}, "held-out loss rose")
SPILL = action("spill", 250, "applied", BEFORE | {"loss_after": 2.32})
SPILL_KEPT = action("spill", 260, "kept", {"loss_after": 2.29, "max_violation_after": 0.1, "steps": 10.0}, "resolved")


class TestRepairs:
    def test_applied_and_kept_is_one(self):
        [repair] = repairs([APPLIED, KEPT])
        assert (repair.step, repair.state, repair.note) == (250, "kept", "the alert is resolved")
        assert repair.detail == BEFORE | {"loss_after": 2.31, "max_violation_after": 0.2, "steps": 10.0}

    def test_applied_only_is_on_trial(self):
        assert repairs([APPLIED]) == [APPLIED]

    def test_undone_and_then_another_kind_kept_are_two(self):
        made = repairs([APPLIED, WORSE, SPILL, SPILL_KEPT])
        assert [(r.kind, r.step, r.state, r.note) for r in made] == [
            ("quantile_bias", 250, "undone", "held-out loss rose"),
            ("spill", 250, "kept", "resolved"),
        ]
        assert made[1].detail["loss_after"] == 2.29  # the later record's

    def test_the_same_kind_again_is_another(self):
        again = action("quantile_bias", 300, "applied")
        made = repairs([APPLIED, WORSE, again, action("quantile_bias", 320, "kept")])
        assert [(r.step, r.state) for r in made] == [(250, "undone"), (300, "kept")]

    def test_a_proposal_and_a_failure_are_whole_at_once(self):
        proposed, failed = action("spill", 250, "proposed", {}, "would do"), action("reseed", 250, "failed", {}, "no")
        assert repairs([proposed, failed]) == [proposed, failed]

    def test_a_failure_does_not_end_another_trial(self):
        """The same repair of another layer is on trial meanwhile: what, where and why must all agree."""
        elsewhere = action("quantile_bias", 250, "failed", {}, "no", key="a:collapse", layer="a")
        kept_elsewhere = action("quantile_bias", 255, "kept", key="a:collapse", layer="a")
        made = repairs([APPLIED, elsewhere, kept_elsewhere, KEPT])
        assert [(r.layer, r.step, r.state) for r in made] == [
            (LAYER, 250, "kept"),
            ("a", 250, "failed"),
            ("a", 255, "kept"),  # its beginning is not among the records
        ]

    def test_two_layers_may_be_on_trial(self):
        other = action("quantile_bias", 251, "applied", {"loss_before": 1.0}, key="a:collapse", layer="a")
        ended = action("quantile_bias", 255, "undone", key="a:collapse", layer="a")
        made = repairs([APPLIED, other, ended, KEPT])
        assert [(r.layer, r.step, r.state) for r in made] == [(LAYER, 250, "kept"), ("a", 251, "undone")]
        assert made[1].detail == {"loss_before": 1.0}

    def test_records_from_before_states_existed(self, tmp_path):
        """Such a row has neither state nor note in its detail, and was applied."""
        with RunStore(tmp_path) as store:
            for step in (250, 400):
                row = (step, "quantile_bias", LAYER, KEY, '{"max_violation": 6.9}')
                store._db.execute("INSERT INTO actions (step, kind, layer, reason, detail) VALUES (?, ?, ?, ?, ?)", row)
            made = repairs(store.actions())
        assert [(r.step, r.state, r.note) for r in made] == [(250, "applied", ""), (400, "applied", "")]
        assert told(made[0]) == "quantile_bias on blocks.1.moe at step 250, applied, max_violation 6.9"

    def test_the_call_for_a_human_is_none(self):
        assert repairs([action(PAGE, 300, "applied", {}, "tried: spill undone")]) == []

    @given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["applied", "kept", "undone", "failed"]))))
    def test_none_is_lost_and_none_counted_twice(self, history):
        """One per record, less one for each end whose beginning is there: the newest that has not ended."""
        actions = [action(kind, step, state) for step, (kind, state) in enumerate(history)]
        trials, ends = {}, 0
        for kind, state in history:
            ends += state in ("kept", "undone") and trials.get(kind, False)
            trials[kind] = state == "applied" or (trials.get(kind, False) and state == "failed")
        assert len(repairs(actions)) == len(actions) - ends
        assert [a.state for a in changes_of(actions)] == [state for _, state in history]


class TestChanges:
    def test_a_later_one_has_the_new_numbers_beside_those_before(self):
        begun, kept = changes_of([APPLIED, KEPT])
        assert begun == APPLIED
        assert kept.detail == {"max_violation_before": 6.9, "max_violation_after": 0.2, "steps": 10.0}
        assert (kept.step, kept.note) == (260, "the alert is resolved")

    def test_what_was_said_already_is_not_said_again(self):
        whole = action("quantile_bias", 250, "undone", {**APPLIED.detail, "steps": 0.0}, "held-out loss rose")
        assert changes_of([APPLIED, whole])[1].detail == {"steps": 0.0}


class TestIncidents:
    def test_with_a_repair_that_was_kept(self):
        [incident] = incidents([FIRED, OVER], [APPLIED, KEPT])
        assert (incident.key, incident.since, incident.fired, incident.resolved) == (KEY, 240, 250, 260)
        assert [(a.kind, a.step, a.state) for a in incident.actions] == [("quantile_bias", 250, "kept")]
        assert [(a.step, a.state) for a in incident.changes] == [(250, "applied"), (260, "kept")]
        assert not incident.firing
        assert incident.paged is None

    def test_with_a_ladder(self):
        [incident] = incidents([FIRED, OVER], [APPLIED, WORSE, SPILL, SPILL_KEPT])
        assert [(a.kind, a.state) for a in incident.actions] == [("quantile_bias", "undone"), ("spill", "kept")]
        assert [a.state for a in incident.changes] == ["applied", "undone", "applied", "kept"]

    def test_with_a_proposal_only(self):
        [incident] = incidents([FIRED], [action(LOOK_AT_INPUT, 250, "proposed")])
        assert [a.state for a in incident.actions] == ["proposed"]
        assert incident.firing
        assert incident.lasted_until(300) == 300

    def test_with_a_failure(self):
        [incident] = incidents([FIRED], [action("reseed", 250, "failed", {}, "found none")])
        assert [(a.state, a.note) for a in incident.actions] == [("failed", "found none")]

    def test_two_of_one_key_have_each_their_own(self):
        again = [alert("firing", 350, 340), alert("resolved", 380, 340)]
        later = [action("quantile_bias", 350, "applied"), action("quantile_bias", 380, "undone")]
        found = incidents([FIRED, OVER, *again], [APPLIED, KEPT, *later])
        assert [(i.since, [(a.step, a.state) for a in i.actions]) for i in found] == [
            (340, [(350, "undone")]),  # the newest first
            (240, [(250, "kept")]),
        ]

    def test_a_repair_belongs_to_the_incident_in_which_it_began(self):
        """It ends at step 280, after the alert: no repair of its own."""
        late = action("quantile_bias", 280, "undone")
        [incident] = incidents([FIRED, OVER], [APPLIED, late])
        assert [(a.step, a.state) for a in incident.actions] == [(250, "undone")]
        assert without_alert([incident], repairs([APPLIED, late])) == []

    def test_repairs_without_an_alert_are_left(self):
        rescue = action("reseed", 500, "applied", key=f"{LAYER}:not_finite")
        early = action("spill", 100, "applied")  # of the same key, before its first symptom
        found = incidents([FIRED, OVER], [early, APPLIED, KEPT, rescue])
        assert without_alert(found, repairs([early, APPLIED, KEPT, rescue])) == [early, rescue]

    def test_records_from_before_states_existed(self):
        old = Action("quantile_bias", LAYER, 250, KEY, {"max_violation": 6.9})
        [incident] = incidents([FIRED, OVER], [old])
        assert incident.actions == incident.changes == (old,)

    def test_a_resolution_without_a_beginning_is_passed_over(self):
        assert incidents([OVER], []) == []


class TestPages:
    def test_a_record_says_for_which_alert(self):
        """Two alerts of one layer fire; no repair is left for the one."""
        other = alert("firing", 255, 245, "drops")
        page = alert("firing", 300, 250, EXHAUSTED)
        found = incidents([FIRED, other, page], [action(PAGE, 300, "applied", {}, "tried: spill undone")])
        by_rule = {incident.finding.rule: incident for incident in found}
        assert (by_rule["collapse"].paged, by_rule["drops"].paged, by_rule[EXHAUSTED].paged) == (300, None, None)
        assert [a.kind for a in by_rule["collapse"].changes] == [PAGE]
        assert by_rule["collapse"].actions == ()
        assert pages_of(by_rule[EXHAUSTED], found) == [by_rule["collapse"]]
        assert pages_of(by_rule["collapse"], found) == []

    def test_an_alert_alone_is_for_what_fires_in_its_layer(self):
        page = alert("firing", 300, 250, EXHAUSTED)
        elsewhere = alert("firing", 250, 240, layer="a")
        earlier = [alert("firing", 50, 40), alert("resolved", 60, 40)]
        found = incidents([*earlier, FIRED, elsewhere, page], [])
        assert {(i.finding.layer, i.finding.rule, i.since): i.paged for i in found} == {
            (LAYER, "collapse", 40): None,  # over by then
            (LAYER, "collapse", 240): 300,
            ("a", "collapse", 240): None,
            (LAYER, EXHAUSTED, 250): None,
        }


class TestWords:
    def test_the_effect_is_perplexity_and_max_violation(self):
        """exp(2.3) = 9.974, exp(2.31) = 10.07."""
        assert effect_text(repairs([APPLIED, KEPT])[0].detail) == "perplexity 9.974 → 10.07, MaxVio 6.9 → 0.2"
        assert effect_text(APPLIED.detail) == "perplexity 9.974 → 10.07, MaxVio 6.9 before"
        assert effect_text({"max_violation_after": 0.2}) == "MaxVio 0.2 after"
        assert effect_text({"max_violation": 3.0, "steps": 2.0}) == ""

    def test_what_the_busiest_expert_computes(self):
        """Under a capacity the router is as it was, and its MaxVio too: what counts is what is left to compute."""
        detail = {"straggler_before": 4.0, "straggler_after": 1.25}
        assert effect_text(detail) == "busiest expert 4 → 1.25"
        assert other_numbers(detail) == ""
        row = dict(zip(REPAIR_COLUMNS, repair_row(replace(KEPT, detail=detail, note="contained")), strict=True))
        assert row["note"] == "contained; busiest expert 4 → 1.25 fair loads"

    @pytest.mark.parametrize(
        ("loss", "text"), [(math.nan, "nan"), (math.inf, "inf"), (1e6, "inf"), (0.0, "1"), (-math.inf, "0")]
    )
    def test_a_loss_that_is_no_number_is_told(self, loss, text):
        [effect] = effects({"loss_after": loss})
        assert (effect.before, effect.after) == ("", text)

    def test_other_numbers(self):
        detail = BEFORE | {"experts": 3.0, "rate": 0.123456, "steps": 10.0}
        assert other_numbers(detail) == "experts 3, rate 0.1235"
        assert other_numbers({"max_violation_expected": 0.02}) == "MaxVio expected 0.02"  # in the words of the rest

    @pytest.mark.parametrize(
        ("state", "steps", "text"),
        [
            ("kept", 20.0, "kept after 20 steps"),
            ("kept", 1.0, "kept after 1 step"),
            ("undone", 0.0, "undone at once"),
            ("undone", math.nan, "undone"),
            ("undone", None, "undone"),
            ("applied", 20.0, "applied"),
            ("proposed", None, "proposed"),
            ("failed", None, "failed"),
        ],
    )
    def test_the_state_and_how_long_the_trial_took(self, state, steps, text):
        assert state_text(action("spill", 1, state, {} if steps is None else {"steps": steps})) == text

    def test_a_repair_in_a_line_and_in_a_row(self):
        [repair] = repairs([APPLIED, KEPT])
        assert told(repair) == (
            "quantile_bias on blocks.1.moe at step 250, kept after 10 steps, "
            "perplexity 9.974 → 10.07, MaxVio 6.9 → 0.2 (the alert is resolved)"
        )
        assert dict(zip(REPAIR_COLUMNS, repair_row(repair), strict=True)) == {
            "step": "250",
            "what": "quantile_bias on blocks.1.moe",
            "why": KEY,
            "state": "kept after 10 steps",
            "perplexity": "9.974 → 10.07",
            "MaxVio": "6.9 → 0.2",
            "note": "the alert is resolved",
        }
        assert repair_row(action("spill", 1, "failed", {"n": 2.0}, "no"))[4:] == ("-", "-", "no; n 2")

    def test_the_whole_model(self):
        assert target(action("lr_cut", 1, "applied", layer="")) == "the whole model"

    def test_how_many_of_each_state(self):
        states = ["kept", "undone", "proposed", "undone", "applied", "failed"]
        made = [action("spill", 1, state) for state in states]
        assert tally(made) == "1 failed, 2 undone, 1 kept, 1 applied, 1 proposed"
        assert tally([]) == "none"
