"""Capacity: the limit, who is dropped, what is counted, and when nothing is."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.layer import Capacity, MoE
from equipoise.layer.overflow import fit
from equipoise.ops import reference
from equipoise.routing import TopK
from equipoise.types import DROP_REASONS, REROUTE_REASONS, RoutingDecision

POLICIES = st.sampled_from(["position", "probability", "random"])


@st.composite
def decisions(draw) -> RoutingDecision:
    """k distinct experts for each of T tokens, with weights that tie now and then."""
    E = draw(st.integers(1, 6))
    k, T = draw(st.integers(1, E)), draw(st.integers(0, 14))
    popular = draw(st.booleans())  # a few experts are everybody's choice
    ids = [draw(st.permutations(range(E)))[:k] if not popular else list(range(k)) for _ in range(T)]
    weights = [[draw(st.sampled_from([0.1, 0.2, 0.5, 0.9])) for _ in range(k)] for _ in range(T)]
    probs = torch.full((T, E), 1 / E)
    return RoutingDecision.from_topk(
        torch.tensor(ids, dtype=torch.int64).view(T, k),
        torch.tensor(weights).view(T, k),
        probs_TE=probs,
        logits_TE=probs,
    )


@given(
    num_tokens=st.integers(0, 100) | st.integers(0, 10**8),
    num_experts=st.integers(1, 512),
    k=st.integers(1, 16),
    factor=st.decimals("0.01", "10", places=2).map(float),
)
def test_limit_is_the_reference_capacity(num_tokens, num_experts, k, factor):
    limit = Capacity(factor).limit(num_tokens, num_tokens * k, num_experts)
    assert limit == reference.capacity(num_tokens, k, num_experts, factor)
    assert 1 <= limit <= max(num_tokens, 1)


@given(decision=decisions(), factor=st.sampled_from([0.3, 0.5, 1.0, 1.25, 9.0]), policy=POLICIES)
def test_keeps_what_the_reference_keeps_and_counts_what_it_drops(decision, factor, policy):
    T, E, N = decision.num_tokens, decision.num_experts, len(decision.expert_ids_N)
    capacity = Capacity(factor, policy)
    torch.manual_seed(5)
    fitted = fit(decision, capacity, training=True)
    kept = fitted.keep_N
    priority = {"position": -torch.arange(N), "probability": decision.weights_N}.get(policy)
    if priority is None:
        torch.manual_seed(5)
        priority = torch.empty(N, dtype=torch.int64).scatter_(0, torch.randperm(N), -torch.arange(N))
    limit = reference.capacity(T, decision.top_k, E, factor)
    assert torch.equal(kept, reference.keep(decision.expert_ids_N, priority, limit))

    before = torch.bincount(decision.expert_ids_N, minlength=E)
    after = torch.bincount(decision.expert_ids_N[kept], minlength=E)
    assert torch.equal(after, before.clamp_max(limit))  # never above the limit, and never dropped without need
    drops = fitted.drops
    assert set(drops) == {*DROP_REASONS, *REROUTE_REASONS} - {"diverted"}  # that is no capacity's doing
    assert drops["hard_cap"].item() == drops["moved"].item() == drops["spilled"].item() == 0
    assert drops["capacity"].item() == (before - before.clamp_max(limit)).sum()
    reached = set(decision.token_ids_N[kept].tolist())
    assert drops["tokens"].item() == T - len(reached)
    assert {count.dtype for count in drops.values()} == {torch.int64}


def layer_with(capacity: Capacity | None, k: int = 2) -> MoE:
    layer = MoE(8, 8, 4, router=TopK(k=k), capacity=capacity)
    layer.init_weights(0.5, 0.5)
    return layer


def test_drops_by_hand(routed_by):
    # Six alike tokens, k = 1, E = 4: all want one expert, which takes ceil(1.0 * 6 / 4) = 2: the first two.
    layer, x = layer_with(Capacity(1.0), k=1), torch.randn(1, 8).expand(6, 8)
    y, routed = routed_by(layer, x)
    drops = {reason: count.item() for reason, count in routed.plan.drops.items() if count}
    assert drops == {"capacity": 4, "tokens": 4}
    assert sorted(routed.plan.counts_e.tolist()) == [0, 0, 0, 2]
    assert y[:2].abs().amax(1).min() > 0
    assert not y[2:].any()


def test_padding_takes_no_room(routed_by):
    layer, x = layer_with(Capacity(1.0), k=1), torch.randn(1, 1, 8).expand(1, 8, 8)
    padding = torch.tensor([[True, True, False, False, False, False, False, False]])
    _, routed = routed_by(layer, x, padding_mask=padding)
    assert routed.plan.drops["capacity"].item() == 4  # six real tokens, room for two
    assert routed.plan.counts_e.sum().item() == 2


@pytest.mark.parametrize("policy", ["position", "probability", "random"])
def test_nothing_is_dropped_in_eval_unless_asked_for(policy, routed_by):
    x = torch.randn(40, 8)
    free, capped, hard = (
        layer_with(capacity) for capacity in (None, Capacity(0.5, policy), Capacity(0.5, policy, at_inference=True))
    )
    capped.load_state_dict(free.state_dict())
    hard.load_state_dict(free.state_dict())
    y, routed = routed_by(capped.eval(), x)
    assert torch.equal(y, free.eval()(x))
    assert routed.plan.drops == {}
    _, routed = routed_by(hard.eval(), x)
    assert routed.plan.drops["capacity"].item() > 0
    _, routed = routed_by(capped.train(), x)
    assert routed.plan.drops["capacity"].item() > 0


@pytest.mark.parametrize("at_inference", [True, False])
def test_decoding_a_single_token_is_never_dropped(at_inference):
    """int(1.0 * 1 * 2 / 64) would be a capacity of 0, and the layer's output 0."""
    layer = MoE(8, 8, 64, capacity=Capacity(1.0, at_inference=at_inference))
    layer.init_weights(0.5, 0.5)
    assert layer.eval()(torch.randn(1, 8)).abs().max() > 0


def test_dropped_assignments_give_no_gradient_but_shared_experts_still_serve(routed_by):
    layer = MoE(8, 8, 4, router=TopK(k=1), capacity=Capacity(1.0), shared_experts=1)
    layer.init_weights(0.5, 0.5)
    x = torch.randn(1, 8).repeat(6, 1)
    y, _ = routed_by(layer, x)
    torch.testing.assert_close(y[2:], layer.shared(x)[2:])
    assert not torch.allclose(y[:2], layer.shared(x)[:2])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"factor": 0.0}, r"Capacity\.factor: expected more than 0, got 0\.0; for no limit at all pass capacity=None"),
        ({"factor": float("nan")}, r"Capacity\.factor: expected more than 0, got nan"),
        ({"factor": None}, r"Capacity: expected a factor, max_tokens or both"),
        ({"max_tokens": 0}, r"Capacity\.max_tokens: expected at least 1, got 0"),
        ({"overflow": "later"}, r"Capacity\.overflow: expected drop, next_choice or shared, got 'later'"),
        ({"policy": "first"}, r"Capacity\.policy: expected position, probability or random, got 'first'"),
    ],
)
def test_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Capacity(**kwargs)
