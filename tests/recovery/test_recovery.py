"""Detect, repair, verify, keep or undo, page: on a model that has learned, under injected faults."""

import copy
import json
import threading
from dataclasses import dataclass, field, replace

import pytest
import torch
from tests.recovery.conftest import new_model

from equipoise.faults import Collapse, DeadExpert, inject
from equipoise.layer.mode import NORMAL, Mode
from equipoise.monitor.baseline import baselines_of
from equipoise.monitor.incidents import EXHAUSTED, LOOK_AT_INPUT, PAGE
from equipoise.monitor.watch import Watch
from equipoise.recovery.actions import Patient, Training
from equipoise.recovery.canary import Canary
from equipoise.recovery.dense_path import build_dense_paths
from equipoise.recovery.gate import Gate
from equipoise.recovery.known_good import KnownGood
from equipoise.recovery.policy import OneRung, RoundRobinThenReload
from equipoise.recovery.recent import RecentScores
from equipoise.recovery.recovery import Limits, Recovery
from equipoise.recovery.remember import remember
from equipoise.recovery.router_state import router_state
from equipoise.recovery.swap import swap
from equipoise.routing import SwitchLoss
from equipoise.types import Alert, Finding

LAYER, OTHER = "layers.1.mlp", "layers.0.mlp"


@dataclass
class Notebook:
    """A sink that keeps what it gets."""

    alerts: list = field(default_factory=list)
    actions: list = field(default_factory=list)

    def routing(self, window):
        pass

    def alert(self, alert):
        self.alerts.append((alert.key, alert.state))

    def action(self, action):
        self.actions.append(action)

    @property
    def story(self):
        return [(action.kind, action.state) for action in self.actions]


class Server:
    """A model that is served: a forward, a flush and a look of the recovery per step."""

    def __init__(self, bench, tmp_path, *, known_good=True, training=None, **options):
        self.bench, self.model, self.step, self.notes = bench, bench.model, 0, Notebook()
        self.model.train(training is not None)
        self.watch = Watch(self.model, every=1, sinks=(self.notes,))
        self.canary = Canary(self.model, bench.held_out_loss)
        with self.watch.recorder.paused():
            self.healthy = self.canary.measure(0)
        self.registry = KnownGood(tmp_path) if known_good else None
        if known_good:
            baselines = baselines_of(self.healthy.stats.values())
            self.registry.put(
                step=0, tensors=router_state(self.model), baselines=baselines, loss=self.healthy.loss, checkpoint="c"
            )
        whole = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        counts = {name: stats.counts_E for name, stats in self.healthy.stats.items()}
        layers = self.model.moe_layers
        with self.watch.recorder.paused():
            dense = build_dense_paths(layers, counts, bench.held_out_loss)
        recent = RecentScores(layers, 2048)
        patient = Patient(
            self.model,
            layers,
            recent=recent,
            known_good=self.registry,
            dense=dense,
            reload=lambda name: swap(self.model, whole, whole=True).undo,
            training=training,
        )
        options = {"act": True, "canary": self.canary, "sinks": (self.notes,)} | options
        self.recovery = Recovery(patient, quiet=self.watch.recorder.paused, **options)

    def run(self, steps, seed=None):
        """The actions of each step; seed: the same traffic every time."""
        for _ in range(steps):
            self.step += 1
            self.bench.serve(self.step if seed is None else seed)
            changed = self.watch.step(self.step)
            resolved = [alert for alert in changed if alert.state == "resolved"]
            self.recovery.after_flush(self.step, self.watch.alerts, self.watch.stats(), resolved)

    def collapse(self, layer=LAYER, expert=5, intensity=40.0):
        with self.watch.recorder.paused():
            return inject(self.model, Collapse(layer, expert, intensity), lambda: self.bench.serve(0))

    def violation(self, layer=LAYER):
        return next(stats.max_violation for stats in self.watch.stats() if stats.layer == layer)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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
    server = Server(bench, tmp_path, policy=OneRung("boost"), limits=Limits(patience=3))
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
    server = Server(bench, tmp_path, policy=OneRung("boost"), limits=Limits(patience=1))
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
    server = Server(bench, tmp_path)
    before = bits(bench.model)
    bench.serve = lambda seed: bench.model.eval()(torch.full((16, 48), 32)).detach()
    server.run(12)
    assert server.violation() > 1.5
    assert server.watch.alerts != []
    assert set(server.notes.story) == {(LOOK_AT_INPUT, "proposed")}
    assert same(bits(bench.model), before)
    assert all(layer.mode == NORMAL for layer in bench.model.moe_layers.values())


def test_a_warning_is_repaired_only_when_it_lasts(bench, tmp_path):
    """A dead expert, found in two flushes in a row: the alert fires at step 2, and for five flushes nothing is done."""
    server = Server(bench, tmp_path, limits=Limits(warning_flushes=5))
    with server.watch.recorder.paused():
        inject(bench.model, DeadExpert(LAYER, 5, 40.0), lambda: bench.serve(0))
    server.run(5)
    assert [alert.finding.rule for alert in server.watch.alerts] == ["dead_experts"]
    assert server.notes.story == []
    server.run(1)
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
    server = Server(bench, tmp_path, limits=Limits(cool_down=3))
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
    server = Server(bench, tmp_path, limits=Limits(relapse_steps=10))
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


# ------------------------------------------------------------------------------------------------- not finite


def test_an_expert_that_is_not_finite_is_shut_while_serving(bench, tmp_path):
    server = Server(bench, tmp_path)
    with torch.no_grad():
        bench.model.moe_layers[LAYER].experts.down_proj[3, 0, 0] = torch.nan
    assert not torch.isfinite(bench.serve(1)).all()
    finding = Finding("not_finite", LAYER, 3, "critical", float("nan"), 0.0, "expert 3 is not finite", "shut it")
    done = server.recovery.rescue(1, finding)
    assert [(action.kind, action.state) for action in done] == [("shut_expert", "applied"), ("shut_expert", "kept")]
    assert torch.isfinite(bench.serve(1)).all()
    assert server.notes.alerts == [(f"{LAYER}:not_finite", "firing"), (f"{LAYER}:not_finite", "resolved")]
    assert done[0].detail["loss_after"] < server.healthy.loss + 0.5


def test_an_expert_that_is_not_finite_is_reseeded_in_training(bench, tmp_path):
    optimizer = torch.optim.AdamW(bench.model.parameters(), lr=1e-3)
    bench.train(optimizer, 2)
    server = Server(bench, tmp_path, training=Training(optimizer, lambda scale: None, lambda: 1.0))
    up = bench.model.moe_layers[LAYER].experts.up
    with torch.no_grad():
        up[3, 0, 0] = torch.nan
    finding = Finding("not_finite", LAYER, 3, "critical", float("nan"), 0.0, "expert 3 is not finite", "copy another")
    done = server.recovery.rescue(2, finding)
    assert [(action.kind, action.state) for action in done] == [("reseed", "applied"), ("reseed", "kept")]
    assert torch.isfinite(up).all()
    assert optimizer.state[up]["exp_avg"][3].abs().sum() == 0
    assert optimizer.state[up]["exp_avg"][2].abs().sum() > 0
    bench.train(optimizer, 3, start=2)
    assert torch.isfinite(up).all()


def test_a_rescue_that_fails_changes_nothing_and_pages(bench, tmp_path):
    server = Server(bench, tmp_path, policy=OneRung("boost"))
    with torch.no_grad():
        bench.model.embed_tokens.weight[32] = torch.nan
    before = bits(bench.model)
    finding = Finding("not_finite", LAYER, None, "critical", float("nan"), 0.0, "not finite", "stop")
    done = server.recovery.rescue(1, finding)
    assert [(action.kind, action.state) for action in done] == [
        ("boost", "applied"),
        ("boost", "undone"),
        (PAGE, "applied"),
    ]
    after = bits(bench.model)
    assert all(torch.equal(after[name].nan_to_num(7.0), value.nan_to_num(7.0)) for name, value in before.items())


# ------------------------------------------------------------------------------------------------- state, threads


def test_a_restart_in_the_middle_of_a_trial(bench, tmp_path):
    """The new process has the modes, judges the trial, and knows what was tried."""
    server = Server(bench, tmp_path, policy=OneRung("boost"), limits=Limits(patience=4))
    server.collapse()
    server.run(4)
    assert server.notes.story == [("boost", "applied")]
    state = json.loads(json.dumps(server.recovery.state_dict()))
    watched = server.watch.state_dict()
    mode = bench.model.moe_layers[LAYER].mode
    server.watch.detach()
    bench.model.moe_layers[LAYER].set_mode(NORMAL)

    again = Server(bench, tmp_path / "again", policy=OneRung("boost"), limits=Limits(patience=4))
    again.step = server.step
    again.watch.load_state_dict(watched)
    again.recovery.load_state_dict(state)
    assert bench.model.moe_layers[LAYER].mode == mode == Mode(boost=10.0)
    assert again.recovery.on_trial.kind == "boost"
    again.run(4)
    assert again.notes.story == [("boost", "undone"), (PAGE, "applied")]
    assert "the process was restarted meanwhile" in again.notes.actions[0].note
    assert bench.model.moe_layers[LAYER].mode == NORMAL


@pytest.mark.parametrize("state", [{}, {"version": 1}, {"version": 1, "modes": {}, "cases": {"a": {}}, "trial": None}])
def test_state_of_something_else(bench, tmp_path, state):
    server = Server(bench, tmp_path)
    with pytest.raises(
        ValueError, match=r"recovery state: expected (version 1, got None|what state_dict\(\) returned)"
    ):
        server.recovery.load_state_dict(state)


def test_actions_wait_for_running_forwards(bench, tmp_path):
    """Forwards of another thread see the routers before a rollback or after it, never a mixture."""
    gate = Gate()
    server = Server(bench, tmp_path, policy=OneRung("router_rollback"), gate=gate, canary=None)
    tokens = bench.batch(7)[:, :-1]
    model = copy.deepcopy(bench.model).eval()
    with torch.no_grad():
        good = model(tokens)
        server.collapse()
        bad = bench.model.eval()(tokens)
    seen, stop = [], threading.Event()

    def serve():
        with torch.no_grad():
            while not stop.is_set():
                with gate.running():
                    y = bench.model(tokens)
                seen.append(0 if torch.equal(y, bad) else 1 if torch.equal(y, good) else -1)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        while len(seen) < 5:
            pass
        finding = Finding("collapse", LAYER, 5, "critical", 1.0, 0.5, "collapsed", "repair")

        server.recovery.after_flush(1, [Alert(f"{LAYER}:collapse", "firing", 1, 1, finding)], [])
        target = len(seen) + 5
        while len(seen) < target:
            pass
    finally:
        stop.set()
        thread.join()
    assert set(seen) == {0, 1}
    assert sorted(seen) == seen
