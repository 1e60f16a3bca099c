"""Sums of layers side by side are those of each layer, whatever they are about."""

from dataclasses import fields

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from equipoise.monitor.stacked import StackedSums
from equipoise.monitor.stats import RoutingSums, merge

REASONS, LOSSES = ("capacity", "tokens"), ("switch", "z")
WHOLE, REAL = st.integers(0, 2**40), st.floats(-1e6, 1e6)


@st.composite
def windows(draw):
    """Sums by layer; layers are of one size each, and not all of them are in every window."""
    names = draw(st.lists(st.sampled_from("abc"), unique=True))
    return {name: draw(sums("abc".index(name) + 1)) for name in names}


@st.composite
def sums(draw, num_experts):
    counts, probs = (draw(st.lists(each, min_size=num_experts, max_size=num_experts)) for each in (WHOLE, REAL))
    others = [draw(REAL) for _ in range(4)]
    dropped, rerouted = (draw(st.dictionaries(st.sampled_from(REASONS), WHOLE)) for _ in range(2))
    losses = draw(st.dictionaries(st.sampled_from(LOSSES), REAL))
    arrays = np.array(counts, dtype=np.int64), np.array(probs)
    return RoutingSums(draw(WHOLE), *arrays, *others, dropped, losses, rerouted)


def assert_same(got, expected):
    assert list(got) == list(expected)
    for layer, each in expected.items():
        for field in fields(RoutingSums):
            np.testing.assert_equal(getattr(got[layer], field.name), getattr(each, field.name))


@given(windows())
def test_come_back_as_they_were(window):
    stacked = StackedSums.of(window)
    assert_same(stacked.by_layer(), window)
    assert stacked.assignments_L.tolist() == [each.counts_E.sum() for each in window.values()]
    assert stacked.experts_L.tolist() == [len(each.counts_E) for each in window.values()]
    assert_same(stacked.by_layer({"b"}), {name: each for name, each in window.items() if name == "b"})


NOTHING = {"a": RoutingSums(0, np.zeros(1, dtype=np.int64), np.zeros(1), -0.0, -0.0, -0.0, -0.0, {}, {})}


@given(windows(), windows(), st.booleans())
@example(NOTHING, NOTHING, True)  # two negative zeros add up to one
def test_add_up_like_each_layer(first, second, alike):
    """Also where layers, or what is said of them, are not the same in both."""
    if alike:
        second = first
    expected = {
        layer: merge(first[layer], second[layer]) if layer in first and layer in second else each
        for layer, each in {**first, **second}.items()
    }
    one, other = StackedSums.of(first), StackedSums.of(second)
    assert_same(one.merged(other).by_layer(), expected)
    assert_same(one.copy().absorb(other.like(one)).by_layer(), expected)
    assert_same(one.by_layer(), first)  # only the copy has changed
    assert_same(other.by_layer(), second)


def test_a_layer_with_other_experts():
    one, two = (RoutingSums(1, np.ones(E, dtype=np.int64), np.ones(E), 0.0, 0.0, 0.0, 0.0, {}, {}) for E in (1, 2))
    with pytest.raises(ValueError, match="cannot merge windows of 1 and 2 experts"):
        StackedSums.of({"a": one}).absorb(StackedSums.of({"a": two}))
