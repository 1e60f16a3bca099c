"""The few rows of a decode step: the same as the reference loop, however they fall on the experts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.layer.experts import Experts, backend_for, reference_experts
from equipoise.ops import few_rows
from equipoise.ops.few_rows import few_rows_experts
from equipoise.ops.ragged import ragged_plan


@pytest.mark.parametrize("one_by_one", [False, True])
@given(
    num_tokens=st.integers(1, 20),
    num_experts=st.integers(1, 12),
    top_k=st.integers(1, 3),
    pull=st.sampled_from([0.0, 3.0]),  # of expert 0, up to nearly all tokens
    seed=st.integers(0, 2**31),
)
def test_equals_the_reference_loop(one_by_one, num_tokens, num_experts, top_k, pull, seed):
    draw = torch.Generator().manual_seed(seed)
    k = min(top_k, num_experts)
    scores = torch.rand(num_tokens, num_experts, generator=draw)
    scores[:, 0] += pull
    ids = scores.topk(k).indices.reshape(-1)
    weights = torch.rand(num_tokens * k, generator=draw, dtype=torch.float64)
    plan = ragged_plan(torch.arange(num_tokens).repeat_interleave(k), ids, weights, num_experts, top_k=k)
    x, up, down = (
        torch.randn(shape, generator=draw, dtype=torch.float64)
        for shape in ((num_tokens, 4), (num_experts, 6, 4), (num_experts, 4, 3))
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(few_rows, "_is_faster_one_by_one", lambda x: one_by_one)
        y = few_rows_experts(x, plan, up, down, "swiglu")
    torch.testing.assert_close(y, reference_experts(x, plan, up, down, "swiglu"))


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_token_that_is_no_number_stays_alone(one_by_one, monkeypatch):
    """Expert 1's row is filled up beside expert 0's three; what fills it up must not reach others."""
    monkeypatch.setattr(few_rows, "_is_faster_one_by_one", lambda x: one_by_one)
    x = torch.randn(4, 8)
    x[0] = torch.nan
    plan = ragged_plan(torch.arange(4), torch.tensor([0, 0, 0, 1]), torch.ones(4), 2, top_k=1)
    y = few_rows_experts(x, plan, torch.randn(2, 8, 8), torch.randn(2, 8, 4), "swiglu")
    assert y[0].isnan().all()
    assert y[1:].isfinite().all()


@pytest.mark.parametrize(
    ("numbers", "runs"),
    [
        ([], []),
        ([5], [[5]]),
        ([2, 9], [[2, 9]]),
        ([0, 1, 2, 4, 6, 7], [[0, 1, 2], [4, 6], [7]]),
        ([0, 3, 6, 9, 10], [[0, 3, 6, 9], [10]]),
    ],
)
def test_runs_by_hand(numbers, runs):
    made = few_rows._runs(numbers)
    assert [list(range(11))[experts] for _, experts in made] == runs
    assert [numbers[places] for places, _ in made] == runs


class TestWhoTakesIt:
    def test_few_rows_without_gradients_on_a_cpu(self):
        experts = Experts(4, 8, 16)
        args = ("auto", torch.empty(2, 8), experts.up, experts.down_proj)
        with torch.no_grad():
            name, reason = backend_for(*args, num_rows=4)
            assert name == "few"
            assert reason.startswith("fewest operators, without gradients; the native code takes sizes in multiples")
            assert backend_for(*args, num_rows=10**6)[0] == "lean"
            assert backend_for(*args)[0] == "lean"

    def test_never_where_a_backward_pass_may_come(self):
        experts = Experts(4, 8, 16)
        assert backend_for("auto", torch.empty(2, 8), experts.up, experts.down_proj, num_rows=4)[0] == "lean"

    def test_both_give_the_same(self):
        experts = Experts(4, 8, 16).double()
        ids, x = torch.tensor([3, 0, 3, 1, 0, 2]), torch.randn(3, 8, dtype=torch.float64)
        plan = ragged_plan(torch.arange(3).repeat_interleave(2), ids, torch.rand(6), 4, top_k=2)
        with torch.no_grad():
            without = experts(x, plan)
        torch.testing.assert_close(without, experts(x, plan).detach())
