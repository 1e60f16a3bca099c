"""A router that collapses while it is served is noticed, repaired, and told of; a healthy one is left alone."""

import threading

import numpy as np
import pytest

from equipoise.faults import Collapse, LogitBlowUp, inject
from equipoise.layer.mode import NORMAL, Mode
from equipoise.monitor.incidents import incidents
from equipoise.serve.care import CareConfig

LAYER = "layers.1.mlp"
COLLAPSE = Collapse(layer=LAYER, expert=3, intensity=30.0)


def break_router(served):
    with served.care.quietly():
        return inject(served.loaded.model, COLLAPSE, served.equipment.canary.run)


def test_a_healthy_model_is_left_alone(serve):
    served = serve(CareConfig(recover=True))
    before = {name: tensor.clone() for name, tensor in served.loaded.model.state_dict().items()}
    for _ in range(4):
        served.traffic()
        assert served.care.look() == []
    assert served.care.reasons() == ()
    assert all(tensor.equal(before[name]) for name, tensor in served.loaded.model.state_dict().items())
    assert sum(stats.num_tokens for stats in served.heard.flushes[0]) > 0


def test_collapse_is_noticed_repaired_and_resolved(serve):
    served = serve(CareConfig(recover=True))
    served.traffic()
    served.care.look()
    break_router(served)
    looks = 0
    while not any(alert.state == "resolved" for alert in served.heard.alerts):
        looks += 1
        assert looks <= 8, served.heard.actions
        served.traffic()
        served.care.look()
        if any(alert.finding.rule == "collapse" for alert in served.care.watch.alerts):
            assert f"{LAYER}: collapse" in served.care.reasons()
    assert served.heard.alerts[0].finding.rule == "collapse"
    assert {action.state for action in served.heard.actions} >= {"applied", "kept"}
    assert served.forgotten, "keys and values of the broken router were kept"


def test_wide_logits_under_the_repair_are_the_same_incident(serve):
    """The collapse's own row makes the logits wide, and the bias does not change that: one alert, and a proposal."""
    served = serve(CareConfig(recover=True, lift_after_s=0))
    break_router(served)

    def look(times, until=lambda: False):
        for _ in range(times):
            served.traffic()
            served.care.look()
            if until():
                return True
        return False

    assert look(8, lambda: any(alert.state == "resolved" for alert in served.heard.alerts))
    look(14)  # longer than a warning waits for its repair
    told = [(alert.key, alert.state) for alert in served.heard.alerts]
    assert told == [(f"{LAYER}:collapse", "firing"), (f"{LAYER}:collapse", "resolved")]
    [left] = served.care.aftermath.findings
    assert (left.rule, left.layer) == ("logits", LAYER)
    assert served.operator.state()["aftermath"] == [vars(left)]
    [incident] = incidents(served.heard.alerts, served.heard.actions)
    done = [(each.kind, each.state) for each in incident.actions]
    assert done == [("quantile_bias", "kept"), ("router_rollback", "proposed")]
    assert "times the baseline's" in incident.actions[-1].note
    # whoever mends the router ends it; wide logits later on are news
    served.operator.rollback_router(LAYER)
    look(3)
    assert served.care.aftermath.findings == ()
    with served.care.quietly():
        inject(served.loaded.model, LogitBlowUp(LAYER, 5.0), served.equipment.canary.run)
    assert look(6, lambda: len(served.heard.alerts) > 2)
    assert served.heard.alerts[2].key == f"{LAYER}:logits"


def test_without_leave_it_only_proposes(serve):
    served = serve()
    break_router(served)
    for _ in range(3):
        served.traffic()
        served.care.look()
    assert [action.state for action in served.heard.actions] == ["proposed"]
    assert all(layer.mode == NORMAL for layer in served.care.layers.values())
    assert served.forgotten == []


def test_an_alert_manager_may_ask_for_the_repair(serve):
    served = serve()
    break_router(served)
    served.traffic()
    [action] = served.operator.repair(LAYER, "collapse", "one expert takes all")
    assert action.state == "applied"
    assert served.care.recovery.act is False
    with pytest.raises(ValueError, match=r"expected an equipoise layer \(layers.0.mlp, layers.1.mlp\), got 'nowhere'"):
        served.operator.repair("nowhere", "collapse", "")


def test_what_was_only_proposed_is_done_for_an_alert_manager(serve):
    served = serve()
    break_router(served)
    for _ in range(3):
        served.traffic()
        served.care.look()
    assert [action.state for action in served.heard.actions] == ["proposed"]
    assert [action.state for action in served.operator.repair(LAYER, "collapse", "")] == ["applied"]


def test_baselines_come_from_the_record(serve):
    served = serve()
    assert set(served.equipment.baselines) == set(served.care.layers)
    comparing = [rule.baselines for rule in served.care.watch._detectors if getattr(rule, "baselines", None)]
    assert comparing
    assert all(baselines == served.equipment.baselines for baselines in comparing)


def test_a_repair_in_force_and_a_breaker_are_reasons(serve):
    served = serve()
    served.care.layers[LAYER].set_mode(Mode(round_robin=True))
    assert served.care.reasons() == (f"{LAYER}: a repair is in force",)


def test_a_repair_that_is_not_needed_is_lifted_by_itself(serve):
    served = serve(CareConfig(recover=True, flush_s=1.0, lift_after_s=2.0))
    served.care.layers[LAYER].set_mode(Mode(temperature=1.05))
    for _ in range(20):
        served.traffic()
        served.care.look()
        if [action.state for action in served.heard.actions] == ["applied", "kept"]:
            break
    assert [(action.kind, action.layer, action.state) for action in served.heard.actions] == [
        ("lift", LAYER, "applied"),
        ("lift", LAYER, "kept"),
    ]
    assert served.care.reasons() == ()
    assert len(served.forgotten) == 1  # keys and values are computed anew, once


@pytest.mark.parametrize(
    "config", [CareConfig(recover=True, lift_after_s=0, flush_s=1.0), CareConfig(lift_after_s=1.0)]
)
def test_a_repair_stays_where_it_may_not_be_lifted(serve, config):
    served = serve(config)
    served.care.layers[LAYER].set_mode(Mode(temperature=1.05))
    for _ in range(4):
        served.traffic()
        served.care.look()
    assert served.heard.actions == []


def test_the_breaker_opens_on_a_slow_layer_and_closes_again(serve):
    served = serve()
    guard = served.care.guard
    assert guard is not None
    assert guard.unguarded == ()
    for _ in range(3):
        served.traffic(4)
        served.care.look()
    config = served.care.config.breaker
    group = guard.breaker.names.index(LAYER)
    slow = np.full(len(guard.breaker.names), np.nan)
    slow[group] = 10.0
    for _ in range(config.window):
        moved = guard.breaker.record(slow, np.full(len(slow), 8.0))
        if moved:
            break
    guard._keep_away([LAYER])
    assert served.care.reasons() == (f"{LAYER}: the breaker is open",)
    served.traffic(4)  # the stand-in computes
    served.care.look()
    diverted = [stats.rerouted.get("diverted", 0) for stats in served.heard.flushes[-1] if stats.layer == LAYER]
    assert diverted[0] > 0


class TestThread:
    def test_looks_by_itself_and_stops(self, serve):
        served = serve(CareConfig(flush_s=0.01))
        looked = threading.Event()
        served.care.after_look = lambda step: looked.set()
        served.care.start()
        served.traffic()
        assert looked.wait(30)
        served.care.stop()
        with pytest.raises(RuntimeError, match="the server is stopping"):
            served.care.call(lambda: None)

    def test_what_fails_is_told_and_does_not_end_it(self, serve):
        served = serve(CareConfig(flush_s=0.01))
        calls, again = [], threading.Event()

        def fail(step):
            calls.append(step)
            if len(calls) == 1:
                raise OSError("the disk is full")
            again.set()

        told = []
        served.care.after_look = fail
        original = served.care.look
        served.care.look = lambda: (told.append(served.care.reasons()), original())[1]
        served.care.start()
        assert again.wait(30)
        assert ("the monitor fails: OSError: the disk is full",) in told

    def test_calls_are_made_in_its_thread_and_errors_are_the_callers(self, serve):
        served = serve(CareConfig(flush_s=60.0))
        served.care.start()
        assert served.care.call(lambda: threading.current_thread().name).result(30) == "care"
        with pytest.raises(KeyError):
            served.care.call(lambda: {}["x"]).result(30)


def test_bad_config():
    with pytest.raises(ValueError, match=r"flush_s: expected seconds, more than 0, got 0"):
        CareConfig(flush_s=0)
    with pytest.raises(ValueError, match=r"lift_after_s: expected seconds, or 0 for never, got -1"):
        CareConfig(lift_after_s=-1)
