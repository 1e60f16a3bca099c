"""A repair is lifted on trial when all has been well for long: kept lifted, or put back, and tried again later."""

import json

import pytest
from tests.bits import bits
from tests.recovery.served import LAYER, OTHER, Server, same

from equipoise.faults import DeadExpert, inject
from equipoise.layer.mode import NORMAL, Mode
from equipoise.recovery.patience import Patience
from equipoise.recovery.policy import OneRung
from equipoise.types import Finding

PATIENCE = Patience(trial_flushes=3, lift_after=4)
KEPT = [("round_robin", "applied"), ("round_robin", "kept")]


def repaired(bench, tmp_path, **options):
    """A server whose router has collapsed and is held by round robin; the fault is still in it."""
    server = Server(bench, tmp_path, **{"patience": PATIENCE, "policy": OneRung("round_robin")} | options)
    server.run(2)
    fault = server.collapse()
    while server.notes.story != KEPT:
        server.run(1)
        assert server.step < 12
    assert mode_of(bench).round_robin
    return server, fault


def mode_of(bench):
    return bench.model.moe_layers[LAYER].mode


def run_until(server, length):
    """Until so many changes of repairs are told."""
    end = server.step + 60
    while len(server.notes.story) < length:
        server.run(1)
        assert server.step < end, server.notes.story


@pytest.mark.parametrize("canary", [True, False])
def test_what_is_no_longer_needed_is_lifted(bench, tmp_path, canary):
    before = bits(bench.model)
    server, fault = repaired(bench, tmp_path, **({} if canary else {"canary": None}))
    fault.remove()
    kept = server.step
    run_until(server, 4)
    assert server.notes.story == [*KEPT, ("lift", "applied"), ("lift", "kept")]
    lift, end = server.notes.actions[2:]
    assert lift.step - kept == 3  # the flush in which it was kept is the first of four in health
    assert end.step - lift.step >= 3
    assert end.note == "no alert came back: the repair is lifted"
    assert ("loss_after" in lift.detail) is canary
    server.run(10)
    assert len(server.notes.story) == 4
    assert mode_of(bench) == NORMAL
    assert same(bits(bench.model), before)


def test_by_held_out_text_it_is_put_back_at_once(bench, tmp_path):
    """Before any other token sees the broken router; and the next attempt waits twice as long, and so on."""
    server, _ = repaired(bench, tmp_path)
    mode = mode_of(bench)
    run_until(server, 8)
    assert server.notes.story == [*KEPT, *[("lift", "applied"), ("lift", "undone")] * 3]
    steps = [action.step for action in server.notes.actions[2:]]
    assert steps[::2] == steps[1::2]  # the same flush
    first, second, third = steps[::2]
    assert (second - first, third - second) == (8, 16)
    assert "the repair is in force again" in server.notes.actions[3].note
    assert server.watch.alerts == []
    assert mode_of(bench) == mode


def test_by_the_alert_it_is_put_back_and_nothing_else_is_tried(bench, tmp_path):
    server, _ = repaired(bench, tmp_path, canary=None)
    mode = mode_of(bench)
    run_until(server, 4)
    assert server.notes.story == [*KEPT, ("lift", "applied"), ("lift", "undone")]
    assert server.notes.actions[3].note.startswith("an alert came back")
    assert server.notes.alerts[-1] == (f"{LAYER}:collapse", "firing")
    server.run(5)
    assert (f"{LAYER}:collapse", "resolved") in server.notes.alerts[-2:]
    assert server.notes.story[4:] == []
    assert mode_of(bench) == mode


def test_repairs_of_other_layers_wait_for_its_end(bench, tmp_path):
    """A warning, that is; what is critical puts the repair back."""
    server, fault = repaired(bench, tmp_path, patience=Patience(trial_flushes=12, lift_after=4, warning_flushes=1))
    fault.remove()
    run_until(server, 3)
    with server.watch.recorder.paused():
        inject(bench.model, DeadExpert(OTHER, 5, 40.0), lambda: bench.serve(0))
    while not server.watch.alerts:
        server.run(1)
        assert server.step < 30
    assert [alert.finding.layer for alert in server.watch.alerts] == [OTHER]
    server.run(2)
    assert server.notes.story[2:] == [("lift", "applied")]
    run_until(server, 5)
    assert server.notes.story[3:5] == [("lift", "kept"), ("round_robin", "applied")]
    assert server.notes.actions[4].layer == OTHER


def test_a_collapse_elsewhere_puts_it_back(bench, tmp_path):
    server, fault = repaired(bench, tmp_path, patience=Patience(trial_flushes=6, lift_after=4))
    fault.remove()
    run_until(server, 3)
    server.collapse(OTHER)
    run_until(server, 4)
    assert server.notes.story[3] == ("lift", "undone")
    assert mode_of(bench).round_robin


def test_silence_is_not_health(bench, tmp_path):
    server, _ = repaired(bench, tmp_path)
    bench.serve = lambda seed: None
    server.run(12)
    assert server.notes.story == KEPT


@pytest.mark.parametrize("options", [{"patience": Patience(trial_flushes=3)}, {"act": False}], ids=["off", "no leave"])
def test_only_where_it_may(bench, tmp_path, options):
    server, fault = repaired(bench, tmp_path, **{k: v for k, v in options.items() if k != "act"})
    server.recovery.act = options.get("act", True)
    fault.remove()
    server.run(12)
    assert server.notes.story == KEPT


def test_what_others_change_meanwhile_is_theirs(bench, tmp_path):
    server, fault = repaired(bench, tmp_path)
    fault.remove()
    run_until(server, 3)
    bench.model.moe_layers[LAYER].set_mode(mode := Mode(temperature=2.0))
    server.run(1)
    assert server.notes.story[3:] == [("lift", "failed")]
    assert mode_of(bench) == mode


def test_a_model_that_breaks_meanwhile_gets_its_repair_back_first(bench, tmp_path):
    server, fault = repaired(bench, tmp_path)
    fault.remove()
    run_until(server, 3)
    finding = Finding("not_finite", LAYER, 3, "critical", float("nan"), 0.0, "not finite", "stop")
    done = server.recovery.rescue(server.step, finding)
    assert (done[0].kind, done[0].state) == ("lift", "undone")
    assert mode_of(bench).round_robin


def test_a_restart_in_the_middle(bench, tmp_path):
    """The new process knows what is on trial and can put it back, and how long the next attempt waits."""
    server, _ = repaired(bench, tmp_path, canary=None)
    mode = mode_of(bench)
    run_until(server, 3)
    assert server.recovery.on_trial.kind == "lift"
    state, watched = json.loads(json.dumps(server.recovery.state_dict())), server.watch.state_dict()
    server.watch.detach()

    again = Server(bench, tmp_path / "again", patience=PATIENCE, policy=OneRung("round_robin"), canary=None)
    again.step = server.step
    again.watch.load_state_dict(watched)
    again.recovery.load_state_dict(state)
    assert again.recovery.on_trial == server.recovery.on_trial
    run_until(again, 1)
    assert again.notes.story == [("lift", "undone")]
    assert mode_of(bench) == mode
    assert again.recovery.state_dict()["lifting"]["waits"] == {LAYER: 8}


def test_state_without_it_and_damaged(bench, tmp_path):
    server = Server(bench, tmp_path)
    state = server.recovery.state_dict()
    del state["lifting"]
    server.recovery.load_state_dict(state)
    with pytest.raises(ValueError, match=r"recovery state: expected what state_dict\(\) returned"):
        server.recovery.load_state_dict(state | {"lifting": {"healthy": {}}})


def test_bad_limits():
    with pytest.raises(ValueError, match=r"Patience\.lift_after: expected at least 1 flush, or None for never, got 0"):
        Patience(lift_after=0)
