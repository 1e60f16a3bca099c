"""The rule that compares a tuned router with the one that it was: by hand, against chance, and on the edge."""

import math
from dataclasses import replace

import numpy as np
import pytest

from equipoise.monitor.chance import needed_nats
from equipoise.monitor.domain_shift import Shift, ShiftRule, agreement, distance_floor, load_distance, shift_of
from equipoise.monitor.stats import RoutingSums, routing_stats

ALIKE = Shift("layer", "task", 2000, 8, 4000, 0.9, 0.05, 0.98, 0.99)


def window(*layers):
    ones = np.full(8, 500)
    sums = RoutingSums(2000, ones, ones / 2, 1.0, 0.0, 16_000.0, 4000.0, {}, {})
    return [routing_stats(layer, 1, sums) for layer in layers]


def found(*shifts):
    return ShiftRule(lambda: shifts)(window("layer", "other"))


def test_measures_by_hand():
    """Three experts; tokens 0, 1, 2 choose 0+1, 0+1, 0+2 in the base, and 0+1, 0+2, 1+2 now.

    Of six choices 0:0 0:1 1:0 1:1 2:0 2:2 four are left: 0:0 0:1 1:0 2:2. Loads 3 2 1 and 2 2 2 of six: half of
    (1 + 0 + 1) / 6 is 1/6.
    """
    base = np.array([0, 1, 3, 4, 6, 8])
    now = np.array([0, 1, 3, 5, 7, 8])
    assert agreement(now, base) == pytest.approx(4 / 6)
    shift = shift_of("layer", "task", (now, base), 3, 3)
    assert (shift.num_assignments, shift.agreement) == (6, pytest.approx(4 / 6))
    assert shift.distance == pytest.approx(1 / 6)
    assert shift.entropy == pytest.approx(1.0)
    loads = np.array([3, 2, 1]) / 6
    assert shift.base_entropy == pytest.approx(-(loads * np.log(loads)).sum() / math.log(3))
    assert agreement(base, base) == 1.0
    assert load_distance(np.array([4, 0]), np.array([0, 4])) == 1.0


def test_the_same_load_may_hide_other_choices():
    """Each of two tokens swaps: no load has moved, no choice is left. That is why there are two measures."""
    shift = shift_of("layer", "task", (np.array([1, 2]), np.array([0, 3])), 2, 2)
    assert (shift.agreement, shift.distance) == (0.0, 0.0)


def test_nothing_to_compare():
    empty = np.empty(0, dtype=np.int64)
    assert agreement(empty, empty) == 1.0
    assert load_distance(np.zeros(3), np.ones(3)) == 0.0
    assert distance_floor(8, 0, 0, 10.0) == math.inf
    assert found() == []


@pytest.mark.parametrize(
    ("shift", "value", "named"),
    [
        (replace(ALIKE, agreement=0.3), 0.7, "30% are the same"),
        (replace(ALIKE, distance=0.5), 0.5, "50% of the load has moved"),
    ],
    ids=["choices", "load"],
)
def test_one_finding_per_layer(shift, value, named):
    [finding] = found(ALIKE, shift, replace(shift, text="base", agreement=0.45, distance=0.1))
    assert (finding.rule, finding.layer, finding.severity) == ("domain_shift", "layer", "warning")
    assert finding.value == pytest.approx(value)
    assert named in finding.message
    assert "task's text" in finding.message
    assert "Freeze the router" in finding.remedy


def test_silent_where_it_is_alike_or_chance_explains_it_or_the_layer_is_another():
    assert found(ALIKE) == []
    assert found(replace(ALIKE, agreement=0.3, num_tokens=10, num_assignments=20)) == []
    assert found(replace(ALIKE, distance=0.6, num_tokens=40, num_assignments=80)) == []
    assert found(replace(ALIKE, layer="third", agreement=0.1)) == []


def test_the_floor_holds_for_samples_of_one_load():
    """4000 samples of 300 tokens with 2 of 8 experts each: at a rate of 5 %, as many of them may pass it."""
    rng = np.random.default_rng(0)
    share = rng.dirichlet(np.ones(8))
    first = rng.choice(8, size=(4000, 300), p=share)
    second = (first + rng.integers(1, 8, size=first.shape)) % 8
    truth = np.array([(share[e] + (1 - share[e]) / 7) / 2 for e in range(8)])
    counts = np.stack([(first == e).sum(1) + (second == e).sum(1) for e in range(8)], 1)
    distances = np.abs(counts / 600 - truth).sum(1) / 2
    floor = distance_floor(8, 600, 300, needed_nats(1, 0.05))
    assert (distances > floor).mean() <= 0.05
    assert floor < 0.15  # and says something


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"min_agreement": 1.0}, r"ShiftRule\.min_agreement: expected between 0 and 1, got 1\.0"),
        ({"max_distance": 0.0}, r"ShiftRule\.max_distance: expected between 0 and 1, got 0\.0"),
        ({"false_alarms": 2.0}, r"false_alarms: expected a probability"),
    ],
)
def test_limits_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        ShiftRule(lambda: (), **change)
