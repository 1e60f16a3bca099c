"""Detect, repair, verify, keep or undo, page: on a model that has learned, under injected faults."""

from dataclasses import replace

import pytest
import torch
from tests.bits import bits
from tests.recovery.conftest import new_model
from tests.recovery.served import LAYER, OTHER, Server, same

from equipoise.faults import DeadExpert, inject
from equipoise.layer.mode import NORMAL, Mode
from equipoise.monitor.incidents import EXHAUSTED, LOOK_AT_INPUT, PAGE
from equipoise.recovery.known_good import KnownGood
from equipoise.recovery.patience import Patience
from equipoise.recovery.policy import OneRung, RoundRobinThenReload
from equipoise.recovery.remember import remember
from equipoise.recovery.swap import swap
from equipoise.routing import SwitchLoss
from equipoise.types import Finding

# ------------------------------------------------------------------------------------------------- it helps


def test_a_healthy_server_is_left_alone(bench, tmp_path):
    server = Server(bench, tmp_path)
    before = bits(bench.model)
    server.run(30)
    assert server.notes.story == []
    assert same(bits(bench.model), before)


@pytest.mark.parametrize("which", ["bench", "bench_with_balancer"])
def test_a_collapse_is_repaired_by_the_gentlest_rung_and_kept(which, tmp_path, request):
    bench = request.getfixturevalue(which)
    server = Server(bench, tmp_path)
    server.run(3)
    server.collapse()
    broken = server.canary.measure(3).loss
    weights = {name: parameter.clone() for name, parameter in bench.model.named_parameters()}
    server.run(8)
    assert server.notes.story == [("quantile_bias", "applied"), ("quantile_bias", "kept")]
    applied, kept = server.notes.actions
    assert applied.step == 5  # two flushes in a row
    assert kept.step <= 5 + 4
    assert applied.detail["max_violation_before"] > 2.5  # one expert of 8 takes all tokens at top-2: 3
    assert kept.detail["max_violation_after"] < 1.0
    assert applied.detail["loss_before"] == pytest.approx(broken)
    assert server.watch.alerts == []
    assert same(weights, dict(bench.model.named_parameters()))  # no weight was touched


def test_what_is_proposed_is_not_done(bench, tmp_path):
    server = Server(bench, tmp_path, act=False)
    server.collapse()
    before = bits(bench.model)
    server.run(10)
    assert server.notes.story == [("quantile_bias", "proposed")]
    assert same(bits(bench.model), before)
    assert all(layer.mode == NORMAL for layer in bench.model.moe_layers.values())


def test_what_is_proposed_is_said_once_while_its_alert_fires(bench, tmp_path):
    """Also where steps are many per flush, as in a server; and again when it fires anew."""
    server = Server(bench, tmp_path, act=False, patience=Patience(relapse_steps=2))
    fault = server.collapse()
    server.run(12)
    assert server.notes.story == [("quantile_bias", "proposed")]
    fault.remove()
    server.run(6)
    assert server.watch.alerts == []
    server.collapse(expert=1)
    server.run(6)
    assert server.notes.story == [("quantile_bias", "proposed")] * 2


def test_what_was_proposed_is_done_as_soon_as_it_may_be(bench, tmp_path):
    server = Server(bench, tmp_path, act=False)
    server.collapse()
    server.run(5)
    server.recovery.act = True
    server.run(5)
    assert server.notes.story == [("quantile_bias", state) for state in ("proposed", "applied", "kept")]


def test_leave_for_one_flush_is_for_that_flush(bench, tmp_path):
    server = Server(bench, tmp_path, act=False)
    server.collapse()
    server.run(3)
    [applied] = server.recovery.after_flush(server.step, server.watch.alerts, server.watch.stats(), act=True)
    assert (applied.kind, applied.state) == ("quantile_bias", "applied")
    server.run(4)
    server.collapse(OTHER)
    server.run(4)
    assert server.notes.story[-2:] == [("quantile_bias", "kept"), ("quantile_bias", "proposed")]


def test_router_rollback_is_exact(bench, tmp_path):
    server = Server(bench, tmp_path, policy=OneRung("router_rollback"))
    before = bits(bench.model)
    server.collapse()
    server.run(8)
    assert server.notes.story == [("router_rollback", "applied"), ("router_rollback", "kept")]
    assert same(bits(bench.model), before)
    assert server.canary.measure(99).loss == server.healthy.loss


def test_what_is_remembered_under_a_repair_is_good_with_that_repair_alone(bench, tmp_path):
    """The router is broken and even under a bias. Going back to it without the bias would bring the collapse back."""
    server = Server(bench, tmp_path)
    server.collapse(expert=5)
    server.run(8)
    mode = bench.model.moe_layers[LAYER].mode
    assert mode.bias is not None
    patient, dense = server.recovery.patient, dict(server.recovery.patient.dense)
    registry = KnownGood(tmp_path / "later")
    patient = replace(patient, known_good=registry)
    with server.watch.recorder.paused():
        record = remember(patient, server.canary, dense, 8, checkpoint="c")
    assert set(record.modes) == {LAYER}
    whole = bits(bench.model)
    server.recovery.patient = replace(patient, reload=lambda name: swap(bench.model, whole, whole=True).undo)
    for kind in ("router_rollback", "full_rollback"):
        server.recovery.policy = OneRung(kind)
        server.collapse(expert=1)
        server.run(10)
        assert server.notes.story[-2:] == [(kind, "applied"), (kind, "kept")]
        assert bench.model.moe_layers[LAYER].mode == mode
        assert server.canary.measure(99).loss == pytest.approx(record.loss)
        assert same(bits(bench.model), whole)


def test_a_layer_without_tokens_keeps_its_stand_in(bench, tmp_path):
    """Bypassed experts read nothing that a stand-in could be distilled from; the old one was, and stays."""
    server = Server(bench, tmp_path)
    dense = dict(server.recovery.patient.dense)
    before = dense[LAYER]
    bench.model.moe_layers[LAYER].set_mode(Mode(dense_share=1.0), before)
    with server.watch.recorder.paused():
        patient = replace(server.recovery.patient, known_good=KnownGood(tmp_path / "later", tolerance=9.0), dense=dense)
        record = remember(patient, server.canary, dense, 1)
    assert dense[LAYER] is before
    assert dense[OTHER] is not server.recovery.patient.dense[OTHER]
    assert record.modes[LAYER] == {"dense_share": 1.0}
    assert bench.model.moe_layers[LAYER].mode == Mode(dense_share=1.0)


# ------------------------------------------------------------------------------------------------- it does not help


def test_an_action_that_makes_things_worse_is_undone_by_itself(bench, tmp_path):
    """What is called known-good is a checkpoint from before any training. Held-out text shows it at once."""
    server = Server(bench, tmp_path, policy=OneRung("full_rollback"))
    untrained = new_model((SwitchLoss(coef=0.05),)).state_dict()
    reload = lambda name: swap(bench.model, untrained, whole=True).undo  # noqa: E731 - as short as it is
    server.recovery.patient = replace(server.recovery.patient, reload=reload)
    server.collapse()
    before = bits(bench.model)
    server.run(3)
    assert server.notes.story == [("full_rollback", "applied"), ("full_rollback", "undone"), (PAGE, "applied")]
    applied, undone, page = server.notes.actions
    assert applied.detail["loss_after"] > applied.detail["loss_before"] + 2  # 5.4 nats against 2.3
    assert undone.step == applied.step  # before the next token
    assert "held-out loss rose from" in undone.note
    assert same(bits(bench.model), before)
    assert "full_rollback undone" in page.note
    assert (f"{LAYER}:{EXHAUSTED}", "firing") in server.notes.alerts


def test_a_repair_that_does_not_help_is_undone_when_patience_ends(bench, tmp_path):
    """With frozen weights a boost of the loss changes nothing."""
    server = Server(bench, tmp_path, policy=OneRung("boost"), patience=Patience(trial_flushes=3))
    server.collapse()
    server.run(8)
    assert server.notes.story == [("boost", "applied"), ("boost", "undone"), (PAGE, "applied")]
    assert "still fires 3 flushes later" in server.notes.actions[1].note
    assert bench.model.moe_layers[LAYER].mode == NORMAL


def test_the_ladder_goes_on_where_a_rung_cannot_be_done_or_does_not_help(bench, tmp_path):
    """No recent traffic was kept: no bias can be computed, and the next rung takes its turn in the same flush."""
    server = Server(bench, tmp_path)
    server.recovery.patient = replace(server.recovery.patient, recent=None)
    server.collapse()
    server.run(2)
    assert server.notes.story[:2] == [("quantile_bias", "failed"), ("next_choice", "applied")]
    assert "needs recent traffic" in server.notes.actions[0].note
    assert server.notes.actions[0].step == server.notes.actions[1].step


def test_the_page_is_resolved_with_the_incident(bench, tmp_path):
    server = Server(bench, tmp_path, policy=OneRung("boost"), patience=Patience(trial_flushes=1))
    fault = server.collapse()
    server.run(6)
    assert server.notes.alerts[-1] == (f"{LAYER}:{EXHAUSTED}", "firing")
    fault.remove()  # a human has mended it
    server.run(4)
    assert server.notes.alerts[-2:] == [(f"{LAYER}:collapse", "resolved"), (f"{LAYER}:{EXHAUSTED}", "resolved")]
    assert server.notes.story[-1] == (PAGE, "applied")  # and nothing was done after it


def test_a_last_resort_that_holds_calls_a_human_all_the_same(bench, tmp_path):
    server = Server(bench, tmp_path, policy=OneRung("round_robin"))
    server.collapse()
    server.run(8)
    assert server.notes.story == [("round_robin", "applied"), ("round_robin", "kept")]
    applied = server.notes.actions[0]
    assert applied.detail["loss_after"] > applied.detail["loss_before"]  # it costs, and is kept
    assert (f"{LAYER}:{EXHAUSTED}", "firing") in server.notes.alerts


# ------------------------------------------------------------------------------------------------- not to blame


def test_one_kind_of_text_is_not_damage(bench, tmp_path):
    """Every token of the traffic is the same: its experts take all. Held-out text routes as before."""
    server = Server(bench, tmp_path, patience=Patience(relapse_steps=2))
    before = bits(bench.model)
    bench.serve = lambda seed: bench.model.eval()(torch.full((16, 48), 32)).detach()
    server.run(12)
    assert server.violation() > 1.5
    assert server.watch.alerts != []
    assert set(server.notes.story) == {(LOOK_AT_INPUT, "proposed")}
    assert len({action.reason for action in server.notes.actions}) == len(server.notes.actions)  # each said once
    assert same(bits(bench.model), before)
    assert all(layer.mode == NORMAL for layer in bench.model.moe_layers.values())


def test_a_warning_is_repaired_only_when_it_lasts(bench, tmp_path):
    """A dead expert, found in two flushes in a row: the alert fires at step 2, and for five flushes nothing is done."""
    server = Server(bench, tmp_path, patience=Patience(warning_flushes=5))
    with server.watch.recorder.paused():
        inject(bench.model, DeadExpert(LAYER, 5, 40.0), lambda: bench.serve(0))
    server.run(5)
    assert [alert.finding.rule for alert in server.watch.alerts] == ["dead_experts"]
    assert server.notes.story == []
    server.run(1)
    assert server.notes.story == [("quantile_bias", "applied")]


def test_a_warning_ripens_however_many_steps_a_flush_has(bench, tmp_path):
    server = Server(bench, tmp_path, patience=Patience(warning_flushes=5, relapse_steps=0))
    with server.watch.recorder.paused():
        inject(bench.model, DeadExpert(LAYER, 5, 40.0), lambda: bench.serve(0))
    server.run(6)
    assert server.notes.story == [("quantile_bias", "applied")]


def test_held_out_text_is_no_traffic(bench, tmp_path):
    server = Server(bench, tmp_path)
    server.run(2)
    recent = server.recovery.patient.recent
    before = recent.scores(LAYER).clone()
    server.collapse()
    bench.serve(1)
    newest = recent.scores(LAYER).clone()
    assert not torch.equal(newest, before)
    server.recovery.rescue(3, Finding("nothing", LAYER, None, "info", 0.0, 0.0, "a look", ""))  # measures, and no more
    assert torch.equal(recent.scores(LAYER), newest)


# ------------------------------------------------------------------------------------------------- one at a time


def test_two_layers_are_repaired_one_after_the_other(bench, tmp_path):
    server = Server(bench, tmp_path)
    server.collapse(LAYER)
    server.collapse(OTHER, expert=2)
    on_trial = 0
    for action in _acted(server, 16):
        on_trial += {"applied": 1, "kept": -1, "undone": -1}[action.state]
        assert on_trial in (0, 1)
    assert {(a.layer, a.state) for a in server.notes.actions} >= {(LAYER, "kept"), (OTHER, "kept")}
    assert server.watch.alerts == []


def test_after_a_trial_there_is_a_rest(bench, tmp_path):
    """The second layer's repair begins three flushes after the first one's end, not at once."""
    server = Server(bench, tmp_path, patience=Patience(cool_down=3))
    server.collapse(LAYER)
    server.collapse(OTHER, expert=2)
    server.run(16)
    first, second = server.notes.actions[0].layer, server.notes.actions[2].layer
    assert {first, second} == {LAYER, OTHER}
    assert server.notes.actions[2].step == server.notes.actions[1].step + 3


def _acted(server, steps):
    server.run(steps)
    return server.notes.actions


def test_a_repair_that_did_not_last_is_followed_by_the_next_rung(bench, tmp_path):
    server = Server(bench, tmp_path)
    server.collapse(expert=5)
    server.run(8)
    server.collapse(expert=1)
    server.run(8)
    assert server.notes.story[1] == ("quantile_bias", "kept")
    assert server.notes.story[2] == ("next_choice", "applied")


def test_after_a_long_peace_it_begins_with_the_gentlest_again(bench, tmp_path):
    server = Server(bench, tmp_path, patience=Patience(relapse_steps=10))
    server.collapse(expert=5)
    server.run(30)
    server.collapse(expert=1)
    server.run(8)
    assert server.notes.story[2] == ("quantile_bias", "applied")


def test_round_robin_then_reload(bench, tmp_path):
    """Round robin hides the symptom within two flushes; the policy goes on to the checkpoint all the same."""
    server = Server(bench, tmp_path, policy=RoundRobinThenReload())
    before = bits(bench.model)
    server.collapse()
    server.run(8)
    assert server.notes.story == [
        ("round_robin", "applied"),
        ("round_robin", "undone"),
        ("full_rollback", "applied"),
        ("full_rollback", "kept"),
    ]
    assert same(bits(bench.model), before)
    assert bench.model.moe_layers[LAYER].mode == NORMAL
