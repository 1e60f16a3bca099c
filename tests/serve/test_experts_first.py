"""Grouping takes answers that share experts, and first of all those who have waited long enough."""

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from equipoise.serve.experts_first import choose_by_experts
from equipoise.serve.request import Request
from equipoise.serve.sequence import Sequence


def sequences(experts, skipped=None):
    made = [Sequence(Request(str(n), (0,), 1), n) for n in range(len(experts))]
    for sequence, touched, times in zip(made, experts, skipped or [0] * len(made), strict=True):
        sequence.last_experts, sequence.skipped = sum(1 << expert for expert in touched), times
    return made


def names(chosen):
    return [each.request.id for each in chosen]


def test_those_who_share_experts_go_together():
    assert names(choose_by_experts(sequences([{1, 2}, {3, 4}, {1, 2}, {5, 6}, {2, 1}]), 3, 4)) == ["0", "2", "4"]


def test_ties_go_to_who_was_skipped_more_often_then_to_who_came_first():
    assert names(choose_by_experts(sequences([{1}, {2}, {3}], [0, 2, 1]), 2, 9)) == ["1", "2"]
    assert names(choose_by_experts(sequences([{1}, {2}, {3}]), 2, 9)) == ["0", "1"]


def test_who_is_due_comes_first():
    candidates = sequences([{1}, {1}, {8, 9}, {7}], [0, 0, 4, 5])
    assert names(choose_by_experts(candidates, 2, 4)) == ["3", "2"]
    assert names(choose_by_experts(candidates, 3, 4)) == ["3", "2", "0"]


@given(
    st.lists(st.tuples(st.frozensets(st.integers(0, 5), min_size=1, max_size=3), st.integers(0, 6)), max_size=7),
    st.integers(1, 5),
)
def test_one_by_one_the_fewest_new_experts(drawn, size):
    candidates = sequences([touched for touched, _ in drawn], [times for _, times in drawn])
    chosen = choose_by_experts(candidates, size, 4)
    assert len(chosen) == len(set(chosen)) == min(size, len(candidates))
    due = [each for each in candidates if each.skipped >= 4]
    assert set(due) <= set(chosen) or set(chosen) <= set(due)
    for number in range(min(len(due), size), len(chosen)):
        experts = {each: drawn[each.order][0] for each in candidates}
        touched = frozenset().union(*(experts[each] for each in chosen[:number]))
        fewest = min(len(experts[each] - touched) for each in candidates if each not in chosen[:number])
        assert len(experts[chosen[number]] - touched) == fewest


def test_two_are_chosen_as_by_trying_all_pairs_with_the_first():
    experts = [{1, 2, 3}, {3, 4, 5}, {2, 3, 6}, {1, 2, 4}]
    chosen = choose_by_experts(sequences(experts), 2, 4)
    pairs = {pair: len(experts[pair[0]] | experts[pair[1]]) for pair in combinations(range(4), 2) if pair[0] == 0}
    assert tuple(int(name) for name in names(chosen)) == min(pairs, key=pairs.__getitem__)
