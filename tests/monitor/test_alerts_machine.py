"""The alert book under any order of flushes and restarts, next to counters kept by hand."""

import json

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from equipoise.monitor.alerts import AlertBook
from equipoise.types import Finding

LAYERS, RULES = ("a", "b"), ("collapse", "dead_experts", "overload")
KEYS = [(layer, name) for layer in LAYERS for name in RULES]


def finding(layer, name, value=0.9):
    return Finding(name, layer, None, "critical", value, 0.5, f"{layer} {name}", "do something")


class AlertMachine(RuleBasedStateMachine):
    """hits, clean: judged flushes in a row with and without each finding. firing: keys, with when their hits began."""

    @initialize(fire_after=st.integers(1, 3), resolve_after=st.integers(1, 3))
    def begin(self, fire_after, resolve_after):
        self.fire_after, self.resolve_after, self.step = fire_after, resolve_after, 0
        self.book = self.new()
        self.hits, self.clean = dict.fromkeys(KEYS, 0), dict.fromkeys(KEYS, 0)
        self.since, self.firing = {}, set()
        self.log = []  # (key, state)

    def new(self):
        return AlertBook(fire_after=self.fire_after, resolve_after=self.resolve_after)

    def expected(self, found, unjudged):
        """What this flush changes, and the counters after it."""
        collapsed = {layer for layer in LAYERS if (layer, "collapse") in found or (layer, "collapse") in self.firing}
        changed = set()
        for key in KEYS:
            layer, name = key
            if layer in unjudged or (layer in collapsed and name != "collapse"):
                continue  # stands still: neither a hit nor clean
            self.hits[key] = self.hits[key] + 1 if key in found else 0
            self.clean[key] = 0 if key in found else self.clean[key] + 1
            if self.hits[key] == 1 and key not in self.firing:
                self.since[key] = self.step
            if self.hits[key] == self.fire_after and key not in self.firing:
                self.firing.add(key)
                changed.add((key, "firing"))
            if self.clean[key] == self.resolve_after and key in self.firing:
                self.firing.remove(key)
                changed.add((key, "resolved"))
        return changed

    def flush(self, found, unjudged=()):
        self.step += 1
        value = self.step / 1000
        changed = self.book.observe(self.step, [finding(*key, value) for key in found], unjudged=unjudged)
        told = [((alert.finding.layer, alert.finding.rule), alert.state) for alert in changed]
        assert len(set(told)) == len(told)
        assert set(told) == self.expected(found, unjudged)
        for (key, state), alert in zip(told, changed, strict=True):
            assert alert.key == ":".join(key)
            assert (alert.step, alert.since_step) == (self.step, self.since[key])
            if state == "firing":
                assert alert.finding.value == value
        self.log += told

    @rule(found=st.sets(st.sampled_from(KEYS)), unjudged=st.sets(st.sampled_from(LAYERS), max_size=1))
    def any_flush(self, found, unjudged):
        self.flush(sorted(found), unjudged)

    @rule(key=st.sampled_from(KEYS), times=st.integers(1, 3))
    def lasting(self, key, times):
        for _ in range(times):
            self.flush([key])

    @rule(times=st.integers(1, 3))
    def quiet(self, times):
        for _ in range(times):
            self.flush([])

    @rule()
    def nobody_judged(self):
        before = self.book.state_dict()
        self.flush([("a", "overload")], LAYERS)
        assert self.book.state_dict() == before

    @rule()
    def restart(self):
        """In a new process: nothing is different."""
        state = json.loads(json.dumps(self.book.state_dict()))
        firing, self.book = self.book.firing, self.new()
        self.book.load_state_dict(state)
        assert self.book.firing == firing
        assert self.book.state_dict() == state

    @invariant()
    def firing_is_what_fired_and_was_not_resolved(self):
        if hasattr(self, "book"):
            alerts = self.book.firing
            keys = [(alert.finding.layer, alert.finding.rule) for alert in alerts]
            assert len(set(keys)) == len(keys)
            assert set(keys) == self.firing
            assert [alert.since_step for alert in alerts] == sorted(alert.since_step for alert in alerts)

    @invariant()
    def each_key_fires_and_resolves_in_turn(self):
        for key in KEYS:
            states = [state for each, state in getattr(self, "log", []) if each == key]
            assert states == ["firing", "resolved"] * (len(states) // 2) + ["firing"] * (len(states) % 2)


TestAlertMachine = AlertMachine.TestCase
TestAlertMachine.settings = settings(max_examples=150, stateful_step_count=40)
