"""Balancing losses as functions of a decision; their numbers are in test_golden_routing."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.routing import ImportanceLoss, LoadLoss, SwitchLoss, TopK, ZLoss
from equipoise.routing.losses import LossInputs, coefficient_of_variation_squared
from equipoise.types import RoutingDecision

LOSSES = [SwitchLoss(), SwitchLoss(scope="sequence"), SwitchLoss(scope="global"), ImportanceLoss(), LoadLoss(), ZLoss()]
EACH_LOSS = pytest.mark.parametrize("loss", LOSSES, ids=repr)


def inputs(z: torch.Tensor, k: int = 2, **kwargs) -> LossInputs:
    router = TopK(k=k).build(z.shape[1], z.shape[1])
    torch.nn.init.eye_(router.weight)
    return LossInputs(router(z), torch.zeros(len(z), dtype=torch.int64), 1, k, **kwargs)


@EACH_LOSS
@pytest.mark.parametrize(("T", "E", "k"), [(0, 4, 2), (1, 1, 1), (1, 4, 2), (5, 4, 4), (3, 1, 1)])
def test_small_cases_are_finite_with_gradients(loss, T, E, k):
    z = torch.randn(T, E, requires_grad=True)
    value = loss(inputs(z, k))
    value.backward()
    assert value.dim() == 0
    assert value.isfinite()
    assert z.grad.isfinite().all()


@EACH_LOSS
@given(seed=st.integers(0, 1000))
def test_the_order_of_tokens_does_not_matter(loss, seed):
    z = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(loss(inputs(z)), loss(inputs(z.flip(0))))


def test_switch_loss_is_one_when_even_and_the_number_of_experts_when_collapsed():
    even = 20 * torch.eye(4)
    assert SwitchLoss()(inputs(even, 1)).item() == pytest.approx(1.0, abs=1e-6)
    collapsed = torch.tensor([[20.0, 0, 0, 0]]).expand(8, 4)
    assert SwitchLoss()(inputs(collapsed, 1)).item() == pytest.approx(4.0, abs=1e-4)


def test_one_is_not_the_lower_bound_of_the_switch_loss():
    # three tokens with p = (.51, .49), one with (.01, .99): f = (.75, .25), P = (.385, .615): 2 * .4425 = .885
    p = torch.tensor([[0.51, 0.49]] * 3 + [[0.01, 0.99]])
    assert SwitchLoss()(inputs(p.log(), 1)).item() == pytest.approx(0.885, abs=1e-6)


def test_switch_loss_differentiates_probabilities_only():
    # dL/dz_tj = E/T p_tj (f_j - sum_i f_i p_ti): nothing through the counts
    z = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    case = inputs(z)
    SwitchLoss()(case).backward()
    p = z.detach().softmax(-1)
    f = torch.bincount(case.decision.expert_ids_N, minlength=4) / 12
    torch.testing.assert_close(z.grad, 4 / 6 * p * (f - (p * f).sum(1, keepdim=True)))


def test_global_scope_takes_the_counts_it_is_given():
    z, counts = torch.randn(6, 4), torch.tensor([10, 0, 0, 0])
    case = inputs(z, global_counts_E=counts)
    assert SwitchLoss(scope="global")(case).item() == pytest.approx(4 * z.softmax(-1).mean(0)[0].item(), rel=1e-6)
    assert SwitchLoss(scope="micro")(case).item() == SwitchLoss()(inputs(z)).item()


def test_sequence_scope_weighs_sequences_by_their_tokens():
    z = torch.randn(7, 4)
    both = LossInputs(inputs(z).decision, torch.tensor([0, 0, 0, 0, 0, 1, 1]), 2, 2)
    first, second = SwitchLoss()(inputs(z[:5])), SwitchLoss()(inputs(z[5:]))
    torch.testing.assert_close(SwitchLoss(scope="sequence")(both), (5 * first + 2 * second) / 7)


def test_z_loss_does_not_overflow():
    z = torch.tensor([[1e3, 0.0]])
    assert ZLoss()(inputs(z, 1)).item() == pytest.approx(1e6)


def test_cv_squared_is_biased_and_safe():
    # values 1 and 3: mean 2, biased variance 1: 1/4
    assert coefficient_of_variation_squared(torch.tensor([1.0, 3.0])).item() == 0.25
    assert coefficient_of_variation_squared(torch.zeros(3)).item() == 0.0


def test_load_loss_takes_thresholds_in_logit_units():
    """Adding a constant to all logits, or to one token's, changes no chance of being selected."""
    z = torch.randn(6, 4)
    shifted = z + torch.randn(6, 1) * 10
    torch.testing.assert_close(LoadLoss()(inputs(z)), LoadLoss()(inputs(shifted)), rtol=1e-4, atol=1e-5)


def test_load_loss_needs_a_fixed_number_of_experts_per_token():
    z = torch.randn(2, 2)
    decision = RoutingDecision(torch.tensor([0]), torch.tensor([1]), torch.ones(1), z.softmax(-1), z, z.softmax(-1))
    with pytest.raises(ValueError, match=r"LoadLoss: needs a router with a fixed number of experts per token, such as"):
        LoadLoss()(LossInputs(decision, torch.zeros(2, dtype=torch.int64), 1, 2))


def test_switch_loss_refuses_an_unknown_scope():
    with pytest.raises(ValueError, match=r"SwitchLoss\.scope: expected micro, sequence or global, got 'batch'"):
        SwitchLoss(scope="batch")


@EACH_LOSS
def test_descending_the_loss_lowers_it(loss):
    z = (torch.randn(64, 8) + torch.linspace(0, 3, 8)).requires_grad_()
    before = loss(inputs(z))
    (grad,) = torch.autograd.grad(before, z)
    after = loss(inputs((z - 1e-2 * grad / grad.norm()).detach()))
    assert after < before
