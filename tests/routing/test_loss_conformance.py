"""Every balancing loss: a finite, pure function of the decision, blind to order and names, in fp32, whatever the loss.

What the losses' numbers should be is in test_golden_routing; here are those of the losses that came later.
"""

import math
from dataclasses import replace

import pytest
import torch
from tests.routing.cases import Case, D, E, T, batch, each, spread
from torch.special import ndtr

from equipoise import routing
from equipoise.layer import MoE
from equipoise.routing import (
    LOSSES,
    ImportanceLoss,
    LoadLoss,
    NoisyTopK,
    ReLURouting,
    SimilarityLoss,
    SparsityLoss,
    SwitchLoss,
    TopK,
    ZLoss,
)
from equipoise.routing.losses import LossInputs
from equipoise.routing.similarity import router_similarity
from equipoise.types import RoutingDecision

CASES = [*(cls() for cls in LOSSES), SwitchLoss(scope="sequence"), SwitchLoss(scope="global"), LoadLoss(noise_std=0.5)]
EACH = pytest.mark.parametrize("loss", CASES, ids=repr)
# Exact for any split of the batch, by their scope or because they are means over tokens, or see no tokens at all.
SPLIT_FREE = (SwitchLoss(scope="sequence"), SwitchLoss(scope="global"), ZLoss(), SimilarityLoss())


def inputs(z: torch.Tensor, k: int = 2, num_sequences: int = 3, **fields) -> LossInputs:
    """Top-k of logits z, raw weights, tokens in sequences of about equal length; the router's rows are z's columns."""
    ids = z.detach().topk(k).indices
    probs = z.softmax(-1)
    decision = RoutingDecision.from_topk(ids, probs.gather(1, ids), probs_TE=probs, logits_TE=z)
    sequences = torch.arange(len(z)) * num_sequences // max(len(z), 1)
    weight = torch.eye(z.shape[1], 32, dtype=z.dtype) + 0.1
    return LossInputs(decision, sequences, num_sequences, k, **({"router_weight_ED": weight} | fields))


def logits(T: int = T, E: int = E, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(T, E, dtype=dtype) + torch.linspace(0, 1, E, dtype=dtype)


def test_every_loss_is_listed_and_covered():
    public = {getattr(routing, name) for name in routing.__all__ if hasattr(getattr(routing, name), "scope")}
    assert public == set(LOSSES) == {type(loss) for loss in CASES}
    names = [cls().name for cls in LOSSES]
    assert len(set(names)) == len(names)


class TestValue:
    @EACH
    @pytest.mark.parametrize(("T", "E", "k"), [(0, 4, 2), (1, 1, 1), (1, 4, 2), (5, 4, 4), (3, 1, 1)])
    def test_small_cases_are_finite_scalars_with_gradients(self, loss, T, E, k):
        z = logits(T, E).requires_grad_()
        case = inputs(z, k)
        case.router_weight_ED.requires_grad_()
        value = loss(case)
        value.backward()
        assert value.shape == ()
        assert value.isfinite()
        grads = [leaf.grad for leaf in (z, case.router_weight_ED) if leaf.grad is not None]
        assert grads
        assert all(grad.isfinite().all() for grad in grads)

    @EACH
    def test_order_of_tokens_does_not_matter(self, loss):
        z, order = logits(), torch.randperm(T)
        case = inputs(z)
        shuffled = replace(inputs(z[order]), sequence_ids_T=case.sequence_ids_T[order])
        torch.testing.assert_close(loss(shuffled), loss(case))

    @EACH
    def test_names_of_experts_do_not_matter(self, loss):
        z, names = logits(), torch.randperm(E)
        weight = torch.randn(E, 32)
        renamed = inputs(z[:, names], router_weight_ED=weight[names])
        torch.testing.assert_close(loss(renamed), loss(inputs(z, router_weight_ED=weight)))

    @EACH
    def test_autocast_changes_no_bit(self, loss):
        z = logits()
        plain = loss(inputs(z))
        case = inputs(z)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(loss(case), plain)
        assert plain.dtype == torch.float32

    @pytest.mark.parametrize("loss", [SwitchLoss(), SwitchLoss(scope="sequence"), SparsityLoss()], ids=repr)
    @pytest.mark.parametrize("k", [1, 2, 4])
    def test_is_one_at_perfect_balance_for_every_k(self, loss, k):
        """Token t takes experts t ... t + k - 1 (mod E) with weights 1/k, and its probability is spread over them."""
        ids = (torch.arange(E)[:, None] + torch.arange(k)) % E
        probs = torch.zeros(E, E).scatter(1, ids, 1 / k)
        decision = RoutingDecision.from_topk(ids, torch.full((E, k), 1 / k), probs_TE=probs, logits_TE=probs)
        assert loss(LossInputs(decision, torch.zeros(E, dtype=torch.int64), 1, k)).item() == pytest.approx(1.0)


class TestGradient:
    @pytest.mark.parametrize("loss", [loss for loss in CASES if not isinstance(loss, LoadLoss)], ids=repr)
    def test_counts_are_constants(self, loss):
        """By probabilities, logits, weights and rows, while the choice stays: as numerical differences say."""
        case = inputs(logits(6, 4, torch.float64))
        decision = case.decision

        def value(probs, z, weights, rows):
            changed = replace(decision, probs_TE=probs, logits_TE=z, selection_TE=z, weights_N=weights)
            return loss(replace(case, decision=changed, router_weight_ED=rows))

        leaves = (decision.probs_TE, decision.logits_TE, decision.weights_N, case.router_weight_ED)
        assert torch.autograd.gradcheck(value, tuple(leaf.clone().requires_grad_() for leaf in leaves))

    @pytest.mark.parametrize("loss", [loss for loss in CASES if isinstance(loss, LoadLoss)], ids=repr)
    def test_so_are_the_thresholds_of_the_load_loss(self, loss):
        z = logits(6, 4, torch.float64).requires_grad_()
        (grad,) = torch.autograd.grad(loss(inputs(z)), z)
        best = z.detach().sort(dim=1, descending=True).values
        threshold = torch.where(z.detach() >= best[:, 1:2], best[:, 2:3], best[:, 1:2])
        load = ndtr((z - threshold) / (loss.noise_std or 1 / 4)).sum(0)
        (expected,) = torch.autograd.grad(load.var(correction=0) / load.mean() ** 2, z)
        torch.testing.assert_close(grad, expected)

    @EACH
    def test_something_gets_one(self, loss):
        z = logits().requires_grad_()
        case = inputs(z)
        case.router_weight_ED.requires_grad_()
        loss(case).backward()
        assert max(leaf.grad.abs().max() for leaf in (z, case.router_weight_ED) if leaf.grad is not None) > 1e-4


class TestWithRouters:
    @each()
    @pytest.mark.parametrize("loss", [cls(coef=1.0) for cls in LOSSES], ids=lambda loss: loss.name)
    @pytest.mark.parametrize("num_tokens", [T, 0])
    def test_works_with_every_router_or_says_what_is_missing(self, case, loss, num_tokens):
        missing = None
        if isinstance(loss, LoadLoss) and not case.traits.fixed_k:
            missing = r"LoadLoss: needs a fixed number of experts per token"
        elif isinstance(loss, SimilarityLoss) and case.config.build(D, E).weight is None:
            missing = r"SimilarityLoss: the router has no weight"
        if missing:
            with pytest.raises(ValueError, match=missing):
                MoE(D, 8, E, router=case.config, balance=with_loss(case, loss))
            return
        layer = MoE(D, 8, E, router=case.config, balance=with_loss(case, loss))
        spread(layer.router)
        case.prepare(layer.router)
        x, ids = batch(num_tokens)
        layer(x, token_ids=ids).square().sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
        if layer.router.weight is not None:
            assert layer.router.weight.grad is not None


def with_loss(case: Case, loss) -> tuple:
    """The loss, and those that the router needs besides."""
    return (loss, *(needed for needed in case.needed_losses() if needed.name != loss.name))


class TestSplit:
    @EACH
    def test_shares_add_up_where_promised(self, loss):
        """Sequences of 8 tokens, split 2 : 1; the parts' gradients, times their shares, add up to the whole's."""
        z, rows = logits(T, E, torch.float64), torch.randn(E, 32, dtype=torch.float64)
        counts = torch.bincount(z.topk(2).indices.flatten(), minlength=E)
        leaves = [z.requires_grad_(), rows.requires_grad_()]

        def gradient(*parts: slice) -> list[torch.Tensor]:
            total = torch.zeros(())
            for part in parts:
                own = z[part]
                num_sequences = len(own) // 8
                case = inputs(own, num_sequences=num_sequences, router_weight_ED=rows, global_counts_E=counts)
                total = total + len(own) / T * loss(case)
            found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
            return list(found)

        whole, split = gradient(slice(0, T)), gradient(slice(0, 16), slice(16, T))
        assert max(grad.abs().max() for grad in whole) > 1e-4
        same = all(torch.allclose(one, two, rtol=1e-9, atol=1e-12) for one, two in zip(whole, split, strict=True))
        assert same == (loss in SPLIT_FREE)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # PyTorch's own, in its compiler
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@EACH
def test_compiled_equals_eager(loss):
    torch._dynamo.reset()
    weight = torch.randn(E, 32)

    def value(z):
        return loss(inputs(z, router_weight_ED=weight))

    results = []
    for run in (value, torch.compile(value, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        z = logits().requires_grad_()
        result = run(z)
        if result.requires_grad:
            result.backward()
        results.append((result.detach(), z.grad))
    torch.testing.assert_close(results[1], results[0])


class TestLoad:
    def test_by_hand(self):
        # One token, k = 2. z = (1, 0.5, 0), with noise (1.2, 0.2, 0.4): it takes 0 and 2. Experts 0 and 2 stay as long
        # as they beat 0.2, the best that was left out; expert 1 gets in when it beats 0.4, the lowest that was taken.
        # Standard deviations (1, 0.5, 2): the arguments of Phi are
        #     (1 - 0.2) / 1 = 0.8, (0.5 - 0.4) / 0.5 = 0.2, (0 - 0.2) / 2 = -0.1
        # and load = (0.788145, 0.579260, 0.460172): mean 0.609192, squares 0.621172 + 0.335542 + 0.211758, so that
        # variance = 1.168472 / 3 - 0.371115 = 0.018376 and CV^2 = 0.018376 / 0.371115 = 0.049515
        z, noisy = torch.tensor([[1.0, 0.5, 0.0]]), torch.tensor([[1.2, 0.2, 0.4]])
        decision = RoutingDecision.from_topk(
            torch.tensor([[0, 2]]),
            torch.tensor([[0.7, 0.3]]),
            probs_TE=z.softmax(-1),
            logits_TE=z,
            selection_TE=noisy,
            noise_std_TE=torch.tensor([[1.0, 0.5, 2.0]]),
        )
        value = LoadLoss()(LossInputs(decision, torch.zeros(1, dtype=torch.int64), 1, 2))
        assert value.item() == pytest.approx(0.049515, abs=2e-5)

    def test_noisy_top_k_hands_over_its_noise_and_learns_how_much(self):
        """In logit units: thresholds from the noisy logits, standard deviations from the noise weight."""
        router = NoisyTopK(init_std=0.5).build(8, 4)
        x = torch.randn(16, 8)
        decision = router(x)
        std = torch.nn.functional.softplus(x @ router.noise_weight.t()) + 0.01
        torch.testing.assert_close(decision.noise_std_TE, std)
        noisy = decision.selection_TE.detach()
        best = noisy.sort(dim=1, descending=True).values
        threshold = torch.where(noisy >= best[:, 1:2], best[:, 2:3], best[:, 1:2])
        load = ndtr((x @ router.weight.t() - threshold) / std).sum(0)
        value = LoadLoss()(LossInputs(decision, torch.zeros(16, dtype=torch.int64), 1, 2))
        torch.testing.assert_close(value, load.var(correction=0) / load.mean() ** 2)
        value.backward()
        assert router.noise_weight.grad.abs().max() > 1e-4
        assert router.weight.grad.abs().max() > 1e-4
        assert router.eval()(x).noise_std_TE is None

    def test_a_router_starts_with_noise_of_ln_2(self):
        decision = NoisyTopK().build(8, 4)(torch.randn(16, 8))
        torch.testing.assert_close(decision.noise_std_TE, torch.full((16, 4), math.log(2) + 0.01))
        assert not decision.logits_TE.any()


class TestSimilarity:
    def test_by_hand(self):
        # R = [[1, 1], [0, 2]]: R R^T = [[2, 2], [2, 4]], less the identity [[1, 2], [2, 3]], which sums to 8
        assert router_similarity(torch.tensor([[1.0, 1.0], [0.0, 2.0]])).item() == 8.0

    def test_orthonormal_rows_cost_nothing(self):
        router = TopK(init="orthogonal").build(16, 8)
        assert router_similarity(router.weight).item() == pytest.approx(0.0, abs=1e-4)
        assert router_similarity(1.1 * router.weight).item() > 1.0

    def test_bf16_rows_are_compared_in_fp32(self):
        rows = torch.randn(8, 16).bfloat16()
        assert router_similarity(rows).dtype == torch.float32
        assert torch.equal(router_similarity(rows), router_similarity(rows.float()))

    @pytest.mark.parametrize(
        ("weight", "message"),
        [
            (None, r"SimilarityLoss: the router has no weight whose rows could be kept apart; remove the loss"),
            (torch.randn(5, 4), r"SimilarityLoss: expected at most dim = 4 experts, got 5: no 5 rows are orthogonal"),
        ],
        ids=["no-weight", "too-many"],
    )
    def test_refuses(self, weight, message):
        with pytest.raises(ValueError, match=message):
            SimilarityLoss()(inputs(logits(), router_weight_ED=weight))

    def test_reaches_the_router_of_a_layer(self):
        layer = MoE(8, 8, 4, router=TopK(), balance=(SimilarityLoss(1.0),))
        layer.init_weights(0.5, 0.5)
        before = router_similarity(layer.router.weight).item()
        (layer(torch.randn(5, 8)) * 0).sum().backward()  # the task is silent
        with torch.no_grad():
            layer.router.weight -= 1e-2 * layer.router.weight.grad
        assert router_similarity(layer.router.weight).item() < before


class TestSparsity:
    def test_by_hand(self):
        # Two tokens, three experts, k = 1. Token 0: expert 0 with 0.5 and expert 1 with 0.25; token 1: expert 0 with 1.
        # c / (T k) = (2, 1, 0) / 2, mean weights (1.5, 0.25, 0) / 2: 3 * (1 * 0.75 + 0.5 * 0.125) = 2.4375
        weights = torch.tensor([[0.5, 0.25, 0.0], [1.0, 0.0, 0.0]])
        decision = RoutingDecision.from_mask(weights > 0, weights, probs_TE=weights, logits_TE=weights)
        zeros = torch.zeros(2, dtype=torch.int64)
        assert SparsityLoss()(LossInputs(decision, zeros, 1, 1)).item() == pytest.approx(2.4375)
        assert SparsityLoss()(LossInputs(decision, zeros, 1, 2)).item() == pytest.approx(2.4375 / 2)

    def test_pushes_busy_experts_harder_and_idle_ones_not_at_all(self):
        router = ReLURouting().build(4, 4)
        with torch.no_grad():
            router.weight.copy_(torch.tensor([1.0, 0.5, 0.1, -1.0])[:, None] * torch.eye(4)[0])
        x = torch.randn(200, 4)
        x[:, 1] += 1
        with torch.no_grad():
            router.weight[1, 1] = 0.5  # active more often than expert 0
        decision = router(x)
        counts = torch.bincount(decision.expert_ids_N, minlength=4)
        z = decision.logits_TE
        (grad,) = torch.autograd.grad(SparsityLoss()(LossInputs(decision, x[:, 0].long() * 0, 1, 2)), z)
        # dL/dz_te = E c_e / (T k) / T where the expert is active, else 0
        expected = torch.where(z > 0, 4 * counts / (200 * 2) / 200, 0.0)
        torch.testing.assert_close(grad, expected)


def test_importance_takes_weights_and_not_counts():
    z = logits()
    case = inputs(z)
    doubled = replace(case, decision=replace(case.decision, weights_N=2 * case.decision.weights_N))
    torch.testing.assert_close(ImportanceLoss()(doubled), ImportanceLoss()(case))  # a ratio: no unit
