"""The breaker under any order of calls, waits and restarts: what holds in each state."""

import json

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from equipoise.recovery.breaker import Breaker, BreakerConfig

NAMES = ("a", "b")
FAST, SLOW = 0.01, 0.6
SHARE_AWAY = {"closed": 0.0, "open": 1.0, "half_open": 0.9}
ALLOWED = {("closed", "open"), ("open", "half_open"), ("half_open", "open"), ("half_open", "closed")}


class BreakerMachine(RuleBasedStateMachine):
    """Two groups. calls: of each since its state began. opened: when, by the clock that is told here."""

    @initialize(
        min_calls=st.integers(1, 5),
        more=st.integers(0, 5),
        probe_calls=st.integers(1, 4),
        slow_share=st.sampled_from([0.2, 0.5, 1.0]),
    )
    def begin(self, min_calls, more, probe_calls, slow_share):
        self.now = 0.0
        self.config = BreakerConfig(
            min_calls=min_calls,
            window=min_calls + more,
            probe_calls=probe_calls,
            slow_share=slow_share,
            open_s=30.0,
            probe_share=0.1,
        )
        self.breaker = self.new()
        self.calls = {name: [] for name in NAMES}
        self.opened = dict.fromkeys(NAMES, 0.0)
        self.states = dict.fromkeys(NAMES, "closed")

    def new(self):
        return Breaker(NAMES, self.config, clock=lambda: self.now)

    def take(self, moved):
        """Check each change against what led to it."""
        for each in moved:
            calls = self.calls[each.name]
            assert self.states[each.name] == each.before
            assert (each.before, each.after) in ALLOWED
            if each.before == "closed":
                assert len(calls) >= self.config.min_calls
                assert calls.count(SLOW) > 0
            if each.before == "open":
                assert self.now - self.opened[each.name] >= self.config.open_s
                assert calls == []
            if each.before == "half_open":
                assert len(calls) == self.config.probe_calls
            if each.after == "open":
                self.opened[each.name] = self.now
            self.states[each.name], self.calls[each.name] = each.after, []

    @rule(seconds=st.lists(st.sampled_from([FAST, SLOW, np.nan]), min_size=2, max_size=2))
    def call(self, seconds):
        self.take(self.breaker.tick())
        for name, each in zip(NAMES, seconds, strict=True):
            if self.states[name] != "open" and not np.isnan(each):
                self.calls[name].append(each)
        self.take(self.breaker.record(np.array(seconds), np.full(2, 64)))

    @rule(seconds=st.sampled_from([0.5, 10.0, 29.0, 30.0]))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def tick(self):
        self.take(self.breaker.tick())

    @rule(name=st.sampled_from(NAMES), probe=st.sampled_from([FAST, SLOW]))
    def recover(self, name, probe):
        """Open it, wait, and let it have only fast or only slow probes: the outcome is certain."""
        calls = np.where([each == name for each in NAMES], SLOW, np.nan)
        turns = 0
        while self.states[name] != "open":
            self.call(calls)
            turns += 1
            assert turns <= self.config.window + self.config.probe_calls
        self.now += self.config.open_s
        for _ in range(self.config.probe_calls):
            self.call(np.where([each == name for each in NAMES], probe, np.nan))
        assert self.breaker.states[name] == ("closed" if probe == FAST else "open")

    @rule()
    def restart(self):
        """In a new process: states are kept, calls are not, waits begin anew."""
        state = json.loads(json.dumps(self.breaker.state_dict()))
        self.breaker = self.new()
        self.breaker.load_state_dict(state)
        self.calls = {name: [] for name in NAMES}
        self.opened = dict.fromkeys(NAMES, self.now)
        assert self.breaker.state_dict() == state

    @invariant()
    def states_and_shares_agree(self):
        if hasattr(self, "breaker"):
            assert self.breaker.states == self.states
            shares = [round(SHARE_AWAY[self.states[name]], 12) for name in NAMES]
            assert self.breaker.dense_share_G.round(12).tolist() == shares

    @invariant()
    def nobody_is_stuck(self):
        """Those with a whole answer have given it."""
        if hasattr(self, "breaker"):
            for name in NAMES:
                if self.states[name] == "half_open":
                    assert len(self.calls[name]) < self.config.probe_calls
                if self.states[name] == "closed" and len(self.calls[name]) >= self.config.min_calls:
                    window = self.calls[name][-self.config.window :]
                    assert window.count(SLOW) / len(window) < self.config.slow_share


TestBreakerMachine = BreakerMachine.TestCase
TestBreakerMachine.settings = settings(max_examples=150, stateful_step_count=40)
