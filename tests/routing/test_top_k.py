"""The token-choice router: selection, weights, what it refuses."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.ops import reference
from equipoise.routing import Switch, TopK
from equipoise.routing.top_k import TopKRouter, limit_to_groups, scores_of

SCORES = st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])


def build(config, dim: int = 8, num_experts: int = 8, std: float = 0.5) -> TopKRouter:
    router = config.build(dim, num_experts)
    torch.nn.init.normal_(router.weight, std=std)
    return router


@st.composite
def routers(draw) -> tuple[TopKRouter, torch.Tensor, torch.Tensor | None]:
    """(router, x, bias): any valid configuration over 1 to 9 experts and 0 to 12 tokens."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    groups, size = draw(st.sampled_from([(1, 1), (1, 5), (1, 9), (2, 3), (4, 2), (3, 1)]))
    top_groups = draw(st.integers(1, groups))
    k = draw(st.integers(1, top_groups * size))
    order = draw(st.sampled_from(["pre", "post"])) if k > 1 else "pre"
    config = TopK(
        k=k,
        score="softmax" if order == "post" else draw(SCORES),
        order=order,
        renormalize=draw(st.sampled_from([None, False])) if k == 1 else draw(st.sampled_from([None, True, False])),
        scale=draw(st.sampled_from([1.0, 2.5])),
        temperature=draw(st.sampled_from([0.3, 1.0, 3.0])),
        num_groups=groups,
        top_groups=top_groups,
        group_score=draw(st.sampled_from(["top2", "max"])),
        bias_on=draw(st.sampled_from([None, "scores", "logits"] if groups == 1 else [None, "scores"])),
    )
    bias = draw(st.sampled_from([None, 0.1, 10.0]))
    E, T = groups * size, draw(st.integers(0, 12))
    return build(config, 4, E), torch.randn(T, 4), None if bias is None else torch.randn(E) * bias


class TestSelection:
    @given(case=routers())
    def test_equals_the_reference(self, case):
        router, x, bias = case
        config = router.config
        decision = router(x, bias)
        scores = decision.selection_TE.detach() if bias is None else decision.selection_TE.detach() + bias
        expected = reference.select(scores, config.k, config.num_groups, config.top_groups, config.group_score)
        assert torch.equal(decision.expert_ids_N.view(-1, config.k), expected)

    @given(case=routers())
    def test_ids_are_in_range_and_distinct_and_weights_sum_as_promised(self, case):
        router, x, bias = case
        T, E, k = len(x), router.weight.shape[0], router.config.k
        decision = router(x, bias)
        ids, weights = decision.expert_ids_N.view(T, k), decision.weights_N.view(T, k)
        assert decision.top_k == k
        assert decision.token_ids_N.tolist() == [t for t in range(T) for _ in range(k)]
        assert all(set(row) <= set(range(E)) and len(set(row)) == k for row in ids.tolist())
        assert weights.dtype == torch.float32
        assert weights.isfinite().all()
        assert (weights >= 0).all()
        torch.testing.assert_close(decision.probs_TE.sum(1), torch.ones(T))
        if (total := router.config.traits.weights_sum_to) is not None:
            torch.testing.assert_close(weights.sum(1), torch.full((T,), total))

    def test_promises_no_sum_for_raw_weights(self):
        assert TopK(k=2, renormalize=False).traits.weights_sum_to is None
        assert TopK(k=1).traits.weights_sum_to is None
        assert TopK(k=2, scale=2.5).traits.weights_sum_to == 2.5
        assert TopK(k=2, order="post", renormalize=False).traits.weights_sum_to == 1.0

    @pytest.mark.parametrize("group_score", ["top2", "max"])
    def test_negative_biases_never_select_an_expert_of_a_masked_group(self, group_score):
        """A mask of 0 instead of -inf would win against scores that the bias has made negative."""
        router = build(TopK(k=2, score="sigmoid", num_groups=4, top_groups=1, group_score=group_score))
        bias = torch.full((8,), -5.0)
        ids = router(torch.randn(200, 8), bias).expert_ids_N.view(200, 2)
        assert torch.equal(ids[:, 0] // 2, ids[:, 1] // 2)  # both experts of one group of two
        limited = limit_to_groups(torch.full((3, 8), -5.0), 4, 1, group_score)
        assert limited.isneginf().sum(1).tolist() == [6, 6, 6]

    def test_scores_are_gathered_and_survive_huge_biases(self):
        """(s + b) - b would be 0 in fp32 for b = 12 and s = 1e-7."""
        router = TopK(k=2, score="sigmoid", renormalize=False).build(4, 4)
        torch.nn.init.eye_(router.weight)
        z = torch.tensor([[-16.0, -16.5, -17.0, -15.5]])
        decision = router(z, torch.tensor([12.0, 12.1, 11.0, 11.0]))
        assert decision.expert_ids_N.tolist() == [1, 0]
        torch.testing.assert_close(decision.weights_N, torch.tensor([-16.5, -16.0]).sigmoid(), rtol=1e-6, atol=0)
        normalised = TopK(k=2, score="sigmoid").build(4, 4)
        torch.nn.init.eye_(normalised.weight)
        assert normalised(z, torch.full((4,), 12.0)).weights_N.sum().item() == pytest.approx(1.0)

    def test_logits_decide_where_probabilities_underflow_to_ties(self):
        router = TopK(k=2).build(4, 4)
        torch.nn.init.eye_(router.weight)
        z = torch.tensor([[300.0, 1.0, 2.0, 3.0]])  # softmax: 1, 0, 0, 0
        assert router(z).expert_ids_N.tolist() == [0, 3]

    @given(
        bias_scale=st.sampled_from([None, 0.3]),
        score=SCORES,
        temperature=st.floats(0.05, 20.0),
        groups=st.sampled_from([1, 4]),
    )
    def test_temperature_changes_no_id(self, bias_scale, score, temperature, groups):
        base = TopK(k=2, score=score, num_groups=groups, top_groups=max(1, groups // 2))
        router, x = build(base), torch.randn(50, 8)
        bias = None if bias_scale is None else torch.randn(8) * bias_scale
        heated = TopK(**{**vars(base), "temperature": temperature}).build(8, 8)
        heated.load_state_dict(router.state_dict())
        assert torch.equal(heated(x, bias).expert_ids_N, router(x, bias).expert_ids_N)

    def test_temperature_below_one_sharpens_the_weights(self):
        x = torch.randn(50, 8)
        sharp, flat = build(TopK(k=2, temperature=0.3)), TopK(k=2).build(8, 8)
        flat.load_state_dict(sharp.state_dict())
        assert (sharp(x).weights_N.view(-1, 2)[:, 0] > flat(x).weights_N.view(-1, 2)[:, 0]).all()
        with pytest.warns(UserWarning, match="eval_temperature"):
            both = TopK(k=2, temperature=0.3, eval_temperature=1.0).build(8, 8)
        both.load_state_dict(sharp.state_dict())
        assert torch.equal(both.train()(x).weights_N, sharp(x).weights_N)
        assert torch.equal(both.eval()(x).weights_N, flat(x).weights_N)


class TestGradient:
    def test_with_one_expert_raw_weights_let_the_task_reach_the_router(self):
        router = build(TopK(k=1))
        router(torch.randn(20, 8)).weights_N.square().sum().backward()
        assert router.weight.grad.abs().max() > 1e-3

    def test_a_bias_gets_no_gradient_and_gives_none(self):
        router, bias = build(TopK(k=2, score="sigmoid")), torch.randn(8, requires_grad=True)
        weights = router(torch.randn(20, 8), bias).weights_N
        assert torch.autograd.grad(weights.sum(), bias, allow_unused=True) == (None,)

    @pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
    def test_extreme_logits_stay_finite(self, score):
        router = TopK(k=2, score=score).build(4, 4)
        torch.nn.init.eye_(router.weight)
        x = torch.tensor([[1e4, -1e4, 0.0, 0.0], [-1e4, -1e4, -1e4, -1e4]], requires_grad=True)
        decision = router(x)
        (decision.weights_N.sum() + decision.probs_TE.square().sum()).backward()
        assert decision.weights_N.isfinite().all()
        assert x.grad.isfinite().all()
        assert router.weight.grad.isfinite().all()


class TestPrecision:
    @pytest.mark.parametrize("autocast", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("config", [TopK(k=2), TopK(k=2, order="post"), TopK(k=2, score="sigmoid")], ids=repr)
    def test_routing_is_fp32(self, config, dtype, autocast):
        router, x = build(config).to(dtype), torch.randn(64, 8, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            decision = router(x)
        fields = (decision.weights_N, decision.probs_TE, decision.logits_TE, decision.selection_TE)
        assert {field.dtype for field in fields} == {torch.float32}
        logits = x.double() @ router.weight.detach().double().t()
        exact = logits if config.bias_is_on_logits else scores_of(logits, config.score)
        assert torch.equal(decision.expert_ids_N.view(-1, 2), reference.select(exact, 2))
        torch.testing.assert_close(decision.selection_TE.double(), exact, rtol=1e-5, atol=1e-6)


class TestInitialValues:
    def test_config_wins_over_the_model(self):
        router = TopK(init_std=0.5).build(64, 64)
        router.init_weights(0.02)
        assert router.weight.std().item() == pytest.approx(0.5, rel=0.05)
        router = TopK().build(64, 64)
        router.init_weights(0.1)
        assert router.weight.std().item() == pytest.approx(0.1, rel=0.05)

    def test_truncated_stays_within_two_standard_deviations(self):
        router = TopK(init="truncated", init_std=0.1).build(64, 64)
        assert 0.15 < router.weight.abs().max().item() <= 0.2


class TestSwitch:
    def test_is_top_1_with_raw_probability_and_a_small_router(self):
        router = Switch().build(40, 16)
        config = router.config
        assert (Switch().k, config.k, config.traits.weights_sum_to, config.jitter) == (1, 1, None, 0.01)
        assert config.init_std == pytest.approx((0.1 / 40) ** 0.5)
        x = torch.randn(30, 40)
        decision = router.eval()(x)
        probs = (x @ router.weight.t()).softmax(-1)
        torch.testing.assert_close(decision.weights_N, probs.amax(1))
        assert torch.equal(decision.expert_ids_N, probs.argmax(1))

    def test_jitter_is_for_training_only(self):
        router, x = Switch(jitter=0.1).build(8, 4), torch.ones(5, 8)
        plain = router.eval()(x).logits_TE
        assert torch.equal(router.eval()(x).logits_TE, plain)
        jittered = router.train()(x).logits_TE
        assert not torch.equal(jittered, plain)
        assert (jittered - plain).abs().max() <= 0.1 * router.weight.abs().sum(1).max() * (1 + 1e-5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"k": 0}, r"TopK\.k: expected at least 1, got 0"),
        ({"score": "tanh"}, r"TopK\.score: expected one of softmax, sigmoid, sqrtsoftplus, got 'tanh'"),
        ({"order": "mid"}, r"TopK\.order: expected one of pre, post, got 'mid'"),
        ({"bias_on": "probs"}, r"TopK\.bias_on: expected one of None, logits, scores, got 'probs'"),
        ({"bias_on": "logits", "num_groups": 2}, r"TopK\.bias_on: .*groups are compared by sums of scores; use"),
        ({"order": "post", "score": "sigmoid"}, r"\"post\" is a softmax over the selected logits, got score='sigmoid'"),
        ({"k": 1, "renormalize": True}, r"k=1 with renormalize=True.*no gradient from the task; use renormalize=False"),
        ({"k": 1, "order": "post"}, r"k=1 with renormalize=None, order='post'.*no gradient.*or k >= 2"),
        ({"temperature": 0.0}, r"TopK\.temperature: expected more than 0, got 0\.0"),
        ({"eval_temperature": -1.0}, r"TopK\.eval_temperature: expected more than 0, got -1\.0"),
        ({"jitter": 1.0}, r"TopK\.jitter: expected a value in \[0, 1\), got 1\.0"),
        ({"scale": 0.0}, r"TopK\.scale: expected more than 0, got 0\.0"),
        ({"init_std": -0.1}, r"TopK\.init_std: expected more than 0, got -0\.1"),
        (
            {"order": "post", "renormalize": "detached"},
            r"or \"detached\" with order=\"pre\", got 'detached' with order='post'",
        ),
        ({"renormalize": "half"}, r"TopK\.renormalize: expected None, True, False, .*got 'half'"),
    ],
    ids=repr,
)
def test_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TopK(**kwargs)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (TopK(k=9), r"TopK\.k: expected at most num_experts = 8, got 9; lower k or add experts"),
        (TopK(num_groups=3), r"TopK\.num_groups: expected a divisor of num_experts = 8, got 3"),
        (TopK(num_groups=0), r"TopK\.num_groups: expected a divisor of num_experts = 8, got 0"),
        (TopK(num_groups=4, top_groups=5), r"TopK\.top_groups: expected 1 to num_groups = 4, got 5"),
        (TopK(k=3, num_groups=4, top_groups=1), r"1 of 4 groups hold 2 experts, fewer than k = 3; raise top_groups"),
    ],
    ids=repr,
)
def test_refuses_for_this_number_of_experts(config, message):
    with pytest.raises(ValueError, match=message):
        config.build(8, 8)


def test_a_learned_bias_is_on_the_logits_and_is_trained():
    """Unlike a balancer's bias, it moves the weights too. Three experts, k=2, no input: softmax of the bias alone."""
    router = TopK(k=2, linear_bias=True).build(4, 3)
    router.init_weights(0.02)
    assert not router.linear_bias.any()
    with torch.no_grad():
        router.linear_bias.copy_(torch.tensor([1.0, 3.0, 2.0]))
    decision = router(torch.zeros(1, 4))
    assert decision.logits_TE.tolist() == [[1.0, 3.0, 2.0]]
    assert decision.expert_ids_N.tolist() == [1, 2]
    # renormalised over the two: e^3 / (e^3 + e^2) = 1 / (1 + e^-1)
    assert decision.weights_N[0].item() == pytest.approx(1 / (1 + math.exp(-1)))
    decision.weights_N[0].backward()
    # d sigmoid(b1 - b2): p (1 - p) for expert 1, the opposite for expert 2, none for who was not chosen
    slope = math.exp(-1) / (1 + math.exp(-1)) ** 2
    assert router.linear_bias.grad.tolist() == pytest.approx([0.0, slope, -slope])


def test_warns_of_another_temperature_at_inference():
    with pytest.warns(UserWarning, match=r"eval_temperature=1\.0 differs from temperature=0\.3.*use the same value"):
        TopK(temperature=0.3, eval_temperature=1.0)


def test_repr_shows_the_configuration():
    assert "TopK(k=2, score='sigmoid'" in repr(TopK(score="sigmoid").build(4, 4))
