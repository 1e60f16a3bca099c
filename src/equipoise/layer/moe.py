"""The Mixture-of-Experts layer: route, dispatch, experts, combine.

It knows no parallelism, no monitor and no training loop. Observers hook its `tap`, which sees what was decided;
balancing losses reach the gradient at the layer's output; balancers are updated by the loop, once per step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from equipoise.layer.admission import Admission, Capped, Dropless
from equipoise.layer.balance import adaptive_of, attach_losses, check_fit, check_zero_experts, coefs_of, sort_balance
from equipoise.layer.capacity import Capacity
from equipoise.layer.dispatch import Dispatched, Dispatcher, LocalDispatcher, UnderWay, whole_plan
from equipoise.layer.experts import BackendName, Experts, sort_for
from equipoise.layer.feed_forward import FeedForward
from equipoise.layer.mode import Bypass, InForce, Mode, in_force
from equipoise.layer.overflow import Fitted
from equipoise.layer.tap import Tap
from equipoise.layer.tokens import TokenView, tokens_of
from equipoise.layer.zero_experts import ZeroComputation, ZeroExperts
from equipoise.ops.ragged import RaggedPlan
from equipoise.routing.adaptive import Adaptive
from equipoise.routing.balancers import Balancer, BalancerConfig
from equipoise.routing.losses import BalanceLoss, LossInputs
from equipoise.routing.router import RouterConfig
from equipoise.routing.similarity import SimilarityLoss, check_similarity
from equipoise.routing.top_k import TopK, TopKRouter
from equipoise.types import BatchScope, DispatchPlan, Routed, RoutingDecision


class Adapting(Protocol):
    """A layer with state that adapts once per optimizer step."""

    @property
    def adaptive(self) -> tuple[Adaptive, ...]: ...  # noqa: D102 - described by the class


@dataclass(frozen=True, eq=False)
class Begun:
    """A forward whose tokens are on their way to the experts: between `MoE.begin` and `MoE.compute`."""

    view: TokenView
    force: InForce
    decision: RoutingDecision
    fitted: Fitted
    sent: Sequence[UnderWay[Dispatched]]


@dataclass(frozen=True, eq=False)
class Computed:
    """A forward whose results are on their way home: between `MoE.compute` and `MoE.finish`."""

    begun: Begun
    plan: DispatchPlan
    sums: Sequence[UnderWay[Tensor]]


class MoE(nn.Module):
    """A Mixture-of-Experts feed-forward layer.

    dim: D, model dim. hidden_dim: F, of each expert. num_experts: E.
    router: who decides; a config such as `TopK` or `Switch`, see `equipoise.routing.ROUTERS`.
    balance: any number of balancing losses, and at most one balancer.
    capacity: a limit per expert, or None for dropless.
    shared_experts: experts that every token uses besides; one block of hidden size shared_experts * F.
    shared_gate: weight the shared block with sigmoid(w x), as Qwen2-MoE does.
    activation: "swiglu", "gelu" or "clamped_swiglu". expert_bias, backend: see `Experts`.
    zero_experts: experts that compute nothing, beside the num_experts that do, or None. Router, balance and observers
    see all of them: the layer's own num_experts is E + Z.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        num_experts: int,
        *,
        router: RouterConfig = TopK(k=2),  # noqa: B008 - frozen
        balance: Iterable[BalanceLoss | BalancerConfig] = (),
        capacity: Capacity | None = None,
        shared_experts: int = 0,
        shared_gate: bool = False,
        activation: str = "swiglu",
        expert_bias: bool = False,
        backend: BackendName = "auto",
        zero_experts: ZeroExperts | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("hidden_dim", hidden_dim), ("num_experts", num_experts)):
            if value < 1:
                raise ValueError(f"MoE.{name}: expected at least 1, got {value}")
        if shared_gate and not shared_experts:
            raise ValueError("MoE.shared_gate: there is no shared expert to gate; set shared_experts=1 or more")
        num_choices = num_experts + (zero_experts.count if zero_experts else 0)
        self.num_experts, self.k = num_choices, router.k
        self.losses, balancer = sort_balance(tuple(balance))
        check_fit(router, self.losses, balancer, capacity, shared_experts)
        if zero_experts is not None:
            check_zero_experts(zero_experts, self.losses, balancer, capacity)
        self.router = router.build(dim, num_choices)
        if any(isinstance(loss, SimilarityLoss) for loss in self.losses):
            check_similarity(self.router.weight)
        self.balancer: Balancer | None = balancer.build(num_choices, router.k) if balancer else None
        self.coefs = coefs_of(self.losses, num_choices, router.k)
        uneven = zero_experts is not None and zero_experts.weight != 1
        shares = zero_experts.fair_shares(num_experts) if zero_experts is not None and uneven else None
        self.admission: Admission = Capped(capacity, shares) if capacity else Dropless()
        self.dispatcher: Dispatcher = LocalDispatcher(sort_for(backend))
        self.experts = Experts(num_experts, dim, hidden_dim, activation, backend, expert_bias)
        self.shared = FeedForward(dim, shared_experts * hidden_dim, activation) if shared_experts else None
        self.shared_gate = nn.Linear(dim, 1, bias=False) if shared_gate else None
        self.zero = ZeroComputation(dim, num_experts, zero_experts) if zero_experts else None
        self.expert_weights = zero_experts.loss_weights(num_experts) if zero_experts and uneven else None
        self.tap = Tap()
        self._force = InForce()
        self._adaptive = self.adaptive  # found once: a forward has no time to look

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The names of the balancing losses, as in `Routed.losses`."""
        return tuple(loss.name for loss in self.losses)

    @property
    def adaptive(self) -> tuple[Adaptive, ...]:
        """All state that adapts once per optimizer step: the balancer's, the router's own, coefficients."""
        return adaptive_of(self)

    def init_weights(self, std: float, output_std: float) -> None:
        """Draw all weights: std inside, output_std for what writes into the residual stream. Resets what adapts."""
        self.router.init_weights(std)
        self.experts.init_weights(std, output_std)
        if self.shared is not None:
            self.shared.init_weights(std, output_std)
        if self.shared_gate is not None:
            nn.init.normal_(self.shared_gate.weight, std=std)
        if self.zero is not None:
            self.zero.init_weights(std, output_std)
        for state in self.adaptive:
            state.reset()

    def forward(
        self,
        x: Tensor,
        *,
        token_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        scope: BatchScope | None = None,
    ) -> Tensor:
        """Same shape and dtype as x.

        x: (B, S, D), or (T, D) as one sequence. token_ids: int64, x's shape without D, for routers that hash them.
        padding_mask: bool, same shape, True where a position is padding: it is left out of everything, output 0.
        scope: see `BatchScope`; matters for balancing losses only.
        Raises ValueError for shapes that do not fit together.
        """
        begun = self.begin(x, token_ids=token_ids, padding_mask=padding_mask)
        return self.finish(self.compute(begun), scope=scope)

    def begin(self, x: Tensor, *, token_ids: Tensor | None = None, padding_mask: Tensor | None = None) -> Begun:
        """Decide, and send the tokens on their way to the experts. Arguments as of `forward`."""
        force = self._force  # read once: a repair may replace it while this forward runs
        view = tokens_of(x, padding_mask, token_ids)
        decision = self.route(view, force)
        fitted = (force.admission or self.admission).admit(decision, self.training)
        to_compute = fitted if self.zero is None else self.zero.split(fitted)
        return Begun(view, force, decision, fitted, self.dispatcher.dispatch(view.x_TD, to_compute))

    def compute(self, begun: Begun) -> Computed:
        """What this rank's experts have to do, chunk by chunk as they come, each sent on its way home at once."""
        plans: list[RaggedPlan] = []
        sums: list[UnderWay[Tensor]] = []
        for sent in begun.sent:
            there: Dispatched = sent.wait()
            plans.append(there.plan)
            sums.append(there.combine(self.experts(there.rows, there.plan)))
        return Computed(begun, whole_plan(plans), sums)

    def finish(self, computed: Computed, *, scope: BatchScope | None = None, shared_x: Tensor | None = None) -> Tensor:
        """The layer's output. scope: as of `forward`. shared_x: what the shared experts read, in place of x."""
        begun, plan, force = computed.begun, computed.plan, computed.begun.force
        view, decision, spilled_T = begun.view, begun.decision, begun.fitted.spilled_T
        shared_TD: Tensor | None = None
        if self.shared is not None:  # before the wait: results may still be on their way home
            own_TD = view.x_TD if shared_x is None else view.pick(shared_x)
            shared_TD = self._shared(own_TD, spilled_T if force.dense is None else None)
        parts = [sums.wait() for sums in computed.sums]
        y_TD = parts[0] if len(parts) == 1 else torch.cat(parts)
        if shared_TD is not None:
            y_TD = y_TD + shared_TD
        if self.zero is not None:
            y_TD = y_TD + self.zero(view.x_TD, begun.fitted)
        if force.dense is not None and spilled_T is not None:
            y_TD = y_TD + spilled_T.to(y_TD.dtype)[:, None] * force.dense(view.x_TD).to(y_TD.dtype)
        if self.training:  # also without gradients: reentrant checkpointing starts so
            for state in self._adaptive:
                state.observe(decision, plan.drops)
        losses: Mapping[str, Tensor] = {}
        if self.training and torch.is_grad_enabled():
            y_TD, losses = self._attach_losses(y_TD, decision, view, scope or BatchScope(), force.mode.boost)
        self.tap(Routed(decision, plan, losses, spilled_T))
        return view.restore(y_TD)

    def route(self, view: TokenView, force: InForce) -> RoutingDecision:
        """The router's decision, under the biases of the balancer and of a repair, if there are any."""
        bias_E = None if self.balancer is None else self.balancer.bias_E
        if force.bias_E is not None:
            bias_E = force.bias_E.to(view.x_TD.device) + (0.0 if bias_E is None else bias_E)
        if force.router is not None:
            return force.router(view.x_TD, None, view.token_ids_T)  # type: ignore[no-any-return]  # nn.Module's
        decision: RoutingDecision = self.router(view.x_TD, bias_E, view.token_ids_T)
        return decision

    @property
    def mode(self) -> Mode:
        """How the layer departs from its configuration at the moment, for a repair."""
        return self._force.mode

    @property
    def dense(self) -> FeedForward | None:
        """What stands in for the experts in this mode, if it is not the shared experts."""
        return self._force.mode_dense

    @property
    def bypass(self) -> Bypass:
        """What a breaker keeps from the experts at the moment, on top of the mode."""
        return self._force.bypass

    def set_mode(self, mode: Mode, dense: FeedForward | None = None) -> None:
        """Replace the mode, from the next forward on. `NORMAL` is the layer as configured. Not part of the state dict.

        dense: what computes what is kept from the experts; without it the shared experts do. It is not trained.
        Raises ValueError, and changes nothing, for a mode that this layer can't take.
        """
        force = in_force(mode, self.router, self.num_experts, dense, self.shared is not None, self.bypass)
        if self.balancer is not None:
            self.balancer.boost = mode.boost
        if isinstance(self.router, TopKRouter):
            self.router.temperature_in_force = mode.temperature
        self._force = force

    def set_bypass(self, bypass: Bypass) -> None:
        """Replace what is kept from the experts on top of the mode, whatever that is, from the next forward on.

        Not part of the state dict. Raises ValueError, and changes nothing, for one that this layer can't take.
        """
        self._force = in_force(self.mode, self.router, self.num_experts, self.dense, self.shared is not None, bypass)

    def _shared(self, x_TD: Tensor, spilled_T: Tensor | None) -> Tensor:
        """The shared experts' part; spilled_T: weight that they take over from experts that were full."""
        assert self.shared is not None
        y_TD: Tensor = self.shared(x_TD)
        own_T1 = None if self.shared_gate is None else self.shared_gate(x_TD).sigmoid()
        if spilled_T is not None:
            own_T1 = (1.0 if own_T1 is None else own_T1) + spilled_T.to(y_TD.dtype)[:, None]
        return y_TD if own_T1 is None else y_TD * own_T1

    def _attach_losses(
        self, y_TD: Tensor, decision: RoutingDecision, view: TokenView, scope: BatchScope, boost: float
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """(output with the losses attached, losses for observers)."""
        if not self.losses:
            return y_TD, {}
        inputs = LossInputs(
            decision,
            view.sequence_ids_T,
            view.num_sequences,
            self.k,
            self.router.weight,
            scope.counts,
            self.expert_weights,
        )
        return attach_losses(y_TD, self.losses, self.coefs, inputs, scope.step, scope.share * boost)


def moe_layers(model: nn.Module) -> dict[str, MoE]:
    """The MoE layers of any model, by name, in its order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoE)}


@torch.no_grad()
def reduce_and_update(
    layers: Iterable[Adapting], reduce: Callable[[Tensor], None] | None = None, *, step: int = 0
) -> None:
    """Update what adapts in each layer, its balancer above all: call once after each optimizer step.

    reduce: sums a tensor over data-parallel ranks, in place; None on one rank. step: for rates that follow a schedule.
    """
    for layer in layers:
        for state in layer.adaptive:
            if reduce is not None:
                reduce(state.pending)
            state.update(step)
