"""Copies and the greedy packing, on numbers worked out by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.plan.packing import copies_of, packed


def test_copies_go_to_the_largest_load_per_copy():
    # 9: 9 -> 4.5 -> 3, then 4 -> 2, as 4 > 3
    assert copies_of(np.array([9.0, 4, 1]), 6, most=6).tolist() == [3, 2, 1]


def test_no_expert_gets_more_copies_than_there_are_ranks():
    assert copies_of(np.array([100.0, 1, 0]), 6, most=2).tolist() == [2, 2, 2]


@given(st.lists(st.integers(0, 100), min_size=1, max_size=5), st.integers(1, 4), st.data())
def test_copies_make_the_largest_load_per_copy_as_small_as_can_be(loads, most, data):
    load_E = np.array(loads, dtype=float)
    num_slots = data.draw(st.integers(len(loads), most * len(loads)))
    copies_E = copies_of(load_E, num_slots, most)
    assert copies_E.sum() == num_slots
    assert 1 <= copies_E.min() <= copies_E.max() <= most
    peak = (load_E / copies_E).max()
    # a smaller peak needs more slots than there are, or more copies of one than it may have
    needed = [int(load / peak + 1e-9) + 1 for load in loads] if peak else [num_slots + 1]
    assert sum(needed) > num_slots or max(needed) > most


@pytest.mark.parametrize(
    ("num_slots", "message"),
    [
        (2, r"slots: expected at least one for each of 3 experts, got 2; allow more replicas"),
        (7, r"slots: 7 cannot be filled with 3 experts, .* at most 6 on 2 ranks; allow fewer replicas"),
    ],
)
def test_slots_that_cannot_be_filled_are_refused(num_slots, message):
    with pytest.raises(ValueError, match=message):
        copies_of(np.ones(3), num_slots, most=2)


def test_longest_first_to_the_lightest_pack_with_room():
    # 9 | 8; 3 to the 8; 2 to the 9; then both have two of two
    assert packed(np.array([9.0, 3, 8, 2]), 2).tolist() == [[0, 3], [2, 1]]
