"""Which experts were used is read the same way fast and slowly, and only where somebody watches."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from tests.serve.small import tiny_model

from equipoise.routing import Hash, Threshold, TopK
from equipoise.serve.trace import ExpertTrace, as_bits, experts_of, experts_of_any, joined, num_distinct

TOKENS = torch.arange(40, 53)[None]


def decisions_of(model):
    trace = ExpertTrace(model.moe_layers)
    with torch.inference_mode(), trace.watching() as decisions:
        model(TOKENS)
    trace.detach()
    return decisions


@pytest.mark.parametrize("router", [TopK(k=1, score="sigmoid"), TopK(k=3), Hash(vocab_size=257, k=2), Threshold(k=2)])
def test_fast_and_slow_are_equal(router):
    decisions = decisions_of(tiny_model(router=router))
    assert len(decisions) == 2
    fast, slow = experts_of(decisions, TOKENS.shape[1]), experts_of_any(decisions)
    assert fast.dtype == slow.dtype == np.int16
    np.testing.assert_array_equal(fast, slow)
    for layer, decision in enumerate(decisions):
        for token in range(TOKENS.shape[1]):
            ids = decision.expert_ids_N[decision.token_ids_N == token].tolist()
            assert fast[layer, token][fast[layer, token] >= 0].tolist() == ids


def test_only_what_runs_inside_is_seen():
    model = tiny_model()
    trace = ExpertTrace(model.moe_layers)
    with torch.inference_mode():
        with trace.watching() as decisions:
            model(TOKENS)
        model(TOKENS[:, :3])
    trace.detach()
    assert [decision.num_tokens for decision in decisions] == [13, 13]


def test_a_forward_that_fails_leaves_nothing():
    model = tiny_model()
    trace = ExpertTrace(model.moe_layers)
    with pytest.raises(ValueError, match="tokens_BS"), trace.watching():
        model(TOKENS + 300)
    with torch.inference_mode(), trace.watching() as decisions:
        model(TOKENS)
    assert len(decisions) == 2


def test_without_experts():
    assert experts_of([], 5).shape == (0, 5, 0)
    assert joined([]).shape == (0, 0, 0)
    assert joined([experts_of([], 5), experts_of([], 2)]).shape == (0, 7, 0)
    assert num_distinct(experts_of([], 5), 0) == ()
    assert as_bits(experts_of([], 5), 0) == [0] * 5


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(0, 4))


@given(SHAPES.flatmap(lambda shape: arrays(np.int16, shape, elements=st.integers(-1, 9))))
def test_distinct_experts_and_their_bits(experts):
    assert num_distinct(experts, 10) == tuple(len(np.unique(each[each >= 0])) for each in experts)
    sets = [
        {(n, e) for n, layer in enumerate(experts) for e in layer[t].tolist() if e >= 0}
        for t in range(experts.shape[1])
    ]
    bits = as_bits(experts, 10)
    for one, touched in zip(bits, sets, strict=True):
        assert [(one & other).bit_count() for other in bits] == [len(touched & other) for other in sets]


def test_pieces_are_joined_without_what_others_had():
    wide = np.array([[[3, 1, -1, -1]]], dtype=np.int16)
    narrow = np.array([[[2, -1], [0, 4]]], dtype=np.int16)
    assert joined([wide, narrow]).tolist() == [[[3, 1], [2, -1], [0, 4]]]
