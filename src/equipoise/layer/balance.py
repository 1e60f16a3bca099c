"""What keeps a choice of experts in balance: which losses and balancers go together, and how losses reach the gradient.

For `MoE`, and for `Choice`, whose experts are not feed-forward networks. The losses and balancers themselves, with
their formulas, are in `equipoise.routing`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from equipoise.layer.capacity import Capacity
from equipoise.layer.zero_experts import ZeroExperts
from equipoise.ops.attach_loss import attach_loss
from equipoise.routing.adaptive import Adaptive
from equipoise.routing.balancers import BalancerConfig
from equipoise.routing.coefficients import AdaptiveCoef, AdaptiveCoefConfig, DropRateCoef
from equipoise.routing.losses import BalanceLoss, ImportanceLoss, LoadLoss, LossInputs
from equipoise.routing.router import RouterConfig
from equipoise.routing.schedules import value_at


def adaptive_of(module: nn.Module) -> tuple[Adaptive, ...]:
    """All state in it that adapts once per optimizer step: a balancer's, a router's own, coefficients."""
    return tuple(each for each in module.modules() if isinstance(each, Adaptive))


def coefs_of(losses: Sequence[BalanceLoss], num_experts: int, k: int) -> nn.ModuleDict:
    """The coefficients that adapt, by the name of their loss."""
    adaptive = {loss.name: loss.coef for loss in losses if isinstance(loss.coef, AdaptiveCoefConfig)}
    return nn.ModuleDict({name: coef.build(num_experts, k) for name, coef in adaptive.items()})


def attach_losses(
    y_TD: Tensor, losses: Sequence[BalanceLoss], coefs: nn.ModuleDict, inputs: LossInputs, step: int, scale: float
) -> tuple[Tensor, Mapping[str, Tensor]]:
    """(output with at least one loss attached, losses by name for observers, before coefficient and scale).

    coefs: those that adapt, see `coefs_of`. step: for the others, which may follow a schedule. scale: of all.
    """
    values = {loss.name: loss(inputs) for loss in losses}
    terms = [scale * _coef(loss, coefs, step) * values[loss.name] for loss in losses]
    y_TD = attach_loss(y_TD, torch.stack(terms).sum())
    return y_TD, {name: value.detach() for name, value in values.items()}


def _coef(loss: BalanceLoss, coefs: nn.ModuleDict, step: int) -> float | Tensor:
    if isinstance(loss.coef, AdaptiveCoefConfig):
        state = coefs[loss.name]
        assert isinstance(state, AdaptiveCoef)
        return state.value
    return value_at(loss.coef, step)


def sort_balance(
    balance: tuple[BalanceLoss | BalancerConfig, ...],
) -> tuple[tuple[BalanceLoss, ...], BalancerConfig | None]:
    """(losses, balancer). Refuses two balancers, and two losses of one name, of which logs would show one."""
    balancers = [item for item in balance if isinstance(item, BalancerConfig)]
    losses = tuple(item for item in balance if not isinstance(item, BalancerConfig))
    if len(balancers) > 1:
        raise ValueError(f"balance: expected at most one balancer, got {balancers}; their biases would fight")
    for loss in losses:
        if isinstance(loss.coef, int | float) and not loss.coef >= 0:
            raise ValueError(f"{type(loss).__name__}.coef: expected 0 or more, got {loss.coef}; it would unbalance")
    names = [loss.name for loss in losses]
    if len(set(names)) < len(names):
        raise ValueError(f"balance: expected each loss once, got {names}; add up their coefficients")
    if balancers and any(isinstance(loss, ImportanceLoss | LoadLoss) for loss in losses):
        warnings.warn(
            f"balance: {', '.join(names)} with {type(balancers[0]).__name__}: the loss balances weights or logits, the "
            "balancer the assignments that its bias leads to, and the two pull apart; use SwitchLoss, or one of them",
            UserWarning,
            stacklevel=4,
        )
    return losses, (balancers[0] if balancers else None)


def check_fit(
    router: RouterConfig,
    losses: tuple[BalanceLoss, ...],
    balancer: BalancerConfig | None,
    capacity: Capacity | None,
    shared_experts: int,
) -> None:
    """Raise ValueError for parts that can't work together."""
    name, traits = type(router).__name__, router.traits
    if balancer and not traits.takes_bias:
        raise ValueError(
            f"balance: {type(balancer).__name__} moves a selection bias, which {name} does not use: remove the balancer"
        )
    if balancer and balancer.needs_free_choice and not traits.free_choice:
        raise ValueError(
            f"balance: {type(balancer).__name__} sets the bias that would balance a free choice among all experts, and "
            f"{name} chooses within groups: use BiasBalance"
        )
    if not traits.fixed_k and any(isinstance(loss, LoadLoss) for loss in losses):
        raise ValueError(f"LoadLoss: needs a fixed number of experts per token, which {name} has not; use SwitchLoss")
    if traits.needs_loss and traits.needs_loss not in [loss.name for loss in losses]:
        raise ValueError(
            f'balance: {name} needs the loss "{traits.needs_loss}", or every expert stays active for every token; add '
            f"{traits.needs_loss.title()}Loss()"
        )
    if not capacity and any(isinstance(loss.coef, DropRateCoef) for loss in losses):
        raise ValueError(
            "DropRateCoef: a coefficient that follows the drop rate needs a capacity, or nothing is dropped"
        )
    if capacity and capacity.overflow == "next_choice" and not traits.ranks:
        raise ValueError(
            f'Capacity.overflow: "next_choice" needs a router in which tokens rank all experts, got {name}; use "drop" '
            'or "shared", or a router such as TopK'
        )
    if capacity and capacity.overflow == "shared" and not shared_experts:
        raise ValueError('Capacity.overflow: "shared" needs a shared expert to spill to; set shared_experts=1 or more')


def check_zero_experts(
    zero: ZeroExperts, losses: tuple[BalanceLoss, ...], balancer: BalancerConfig | None, capacity: Capacity | None
) -> None:
    """Raise ValueError for parts that even loads out where zero-computation experts are to have more than others."""
    if zero.weight == 1:
        return
    even = [type(loss).__name__ for loss in losses if isinstance(loss, ImportanceLoss | LoadLoss)]
    even += [type(balancer).__name__] if balancer else []
    even += ["Capacity(overflow='next_choice')"] if capacity and capacity.overflow == "next_choice" else []
    if even:
        raise ValueError(
            f"zero_experts.weight: expected 1 with {', '.join(even)}, which knows one load for all experts, got "
            f"{zero.weight}. Balance with SwitchLoss, which weighs them, or set weight=1."
        )
