"""The nouns that check themselves."""

import inspect

import pytest

from equipoise.layer import MoE
from equipoise.types import Placement, is_observable


def test_even_placement_covers_all_experts_once():
    assert Placement.even(6, 4).slots == ((0,), (1, 2), (3,), (4, 5))
    assert Placement.even(2, 4).slots == ((), (0,), (), (1,))
    assert Placement.even(8, 2).num_experts == 8


def test_replicas_are_found():
    placement = Placement(((0, 1), (1, 2), (1,)))
    assert placement.ranks_of(1) == (0, 1, 2)
    assert (placement.num_ranks, placement.num_experts) == (3, 3)


@pytest.mark.parametrize(
    ("slots", "message"),
    [(((0,), (2,)), "every expert from 0 on"), (((0, 0), (1,)), "at most once on a rank, rank 0 has")],
)
def test_a_placement_that_cannot_work_is_refused(slots, message):
    with pytest.raises(ValueError, match=message):
        Placement(slots)


def test_a_layer_is_observable_though_its_tap_is_a_module_within():
    """isinstance with a protocol looks no deeper than `getattr_static` from Python 3.12 on, and misses submodules."""
    layer = MoE(8, 8, 4)
    assert inspect.getattr_static(layer, "tap", None) is None
    assert is_observable(layer)
    assert not is_observable(layer.router)
