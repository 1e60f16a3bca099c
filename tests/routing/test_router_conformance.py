"""What every router's decision is, whatever the router: well-formed, fp32, finite, repeatable, in every mode and size.

What a router promises beyond that, its traits, is in test_router_traits.
"""

import copy
import inspect
import math
from collections import Counter

import pytest
import torch
from tests.routing.cases import (
    CASES,
    VARIANTS,
    VOCAB,
    D,
    E,
    T,
    assert_same_bits,
    assert_same_choice,
    batch,
    each,
    fields,
    fit,
    route,
    warm_up,
)

from equipoise import routing
from equipoise.layer import MoE
from equipoise.routing import (
    ROUTERS,
    ExpertChoice,
    Hash,
    NoisyTopK,
    ReLURouting,
    Sinkhorn,
    Switch,
    Threshold,
    TopK,
    TwoTier,
)
from equipoise.routing.router import Router

WITH_K = [cls for cls in ROUTERS if cls is not Switch]  # Switch is k = 1
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def test_every_router_is_listed_and_covered():
    public = {getattr(routing, name) for name in routing.__all__ if hasattr(getattr(routing, name), "traits")}
    assert public == set(ROUTERS)
    assert {type(case.config) for case in CASES} == set(ROUTERS)
    assert set(VARIANTS) <= set(ROUTERS)
    assert {type(case.build()) for case in CASES} == concrete_subclasses(Router)


def concrete_subclasses(cls: type) -> set[type]:
    """Those of the routing package: a router that a layer builds for itself is tested with the layer."""
    own: set[type] = {cls} if cls.__module__.startswith("equipoise.routing.") and not inspect.isabstract(cls) else set()
    return own.union(*(concrete_subclasses(each) for each in cls.__subclasses__()))


class TestDecision:
    @each()
    @MODES
    @pytest.mark.parametrize("num_tokens", [T, 1, 0])
    def test_is_well_formed(self, case, training, num_tokens):
        decision = route(case.build().train(training), *batch(num_tokens))
        tokens, experts = decision.token_ids_N, decision.expert_ids_N
        assert tokens.dtype == experts.dtype == torch.int64
        assert tokens.shape == experts.shape == decision.weights_N.shape
        pairs = list(zip(tokens.tolist(), experts.tolist(), strict=True))
        assert all(0 <= t < num_tokens and 0 <= e < E for t, e in pairs)
        assert len(set(pairs)) == len(pairs)
        if case.traits.fixed_k:
            k = case.config.k
            assert decision.top_k == k
            assert tokens.tolist() == [t for t in range(num_tokens) for _ in range(k)]
        else:
            assert decision.top_k is None
        matrices = (decision.probs_TE, decision.logits_TE, decision.selection_TE)
        assert {matrix.shape for matrix in matrices} == {(num_tokens, E)}
        assert (decision.num_tokens, decision.num_experts) == (num_tokens, E)

    @each()
    @MODES
    def test_is_finite_fp32_and_weights_sum_as_promised(self, case, training):
        decision = route(case.build().train(training), *batch())
        floats = {name: value for name, value in fields(decision).items() if value.is_floating_point()}
        assert {value.dtype for value in floats.values()} == {torch.float32}
        assert all(value.isfinite().all() for name, value in floats.items() if name != "ranking")
        assert (decision.weights_N >= 0).all()
        if (total := case.traits.weights_sum_to) is not None:
            sums = torch.zeros(T).index_add(0, decision.token_ids_N, decision.weights_N)
            torch.testing.assert_close(sums, torch.full((T,), total))

    @each()
    @MODES
    def test_probabilities_sum_to_one_where_anything_is_active(self, case, training):
        decision = route(case.build().train(training), *batch(400))
        assert (decision.probs_TE >= 0).all()
        sums = decision.probs_TE.sum(1)
        inactive = (sums == 0).nonzero()[:, 0].tolist()
        torch.testing.assert_close(sums[sums != 0], torch.ones(400 - len(inactive)))
        assert not inactive or isinstance(case.config, ReLURouting)
        assert set(inactive).isdisjoint(decision.token_ids_N.tolist())

    def test_a_token_without_positive_logit_has_no_expert(self):
        """One of 2^8 random tokens, but not by chance here."""
        router = ReLURouting().build(D, E)
        torch.nn.init.constant_(router.weight, 0.1)
        decision = router(torch.cat([torch.ones(1, D), -torch.ones(1, D)]))
        assert decision.token_ids_N.tolist() == [0] * E
        assert decision.probs_TE.sum(1).tolist() == pytest.approx([1, 0])

    @each(lambda case: isinstance(case.config, ExpertChoice))
    @pytest.mark.parametrize("num_tokens", [T, 23, 3])
    def test_expert_choice_gives_every_expert_the_same_number(self, case, num_tokens):
        decision = route(case.build(), *batch(num_tokens))
        each_takes = -(-num_tokens * case.config.k // E)
        assert Counter(decision.expert_ids_N.tolist()) == dict.fromkeys(range(E), each_takes)

    def test_threshold_gives_every_token_k_before_its_warm_up(self):
        decision = Threshold(k=3).build(D, E)(batch()[0])
        assert Counter(decision.token_ids_N.tolist()) == dict.fromkeys(range(T), 3)

    def test_threshold_gives_tokens_different_numbers_after_it(self):
        router = Threshold(k=3, warmup=1).build(D, E)
        warm_up(router)
        counts = torch.bincount(router(torch.randn(200, D)).token_ids_N, minlength=200)
        assert counts.min() < 3 < counts.max()
        assert counts.double().mean() == pytest.approx(3, rel=0.2)  # one batch of noise


class TestGradient:
    @each()
    def test_reaches_every_parameter_from_the_weights(self, case):
        router, (x, ids) = case.build(), batch()
        weights = route(router, x.requires_grad_(), ids).weights_N
        parameters = dict(router.named_parameters())
        if not parameters:  # a fixed table with equal weights has nothing to learn
            assert isinstance(case.config, Hash)
            assert not weights.requires_grad
            return
        (weights * torch.randn(len(weights))).sum().backward()
        assert [name for name, p in parameters.items() if p.grad is None or p.grad.abs().max() < 1e-4] == []
        assert x.grad.abs().max() > 1e-4

    @each()
    @pytest.mark.parametrize("scale", [1e4, -1e4, 0.0], ids=["large", "negative", "equal"])
    @MODES
    def test_extreme_logits_stay_finite(self, case, scale, training):
        router, (x, ids) = case.build().train(training), batch()
        x = (x.abs() * scale).requires_grad_()  # 0 makes all logits equal
        decision = route(router, x, ids)
        values = {name: value for name, value in fields(decision).items() if name != "ranking"}
        assert [name for name, value in values.items() if not value.isfinite().all()] == []
        assert not decision.logits_TE.isnan().any()
        assert (decision.probs_TE.sum(1) <= 1 + 1e-5).all()
        loss = decision.weights_N.sum() + decision.probs_TE.square().sum()
        if loss.requires_grad:
            loss.backward()
            grads = [leaf.grad for leaf in (x, *router.parameters()) if leaf.grad is not None]
            assert all(grad.isfinite().all() for grad in grads)
            assert len(grads) >= 2


class TestRepeatable:
    @each()
    def test_eval_is_a_function_of_the_input(self, case):
        router, (x, ids) = case.build().eval(), batch()
        first = route(router, x, ids, seed=1)
        torch.manual_seed(2)
        before = torch.get_rng_state()
        assert_same_bits(router(x, None, ids), first)
        assert torch.equal(torch.get_rng_state(), before)

    @each()
    def test_training_is_random_exactly_where_it_says_so(self, case):
        router, (x, ids) = case.build(), batch()
        assert_same_bits(route(router, x, ids, seed=1), route(router, x, ids, seed=1))
        one, two = fields(route(router, x, ids, seed=1)), fields(route(router, x, ids, seed=2))
        differs = one["weights_N"].shape != two["weights_N"].shape or not torch.equal(
            one["weights_N"], two["weights_N"]
        )
        assert differs == case.random

    @each()
    def test_a_checkpoint_and_a_copy_decide_alike(self, case):
        router, other, (x, ids) = case.build(), case.config.build(D, E), batch()
        other.load_state_dict(router.state_dict())
        for mode in (True, False):
            expected = route(router.train(mode), x, ids)
            assert_same_bits(route(other.train(mode), x, ids), expected)
            assert_same_bits(route(copy.deepcopy(router), x, ids), expected)


class TestPrecision:
    @each()
    @MODES
    @pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
    def test_bf16_numbers_are_routed_in_fp32(self, case, training, autocast):
        """The same decision, to the bit, as fp32 copies of the same bf16 numbers get."""
        router, (x, ids) = case.build().train(training).bfloat16(), batch()
        x = x.bfloat16()
        exact = copy.deepcopy(router).float()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            decision = route(router, x, ids)
        assert_same_bits(decision, route(exact, x.float(), ids))

    @each()
    def test_fp64_inputs_are_routed_in_fp64(self, case):
        router, (x, ids) = case.build(), batch()
        expected = route(router.eval(), x, ids)
        decision = route(router.double(), x.double(), ids)
        assert {decision.weights_N.dtype, decision.probs_TE.dtype, decision.logits_TE.dtype} == {torch.float64}
        torch.testing.assert_close(decision.weights_N.float(), expected.weights_N)


class TestSizes:
    @each()
    @MODES
    def test_works_with_the_fewest_experts_that_it_accepts(self, case, training):
        """k = E, or with groups: the groups that a token may use hold just k."""
        groups, open_groups = getattr(case.config, "num_groups", 1), getattr(case.config, "top_groups", 1)
        fewest = groups * math.ceil(case.config.k / open_groups)
        if fewest > 1:
            with pytest.raises(ValueError, match=r"expected|fewer than"):
                case.config.build(D, fewest - 1)
        decision = route(case.build(fewest).train(training), *batch())
        assert decision.weights_N.isfinite().all()
        if groups == 1 and case.traits.fixed_k:
            assert len(decision.expert_ids_N) == T * fewest  # everybody takes everybody

    @each()
    def test_no_tokens_give_zero_gradients(self, case):
        router, (x, ids) = case.build(), batch(0)
        decision = route(router, x.requires_grad_(), ids)
        total = decision.weights_N.sum() + decision.probs_TE.sum()
        if total.requires_grad:
            total.backward()
            assert not router.weight.grad.any()


class TestMetaDevice:
    @each()
    def test_constructs_there(self, case):
        with torch.device("meta"):
            router = case.config.build(D, E)
        assert {tensor.device.type for tensor in router.state_dict().values()} == {"meta"}

    @each(lambda case: case.traits.fixed_k and getattr(case.config, "table", "random") == "random")
    def test_runs_there(self, case):
        with torch.device("meta"):
            decision = case.config.build(D, E)(torch.empty(T, D), None, torch.empty(T, dtype=torch.int64))
        assert decision.weights_N.shape == (T * case.config.k,)
        assert decision.weights_N.device.type == "meta"

    @each()
    def test_comes_back_whole(self, case):
        """Memory first, then `init_weights`: what that does not draw it has to make, a table say."""
        with torch.device("meta"):
            layer = MoE(D, 8, E, router=case.config, balance=case.needed_losses())
        layer.to_empty(device="cpu")
        for tensor in layer.state_dict().values():
            tensor.fill_(1)  # what happens to lie in that memory
        layer.init_weights(0.02, 0.02)
        fresh = MoE(D, 8, E, router=case.config, balance=case.needed_losses()).state_dict()
        made = layer.state_dict().keys() - dict(layer.named_parameters()).keys()
        assert [name for name in sorted(made) if not torch.equal(layer.state_dict()[name], fresh[name])] == []


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own, in its compiler
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
class TestCompiled:
    @each()
    def test_training_equals_eager_with_the_same_random_numbers(self, case):
        self.compare(case, training=True)

    @each(lambda case: case.random or isinstance(case.config, Sinkhorn))
    def test_eval_equals_eager_where_it_is_another_code(self, case):
        self.compare(case, training=False)

    def compare(self, case, training):
        torch._dynamo.reset()
        router, (x, ids) = case.build().train(training), batch()
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=not case.traits.fixed_k):
            compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
            decision = route(compiled, x, ids)
        assert_same_choice(decision, route(router, x, ids))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        *[(lambda cls=cls: cls(k=0), rf"{cls.__name__}\.k: expected at least 1, got 0") for cls in WITH_K],
        (lambda: TopK(k=1, renormalize=True), r"k=1 with renormalize=True.*no gradient.*use renormalize=False"),
        (lambda: NoisyTopK(k=1), r"NoisyTopK\.k: 1 makes every weight the constant 1.*no gradient.*k >= 2, or Switch"),
        (lambda: NoisyTopK(init_std=-0.1), r"NoisyTopK\.init_std: expected 0 or more, got -0\.1"),
        (lambda: Threshold(ema=1.0), r"Threshold\.ema: expected a value in \[0, 1\), got 1\.0"),
        (lambda: Threshold(warmup=0), r"Threshold\.warmup: expected at least 1, or there is no threshold yet, got 0"),
        (lambda: Sinkhorn(iterations=0), r"Sinkhorn\.iterations: expected at least 1, got 0"),
        (
            lambda: Hash(weights="learned"),
            r"Hash\.weights: \"learned\" with k=1 is the constant 1.*no gradient.*\"equal\"",
        ),
        (lambda: Hash(vocab_size=0), r"Hash\.vocab_size: expected at least 1, got 0"),
        (lambda: Hash(scale=0.0), r"Hash\.scale: expected more than 0, got 0\.0"),
        (lambda: Hash(table="greedy"), r"Hash\.table: expected random or balanced, got 'greedy'"),
        (lambda: Hash(weights="free"), r"Hash\.weights: expected equal or learned, got 'free'"),
        (lambda: TwoTier(num_groups=0), r"TwoTier: expected num_groups and vocab_size of at least 1, got 0, 65536"),
        (lambda: TwoTier(vocab_size=0), r"TwoTier: expected num_groups and vocab_size of at least 1, got 2, 0"),
        (lambda: TwoTier(first="random"), r"TwoTier\.first: expected learned or hash, got 'random'"),
        (lambda: Switch(jitter=1.0).build(D, E), r"jitter: expected a value in \[0, 1\), got 1\.0"),
        (lambda: Switch(init_scale=-1.0).build(D, E), r"Switch\.init_scale: expected .* got -1\.0"),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *[
            (cls(k=9), rf"{cls.__name__}\.k: expected at most num_experts = 8, got 9; lower k or add experts")
            for cls in WITH_K
            if cls is not TwoTier
        ],
        (TwoTier(k=5), r"TwoTier\.k: expected at most the 4 experts of a group, got 5; lower k or num_groups"),
        (TwoTier(num_groups=3), r"TwoTier\.num_groups: expected a divisor of num_experts = 8, got 3"),
    ],
    ids=repr,
)
def test_refuses_for_this_number_of_experts(config, message):
    with pytest.raises(ValueError, match=message):
        config.build(D, E)


def test_a_balanced_table_has_to_be_fitted_before_use():
    router, (x, ids) = Hash(VOCAB, table="balanced").build(D, E), batch()
    with pytest.raises(ValueError, match=r'Hash\.table: "balanced" needs the frequencies.*call router\.fit'):
        router(x, None, ids)
    with pytest.raises(ValueError, match=r"expected the frequencies of vocab_size = 64 token ids, got shape \(5,\)"):
        router.fit(torch.ones(5))
    fit(router)
    assert router(x, None, ids).num_tokens == T
