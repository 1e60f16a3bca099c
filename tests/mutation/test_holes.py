"""What a mutant showed to be untested, or found by chance only. Each test kills the mutant that its comment names."""

import pytest
import torch

from equipoise.layer import Capacity
from equipoise.ops.next_choice import next_choice
from equipoise.routing import TopK, TwoTier


@pytest.mark.parametrize(
    "config", [TopK(k=1, score="sigmoid"), TopK(k=1, bias_on="scores")], ids=["sigmoid", "softmax"]
)
def test_logits_decide_where_scores_are_equal(config):
    # ties-by-underflow: in fp32 the sigmoid of 30 and of 40 is 1, the softmax of -200 and of -190 beside 0 is 0.
    router = config.build(3, 3)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    decision = router(torch.tensor([[30.0, 20.0, 40.0]]))
    assert decision.expert_ids_N.tolist() == [2]
    ranking_TE = router(torch.tensor([[-200.0, 0.0, -190.0]])).preferences.ranking_TE
    assert ranking_TE.argsort(descending=True).tolist() == [[1, 2, 0]]


def test_rounding_errors_add_no_place():
    # capacity-noise: 1.1 * 100 / 10 is 11, and 11.000000000000002 in floating point.
    assert Capacity(1.1).limit(num_tokens=50, num_assignments=100, num_experts=10) == 11


def test_a_token_that_moves_twice_gets_two_experts():
    # auction-forgets-places: with room for 2 each, experts 0 and 1 are full; the first token goes to 2, then to 3.
    ranking = torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 3)
    ids, keep = torch.tensor([[0, 1]] * 3), torch.tensor([[False, False], [True, True], [True, True]])
    moved, kept = next_choice(ranking, ids, keep, torch.arange(6).view(3, 2), 2)
    assert moved.tolist() == [[2, 3], [0, 1], [0, 1]]
    assert kept.all()


def test_a_token_does_not_move_to_an_expert_that_it_has():
    # auction-forgets-choices: expert 1 is full, expert 0 has room for one more, but the first token is there already.
    ranking = torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 3)
    ids, keep = torch.tensor([[0, 1], [1, 2], [1, 3]]), torch.tensor([[True, False], [True, True], [True, True]])
    moved, kept = next_choice(ranking, ids, keep, torch.arange(6).view(3, 2), 2)
    assert moved.tolist() == [[0, 2], [1, 2], [1, 3]]
    assert kept.all()


@pytest.mark.parametrize("first", ["learned", "hash"])
def test_two_tiers_never_leave_the_group(first):
    # two-tier-open: the best expert of all is in the other group.
    router = TwoTier(k=2, num_groups=2, first=first, vocab_size=64).build(8, 8)
    torch.nn.init.normal_(router.weight, std=2.0)
    x, ids = torch.randn(64, 8), torch.arange(64)
    groups = router(x, token_ids_T=ids).expert_ids_N.view(64, 2) // 4
    expected = router.groups_V if first == "hash" else (x @ router.group_weight.t()).argmax(1)
    assert torch.equal(groups, expected[:, None].expand(-1, 2))
