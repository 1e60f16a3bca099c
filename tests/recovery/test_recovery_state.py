"""What a recovery keeps across a restart, and how it shares the model with other threads."""

import copy
import json
import threading

import pytest
import torch
from tests.recovery.served import LAYER, Server

from equipoise.layer.mode import NORMAL, Mode
from equipoise.monitor.incidents import PAGE
from equipoise.recovery.gate import Gate
from equipoise.recovery.patience import Patience
from equipoise.recovery.policy import OneRung
from equipoise.types import Alert, Finding


def test_a_restart_in_the_middle_of_a_trial(bench, tmp_path):
    """The new process has the modes, judges the trial, and knows what was tried."""
    server = Server(bench, tmp_path, policy=OneRung("boost"), patience=Patience(trial_flushes=4))
    server.collapse()
    server.run(4)
    assert server.notes.story == [("boost", "applied")]
    state = json.loads(json.dumps(server.recovery.state_dict()))
    watched = server.watch.state_dict()
    mode = bench.model.moe_layers[LAYER].mode
    server.watch.detach()
    bench.model.moe_layers[LAYER].set_mode(NORMAL)

    again = Server(bench, tmp_path / "again", policy=OneRung("boost"), patience=Patience(trial_flushes=4))
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
