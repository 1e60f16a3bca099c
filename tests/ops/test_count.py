import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from equipoise.ops.count import accumulate, accumulate_counts, count_assignments, inside_backward


@given(ids=st.lists(st.integers(0, 6), max_size=40))
def test_count_assignments_is_bincount(ids):
    counts = count_assignments(torch.tensor(ids, dtype=torch.int64), 7)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [ids.count(e) for e in range(7)]


def test_counts_stay_exact_where_floats_do_not():
    counts = torch.full((2,), 2**53, dtype=torch.int64)  # 2^53 + 1 has no float64
    accumulate_counts(counts, torch.tensor([0]))
    assert counts.tolist() == [2**53 + 1, 2**53]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_forward_adds_nothing(use_reentrant):
    counts, total, forwards = torch.zeros(4, dtype=torch.int64), torch.zeros(()), []
    ids = torch.tensor([0, 1, 1, 3])

    def block(x):
        forwards.append(inside_backward())
        accumulate_counts(counts, ids)
        accumulate(total, x.detach().sum())
        return x.sin()

    x = torch.ones(3, requires_grad=True)
    checkpoint(block, x, use_reentrant=use_reentrant).sum().backward()
    assert forwards == [False, True]  # it did run twice
    assert counts.tolist() == [1, 2, 0, 1]
    assert total.item() == 3.0


def test_opcheck():
    torch.library.opcheck(accumulate_counts, (torch.zeros(4, dtype=torch.int64), torch.tensor([0, 3, 3])))
    torch.library.opcheck(accumulate, (torch.zeros(3, dtype=torch.float64), torch.ones(3)))
