"""What the adapting rules come to: thresholds at their quantile, coefficients at their target, loads in balance."""

import itertools

import pytest
import torch
from tests.routing.cases import CASES, VOCAB, Case, D, E, each, spread

from equipoise.layer import Capacity, MoE, reduce_and_update
from equipoise.ops.histogram import EPS
from equipoise.routing import (
    BiasBalance,
    DropRateCoef,
    HighThenLow,
    QuantileBalance,
    ReLURouting,
    SparsityCoef,
    SparsityLoss,
    SwitchLoss,
    Threshold,
    TopK,
)


class TestThresholds:
    def skewed(self, num_tokens: int) -> torch.Tensor:
        x = torch.randn(num_tokens, D)
        x[:, 0] += 1  # some experts are preferred
        return x

    @pytest.mark.parametrize("k", [1, 2, 3])
    def test_on_stationary_tokens_every_expert_takes_its_share(self, k):
        router = Threshold(k=k, ema=0.9, warmup=5).build(D, E)
        spread(router)
        first = torch.bincount(router(self.skewed(2000)).expert_ids_N, minlength=E)
        assert first.max() > 1.5 * first.double().mean()  # before the warm-up it is plain top-k
        for _ in range(40):
            router.state.observe(router(self.skewed(2000)))
            router.state.update()
        share = torch.bincount(router.eval()(self.skewed(20_000)).expert_ids_N, minlength=E) / 20_000
        assert share.sum().item() == pytest.approx(k, rel=0.02)
        assert share.tolist() == pytest.approx([k / E] * E, rel=0.06)

    def test_are_the_exact_quantile_to_within_a_bin(self):
        router = Threshold(k=2, ema=0.0, warmup=1).build(D, E)
        spread(router)
        for _ in range(2):
            decision = router(self.skewed(400))
            router.state.observe(decision)
            router.state.update()
            best = decision.logits_TE.detach().sort(dim=0, descending=True).values
            taken, left = best[400 * 2 // E - 1], best[400 * 2 // E]  # the last of the best k/E of all, and the next
            width = 0.035 * taken.abs() + EPS
            assert (router.state.thresholds_E <= taken + width).all()
            assert (router.state.thresholds_E >= left - width).all()

    def test_running_mean_is_corrected_for_its_start(self):
        """After one update it is that update's quantile, not (1 - ema) of it; after more their weighted mean."""
        (plain, slow), quantiles = (Threshold(ema=ema, warmup=1).build(D, E) for ema in (0.0, 0.9)), []
        for _ in range(3):
            decision = plain(self.skewed(100) * (len(quantiles) + 1))
            for router in (plain, slow):
                router.state.observe(decision)
                router.state.update()
            quantiles.append(plain.state.thresholds_E.clone())
            weights = [0.9**age for age in reversed(range(len(quantiles)))]
            mean = sum(w * q for w, q in zip(weights, quantiles, strict=True)) / sum(weights)
            torch.testing.assert_close(slow.state.thresholds_E, mean)


class TestDropRateCoef:
    def test_by_hand(self):
        # slope 0.2, maximum 0.1, beta 0.5: min(0.2 d, 0.1), and half of what is left towards it
        state = DropRateCoef(slope=0.2, maximum=0.1, beta=0.5).build(E, 2)
        # of 10 assignments 3 found no room, whatever became of them: d = 0.3, 0.06; (0 + 0.06) / 2 = 0.03
        self.observe(state, 10, capacity=1, moved=1, spilled=1, tokens=7)
        state.update()
        assert state.value.item() == pytest.approx(0.03)
        # two micro-batches, 9 of 10 and 1 of 10: d = 0.5, 0.1; (0.03 + 0.1) / 2 = 0.065
        self.observe(state, 10, capacity=4, hard_cap=5)
        self.observe(state, 10, capacity=1)
        state.update()
        assert state.value.item() == pytest.approx(0.065)
        self.observe(state, 10, capacity=10)  # d = 1 asks for 0.2, more than the maximum: (0.065 + 0.1) / 2
        state.update()
        assert state.value.item() == pytest.approx(0.0825)
        self.observe(state, 10, capacity=0)
        state.update()
        assert state.value.item() == pytest.approx(0.04125)

    def observe(self, state, num_assignments: int, **drops: int) -> None:
        decision = TopK(k=2).build(D, E)(torch.randn(num_assignments // 2, D))
        state.observe(decision, {reason: torch.tensor(count) for reason, count in drops.items()})

    def test_scales_the_loss_of_its_layer(self):
        """Nothing at first; then value times the loss."""
        layer = MoE(D, 8, E, balance=(SwitchLoss(DropRateCoef(beta=0.0)),), capacity=Capacity(0.5))
        layer.init_weights(0.5, 0.5)
        x, grads = torch.randn(40, D), []
        for value in (0.0, 0.01, 0.02):
            layer.coefs["switch_micro"].value.fill_(value)
            layer.zero_grad()
            (layer(x) * 0).sum().backward()
            grads.append(layer.router.weight.grad.clone())
        assert not grads[0].any()
        assert grads[1].abs().max() > 1e-5
        torch.testing.assert_close(grads[2], 2 * grads[1])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DropRateCoef(slope=0.0), r"DropRateCoef\.slope: expected more than 0, got 0\.0"),
        (lambda: DropRateCoef(maximum=float("nan")), r"DropRateCoef\.maximum: expected more than 0, got nan"),
        (lambda: DropRateCoef(beta=1.0), r"DropRateCoef\.beta: expected a value in \[0, 1\), got 1\.0"),
        (lambda: SparsityCoef(initial=0.0), r"SparsityCoef\.initial: expected more than 0, got 0\.0"),
        (lambda: SparsityCoef(factor=1.0), r"SparsityCoef\.factor: expected more than 1, got 1\.0"),
    ],
)
def test_coefficients_refuse(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_drop_rate_needs_drops():
    """A layer without capacity refuses it when it is made; so does its state, for who uses it without our layer."""
    with pytest.raises(ValueError, match=r"DropRateCoef: .* needs a capacity, or nothing is dropped"):
        MoE(D, 8, E, balance=(SwitchLoss(DropRateCoef()),))
    decision = TopK(k=2).build(D, E)(torch.randn(3, D))
    with pytest.raises(ValueError, match=r"DropRateCoef: the layer drops nothing; give it a capacity, or a constant"):
        DropRateCoef().build(E, 2).observe(decision)


class TestSparsityCoef:
    def test_by_hand(self):
        state = SparsityCoef(initial=1e-3, factor=1.5).build(E, 2)
        router = ReLURouting().build(D, E)
        torch.nn.init.constant_(router.weight, 0.1)
        state.observe(router(torch.ones(3, D)))  # all 8 experts, more than k = 2
        state.observe(router(-torch.ones(8, D)))  # none: 24 assignments of 11 tokens in all
        state.update()
        assert state.value.item() == pytest.approx(1.5e-3)
        state.observe(router(-torch.ones(8, D)))
        state.update()
        assert state.value.item() == pytest.approx(1e-3)

    @pytest.mark.parametrize("k", [2, 3])
    def test_drives_a_layer_to_k_experts_per_token(self, k):
        """A task that gains from every expert; the coefficient rises until they are k on average, about evenly used."""
        coef = SparsityCoef(initial=1e-3, factor=1.1)
        layer = MoE(D, 8, E, router=ReLURouting(k=k), balance=(SparsityLoss(coef),))
        layer.init_weights(0.5, 0.5)
        seen, active = [], []
        layer.tap.register_forward_hook(lambda module, args, routed: seen.append(routed.decision))
        for _ in range(200):
            x = torch.randn(256, D)
            x[:, 0] += 1  # or each logit would be positive for half of the tokens, whatever the weight
            y, decision = layer(x), seen.pop()
            ((y * 0).sum() - (1 + decision.weights_N).log().sum() / 256).backward()
            reduce_and_update([layer])
            with torch.no_grad():
                layer.router.weight -= 0.2 * layer.router.weight.grad
            layer.zero_grad()
            active.append(len(decision.token_ids_N) / 256)
        assert active[0] > 3.5
        assert sum(active[-80:]) / 80 == pytest.approx(k, rel=0.1)
        counts = torch.bincount(decision.expert_ids_N, minlength=E)
        assert counts.max() < 2 * counts.double().mean()

    @pytest.mark.parametrize("num_active", [0, E])
    def test_stays_a_usable_number_where_its_target_is_out_of_reach(self, num_active):
        """Thousands of steps on one side of k: not infinite, and not so small that a factor no longer moves it."""
        state = SparsityCoef().build(E, 2)
        router = ReLURouting().build(D, E)
        torch.nn.init.constant_(router.weight, 0.1)
        none, all_of_them = router(-torch.ones(4, D)), router(torch.ones(4, D))
        for step in range(2000):
            state.observe(all_of_them if num_active else none)
            state.update(step)
        before = state.value.item()
        state.observe(none if num_active else all_of_them)
        state.update()
        assert 0 < state.value.item() < float("inf")
        assert state.value.item() != before


def test_a_bias_stops_where_its_rate_ends():
    """As DeepSeek-V3 ends; the step comes through `reduce_and_update`. The last of `hold` = 2 is still high."""
    layer = MoE(D, 8, E, balance=(BiasBalance(HighThenLow(1e-3, 0.0, hold=2, anneal=0)),))
    x, biases = torch.randn(64, D) + 1, [layer.balancer.bias_E.clone()]
    for step in range(6):
        layer(x)
        reduce_and_update([layer], step=step)
        biases.append(layer.balancer.bias_E.clone())
    moved = [not torch.equal(before, after) for before, after in itertools.pairwise(biases)]
    assert moved == [True, True, True, False, False, False]


# ------------------------------------------------------------------------------------------------ does it balance?

TOKENS = 1024
BALANCERS = {  # with the number of updates: a rate has to travel the distance between the scores
    "sign": (BiasBalance(0.01), 200),
    "proportional": (BiasBalance(0.02, "proportional"), 200),
    "smooth": (BiasBalance(0.02, "smooth"), 200),
    "quantile": (QuantileBalance(), 8),
}


def violations(router, balancer, num_updates: int, ids: torch.Tensor, x: torch.Tensor) -> list[float]:
    """MaxVio before each update and after the last, on the same tokens (and other noise each time)."""
    found = []
    for step in range(num_updates + 1):
        decision = router(x, balancer.bias_E, ids)
        counts = torch.bincount(decision.expert_ids_N, minlength=E).double()
        found.append((counts.max() / counts.mean() - 1).item())
        balancer.observe(decision)
        balancer.update(step)
    return found


def skewed(case: Case, gap: float, group_gap: float = 0.0):
    """(router, token ids, x): expert 0's logit leads by `gap` for every token, and group 0's by `group_gap`."""
    router = case.config.build(D, E)
    spread(router, 0.3)
    with torch.no_grad():
        router.weight[:, 0] = torch.linspace(gap, 0, E) if gap < 10 else gap * torch.eye(E)[0]
        if getattr(router, "group_weight", None) is not None:
            router.group_weight[0, 0] = group_gap
    x = torch.randn(TOKENS, D)
    x[:, 0] = 1
    return router, torch.arange(TOKENS) % VOCAB, x


@pytest.mark.parametrize(
    ("name", "case"),
    [
        (name, case)
        for name, (config, _) in BALANCERS.items()
        for case in CASES
        if case.traits.takes_bias and (case.traits.free_choice or not config.needs_free_choice)
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_balancers_bring_every_router_that_takes_them_into_balance(name, case):
    """More than half of the violation goes, with one rate for scores and logits alike."""
    config, num_updates = BALANCERS[name]
    router, ids, x = skewed(case, gap=3.0, group_gap=1.5)
    found = violations(router, config.build(E, case.config.k), num_updates, ids, x)
    assert found[0] > 0.8
    assert sum(found[-5:]) / 5 < found[0] / 2, (found[0], found[-5:])


def underflows(case: Case) -> bool:
    """Its bias is on softmax scores: those of a saturated router are all 0 but one, and say nothing of the others."""
    return getattr(case.config, "score", None) == "softmax" and not case.config.bias_is_on_logits


@each(lambda case: case.traits.takes_bias and case.traits.free_choice and not case.random and not underflows(case))
def test_quantile_balancing_holds_down_an_expert_that_leads_by_60(case):
    router, ids, x = skewed(case, gap=60.0)
    found = violations(router, QuantileBalance().build(E, case.config.k), 8, ids, x)
    assert found[0] > 1.5
    grouped = getattr(case.config, "num_groups", 1) > 1  # the cutoffs know nothing of groups: better, not even
    assert found[-1] < (found[0] / 2 if grouped else 0.1), (found[0], found[-1])


def test_quantile_balancing_is_refused_where_its_cutoffs_are_not_what_decides():
    """They made an even load a collapse: of four groups' experts, MaxVio from 0.4 to 3."""
    limited = [case for case in CASES if case.traits.takes_bias and not case.traits.free_choice]
    assert limited
    for case in limited:
        with pytest.raises(ValueError, match=rf"QuantileBalance.*{type(case.config).__name__}.*use BiasBalance"):
            case.layer(balance=(QuantileBalance(),))
        assert case.layer(balance=(BiasBalance(),)).balancer is not None
