"""Repairs remembered while they are on trial."""

from dataclasses import replace

from tests.monitor.sinks.cases import BEFORE, repair

from equipoise.monitor.sinks.on_trial import MAX_REPAIRS, OnTrial


def test_the_end_has_the_numbers_of_the_beginning():
    on_trial = OnTrial()
    assert on_trial.take(repair()) == repair()
    end = on_trial.take(repair("kept", step=140))
    assert (end.step, end.state) == (140, "kept")
    assert end.detail == BEFORE | {"loss_after": 2.29, "max_violation_after": 0.25, "steps": 20.0}


def test_it_is_forgotten_with_its_end():
    on_trial = OnTrial()
    on_trial.take(repair())
    on_trial.take(repair("undone"))
    assert on_trial.take(repair("kept")) == repair("kept")


def test_other_repairs_are_other_repairs():
    on_trial = OnTrial()
    on_trial.take(repair())
    others = [repair("kept", kind="spill"), repair("kept", reason="else"), replace(repair("kept"), layer="else")]
    others += [repair("failed"), repair("proposed")]
    assert [on_trial.take(other) for other in others] == others
    assert on_trial.take(repair("kept")).detail["loss_before"] == 2.3  # still on trial


def test_memory_is_bounded_and_the_newest_stay():
    on_trial = OnTrial()
    for number in range(MAX_REPAIRS + 1):
        on_trial.take(repair(kind=f"kind {number}"))
    ends = [on_trial.take(repair("kept", kind=f"kind {number}")) for number in range(MAX_REPAIRS + 1)]
    assert ["loss_before" in end.detail for end in ends] == [False] + [True] * MAX_REPAIRS
