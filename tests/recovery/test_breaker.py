"""The breaker: worked cases, and a scalar twin that it equals call by call."""

import json
import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.recovery.breaker import KEEP, LEARN, SIZE_BUCKETS, Breaker, BreakerConfig

NONE = math.nan


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Twin:
    """One group, in lists and loops."""

    def __init__(self, config):
        self.config, self.state, self.since = config, "closed", 0.0
        self.calls = []  # (seconds, slow) since the state began
        self.limit = math.nan  # of the last of them
        self.healthy = {}  # bucket -> seconds of the first calls
        self.baseline = {}

    def window(self):
        return self.calls[-self.config.window :]

    def slow_share(self):
        window = self.window()
        return sum(slow for _, slow in window) / len(window) if window else 0.0

    def p99(self):
        """The smallest of the window that at least 99 % of it do not exceed."""
        seconds = sorted(seconds for seconds, _ in self.window())
        for value in seconds:
            if sum(other <= value for other in seconds) * 100 >= 99 * len(seconds):
                return value
        return math.nan

    def move(self, state, now):
        told = (self.state, state, self.slow_share(), len(self.window()), self.limit, self.p99())
        self.state, self.since, self.calls, self.limit = state, now, [], math.nan
        return told

    def tick(self, now):
        if now < self.since:
            self.since = now
        if self.state == "open" and now - self.since >= self.config.open_s:
            return [self.move("half_open", now)]
        return []

    def limit_of(self, bucket):
        known = [each for each in self.baseline if each >= bucket]
        if not known:
            return self.config.slow_s
        return min(max(self.config.slow_ratio * self.baseline[min(known)], self.config.floor_s), self.config.slow_s)

    def learn(self, seconds, bucket):
        if bucket in self.baseline:
            self.baseline[bucket] = KEEP * self.baseline[bucket] + (1 - KEEP) * seconds
            return
        self.healthy.setdefault(bucket, []).append(seconds)
        if len(self.healthy[bucket]) == LEARN:
            self.baseline[bucket] = statistics.median(self.healthy[bucket])

    def record(self, seconds, size, now):
        moved = self.tick(now)
        if math.isnan(seconds) or self.state == "open":
            return moved
        bucket = 0
        while bucket < SIZE_BUCKETS - 1 and 2 ** (bucket + 1) <= size:
            bucket += 1
        self.limit = self.limit_of(bucket)
        slow = seconds > self.limit
        self.calls.append((seconds, slow))
        if self.state == "closed" and not slow:
            self.learn(seconds, bucket)
        many = self.slow_share() >= self.config.slow_share
        if self.state == "closed" and len(self.calls) >= self.config.min_calls and many:
            moved.append(self.move("open", now))
        elif self.state == "half_open" and len(self.calls) >= self.config.probe_calls:
            moved.append(self.move("open" if many else "closed", now))
        return moved


def breaker(*names, **config):
    clock = Clock()
    return Breaker(names or ("a",), BreakerConfig(**config), clock=clock), clock


def feed(breaker, *seconds, size=64):
    """One call after the other of the only group; its changes of state as (before, after)."""
    moved = [each for s in seconds for each in breaker.record(np.array([s]), np.array([size]))]
    return [(each.before, each.after) for each in moved]


# ---------------------------------------------------------------------------------------------------- against the twin

SECONDS = st.one_of(st.just(NONE), st.sampled_from([0.0, 0.0005, 0.002, 0.01, 0.04, 0.6]), st.floats(0, 1))
SIZES = st.sampled_from([0, 1, 2, 3, 4, 64, 65, 127, 128, 2**23 - 1, 2**23, 2**40])
CONFIGS = st.integers(1, 12).flatmap(
    lambda window: st.builds(
        BreakerConfig,
        slow_s=st.sampled_from([0.03, 0.5]),
        slow_ratio=st.sampled_from([1.5, 3.0]),
        floor_s=st.sampled_from([0.0, 1e-3, 0.02]),
        slow_share=st.sampled_from([0.01, 0.25, 0.5, 1.0]),
        window=st.just(window),
        min_calls=st.integers(1, window),
        open_s=st.sampled_from([1.0, 30.0]),
        probe_share=st.just(0.05),
        probe_calls=st.integers(1, 15),  # also more than the window holds
    )
)


@st.composite
def histories(draw):
    """(groups, [(clock move, seconds_G, sizes_G)]): few sizes and clock moves, so that baselines and states come up."""
    groups = draw(st.integers(1, 3))
    sizes = draw(st.lists(SIZES, min_size=1, max_size=2))
    turn = st.tuples(
        st.sampled_from([0.0, 0.0, 0.0, 0.0, 0.4, 40.0, -500.0]),
        st.lists(SECONDS, min_size=groups, max_size=groups),
        st.lists(st.sampled_from(sizes), min_size=groups, max_size=groups),
    )
    return groups, draw(st.lists(turn, max_size=60))


@settings(max_examples=200)
@given(config=CONFIGS, history=histories())
def test_equals_the_twin_call_by_call(config, history):
    groups, turns = history
    clock = Clock()
    names = [f"g{group}" for group in range(groups)]
    real, twins = Breaker(names, config, clock=clock), [Twin(config) for _ in names]
    for move, seconds_G, sizes_G in turns:
        clock.now += move
        moved = real.record(np.array(seconds_G), np.array(sizes_G))
        for group, name in enumerate(names):
            twin = twins[group]
            told = twin.record(seconds_G[group], sizes_G[group], clock.now)
            mine = [
                (each.before, each.after, each.slow_share, each.num_calls, each.limit_s, each.p99_s)
                for each in moved
                if each.name == name
            ]
            assert mine == [pytest.approx(each, nan_ok=True) for each in told]
            assert all(each.at == clock.now for each in moved)
            assert real.states[name] == twin.state
            assert real.slow_share_G[group] == pytest.approx(twin.slow_share())
            assert real.p99_s[group] == pytest.approx(twin.p99(), nan_ok=True)
            for size in sizes_G:
                bucket = min(max(int(size).bit_length() - 1, 0), SIZE_BUCKETS - 1)
                expected = twin.baseline.get(bucket, math.nan)
                assert real.baseline_s(name, size) == pytest.approx(expected, nan_ok=True)


@given(history=histories(), config=CONFIGS)
def test_groups_do_not_affect_each_other(history, config):
    groups, turns = history
    clock = Clock()
    together = Breaker([str(group) for group in range(groups)], config, clock=clock)
    alone = [Breaker(["x"], config, clock=clock) for _ in range(groups)]
    for move, seconds_G, sizes_G in turns:
        clock.now += move
        together.record(np.array(seconds_G), np.array(sizes_G))
        for group, one in enumerate(alone):
            one.record(np.array([seconds_G[group]]), np.array([sizes_G[group]]))
    assert list(together.states.values()) == [one.states["x"] for one in alone]
    assert together.dense_share_G.tolist() == [one.dense_share_G[0] for one in alone]
    np.testing.assert_array_equal(together.p99_s, [one.p99_s[0] for one in alone])


# ------------------------------------------------------------------------------------------------------- worked cases


def test_there_is_no_opinion_before_the_minimum_of_calls():
    real, _ = breaker(window=10, min_calls=4)
    assert feed(real, 0.6, 0.6, 0.6) == []
    assert feed(real, 0.6) == [("closed", "open")]


def test_calls_of_none_do_not_count():
    real, _ = breaker(window=10, min_calls=2)
    assert feed(real, 0.6, NONE, NONE, NONE) == []
    assert feed(real, 0.6) == [("closed", "open")]


def test_the_share_is_of_the_last_calls_only():
    real, _ = breaker(window=4, min_calls=4, slow_share=0.75)
    # windows: SFFS 2/4, then FFSF 1/4, FSFS 2/4, SFSS 3/4
    assert feed(real, 0.6, 0.1, 0.1, 0.6, 0.1, 0.6) == []
    assert real.slow_share_G.tolist() == [0.5]
    assert feed(real, 0.6) == [("closed", "open")]


def test_a_share_of_exactly_the_limit_opens():
    real, _ = breaker(window=4, min_calls=4, slow_share=0.5)
    assert feed(real, 0.1, 0.6, 0.1, 0.6) == [("closed", "open")]


@pytest.mark.parametrize(("seconds", "slow"), [(0.5, False), (0.501, True)])
def test_half_a_second_is_the_absolute_limit(seconds, slow):
    real, _ = breaker(window=4, min_calls=1)
    assert feed(real, seconds) == ([("closed", "open")] if slow else [])


@pytest.mark.parametrize(("seconds", "slow"), [(0.029, False), (0.031, True)])
def test_slow_is_three_times_the_usual(seconds, slow):
    real, _ = breaker(window=20, min_calls=9, slow_share=0.1)
    feed(real, *[0.008] * 3, *[0.010] * 2, *[0.020] * 3)
    assert real.baseline_s("a", 64) == 0.010  # the median of 8: between the 4th and the 5th, both 0.010
    assert bool(feed(real, seconds)) == slow  # 1 of 9 is more than a tenth


def test_the_baseline_is_of_calls_of_the_same_size():
    real, _ = breaker(window=40, min_calls=17, slow_share=0.05)  # 1 of 18 is more
    feed(real, *[0.002] * 8, size=64)
    feed(real, *[0.100] * 8, size=1024)
    assert (real.baseline_s("a", 127), real.baseline_s("a", 1024)) == (0.002, 0.100)  # 64 to 127 are one bucket
    assert math.isnan(real.baseline_s("a", 128))
    assert feed(real, 0.100, size=2047) == []
    assert feed(real, 0.100, size=100) == [("closed", "open")]


def test_a_size_without_a_baseline_has_that_of_the_next_larger_one():
    real, clock = breaker(window=40, min_calls=20, slow_share=0.5, probe_calls=2)
    feed(real, *[0.100] * 8, size=4096)
    feed(real, *[0.010] * 8, size=1024)
    assert feed(real, *[0.040] * 16, size=1024) == [("closed", "open")]  # 16 of 32
    clock.now += 30
    assert feed(real, 0.029, 0.029, size=50) == [("open", "half_open"), ("half_open", "closed")]
    feed(real, *[0.6] * 20, size=50)
    clock.now += 30
    assert feed(real, 0.031, 0.031, size=50) == [("open", "half_open"), ("half_open", "open")]


def test_a_size_larger_than_all_that_are_known_has_the_absolute_limit_alone():
    real, _ = breaker(window=40, min_calls=9, slow_share=0.05)
    feed(real, *[0.010] * 8, size=1)
    assert feed(real, 0.499, size=2) == []
    assert feed(real, 0.031, size=1) == [("closed", "open")]


def test_below_the_floor_nothing_is_slow():
    real, _ = breaker(window=20, min_calls=9, slow_share=0.05, floor_s=1e-3)
    feed(real, *[1e-5] * 8)
    assert feed(real, 9e-4) == []  # ninety times the usual
    assert feed(real, 1.1e-3) == [("closed", "open")]


def test_a_floor_above_the_absolute_limit_does_not_lift_it():
    real, _ = breaker(window=20, min_calls=9, slow_share=0.05, floor_s=2.0)
    feed(real, *[1e-5] * 8)
    assert feed(real, 0.6) == [("closed", "open")]


def test_slow_calls_do_not_teach_the_baseline():
    real, _ = breaker(window=100, min_calls=100)
    feed(real, *[0.010] * 8, *[0.4] * 50)
    assert real.baseline_s("a", 64) == 0.010
    feed(real, 0.020)  # not slow: 0.98 * 0.010 + 0.02 * 0.020
    assert real.baseline_s("a", 64) == pytest.approx(0.0102)


def test_first_calls_that_are_slow_do_not_teach_it_either():
    real, _ = breaker(window=100, min_calls=100)
    feed(real, *[0.6] * 20, *[0.010] * 7)
    assert math.isnan(real.baseline_s("a", 64))
    feed(real, 0.010)
    assert real.baseline_s("a", 64) == 0.010


def opened(**config):
    real, clock = breaker(window=4, min_calls=4, **{"probe_calls": 3, "open_s": 30.0} | config)
    assert feed(real, *[0.6] * 4) == [("closed", "open")]
    return real, clock


def test_open_lasts_its_time_and_takes_no_calls():
    real, clock = opened()
    clock.now += 29.9
    assert feed(real, *[0.001] * 20) == []
    assert real.tick() == []
    clock.now += 0.1
    (moved,) = real.tick()
    assert (moved.name, moved.before, moved.after, moved.num_calls, moved.at) == ("a", "open", "half_open", 0, 1030.0)
    assert math.isnan(moved.p99_s)
    assert math.isnan(moved.limit_s)


def test_fast_probes_close_it():
    real, clock = opened()
    clock.now += 30
    assert feed(real, 0.01) == [("open", "half_open")]
    assert feed(real, 0.6) == []  # 1 of 3 is less than half
    assert feed(real, 0.01) == [("half_open", "closed")]
    assert feed(real, *[0.6] * 3) == []  # a fresh start: four calls, or no opinion


def test_slow_probes_open_it_again_for_the_whole_time():
    real, clock = opened()
    clock.now += 30
    assert feed(real, 0.6, 0.6, 0.01) == [("open", "half_open"), ("half_open", "open")]
    clock.now += 29.9
    assert feed(real, 0.01) == []
    clock.now += 0.1
    assert feed(real, 0.01) == [("open", "half_open")]


def test_half_of_the_probes_slow_is_too_many():
    real, clock = opened(probe_calls=2)
    clock.now += 30
    assert feed(real, 0.01, 0.6) == [("open", "half_open"), ("half_open", "open")]


def test_probes_do_not_teach_the_baseline():
    real, clock = breaker(window=12, min_calls=12, probe_calls=20)
    feed(real, *[0.010] * 8)
    assert feed(real, *[0.6] * 8) == [("closed", "open")]  # at 6 of 12 the share is a half
    clock.now += 30
    feed(real, *[0.029] * 10)
    assert real.states == {"a": "half_open"}
    assert real.baseline_s("a", 64) == 0.010


def test_a_clock_that_jumps_back_makes_the_wait_begin_anew():
    real, clock = opened()
    clock.now -= 900
    assert real.tick() == []
    clock.now += 29
    assert real.tick() == []
    clock.now += 1
    assert [each.after for each in real.tick()] == ["half_open"]


def test_p99_is_of_the_window():
    real, _ = breaker(window=200, min_calls=200)
    assert np.isnan(real.p99_s).all()
    feed(real, 0.3)
    assert real.p99_s.tolist() == [0.3]
    feed(real, *[0.001 * i for i in range(1, 100)])  # 100 calls: the 99th of 0.001, ..., 0.099, 0.3
    assert real.p99_s.tolist() == [0.099]
    feed(real, *[0.4] * 2)  # 102 calls, ceil(0.99 * 102) = 101: of 0.3, 0.4, 0.4 at the end the second
    assert real.p99_s.tolist() == [0.4]


def test_a_transition_tells_its_numbers():
    real, _ = breaker(window=4, min_calls=4)
    moved = [each for s in (0.7, 0.1, 0.9, 0.2) for each in real.record(np.array([s]), np.array([1]))]
    (told,) = moved
    assert (told.slow_share, told.num_calls, told.limit_s, told.p99_s, told.at) == (0.5, 4, 0.5, 0.9, 1000.0)


def test_a_transition_tells_the_limit_of_its_last_call():
    real, clock = breaker(window=20, min_calls=16, slow_share=0.5, probe_calls=1)
    feed(real, *[0.010] * 8)
    (told,) = [each for _ in range(8) for each in real.record(np.array([0.040]), np.array([64]))]
    assert told.limit_s == pytest.approx(0.030)  # three times the usual
    clock.now += 30
    waited, closed = real.record(np.array([0.1]), np.array([128]))  # nothing is known of that size, or of larger ones
    assert math.isnan(waited.limit_s)
    assert (closed.after, closed.limit_s) == ("closed", 0.5)


def test_the_share_to_keep_away():
    real, clock = breaker("a", "b", "c", window=2, min_calls=1, probe_share=0.2, open_s=10, probe_calls=5)
    real.record(np.array([NONE, 0.6, NONE]), np.ones(3))
    clock.now += 10
    real.record(np.array([NONE, NONE, 0.6]), np.ones(3))
    assert real.states == {"a": "closed", "b": "half_open", "c": "open"}
    assert real.dense_share_G.tolist() == [0.0, 0.8, 1.0]


# -------------------------------------------------------------------------------------------------------------- state


def test_state_goes_through_json_and_keeps_states_and_baselines():
    real, clock = breaker("a", "b", window=4, min_calls=4, probe_calls=3)
    for _ in range(8):
        real.record(np.array([0.010, 0.020]), np.array([64, 4]))
    for _ in range(3):
        real.record(np.array([0.6, 0.020]), np.array([64, 4]))
    state = json.loads(json.dumps(real.state_dict()))
    other = Breaker(("a", "b"), real.config, clock=clock)
    other.load_state_dict(state)
    assert other.states == real.states == {"a": "open", "b": "closed"}
    assert (other.baseline_s("a", 64), other.baseline_s("b", 4)) == pytest.approx((0.010, 0.020))
    assert math.isnan(other.baseline_s("a", 4))
    assert other.state_dict() == state
    other.record(np.array([NONE, 0.030]), np.array([64, 4]))  # goes on where it was: 0.98 * 0.020 + 0.02 * 0.030
    assert other.baseline_s("b", 4) == pytest.approx(0.0202)


def test_a_wait_begins_anew_where_the_state_is_loaded():
    real, clock = opened()
    state = real.state_dict()
    clock.now += 29
    real.load_state_dict(state)
    clock.now += 29
    assert real.tick() == []
    clock.now += 1
    assert [each.after for each in real.tick()] == ["half_open"]


def test_loading_forgets_the_calls_and_baselines_of_before():
    real, _ = breaker(window=4, min_calls=4)
    fresh = real.state_dict()
    feed(real, *[0.010] * 8, 0.4)
    real.load_state_dict(fresh)
    assert math.isnan(real.baseline_s("a", 64))
    assert np.isnan(real.p99_s).all()
    assert real.slow_share_G.tolist() == [0.0]
    assert feed(real, *[0.6] * 3) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, r"expected version 1 of 2 groups of these names, got version 2; start with a new breaker"),
        ({"names": ["a", "c"]}, r"breaker state: expected version 1 of 2 groups of these names"),
        ({"states": ["closed", "ajar"]}, r"breaker state: expected what state_dict\(\) returned, got damaged .*ajar"),
        ({"states": ["open"]}, r"damaged entries .*; start with a new breaker"),
        ({"baselines": [[0, 6, 0.5], [7, 0, 0.1]]}, r"damaged entries"),
        ({"baselines": [[0, 6]]}, r"damaged entries"),
        ({"baselines": None}, r"damaged entries"),
    ],
)
def test_the_state_of_something_else_is_refused_and_changes_nothing(change, message):
    real, _ = breaker("a", "b", window=4, min_calls=4)
    for _ in range(8):
        real.record(np.array([0.010, 0.6]), np.array([64, 4]))
    before = real.state_dict()
    with pytest.raises(ValueError, match=message):
        real.load_state_dict(before | change)
    assert real.state_dict() == before
    assert real.p99_s[0] == 0.010


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"slow_s": 0}, r"BreakerConfig\.slow_s: expected seconds, more than 0, got 0"),
        ({"slow_s": math.nan}, r"BreakerConfig\.slow_s: expected seconds, more than 0, got nan"),
        ({"open_s": math.inf}, r"BreakerConfig\.open_s: expected seconds, more than 0, got inf"),
        ({"slow_ratio": 1.0}, r"BreakerConfig\.slow_ratio: expected more than 1, got 1\.0"),
        ({"floor_s": -1.0}, r"BreakerConfig\.floor_s: expected 0 or more seconds, got -1\.0"),
        ({"slow_share": 0.0}, r"BreakerConfig\.slow_share: expected a share in \(0, 1\], got 0\.0"),
        ({"probe_share": 1.1}, r"BreakerConfig\.probe_share: expected a share in \(0, 1\], got 1\.1"),
        ({"window": 0}, r"BreakerConfig\.window: expected at least 1 call, got 0"),
        ({"min_calls": 0}, r"BreakerConfig\.min_calls: expected at least 1 call, got 0"),
        ({"probe_calls": 0}, r"BreakerConfig\.probe_calls: expected at least 1 call, got 0"),
        ({"window": 5, "min_calls": 6}, r"min_calls: expected at most window = 5, got 6; it would never have an opin"),
    ],
)
def test_a_wrong_config_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        BreakerConfig(**config)


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_names_differ(names):
    with pytest.raises(ValueError, match=r"Breaker\.names: expected different names, at least one, got \["):
        Breaker(names)


def test_calls_of_another_number_of_groups_are_refused():
    real, _ = breaker("a", "b")
    with pytest.raises(ValueError, match=r"record: seconds_G: expected 2 numbers, got shape \(3,\)"):
        real.record(np.zeros(3), np.zeros(2))
    with pytest.raises(ValueError, match=r"record: sizes_G: expected 2 numbers, got shape \(1,\)"):
        real.record(np.zeros(2), np.zeros(1))


def test_there_is_no_baseline_of_an_unknown_group():
    real, _ = breaker("a", "b")
    with pytest.raises(ValueError, match=r"baseline_s: expected one of a, b, \.\.\., got 'c'"):
        real.baseline_s("c", 1)
