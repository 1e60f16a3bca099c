"""What becomes of assignments that found no room: moved, spilled, capped; each counted once, nobody lost needlessly."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.layer import Capacity, MoE
from equipoise.layer.overflow import fit
from equipoise.ops import reference
from equipoise.ops.next_choice import next_choice
from equipoise.routing import DropRateCoef, Hash, LoadLoss, SimilarityLoss, SwitchLoss, Threshold, TopK
from equipoise.types import Preferences, RoutingDecision


@st.composite
def ranked_decisions(draw) -> RoutingDecision:
    """Top-k by a ranking without ties, some experts not allowed; tokens agree with each other more or less."""
    E, T = draw(st.integers(1, 6)), draw(st.integers(0, 12))
    k = draw(st.integers(1, E))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    agreement = draw(st.sampled_from([0.0, 1.0, 100.0]))
    logits = torch.randn(T, E, generator=generator) + agreement * torch.randn(E, generator=generator)
    ranking = logits.clone()
    if draw(st.booleans()) and k < E:
        ranking[:, draw(st.integers(0, E - 1))] = float("-inf")
    preferences = Preferences(ranking, logits, draw(st.sampled_from(["raw", "softmax"])))
    ids = ranking.topk(k).indices
    return RoutingDecision.from_topk(
        ids, preferences.weights(ids), probs_TE=logits.softmax(-1), logits_TE=logits, preferences=preferences
    )


FACTORS = st.sampled_from([0.3, 0.6, 1.0, 1.25])


@given(decision=ranked_decisions(), factor=FACTORS, policy=st.sampled_from(["position", "probability", "random"]))
def test_next_choice_is_the_reference_auction(decision, factor, policy):
    T, E, K, N = decision.num_tokens, decision.num_experts, decision.top_k, len(decision.expert_ids_N)
    capacity = Capacity(factor, policy, overflow="next_choice")
    torch.manual_seed(3)
    fitted = fit(decision, capacity, training=True)

    torch.manual_seed(3)
    priority = {"position": -torch.arange(N), "probability": decision.weights_N}.get(policy)
    if priority is None:
        priority = torch.empty(N, dtype=torch.int64).scatter_(0, torch.randperm(N), -torch.arange(N))
    limit = reference.capacity(T, K, E, factor)
    ids, keep = decision.expert_ids_N.view(T, K), reference.keep(decision.expert_ids_N, priority, limit).view(T, K)
    place = torch.empty(N, dtype=torch.int64)
    place[priority.argsort(descending=True, stable=True)] = torch.arange(N)
    ranking = decision.preferences.ranking_TE
    new_ids, new_keep = reference.next_choice(ranking, ids, keep, place.view(T, K), limit)

    assert torch.equal(fitted.decision.expert_ids_N.view(T, K), new_ids)
    assert torch.equal(fitted.keep_N.view(T, K), new_keep)
    assert fitted.drops["moved"].item() == (new_keep & ~keep).sum()
    assert fitted.drops["capacity"].item() == (~new_keep).sum()
    torch.testing.assert_close(fitted.decision.weights_N.view(T, K), decision.preferences.weights(new_ids))


@given(decision=ranked_decisions(), factor=FACTORS)
def test_next_choice_keeps_its_promises(decision, factor):
    T, E, K = decision.num_tokens, decision.num_experts, decision.top_k
    fitted = fit(decision, Capacity(factor, overflow="next_choice"), training=True)
    ids, keep = fitted.decision.expert_ids_N.view(T, K), fitted.keep_N.view(T, K)
    limit = reference.capacity(T, K, E, factor)
    load = torch.bincount(ids[keep], minlength=E)
    assert max(load.tolist()) <= limit
    for t in range(T):
        mine = ids[t].tolist()
        assert len(set(mine)) == K  # no pair twice
        allowed = {e for e in range(E) if decision.preferences.ranking_TE[t, e] > float("-inf")}
        assert set(mine) <= allowed
        if not keep[t].all():  # lost only where every expert that it could still use is full
            assert all(load[e] == limit for e in allowed - set(mine))


def test_next_choice_by_hand():
    # Three tokens prefer expert 0, then 1, then 2; room for one each. The second asks 1 and gets it; the third asks 1
    # in the same round, is turned away, and gets 2.
    ranking = torch.tensor([[3.0, 2.0, 1.0]] * 3)
    ids, keep, place = torch.zeros(3, 1, dtype=torch.int64), torch.tensor([[True], [False], [False]]), torch.arange(3)
    moved, kept = next_choice(ranking, ids, keep, place.view(3, 1), 1)
    assert moved[:, 0].tolist() == [0, 1, 2]
    assert kept.all()


def collapsed_layer(capacity: Capacity | None, **kwargs) -> tuple[MoE, torch.Tensor]:
    """All tokens prefer the same experts."""
    layer = MoE(8, 8, 8, router=TopK(k=2), capacity=capacity, **kwargs)
    layer.init_weights(0.5, 0.5)
    return layer, torch.randn(1, 8) + 0.01 * torch.randn(32, 8)


def test_next_choice_rescues_a_collapsed_layer(routed_by):
    layer, x = collapsed_layer(Capacity(1.25, overflow="next_choice"))
    _, routed = routed_by(layer, x)
    drops = {reason: count.item() for reason, count in routed.plan.drops.items()}
    assert drops["capacity"] == drops["tokens"] == 0
    assert drops["moved"] > 32
    assert routed.plan.counts_e.sum() == 64
    assert routed.plan.counts_e.max() == 10  # ceil(1.25 * 64 / 8)
    # The decision that observers see is the router's own: the collapse stays visible.
    assert torch.bincount(routed.decision.expert_ids_N, minlength=8).max() >= 31


def test_the_router_learns_from_the_expert_that_was_used(routed_by):
    """The gradient of a moved assignment goes to the logit of its new expert, not of the one that was full."""
    layer, x = collapsed_layer(Capacity(1.0, overflow="next_choice"))
    layer.router.config = TopK(k=1)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[0], layer.router.weight[1] = 2 * x.mean(0), x.mean(0)
    _, routed = routed_by(layer, x)
    layer(x)[8:].sum().backward()
    assert routed.plan.counts_e.tolist()[:2] == [4, 4]  # ceil(1.0 * 32 * 1 / 8)
    assert layer.router.weight.grad[1].abs().max() > 0


def test_spill_takes_the_weight_to_the_shared_expert(routed_by):
    layer, x = collapsed_layer(Capacity(1.0, overflow="shared"), shared_experts=1)
    y, routed = routed_by(layer, x)
    drops = {reason: count.item() for reason, count in routed.plan.drops.items()}
    assert drops["spilled"] == 64 - routed.plan.counts_e.sum() > 0
    assert drops["capacity"] == drops["moved"] == drops["tokens"] == 0
    lost = routed.spilled_T > 0.999  # both experts of these tokens were full: weights sum to 1
    assert lost.any()
    torch.testing.assert_close(y[lost], 2 * layer.shared(x)[lost])
    y.sum().backward()
    assert layer.router.weight.grad.abs().max() > 0


def test_spill_adds_to_the_gate_of_the_shared_expert(routed_by):
    layer, x = collapsed_layer(Capacity(1.0, overflow="shared"), shared_experts=1, shared_gate=True)
    y, routed = routed_by(layer, x)
    lost = routed.spilled_T > 0.999
    expected = layer.shared(x) * (1 + layer.shared_gate(x).sigmoid())
    torch.testing.assert_close(y[lost], expected[lost])


@pytest.mark.parametrize("training", [True, False])
def test_a_hard_cap_holds_in_both_modes_and_has_its_own_reason(training, routed_by):
    layer, x = collapsed_layer(Capacity(1.0, max_tokens=3))
    _, routed = routed_by(layer.train(training), x)
    assert routed.plan.counts_e.max() == 3
    drops = routed.plan.drops
    counts = torch.bincount(routed.decision.expert_ids_N, minlength=8)
    limit = 8 if training else 32  # the factor holds in training only
    assert drops["capacity"].item() == (counts - limit).clamp_min(0).sum()
    assert drops["hard_cap"].item() == (counts.clamp_max(limit) - 3).clamp_min(0).sum()


def test_a_hard_cap_alone_drops_nothing_below_it(routed_by):
    layer, x = collapsed_layer(Capacity(None, max_tokens=32))
    _, routed = routed_by(layer, x)
    assert not any(routed.plan.drops.values())


def test_the_adaptive_coefficient_follows_the_drops():
    loss = SwitchLoss(coef=DropRateCoef(slope=0.5, maximum=1.0, beta=0.0))
    layer, x = collapsed_layer(Capacity(1.0), balance=(loss,))
    layer(x)
    lost = 64 - 2 * 8  # two experts take 8 of 32 each, if nobody else was chosen
    (state,) = layer.adaptive
    expected = 0.5 * state.pending[0] / 64
    assert state.pending.tolist() == [pytest.approx(lost, abs=4), 64]
    state.update()
    assert state.value.item() == pytest.approx(expected.item())
    assert not state.pending.any()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"capacity": Capacity(overflow="shared")},
            r'"shared" needs a shared expert to spill to; set shared_experts=1',
        ),
        ({"balance": (SwitchLoss(DropRateCoef()),)}, r"DropRateCoef: .* needs a capacity"),
        ({"balance": (SwitchLoss(-0.1),)}, r"SwitchLoss\.coef: expected 0 or more, got -0\.1"),
        ({"balance": (LoadLoss(),), "router": Threshold()}, r"LoadLoss: needs a fixed number of experts per token"),
        ({"balance": (SimilarityLoss(),), "router": Hash(vocab_size=9)}, r"SimilarityLoss: the router has no weight"),
        (
            {"balance": (SimilarityLoss(),), "num_experts": 9},
            r"SimilarityLoss: expected at most dim = 8 experts, got 9",
        ),
    ],
)
def test_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        MoE(**({"dim": 8, "hidden_dim": 8, "num_experts": 4} | kwargs))
