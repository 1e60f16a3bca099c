"""The guard on a live model: what is really slow is bypassed, and comes back when it is no longer slow."""

import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from equipoise.faults import SlowExpert, SlowRank, inject
from equipoise.layer import MoE
from equipoise.layer.mode import NORMAL, Bypass, Mode
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.monitor.recorder import Recorder
from equipoise.recovery.actions import Patient, apply_dense, apply_spill
from equipoise.recovery.breaker import BreakerConfig
from equipoise.recovery.dense_path import build_dense_paths
from equipoise.recovery.latency import ExpertClock, LatencyGuard, LayerClock
from equipoise.recovery.recovery import Recovery
from equipoise.routing import TopK
from equipoise.types import Finding

E, K, B, S = 4, 2, 4, 16
NOTHING = (0.0, ())
ONE, TWO = "layers.0.mlp", "layers.1.mlp"
BUSY, LIMIT = 0.04, 0.03  # seconds: a fault's, and what is too slow. Experts here take about a thousandth.
# Six slow ones of the last eight open, so that a machine that stumbles now and then does not.
CONFIG = BreakerConfig(
    slow_s=LIMIT,
    floor_s=LIMIT,
    slow_share=0.75,
    window=8,
    min_calls=4,
    open_s=30.0,
    probe_share=0.5,
    probe_calls=4,
)


# Threads that wait for each other on a busy machine would be timed too.
pytestmark = pytest.mark.usefixtures("one_thread")


class Clock:
    """The breaker's, in seconds; the calls themselves are timed by a real one."""

    now = 0.0

    def __call__(self):
        return self.now


class Inbox:
    """A sink."""

    def __init__(self):
        self.actions = []

    def routing(self, window):
        raise AssertionError("a guard has no windows")

    def alert(self, alert):
        raise AssertionError("a guard has no alerts")

    def action(self, action):
        self.actions.append(action)


class BusyExpert:
    """A probe that burns time while one expert is computed."""

    def __init__(self, layer, expert):
        self.layer, self.expert, self.seconds = layer, expert, BUSY
        layer.experts.probes = (*layer.experts.probes, self)

    def begin(self, expert, num_rows):
        until = time.perf_counter() + (self.seconds if expert == self.expert else 0.0)
        while time.perf_counter() < until:
            sum(range(100))

    def end(self, expert):
        pass

    def remove(self):
        self.layer.experts.probes = tuple(probe for probe in self.layer.experts.probes if probe is not self)


class Ward:
    """A model in eval under a guard, with a clock of its own."""

    def __init__(self, config=CONFIG, shared=0, **options):
        torch.manual_seed(0)
        moe = MoEConfig(num_experts=E, hidden_dim=16, router=TopK(k=K), shared_experts=shared)
        sizes = {"vocab_size": 64, "dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "max_seq_len": S}
        self.model = Decoder(DecoderConfig(**sizes, moe=moe)).eval()
        self.layers = self.model.moe_layers
        self.tokens = torch.randint(64, (B, S), generator=torch.Generator().manual_seed(1))
        self.dense = {} if shared else build_dense_paths(self.layers, {name: np.ones(E) for name in self.layers})
        self.clock, self.inbox, self.steps = Clock(), Inbox(), 0
        self.healthy = self.forward()
        options = {"dense": self.dense, "sinks": [self.inbox], "clock": self.clock} | options
        self.guard = LatencyGuard(self.layers, config, **options)

    @torch.no_grad()
    def forward(self):
        return self.model(self.tokens)

    def serve(self, times):
        """What the guard did during so many forwards."""
        actions = []
        for _ in range(times):
            self.forward()
            self.steps += 1
            actions += self.guard.step(self.steps)
        return actions

    def states(self):
        return {name: state for name, state in self.guard.states().items() if state != "closed"}

    def patient(self):
        return Patient(self.model, self.layers, dense=self.dense)

    def kept_away(self, name):
        """By the guard: (share of the tokens, experts). The mode is others'."""
        bypass = self.layers[name].bypass
        return bypass.dense_share, bypass.shut_experts


def notes(actions):
    return [action.note for action in actions]


# -------------------------------------------------------------------------------- a layer that is slow


def test_a_slow_layer_is_bypassed_probed_and_comes_back():
    ward = Ward()
    assert ward.serve(8) == []
    assert torch.equal(ward.forward(), ward.healthy)
    fault = inject(ward.model, SlowExpert(TWO, expert=1, seconds=BUSY))
    (opened,) = ward.serve(6)
    assert (opened.kind, opened.layer, opened.reason, opened.state) == ("breaker", TWO, f"{TWO}:expert_p99", "applied")
    assert opened.note == f"{TWO}: closed -> open; 6 of 8 calls were too slow"
    assert opened.detail["slow_share"] == 0.75
    assert opened.detail["limit_ms"] == 1000 * LIMIT
    assert opened.detail["p99_ms"] >= 1000 * BUSY
    assert ward.states() == {TWO: "open"}
    assert (ward.kept_away(ONE), ward.kept_away(TWO)) == (NOTHING, (1.0, ()))
    assert all(layer.mode == NORMAL for layer in ward.layers.values())

    recorder = Recorder(ward.model)
    assert ward.serve(3) == []
    counted = {stats.layer: stats.rerouted["diverted"] for stats in recorder.flush(1)}
    assert counted == {ONE: 0, TWO: 3 * B * S * K}
    recorder.detach()
    assert not torch.equal(ward.forward(), ward.healthy)

    ward.clock.now = 30.0
    (half,) = ward.guard.step(100)
    assert half.note == f"{TWO}: open -> half_open; the wait is over"
    assert half.detail == {"slow_share": 0.0}  # there are no calls to tell of
    assert ward.kept_away(TWO) == (0.5, ())
    (again,) = ward.serve(4)  # still slow
    assert again.note == f"{TWO}: half_open -> open; 4 of 4 calls were too slow"
    assert ward.kept_away(TWO) == (1.0, ())

    fault.remove()
    ward.clock.now = 60.0
    half, closed = ward.serve(5)  # the first moves it, with a call in which it had no rows
    assert re.fullmatch(TWO + r": half_open -> closed; [0-2] of 4 calls were too slow", closed.note)
    assert ward.kept_away(TWO) == NOTHING
    assert torch.equal(ward.forward(), ward.healthy)
    assert ward.inbox.actions == [opened, _half(half, ward.inbox), again, half, closed]


def _half(last, inbox):
    """The first of the two that have the same text."""
    first, second = (action for action in inbox.actions if action.note == last.note)
    assert second == last
    return first


def test_calls_that_were_bypassed_are_no_probes():
    """Ten forwards without a step while it is open: none of them had rows, so none says that it is fast again."""
    ward = Ward()
    ward.serve(8)
    inject(ward.model, SlowRank(BUSY))
    assert len(ward.serve(6)) == 2
    for _ in range(10):
        ward.forward()
    ward.clock.now = 30.0
    assert sorted(notes(ward.guard.step(100))) == [
        f"{name}: open -> half_open; the wait is over" for name in (ONE, TWO)
    ]


def test_a_slow_rank_opens_all_layers():
    ward = Ward(shared=1)
    ward.serve(8)
    fault = inject(ward.model, SlowRank(BUSY))
    assert {action.layer for action in ward.serve(6)} == {ONE, TWO}
    assert ward.states() == {ONE: "open", TWO: "open"}
    fault.remove()
    ward.clock.now = 30.0
    ward.serve(5)
    assert ward.states() == {}
    assert torch.equal(ward.forward(), ward.healthy)


def test_calls_are_told_one_by_one_however_seldom_step_is_called():
    ward = Ward()
    for _ in range(8):
        ward.forward()
    assert ward.guard.step(1) == []
    inject(ward.model, SlowExpert(ONE, expert=0, seconds=BUSY))
    for _ in range(8):
        ward.forward()
    (opened,) = ward.guard.step(2)  # at the sixth; the others were of a layer that is open
    assert opened.note == f"{ONE}: closed -> open; 6 of 8 calls were too slow"
    assert opened.step == 2
    assert ward.guard.step(3) == []


# -------------------------------------------------------------------------------- an expert that is slow


@pytest.mark.parametrize(
    "slow",
    [lambda ward: BusyExpert(ward.layers[TWO], 2), lambda ward: inject(ward.model, SlowExpert(TWO, 2, BUSY))],
    ids=["probe", "fault"],
)
def test_exactly_the_slow_expert_is_shut(slow):
    ward = Ward(granularity="expert")
    assert torch.equal(ward.forward(), ward.healthy)
    ward.guard.step(0)
    assert len(ward.guard.states()) == 2 * E
    ward.serve(8)
    assert ward.guard.findings() == []
    fault = slow(ward)
    (opened,) = ward.serve(6)
    (found,) = ward.guard.findings()
    assert (found.rule, found.layer, found.expert, found.severity) == ("expert_p99", TWO, 2, "warning")
    assert found.value >= 1000 * BUSY > found.threshold == 1000 * LIMIT
    assert found.message.startswith(f"{TWO}: expert 2 takes ")
    assert found.message.endswith("; its breaker is open")
    assert ward.guard.times()[f"{TWO}/2"][0] >= BUSY  # the calls that opened it
    assert set(ward.guard.times()) == {f"{name}/{expert}" for name in ward.layers for expert in range(E)}
    assert (opened.layer, ward.states()) == (TWO, {f"{TWO}/2": "open"})
    assert opened.note.startswith(f"{TWO}/2: closed -> open; 6 of 8")
    assert (ward.kept_away(ONE), ward.kept_away(TWO)) == (NOTHING, (0.0, (2,)))
    assert all(layer.mode == NORMAL for layer in ward.layers.values())

    recorder = Recorder(ward.model)
    ward.serve(1)
    stats = {stats.layer: stats for stats in recorder.flush(1)}
    recorder.detach()
    assert stats[TWO].rerouted["diverted"] == stats[TWO].counts_E[2] > 0
    assert stats[ONE].rerouted["diverted"] == 0

    ward.clock.now = 30.0
    assert notes(ward.guard.step(100)) == [f"{TWO}/2: open -> half_open; the wait is over"]
    assert ward.kept_away(TWO) == NOTHING  # all of its tokens are the probes
    assert ward.serve(4)[0].note == f"{TWO}/2: half_open -> open; 4 of 4 calls were too slow"
    assert ward.kept_away(TWO) == (0.0, (2,))

    fault.remove()
    ward.clock.now = 60.0
    assert [note.split("; ")[0] for note in notes(ward.serve(5))] == [
        f"{TWO}/2: open -> half_open",
        f"{TWO}/2: half_open -> closed",
    ]
    assert ward.kept_away(TWO) == NOTHING
    assert ward.guard.findings() == []
    assert torch.equal(ward.forward(), ward.healthy)


def test_what_always_takes_too_long_is_found_without_a_change():
    """It was as slow from the beginning, and most calls are not: the breaker stays closed, and the p99 is told."""
    ward = Ward(replace(CONFIG, slow_share=1.0))
    ward.serve(3)
    inject(ward.model, SlowExpert(TWO, 1, BUSY))
    ward.serve(2)
    assert ward.states() == {}
    (found,) = ward.guard.findings()
    assert (found.layer, found.expert, found.threshold) == (TWO, None, 1000 * LIMIT)
    assert "its experts take" in found.message
    assert "breaker" not in found.message


def test_the_numbers_say_what_was_timed():
    assert Ward().guard.breaker.granularity == "layer"
    assert Ward(granularity="expert").guard.breaker.granularity == "expert"


# -------------------------------------------------------------------------------- other repairs

OTHERS = {
    "bias": Mode(bias=(0.1, 0.2, 0.3, 0.4)),
    "half-dense": Mode(dense_share=0.25),
    "round-robin": Mode(round_robin=True, temperature=0.5),
}


def diverted(ward, name):
    """Assignments of one forward that did not reach the layer's experts, and their experts' counts."""
    recorder = Recorder(ward.model)
    ward.forward()
    (stats,) = [stats for stats in recorder.flush(1) if stats.layer == name]
    recorder.detach()
    return stats.rerouted.get("diverted", 0), stats.counts_E


def opened_and_closed(ward, meanwhile=lambda: None):
    """Slow for a while; what others do to the layer while it is open."""
    ward.serve(8)
    fault = inject(ward.model, SlowRank(BUSY))
    ward.serve(6)
    assert ward.states() == {ONE: "open", TWO: "open"}
    meanwhile()
    assert diverted(ward, TWO)[0] == B * S * K
    fault.remove()
    ward.clock.now += 30.0
    ward.serve(5)
    assert ward.states() == {}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_mode_of_another_repair_is_kept(other):
    ward = Ward()
    ward.layers[TWO].set_mode(other, ward.dense[TWO])
    opened_and_closed(ward)
    assert ward.layers[TWO].mode == other
    assert ward.kept_away(TWO) == NOTHING


def test_a_repair_that_is_undone_while_a_layer_is_open_does_not_let_tokens_in():
    ward = Ward()
    repair = apply_spill(ward.patient(), about(TWO))
    opened_and_closed(ward, repair.undo)
    assert ward.layers[TWO].mode == NORMAL
    assert torch.equal(ward.forward(), ward.healthy)


def test_a_repair_that_is_undone_later_does_not_keep_tokens_away():
    """What it puts back is from a time when the layer was open."""
    ward, repairs = Ward(), []
    opened_and_closed(ward, lambda: repairs.append(apply_spill(ward.patient(), about(TWO))))
    assert ward.layers[TWO].mode.capacity is not None
    repairs[0].undo()
    assert ward.layers[TWO].mode == NORMAL
    assert torch.equal(ward.forward(), ward.healthy)


def test_a_repair_that_bypasses_an_open_layer_too_holds_until_it_is_undone():
    ward = Ward()
    ward.serve(8)
    fault = inject(ward.model, SlowExpert(TWO, expert=1, seconds=BUSY))
    ward.serve(6)
    repair = apply_dense(ward.patient(), about(TWO))
    fault.remove()
    ward.clock.now = 30.0
    assert notes(ward.serve(5)) == [f"{TWO}: open -> half_open; the wait is over"]  # no tokens, no probes
    assert diverted(ward, TWO)[0] == B * S * K
    repair.undo()
    ward.serve(4)
    assert ward.states() == {}
    assert torch.equal(ward.forward(), ward.healthy)


def test_neither_checkpoints_nor_records_have_what_the_guard_does():
    ward, states = Ward(), []
    opened_and_closed(ward, lambda: states.append(Recovery(ward.patient()).state_dict()))
    assert states[0]["modes"] == {}


def about(name):
    return Finding("collapse", name, None, "critical", 1.0, 0.5, "", "")


def test_experts_that_others_have_shut_stay_shut():
    ward = Ward(granularity="expert")
    ward.serve(8)
    fault = BusyExpert(ward.layers[TWO], 2)
    ward.layers[TWO].set_mode(Mode(shut_experts=(0,)), ward.dense[TWO])
    ward.serve(6)
    assert ward.kept_away(TWO) == (0.0, (2,))
    number, counts_E = diverted(ward, TWO)
    assert number == counts_E[0] + counts_E[2] > 0
    fault.remove()
    ward.clock.now = 30.0
    ward.serve(5)
    assert ward.states() == {}
    number, counts_E = diverted(ward, TWO)
    assert number == counts_E[0] > 0
    assert ward.layers[TWO].mode == Mode(shut_experts=(0,))


def test_both_kinds_of_guards_on_one_layer_leave_each_others_alone():
    ward = Ward()
    experts = LatencyGuard(ward.layers, CONFIG, granularity="expert", dense=ward.dense, clock=ward.clock)
    ward.layers[TWO].set_bypass(Bypass(shut_experts=(1,), dense=ward.dense[TWO]))  # as if it had opened
    opened_and_closed(ward)
    assert ward.kept_away(TWO) == (0.0, (1,))
    ward.guard.detach()
    assert ward.kept_away(TWO) == (0.0, (1,))
    experts.detach()
    assert ward.kept_away(TWO) == NOTHING


def test_the_stand_in_of_another_repair_is_kept():
    ward = Ward()
    other = build_dense_paths(ward.layers, {name: np.arange(E) for name in ward.layers})[TWO]
    seen = []
    for path in (other, ward.dense[ONE], ward.dense[TWO]):
        path.register_forward_hook(lambda path, args, y: seen.append(path))
    ward.layers[TWO].set_mode(Mode(dense_share=0.25), other)
    ward.serve(8)
    inject(ward.model, SlowRank(BUSY))
    ward.serve(6)
    seen.clear()
    ward.forward()
    assert seen == [ward.dense[ONE], other]


@pytest.mark.parametrize("granularity", ["layer", "expert"])
@pytest.mark.parametrize("half_open", [False, True])
def test_detach_leaves_layers_as_they_were(granularity, half_open):
    ward = Ward(granularity=granularity)
    other = Mode(dense_share=0.25) if granularity == "layer" else Mode(shut_experts=(0,))
    ward.layers[TWO].set_mode(other, ward.dense[TWO])
    ward.serve(8)
    faults = [BusyExpert(layer, 2) for layer in ward.layers.values()]
    ward.serve(6)
    assert len(ward.states()) == 2
    if half_open:
        ward.clock.now = 30.0
        ward.guard.step(100)
    ward.guard.detach()
    assert (ward.layers[ONE].mode, ward.layers[TWO].mode) == (NORMAL, other)
    assert ward.kept_away(ONE) == ward.kept_away(TWO) == NOTHING
    for fault in faults:
        fault.remove()
    for layer in ward.layers.values():
        assert layer.experts.probes == ()
        assert not layer.experts._forward_hooks
        assert not layer.experts._forward_pre_hooks
    ward.layers[TWO].set_mode(NORMAL)
    assert torch.equal(ward.forward(), ward.healthy)
    later = Mode(dense_share=0.5, shut_experts=(2,))
    ward.layers[TWO].set_mode(later, ward.dense[TWO])
    ward.guard.detach()  # twice is once
    assert ward.layers[TWO].mode == later
    ward.clock.now += 30.0
    assert ward.guard.step(101) == []  # also when a wait would be over
    assert (ward.layers[ONE].mode, ward.layers[TWO].mode) == (NORMAL, later)


# -------------------------------------------------------------------------------- clocks


def a_layer(**options):
    layer = MoE(16, 8, E, router=TopK(k=K), **options)
    return layer, torch.randn(10, 16)


def test_a_layers_clock_has_the_rows_that_were_computed():
    layer, x = a_layer(shared_experts=1)
    layer.eval()
    clock = LayerClock(layer)
    layer(x)
    layer(x[:3])
    layer.set_mode(Mode(dense_share=1.0))
    layer(x)
    layer.set_mode(Mode(shut_experts=(0, 1, 2)))
    layer(x)
    sizes = [call.size for call in clock.take()]
    assert sizes[:2] == [10 * K, 3 * K]  # the bypassed one is no call
    assert len(sizes) == 3
    assert 0 < sizes[2] <= 10
    assert clock.take() == []
    layer(x[:0])
    assert clock.take() == []


def test_what_nobody_takes_does_not_grow_for_ever(monkeypatch):
    monkeypatch.setattr("equipoise.recovery.latency.MAX_CALLS", 3)
    layer, x = a_layer()
    clock = LayerClock(layer)
    for num_tokens in range(1, 6):
        layer(x[:num_tokens])
    assert [call.size for call in clock.take()] == [3 * K, 4 * K, 5 * K]
    assert clock.take() == []


def test_an_experts_clock_has_calls_by_expert():
    layer, x = a_layer()
    clock = ExpertClock(layer)
    counts = []
    layer.tap.register_forward_hook(lambda module, args, routed: counts.append(routed.plan.counts_e.tolist()))
    layer(x)
    layer(x[:1])
    sizes = {expert: [call.size for call in calls] for expert, calls in clock.take().items()}
    assert sizes == {e: [each[e] for each in counts if each[e]] for e in range(E)}
    assert clock.take() == {}


@pytest.mark.parametrize("slow_before", [False, True])
@pytest.mark.parametrize("granularity", [LayerClock, ExpertClock])
def test_clocks_measure_seconds_whether_the_fault_or_they_came_first(granularity, slow_before):
    layer, x = a_layer()
    if slow_before:
        inject(layer, SlowRank(BUSY)) if granularity is LayerClock else BusyExpert(layer, 1)
    clock = granularity(layer)
    if not slow_before:
        inject(layer, SlowRank(BUSY)) if granularity is LayerClock else BusyExpert(layer, 1)
    start = time.perf_counter()
    layer(x)
    passed = time.perf_counter() - start
    taken = clock.take()
    (call,) = taken if granularity is LayerClock else taken[1]
    assert BUSY <= call.seconds <= passed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("granularity", [LayerClock, ExpertClock])
def test_a_compiled_layer_is_timed_too(granularity):
    layer, x = a_layer()
    with torch.no_grad():
        expected = layer.eval()(x)
        clock = granularity(layer)
        compiled = torch.compile(layer, backend="aot_eager")
        compiled(x)
        clock.take()  # the first has the time of compiling in it
        torch.testing.assert_close(compiled(x), expected)
    taken = clock.take()
    calls = taken if granularity is LayerClock else [call for (call,) in taken.values()]
    assert sum(call.size for call in calls) == len(x) * K
    assert all(call.seconds > 0 for call in calls)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("granularity", [LayerClock, ExpertClock])
def test_recomputation_in_backward_is_not_timed(granularity, use_reentrant):
    layer, x = a_layer()
    clock = granularity(layer)
    x.requires_grad_()
    runs = []
    layer.register_forward_pre_hook(lambda module, args: runs.append(1))
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use_reentrant)
    first = clock.take()
    assert first
    y.sum().backward()
    assert len(runs) == 2  # it did run again
    assert not clock.take()
    layer(x)
    assert len(clock.take()) == len(first)


@pytest.mark.parametrize("granularity", [LayerClock, ExpertClock])
def test_a_forward_that_fails_leaves_no_call_behind(granularity):
    layer, x = a_layer()
    clock = granularity(layer)

    def fail(*args):
        raise RuntimeError("out of memory")

    class Failing:
        begin = end = staticmethod(fail)

    layer.experts.probes = (*layer.experts.probes, Failing())
    with pytest.raises(RuntimeError, match="out of memory"):
        layer(x)
    assert not clock.take()


# -------------------------------------------------------------------------------- errors


def bare_and_shared():
    return {"bare": a_layer()[0], "shared": a_layer(shared_experts=1)[0]}


def test_a_layer_without_a_stand_in_is_refused_and_nothing_is_attached():
    layers = bare_and_shared()
    message = (
        r"nothing can stand in for the experts of bare; give it a dense path .*dense_path\), or .*shared_experts=1"
    )
    with pytest.raises(ValueError, match=message):
        LatencyGuard(layers)
    assert not any(layer.experts._forward_hooks for layer in layers.values())


def test_if_not_strict_it_is_left_out_and_named():
    guard = LatencyGuard(bare_and_shared(), strict=False)
    assert guard.unguarded == ("bare",)
    assert guard.states() == {"shared": "closed"}


def test_with_nothing_left_to_guard_it_is_refused_all_the_same():
    with pytest.raises(ValueError, match=r"LatencyGuard: nothing can stand in for the experts of a;"):
        LatencyGuard({"a": a_layer()[0]}, strict=False)


def test_no_layers_are_refused():
    with pytest.raises(ValueError, match=r"LatencyGuard\.layers: expected at least one layer, got none"):
        LatencyGuard({})


def test_ranks_are_not_timed_here():
    with pytest.raises(ValueError, match=r"granularity: expected layer or expert, got 'rank'"):
        LatencyGuard(bare_and_shared(), granularity="rank")
