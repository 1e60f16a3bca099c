"""Which replica a token goes to: by hand, against the slow twin, and what must hold for any placement."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from equipoise.plan.replicas import homes, ranks_of_choices, ranks_of_choices_reference
from equipoise.types import Placement


@st.composite
def placed_choices(draw):
    """A placement, choices with gaps, and homes."""
    num_experts, num_ranks = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    held = [set(draw(st.sets(st.integers(0, num_experts - 1)))) for _ in range(num_ranks)]
    for expert in set(range(num_experts)).difference(*held):
        held[draw(st.integers(0, num_ranks - 1))].add(expert)
    rows = st.permutations(range(num_experts)).map(lambda order: order[:3] + [-1] * (3 - len(order[:3])))
    ids_TK = np.array(draw(st.lists(rows, min_size=1, max_size=12)))
    ids_TK[draw(st.integers(0, len(ids_TK) - 1)), draw(st.integers(0, 2))] = -1
    homes_T = np.array(draw(st.lists(st.integers(0, num_ranks - 1), min_size=len(ids_TK), max_size=len(ids_TK))))
    return Placement(tuple(tuple(sorted(experts)) for experts in held)), ids_TK, homes_T


@given(placed_choices())
def test_the_fast_rule_is_the_slow_one(case):
    np.testing.assert_array_equal(ranks_of_choices(*case), ranks_of_choices_reference(*case))


@given(placed_choices())
def test_every_choice_goes_to_a_rank_that_holds_it(case):
    placement, ids_TK, _ = case
    for expert, rank in zip(ids_TK.flat, ranks_of_choices(*case).flat, strict=True):
        assert rank == -1 if expert < 0 else expert in placement.slots[rank]


def test_home_comes_first_then_a_rank_that_is_needed_anyway_then_the_emptiest():
    # expert 0 is on ranks 0, 1 and 2; 1 on rank 1; 2 on rank 2; 3 on rank 3
    placement = Placement(((0,), (0, 1), (0, 2), (3,)))
    ids_TK = np.array([[0, 1], [0, 1], [0, 3], [0, 3], [0, 3], [0, 3]])
    homes_T = np.array([2, 3, 3, 3, 3, 3])
    ranks = ranks_of_choices(placement, ids_TK, homes_T).tolist()
    assert ranks[0] == [2, 1]  # home holds it
    assert ranks[1] == [1, 1]  # rank 1 is needed for expert 1
    # none is needed: ranks 1 and 3 have 2 and 4 already, 0 and 2 nothing: they share the four
    assert ranks[2:] == [[0, 3], [0, 3], [2, 3], [2, 3]]


def test_of_several_ranks_that_are_needed_it_takes_the_first_from_its_turn_on():
    placement = Placement(((0,), (0, 1), (0, 2)))
    ids_TK = np.array([[0, 1, 2]] * 3)
    # turns 0, 1, 2; needed are ranks 1 and 2
    assert ranks_of_choices(placement, ids_TK, np.full(3, 0))[:, 0].tolist() == [0, 0, 0]
    away = Placement(((3,), (0, 1), (0, 2)))
    of_two = ranks_of_choices(away, ids_TK, np.full(3, 0))[:, 0]
    assert of_two.tolist() == [1, 2, 1]  # two copies: 0 mod 2, 1 mod 2, ...


def test_an_earlier_choice_makes_its_rank_needed():
    # token 2: rank 1 has two already, so expert 0 goes to rank 0; and 1 follows it there, not to rank 2, which is empty
    placement = Placement(((0, 1), (0, 3), (1,), (2,)))
    ids_TK = np.array([[3, -1], [3, -1], [0, 1]])
    assert ranks_of_choices(placement, ids_TK, np.full(3, 3)).tolist() == [[1, -1], [1, -1], [0, 0]]


def test_homes_do_not_ask_each_other():
    """Tokens of other homes change nothing."""
    rng = np.random.default_rng(0)
    placement = Placement(((0, 1, 4), (0, 2, 5), (1, 3, 4), (2, 3, 6)))
    ids_TK = np.argsort(rng.random((40, 7)), axis=1)[:, :3]
    homes_T = homes(40, 4)
    together = ranks_of_choices(placement, ids_TK, homes_T)
    alone_TK = np.where(homes_T[:, None] == 1, ids_TK, -1)
    np.testing.assert_array_equal(ranks_of_choices(placement, alone_TK, homes_T)[homes_T == 1], together[homes_T == 1])


def test_tokens_lie_in_blocks_of_16_from_rank_to_rank():
    assert homes(50, 3).tolist() == [0] * 16 + [1] * 16 + [2] * 16 + [0] * 2
