"""The last minutes of routing: exact sums over any span, in bounded memory, whatever the clock does."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.monitor.stats import RoutingSums
from equipoise.monitor.window import TimeWindow


def sums(*counts, tokens=None):
    counts_E = np.array(counts, dtype=np.int64)
    num_tokens = int(counts_E.sum()) if tokens is None else tokens
    return RoutingSums(num_tokens, counts_E, counts_E.astype(float), 1.0, 0.0, 0.0, 0.0, {"capacity": 1}, {})


def test_recent_reaches_back_only_as_far_as_it_must():
    window = TimeWindow(600.0)
    window.add(0.0, {"a": sums(100, 0)})
    window.add(1.0, {"a": sums(0, 6)})
    window.add(2.0, {"a": sums(7, 7)})
    assert window.recent(5)["a"].counts_E.tolist() == [7, 7]
    assert window.recent(8)["a"].counts_E.tolist() == [7, 13]
    assert window.recent(20)["a"].counts_E.tolist() == [107, 13]
    assert window.recent(1e9)["a"].counts_E.tolist() == [107, 13]
    assert window.whole()["a"].dropped == {"capacity": 3}


def test_each_layer_reaches_back_for_itself():
    window = TimeWindow(600.0)
    window.add(0.0, {"busy": sums(50, 50), "quiet": sums(1, 1)})
    window.add(1.0, {"busy": sums(60, 60), "quiet": sums(2, 0)})
    recent = window.recent(50)
    assert recent["busy"].counts_E.tolist() == [60, 60]
    assert recent["quiet"].counts_E.tolist() == [3, 1]


def test_what_is_older_than_the_window_is_forgotten():
    window = TimeWindow(10.0)
    for second in range(30):
        window.add(float(second), {"a": sums(1, 0)})
    assert window.whole()["a"].counts_E.tolist() == [10, 0]
    assert window.seconds == 9.0


def test_a_clock_that_jumps_back_loses_nothing():
    window = TimeWindow(10.0)
    window.add(100.0, {"a": sums(1, 0)})
    window.add(5.0, {"a": sums(1, 0)})
    window.add(6.0, {"a": sums(1, 0)})
    assert window.whole()["a"].counts_E.tolist() == [3, 0]


def test_a_clock_that_jumps_back_by_an_hour_still_ages_what_was_seen():
    """Somebody sets the time: from then on it is that time which passes, not an hour of nothing forgotten."""
    window = TimeWindow(10.0)
    for second in (7200.0, 7201.0, 3600.0, 3601.0, 3609.0):  # ages at the end: 10, 9, 9, 8, 0 seconds
        window.add(second, {"a": sums(1, 0)})
    assert window.whole()["a"].counts_E.tolist() == [4, 0]
    assert window.seconds == 9.0
    window.add(3619.0, {"a": sums(1, 0)})
    assert window.whole()["a"].counts_E.tolist() == [1, 0]


def test_a_clock_that_jumps_ahead_forgets_what_is_then_too_old():
    """A machine that slept: what it saw before is as old as the clock says."""
    window = TimeWindow(10.0)
    for second in (0.0, 1.0, 1e9):
        window.add(second, {"a": sums(1, 0)})
    assert window.whole()["a"].counts_E.tolist() == [1, 0]


@given(gaps=st.lists(st.floats(0.0, 5.0), max_size=80), max_spans=st.integers(2, 9))
def test_memory_is_bounded_and_sums_stay_exact(gaps, max_spans):
    window, now = TimeWindow(1e9, max_spans), 0.0
    for number, gap in enumerate(gaps):
        now += gap
        window.add(now, {"a": sums(number, 1)})
        assert len(window) <= max_spans
        assert window.recent(0)["a"].counts_E.tolist() == [number, 1]  # the newest stays by itself
    if gaps:
        assert window.whole()["a"].counts_E.tolist() == [sum(range(len(gaps))), len(gaps)]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"window_s": 0.0}, r"window_s: expected more than 0 seconds, got 0\.0"),
        ({"max_spans": 1}, r"max_spans: expected at least 2, got 1"),
    ],
)
def test_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TimeWindow(**kwargs)
