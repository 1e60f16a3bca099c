"""The baseline is EPLB: its README's example, and what its steps promise."""

import numpy as np
import pytest

from equipoise.plan import eplb, eplb_placement

WEIGHT = np.array([
    [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
    [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
]).astype(float)  # fmt: skip
README = [
    [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
    [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
]


@pytest.mark.parametrize("layer", [0, 1])
def test_the_example_of_its_readme(layer):
    slots_RS = eplb(WEIGHT[layer], num_slots=16, num_ranks=8, num_nodes=2, num_groups=4)
    assert slots_RS.shape == (8, 2)
    assert slots_RS.reshape(-1).tolist() == README[layer]


def test_groups_that_nodes_do_not_divide_are_planned_on_one_node():
    limited = eplb(WEIGHT[0], 16, 8, num_nodes=2, num_groups=3)
    np.testing.assert_array_equal(limited, eplb(WEIGHT[0], 16, 8))


def test_it_may_put_an_expert_on_a_rank_twice_and_the_placement_leaves_that_out():
    slots_RS = eplb(np.array([100.0, 1, 1]), num_slots=6, num_ranks=2)
    assert [sorted(rank) for rank in slots_RS.tolist()] == [[0, 0, 1], [0, 0, 2]]
    assert eplb_placement(np.array([100.0, 1, 1]), 6, 2).slots == ((0, 1), (0, 2))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((16, 5, 1, 1), r"slots, ranks: expected the second to divide the first, got 16 and 5"),
        ((16, 8, 3, 1), r"ranks, nodes: expected the second to divide the first, got 8 and 3"),
        ((16, 8, 1, 5), r"experts, groups: expected the second to divide the first, got 12 and 5"),
        ((8, 8, 1, 1), r"slots: expected at least one for each of 12 experts, got 8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        eplb(WEIGHT[0], *sizes)
