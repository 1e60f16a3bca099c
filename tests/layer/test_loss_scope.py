"""The gradient of a balancing loss does not depend on how the global batch is split, for the scope its name says."""

import pytest
import torch

from equipoise.layer import MoE
from equipoise.routing import ImportanceLoss, LinearAnneal, SwitchLoss, TopK, ZLoss
from equipoise.types import BatchScope

B, S, D, E = 4, 6, 8, 4
LENGTHS = torch.tensor([6, 3, 5, 1])
PADDING = torch.arange(S) >= LENGTHS[:, None]
EXACT = {"rtol": 0, "atol": 1e-10}


def build(*balance) -> MoE:
    torch.manual_seed(3)
    layer = MoE(D, 8, E, router=TopK(k=2), balance=balance).double()
    layer.init_weights(0.5, 0.5)
    return layer


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    return tuple(torch.randn(B, S, D, dtype=torch.float64, generator=generator) for _ in range(2))


def global_counts(layer: MoE, x: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    real = x.reshape(-1, D) if padding is None else x[~padding]
    return torch.bincount((real @ layer.router.weight.detach().t()).topk(2).indices.flatten(), minlength=E)


def gradients(layer: MoE, num_micro_batches: int, padding: torch.Tensor | None) -> list[torch.Tensor]:
    """Of every parameter and of x, summed over the micro-batches of one global batch."""
    x, cotangent = batch()
    x.requires_grad_()
    counts = global_counts(layer, x.detach(), padding)
    num_tokens = B * S if padding is None else int((~padding).sum())
    layer.zero_grad()
    for rows in torch.arange(B).chunk(num_micro_batches):
        mask = None if padding is None else padding[rows]
        own_tokens = len(rows) * S if mask is None else int((~mask).sum())
        scope = BatchScope(share=own_tokens / num_tokens, counts=counts)
        (layer(x[rows], padding_mask=mask, scope=scope) * cotangent[rows]).sum().backward()
    return [x.grad, *(p.grad.clone() for p in layer.parameters())]


SPLIT_FREE = {
    "sequence": (SwitchLoss(0.5, "sequence"),),
    "global": (SwitchLoss(0.5, "global"),),
    "z": (ZLoss(0.5),),
    "all": (SwitchLoss(0.3, "sequence"), SwitchLoss(0.5, "global"), ZLoss(0.2)),
}


@pytest.mark.parametrize("padding", [None, PADDING], ids=["even", "padded"])
@pytest.mark.parametrize("losses", SPLIT_FREE)
def test_gradient_is_the_same_for_one_two_and_four_micro_batches(losses, padding):
    layer = build(*SPLIT_FREE[losses])
    whole, task_alone = gradients(layer, 1, padding), gradients(build(), 1, padding)
    router = 1  # of [x, router.weight, ...]
    assert (whole[router] - task_alone[router]).abs().max() > 1e-3  # there is a loss to speak of
    for num_micro_batches in (2, 4):
        torch.testing.assert_close(gradients(layer, num_micro_batches, padding), whole, **EXACT)


@pytest.mark.parametrize("loss", [SwitchLoss(0.5, "micro"), ImportanceLoss(0.5)], ids=repr)
def test_micro_scope_does_depend_on_the_split(loss):
    layer = build(loss)
    whole, split = gradients(layer, 1, None), gradients(layer, 4, None)
    assert (whole[1] - split[1]).abs().max() > 1e-4


def test_global_scope_of_an_unsplit_batch_needs_no_counts():
    x, _ = batch()
    results = []
    for layer, scope in (
        (build(SwitchLoss(0.5, "global")), None),
        (build(SwitchLoss(0.5, "global")), BatchScope(counts=global_counts(build(), x, None))),
        (build(SwitchLoss(0.5, "micro")), None),
    ):
        layer(x, scope=scope).sum().backward()
        results.append(layer.router.weight.grad)
    torch.testing.assert_close(results[1], results[0], **EXACT)
    torch.testing.assert_close(results[2], results[0], **EXACT)


def test_coefficient_and_share_scale_exactly_the_loss_gradient():
    x, _ = batch()

    def loss_gradient(coef, scope: BatchScope) -> torch.Tensor:
        with_loss, without = build(SwitchLoss(coef)), build()
        with_loss(x, scope=scope).sum().backward()
        without(x).sum().backward()
        return with_loss.router.weight.grad - without.router.weight.grad

    unit = loss_gradient(1.0, BatchScope())
    assert unit.abs().max() > 1e-3
    torch.testing.assert_close(loss_gradient(0.25, BatchScope(share=0.5)), 0.125 * unit, **EXACT)
    schedule = LinearAnneal(1.0, 0.0, 10)
    torch.testing.assert_close(loss_gradient(schedule, BatchScope(step=3)), 0.7 * unit, **EXACT)


def test_observers_see_the_loss_before_its_coefficient_and_eval_has_none(routed_by):
    layer, (x, _) = build(SwitchLoss(1e-6), ZLoss(1e-6)), batch()
    _, routed = routed_by(layer, x, scope=BatchScope(share=0.1))
    assert set(routed.losses) == {"switch_micro", "z"}
    assert 0.5 < routed.losses["switch_micro"].item() < 4
    assert not routed.losses["z"].requires_grad
    assert routed_by(layer.eval(), x)[1].losses == {}


def test_a_model_hands_each_layer_its_own_counts():
    counts = torch.arange(6).view(2, 3)
    scope = BatchScope(step=5, share=0.5, counts=counts)
    assert scope.layer(1).counts.tolist() == [3, 4, 5]
    assert (scope.layer(1).step, scope.layer(1).share) == (5, 0.5)
    assert BatchScope(step=5).layer(1).counts is None
