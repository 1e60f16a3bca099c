"""Balancers: rules, state, and that they do bring a collapsed router back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.ops.histogram import EPS
from equipoise.routing import BiasBalance, QuantileBalance, SwitchLoss
from equipoise.routing.balancers import bias_step, quantile_bias, smooth_step, violation
from equipoise.routing.losses import LossInputs
from equipoise.types import RoutingDecision

CONFIGS = [BiasBalance(), BiasBalance(rule="proportional"), BiasBalance(rule="smooth"), QuantileBalance()]
EACH_BALANCER = pytest.mark.parametrize("config", CONFIGS, ids=repr)


def decide(scores: torch.Tensor, bias: torch.Tensor, k: int) -> RoutingDecision:
    ids = (scores + bias).topk(k).indices
    probs = scores / scores.sum(1, keepdim=True)
    return RoutingDecision.from_topk(ids, scores.gather(1, ids), probs_TE=probs, logits_TE=scores, selection_TE=scores)


def max_violation(decision: RoutingDecision) -> float:
    counts = torch.bincount(decision.expert_ids_N, minlength=decision.num_experts).double()
    return (counts.max() / counts.mean() - 1).item()


def run(balancer, scores: torch.Tensor, k: int, steps: int) -> list[float]:
    """MaxVio before each of `steps` updates and after the last."""
    violations = []
    for _ in range(steps):
        decision = decide(scores, balancer.bias_E, k)
        violations.append(max_violation(decision))
        balancer.observe(decision)
        balancer.update()
    return [*violations, max_violation(decide(scores, balancer.bias_E, k))]


class TestRules:
    @given(counts=st.lists(st.integers(0, 10**9), min_size=1, max_size=12), times=st.integers(2, 9))
    def test_steps_are_centred_and_do_not_depend_on_the_batch_size(self, counts, times):
        counts = torch.tensor(counts)
        for step_of in (
            lambda c: bias_step(c, 1e-3, "sign"),
            lambda c: bias_step(c, 1e-3, "proportional"),
            lambda c: smooth_step(c, torch.zeros(len(c)), 1e-3)[0],
        ):
            step = step_of(counts)
            assert abs(step.mean().item()) < 1e-8
            torch.testing.assert_close(step_of(counts * times), step, rtol=1e-5, atol=1e-9)

    def test_violation_of_nothing_is_nothing(self):
        assert violation(torch.zeros(3, dtype=torch.int64)).tolist() == [0.0, 0.0, 0.0]
        assert violation(torch.tensor([0, 4])).tolist() == [1.0, -1.0]


class TestState:
    @EACH_BALANCER
    def test_is_buffers_in_the_checkpoint_but_not_parameters(self, config):
        balancer = config.build(4, 2)
        assert list(balancer.parameters()) == []
        saved = set(balancer.state_dict())
        assert "bias_E" in saved
        assert not any("pending" in name for name in saved)

    @EACH_BALANCER
    def test_survives_a_checkpoint(self, config):
        scores = torch.rand(32, 4)
        one = config.build(4, 2)
        run(one, scores, 2, 3)
        two = config.build(4, 2)
        two.load_state_dict(one.state_dict())
        assert run(one, scores, 2, 3) == run(two, scores, 2, 3)
        assert torch.equal(one.bias_E, two.bias_E)

    @EACH_BALANCER
    @pytest.mark.parametrize(
        "cast",
        [
            lambda m: m.bfloat16(),
            lambda m: m.half(),
            lambda m: m.to(torch.bfloat16),
            lambda m: m.to("cpu", torch.float64),
        ],
        ids=["bfloat16", "half", "to", "to-device"],
    )
    def test_stays_fp32_to_the_last_bit_when_the_model_is_cast(self, config, cast):
        balancer = config.build(4, 2)
        run(balancer, torch.rand(32, 4), 2, 2)
        before = balancer.bias_E.clone()
        cast(balancer)
        assert balancer.bias_E.dtype == torch.float32
        assert torch.equal(balancer.bias_E, before)
        assert balancer.pending.dtype == torch.int64

    @EACH_BALANCER
    def test_still_follows_the_model_to_another_device(self, config):
        balancer = config.build(4, 2).to("meta", torch.bfloat16)
        assert balancer.bias_E.is_meta
        assert balancer.bias_E.dtype == torch.float32
        assert not balancer.to_empty(device="cpu").bias_E.is_meta

    @EACH_BALANCER
    def test_reset_makes_it_as_new(self, config):
        balancer = config.build(4, 2)
        run(balancer, torch.rand(32, 4), 2, 2)
        balancer.observe(decide(torch.rand(32, 4), balancer.bias_E, 2))
        balancer.reset()
        for name, new in config.build(4, 2).named_buffers():
            assert torch.equal(balancer.get_buffer(name), new)

    @EACH_BALANCER
    def test_bias_is_zero_centred(self, config):
        balancer = config.build(5, 2)
        run(balancer, torch.rand(40, 5) + torch.linspace(0, 1, 5), 2, 20)
        assert balancer.bias_E.abs().max() > 1e-4
        assert abs(balancer.bias_E.mean().item()) < 1e-6

    @EACH_BALANCER
    def test_an_update_without_tokens_moves_nothing_and_is_finite(self, config):
        balancer = config.build(4, 2)
        balancer.update()
        assert balancer.bias_E.tolist() == [0.0] * 4
        balancer.observe(decide(torch.zeros(0, 4), balancer.bias_E, 2))
        balancer.update()
        assert balancer.bias_E.tolist() == [0.0] * 4

    @EACH_BALANCER
    def test_one_update_sees_the_sum_of_all_micro_batches_and_ranks(self, config):
        scores = torch.rand(48, 4) + torch.linspace(0, 0.5, 4)
        whole, split, other = (config.build(4, 2) for _ in range(3))
        whole.observe(decide(scores, whole.bias_E, 2))
        for part in (scores[:5], scores[5:32]):
            split.observe(decide(part, split.bias_E, 2))
        other.observe(decide(scores[32:], other.bias_E, 2))
        split.pending.add_(other.pending)  # what an all-reduce does
        assert torch.equal(split.pending, whole.pending)
        whole.update()
        split.update()
        assert torch.equal(split.bias_E, whole.bias_E)
        assert not split.pending.any()


class TestSignBias:
    def test_stays_bounded_over_ten_thousand_steps(self):
        """Centred: the common part can't drift. Bounded: no further out than the scores' spread."""
        scores = torch.rand(24, 8) * 0.2 + torch.linspace(0, 0.5, 8)
        balancer = BiasBalance(rate=1e-3).build(8, 2)
        largest = 0.0
        for _ in range(10_000):
            balancer.observe(decide(scores, balancer.bias_E, 2))
            balancer.update()
            largest = max(largest, balancer.bias_E.abs().max().item())
        assert largest < 0.7  # scores reach from 0 to 0.7
        assert abs(balancer.bias_E.mean().item()) < 1e-4

    def test_takes_about_half_the_gap_over_the_rate(self):
        """Expert 0 leads by 0.4; it falls and the others rise by about the rate per step: 0.4 / (2 rate) steps."""
        rate, gap = 5e-3, 0.4
        scores = torch.rand(256, 2) * 0.02
        scores[:, 0] += gap
        violations = run(BiasBalance(rate=rate).build(2, 1), scores, 1, 80)
        recovered = next(step for step, value in enumerate(violations) if value < 0.5)
        assert 0.8 * gap / (2 * rate) <= recovered <= 1.2 * gap / (2 * rate)


def saturated_logits(gap: float = 12.0) -> torch.Tensor:
    """Every token wants expert 0 of 8, with probability 1 - 1e-4."""
    z = torch.randn(512, 8)
    z[:, 0] += gap
    return z


class TestSaturatedRouter:
    def test_no_loss_can_rescue_it(self):
        def gradient(gap: float) -> float:
            z = saturated_logits(gap).requires_grad_()
            probs = z.softmax(-1)
            ids = probs.topk(1).indices
            decision = RoutingDecision.from_topk(ids, probs.gather(1, ids), probs_TE=probs, logits_TE=z)
            SwitchLoss()(LossInputs(decision, torch.zeros(len(z), dtype=torch.int64), 1, decision.top_k)).backward()
            return z.grad.norm().item()

        assert gradient(12.0) < 1e-2 * gradient(2.0)
        assert gradient(60.0) < 1e-10

    @pytest.mark.parametrize("score", ["softmax", "sigmoid"])
    @pytest.mark.parametrize("k", [1, 2])
    def test_quantile_balancing_can(self, score, k):
        z = saturated_logits()
        scores = z.softmax(-1) if score == "softmax" else z.sigmoid()
        violations = run(QuantileBalance().build(8, k), scores, k, 5)
        assert violations[0] > 2.5
        assert violations[-1] < 0.5


class TestQuantileBalance:
    @given(seed=st.integers(0, 1000), k=st.integers(1, 3), skew=st.floats(0, 0.5))
    def test_histogram_is_close_to_sorting(self, seed, k, skew):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(64, 4, generator=generator) * 0.5 + torch.linspace(0, skew, 4)
        balancer = QuantileBalance().build(4, k)
        for _ in range(2):
            exact = quantile_bias(scores, balancer.bias_E, k)
            balancer.observe(decide(scores, balancer.bias_E, k))
            balancer.update()
            # each cutoff is off by at most its bin, 3.4 % of it, and centring moves all by the mean error
            tolerance = 2 * 0.035 * (1.5 + skew) + 2 * EPS
            assert (balancer.bias_E - exact).abs().max().item() <= tolerance

    def test_ema_moves_a_part_of_the_way(self):
        scores = torch.rand(64, 4) + torch.linspace(0, 0.5, 4)
        full, part = QuantileBalance().build(4, 2), QuantileBalance(ema=0.75).build(4, 2)
        run(full, scores, 2, 1)
        run(part, scores, 2, 1)
        torch.testing.assert_close(part.bias_E, 0.25 * full.bias_E)

    def test_on_demand_waits_until_it_is_activated(self):
        scores = torch.rand(64, 4) + torch.linspace(0, 0.5, 4)
        balancer = QuantileBalance(on_demand=True).build(4, 2)
        before = run(balancer, scores, 2, 3)
        assert balancer.bias_E.tolist() == [0.0] * 4
        assert before[-1] == before[0]
        balancer.activate()
        assert run(balancer, scores, 2, 3)[-1] < 0.5 * before[0]
        assert balancer.state_dict()["active"].item() is True

    def test_waiting_forgets_old_steps(self):
        """On activation the bias follows the last step, not what was seen since the start."""
        balancer = QuantileBalance(on_demand=True).build(4, 2)
        run(balancer, torch.rand(64, 4) + torch.linspace(0.5, 0, 4), 2, 3)
        assert not balancer.pending.any()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BiasBalance(rate=-1.0), r"BiasBalance\.rate: expected 0 or more, got -1\.0"),
        (lambda: BiasBalance(rule="cubic"), r"BiasBalance\.rule: expected sign, proportional or smooth, got 'cubic'"),
        (lambda: QuantileBalance(ema=1.0), r"QuantileBalance\.ema: expected a value in \[0, 1\), got 1\.0"),
        (lambda: QuantileBalance().build(4, 4), r"needs k < num_experts, got k = 4 of 4.*nothing to balance; remove"),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()
