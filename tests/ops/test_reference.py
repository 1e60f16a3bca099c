"""The oracle itself, against numbers worked out by hand."""

import math

import pytest
import torch

from equipoise.ops import reference


def test_select_takes_the_best_first_and_the_lower_id_on_ties():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.5], [0.2, 0.2, 0.2, 0.2]])
    assert reference.select(scores, 3).tolist() == [[1, 2, 3], [0, 1, 2]]


@pytest.mark.parametrize(
    ("group_score", "expected"),
    [
        ("top2", [2, 3]),  # groups (0.9 + 0.1), (0.6 + 0.5), (-1 - 2): the middle one
        ("max", [0, 1]),  # 0.9, 0.6, -1: the first one
    ],
)
def test_select_keeps_to_the_best_groups(group_score, expected):
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.5, -1.0, -2.0]])
    assert reference.select(scores, 2, 3, 1, group_score).tolist() == [expected]


@pytest.mark.parametrize(
    ("num_tokens", "k", "num_experts", "factor", "expected"),
    [
        (8, 2, 4, 1.0, 4),
        (8, 2, 4, 1.1, 5),  # 4.4
        (10, 2, 2, 1.1, 10),  # 11, but no more than the tokens there are
        (100, 1, 10, 1.1, 11),  # exactly 11: in floats the product is 11.000000000000002
        (1, 1, 64, 1.0, 1),  # 1/64, but at least 1: decoding one token must not drop it
        (0, 2, 4, 1.0, 1),
    ],
)
def test_capacity(num_tokens, k, num_experts, factor, expected):
    assert reference.capacity(num_tokens, k, num_experts, factor) == expected


def test_keep_takes_the_highest_priorities_and_the_earlier_on_ties():
    ids = torch.tensor([0, 0, 0, 1, 0])
    priority = torch.tensor([1.0, 3.0, 2.0, 0.0, 3.0])
    assert reference.keep(ids, priority, 2).tolist() == [False, True, False, True, True]
    assert reference.keep(ids, torch.zeros(5), 1).tolist() == [True, False, False, True, False]


def test_experts_by_hand():
    # One expert, D = F = 1: up rows gate = 2, up = 3; down = 5; x = 1: silu(2) * 3 * 5 = 2 * sigmoid(2) * 15
    x, up, down = torch.ones(2, 1), torch.tensor([[[2.0], [3.0]]]), torch.tensor([[[5.0]]])
    y = reference.experts(x, torch.tensor([1]), torch.tensor([0]), torch.tensor([0.5]), up, down)
    assert y[0].item() == 0.0  # no assignment
    assert y[1].item() == pytest.approx(0.5 * 15 * 2 / (1 + math.exp(-2)), rel=1e-6)
