"""Who chooses among experts that are not feed-forward networks: a router, its balance, and a tap to watch it by.

The experts themselves are whoever's it is; this knows only the decision. See `models/attention_experts`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from equipoise.layer.balance import adaptive_of, attach_losses, check_fit, coefs_of, sort_balance
from equipoise.layer.dispatch import WholePlan
from equipoise.layer.feed_forward import FeedForward
from equipoise.layer.mode import InForce, Mode, in_force
from equipoise.layer.moe import MoE
from equipoise.layer.tap import Tap
from equipoise.layer.tokens import TokenView
from equipoise.routing.adaptive import Adaptive
from equipoise.routing.balancers import Balancer, BalancerConfig
from equipoise.routing.losses import BalanceLoss, LossInputs
from equipoise.routing.router import RouterConfig
from equipoise.routing.top_k import TopKRouter
from equipoise.types import BatchScope, Routed, RoutingDecision


class Choice(nn.Module):
    """An `Observable`: decides with `route`, and with `finish` counts, balances and shows what was decided.

    router: with a fixed number of experts per token. balance: losses of micro-batch or sequence scope, and at most one
    balancer. num_choosers: in how many equal parts of the experts a token chooses, each for itself, as heads do.
    Raises ValueError for parts that do not fit together.
    """

    def __init__(
        self,
        router: RouterConfig,
        dim: int,
        num_experts: int,
        balance: Iterable[BalanceLoss | BalancerConfig] = (),
        num_choosers: int = 1,
    ) -> None:
        super().__init__()
        self.losses, balancer = check_choice(router, balance)
        self.num_experts, self.k, self.num_choosers = num_experts, router.k, num_choosers
        self.router = router.build(dim, num_experts)
        self.balancer: Balancer | None = balancer.build(num_experts, router.k) if balancer else None
        self.coefs = coefs_of(self.losses, num_experts, router.k)
        self.tap = Tap()
        self._force = InForce()
        self._adaptive = self.adaptive

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The names of the balancing losses, as in `Routed.losses`."""
        return tuple(loss.name for loss in self.losses)

    @property
    def adaptive(self) -> tuple[Adaptive, ...]:
        """All state that adapts once per optimizer step."""
        return adaptive_of(self)

    def init_weights(self, std: float) -> None:
        """Draw the router; reset what adapts."""
        self.router.init_weights(std)
        for state in self.adaptive:
            state.reset()

    def route(self, view: TokenView) -> RoutingDecision:
        """The router's decision, under the biases of the balancer and of a repair, if there are any."""
        force = self._force
        bias_E = None if self.balancer is None else self.balancer.bias_E
        if force.bias_E is not None:
            bias_E = force.bias_E.to(view.x_TD.device) + (0.0 if bias_E is None else bias_E)
        router, bias_E = (self.router, bias_E) if force.router is None else (force.router, None)
        decision: RoutingDecision = router(view.x_TD, bias_E, None)
        return decision

    @property
    def mode(self) -> Mode:
        """How it departs from its configuration at the moment, for a repair."""
        return self._force.mode

    @property
    def dense(self) -> None:
        """Nothing stands in for attention experts."""
        return None

    def set_mode(self, mode: Mode, dense: FeedForward | None = None) -> None:
        """Replace the mode, from the next forward on, as `MoE.set_mode` does. dense: is not used.

        Raises ValueError, and changes nothing, for a mode that it can't take: attention experts have no capacity, and
        nothing computes in their place.
        """
        asks = {"capacity": mode.capacity, "dense_share": mode.dense_share, "shut_experts": mode.shut_experts}
        if refused := [name for name, value in asks.items() if value]:
            raise ValueError(
                f"Mode.{refused[0]}: expected none on attention experts, got {asks[refused[0]]}. They have no capacity "
                "and nothing that stands in for them: take a bias, or go back to a good router"
            )
        if mode.round_robin and self.num_choosers > 1:
            raise ValueError(
                f"Mode.round_robin: expected one choice among all experts, got {self.num_choosers} heads that choose "
                "among their own. Taking turns over all would leave heads without any: go back to a good router"
            )
        force = in_force(mode, self.router, self.num_experts, None, has_shared=False)
        if self.balancer is not None:
            self.balancer.boost = mode.boost
        if isinstance(self.router, TopKRouter):
            self.router.temperature_in_force = mode.temperature
        self._force = force

    def finish(
        self, y_TD: Tensor, decision: RoutingDecision, counts_e: Tensor, view: TokenView, scope: BatchScope | None
    ) -> Tensor:
        """y_TD, to which the balancing losses are attached in training; observers see the decision."""
        if self.training:
            for state in self._adaptive:
                state.observe(decision, {})
        losses: Mapping[str, Tensor] = {}
        if self.training and torch.is_grad_enabled() and self.losses:
            scope = scope or BatchScope()
            inputs = LossInputs(decision, view.sequence_ids_T, view.num_sequences, self.k, self.router.weight)
            scale = scope.share * self.mode.boost
            y_TD, losses = attach_losses(y_TD, self.losses, self.coefs, inputs, scope.step, scale)
        self.tap(Routed(decision, WholePlan(counts_e, {}), losses))
        return y_TD


def check_choice(
    router: RouterConfig, balance: Iterable[BalanceLoss | BalancerConfig]
) -> tuple[tuple[BalanceLoss, ...], BalancerConfig | None]:
    """(losses, balancer). Raises ValueError for a router or a balance that a `Choice` can't work with."""
    name, traits = type(router).__name__, router.traits
    if not (traits.causal and traits.fixed_k and traits.batch_invariant) or traits.needs_token_ids:
        raise ValueError(
            f"router: expected one that is causal and gives every token the same number of experts by what it is, "
            f"without token ids, such as TopK, got {name}. Take TopK."
        )
    losses, balancer = sort_balance(tuple(balance))
    check_fit(router, losses, balancer, None, 0)
    wide = [loss.name for loss in losses if loss.scope == "global"]
    if wide:
        raise ValueError(
            f'balance: expected losses of scope "micro" or "sequence" on attention experts, got {", ".join(wide)}. '
            'The counts of the global batch are kept for MoE layers only: use SwitchLoss(scope="micro"), or '
            "BiasBalance(), which counts the whole batch."
        )
    return losses, balancer


RoutedLayer: TypeAlias = MoE | Choice  # what monitor and repairs know


def routed_layers(model: nn.Module) -> dict[str, RoutedLayer]:
    """All that routes in any model, by name, in its order: MoE layers, and what chooses attention experts."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE | Choice)}
