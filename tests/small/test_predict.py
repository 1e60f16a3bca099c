"""What follows what, counted: by hand, on a rule that can be learnt, within bounded memory."""

import numpy as np
import torch

from equipoise.small.predict import HISTORY, Choices, Transitions


def choices(*experts_of_tokens):
    """One tuple of experts per token."""
    token_N = torch.tensor([token for token, each in enumerate(experts_of_tokens) for _ in each])
    expert_N = torch.tensor([int(expert) for each in experts_of_tokens for expert in each])
    return Choices(len(experts_of_tokens), token_N, expert_N)


def test_by_hand():
    """Of two tokens at 0 one went on to 2, the other to 3: a token at 0 is expected at each half a time."""
    seen = Transitions(num_layers=2, num_experts=5)
    seen.observe(1, choices((0,), (0,)), choices((2,), (3,)))
    assert seen.predict(1, choices((0,)), 4) == [2, 3]  # each expected half a time
    assert seen.predict(1, choices((0,)), 1) == [2]
    seen.observe(1, choices((0,)), choices((2,)))
    assert seen.predict(1, choices((0,)), 4) == [2]  # two thirds; 3 one third, not likely
    assert seen.predict(1, choices((0,), (0,)), 4) == [2, 3]  # of two tokens, two thirds of one
    assert seen.predict(1, choices((4,)), 4) == []
    assert seen.predict(0, choices((0,)), 4) == []  # another layer


def test_a_rule_is_learnt():
    rng, seen = np.random.default_rng(0), Transitions(1, 8)
    for _ in range(50):
        before = [tuple(rng.permutation(8)[:2]) for _ in range(3)]
        seen.observe(0, choices(*before), choices(*(tuple((e + 3) % 8 for e in each) for each in before)))
    right = [set(seen.predict(0, choices((e, (e + 1) % 8)), 2)) == {(e + 3) % 8, (e + 4) % 8} for e in range(8)]
    assert all(right)


def test_other_tokens_say_nothing():
    seen = Transitions(1, 4)
    seen.observe(0, choices((0,), (1,)), choices((2,)))
    assert seen.predict(0, choices((0,)), 4) == []


def test_the_past_fades_and_memory_does_not_grow():
    seen = Transitions(1, 4)
    size = seen._counts_LEE.nbytes
    for _ in range(10 * HISTORY):
        seen.observe(0, choices((0,)), choices((1,)))
    assert seen.predict(0, choices((0,)), 1) == [1]
    assert seen._counts_LEE.max() <= 2 * HISTORY  # HISTORY and half of it and half of that ...
    for _ in range(2 * HISTORY):
        seen.observe(0, choices((0,)), choices((2,)))
    assert seen.predict(0, choices((0,)), 1) == [2]
    assert seen._counts_LEE.nbytes == size == 4 * 4 * 4
