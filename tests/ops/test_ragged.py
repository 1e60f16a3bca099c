import pytest
import torch

from equipoise.ops.ragged import ragged_plan, sort_on_device, sort_on_host, sum_rows


def test_ragged_plan_by_hand():
    # assignments (token, expert): (0,1) (0,0) (1,1) (1,2) (2,0) (2,1), by expert: 0: n1 n4, 1: n0 n2 n5, 2: n3
    tokens, experts = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([1, 0, 1, 2, 0, 1])
    weights = torch.arange(6.0)
    plan = ragged_plan(tokens, experts, weights, 4, top_k=2)
    assert plan.token_ids_R.tolist() == [0, 2, 0, 1, 2, 1]
    assert plan.weights_R.tolist() == [1, 4, 0, 2, 5, 3]
    assert plan.counts_e.tolist() == [2, 3, 1, 0]
    assert plan.rows_TK.tolist() == [[2, 0], [3, 5], [1, 4]]
    assert not plan.may_drop
    assert plan.drops == {}


def test_dropped_rows_go_last_and_are_not_counted():
    tokens, experts = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 1, 0])
    keep = torch.tensor([False, True, True, False])
    plan = ragged_plan(tokens, experts, torch.arange(4.0), 2, top_k=2, keep_N=keep)
    assert plan.counts_e.tolist() == [1, 1]
    assert plan.token_ids_R.tolist() == [0, 1, 0, 1]  # n1 (expert 0), n2 (expert 1), then the dropped n0 and n3
    assert plan.may_drop


@pytest.mark.parametrize("top_k", [2, None])
def test_sum_rows_accumulates_in_fp32(top_k):
    # 1 + 512 * 2^-9 summed one by one in bf16 stays at 1; in fp32 it is 2. Here: K = 2 rows of 1 and 2^-9 per token,
    # and without rows_TK many rows for one token.
    if top_k:
        rows = torch.tensor([[1.0], [2**-9]], dtype=torch.bfloat16)
        total = sum_rows(rows, torch.tensor([0, 0]), torch.tensor([[0, 1]]), 1)
        assert total.item() == 1.0  # rounded once, at the end
    else:
        rows = torch.cat([torch.ones(1, 1), torch.full((512, 1), 2**-9)]).bfloat16()
        assert sum_rows(rows, torch.zeros(513, dtype=torch.int64), None, 1).item() == 2.0


def test_sum_of_no_rows_is_zero_and_keeps_the_graph():
    rows = torch.zeros(0, 3, requires_grad=True)
    total = sum_rows(rows, torch.zeros(0, dtype=torch.int64), None, 2)
    assert total.tolist() == [[0.0] * 3] * 2
    total.sum().backward()
    assert rows.grad.shape == (0, 3)


@pytest.mark.parametrize("num_keys", [1, 3, 17])
@pytest.mark.parametrize("num", [0, 1, 2, 50])
def test_both_sorts_say_the_same(num, num_keys):
    keys = torch.randint(num_keys, (num,))
    for host, device in zip(sort_on_host(keys, num_keys), sort_on_device(keys, num_keys), strict=True):
        assert host.dtype == device.dtype == torch.int64
        assert torch.equal(host, device)
