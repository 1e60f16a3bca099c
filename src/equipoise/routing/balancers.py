"""Balancers: a bias on the selection scores, moved once per optimizer step against the load. No gradient involved.

The rules are pure functions. A balancer module holds the state (buffers, fp32, zero-centred, in checkpoints), sees
each real forward once, and is updated from counts summed over micro-batches and ranks. Never in eval.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from equipoise.ops.count import accumulate_counts
from equipoise.ops.histogram import NUM_BINS, accumulate_values, upper_quantile
from equipoise.routing.adaptive import Adaptive
from equipoise.routing.schedules import Schedule, value_at
from equipoise.types import RoutingDecision


class Balancer(Adaptive):
    """A selection bias that adapts: bias_E, fp32 (E,), zero-centred. boost: steps count so many times, for a repair."""

    bias_E: Tensor
    boost: float = 1.0


@runtime_checkable
class BalancerConfig(Protocol):
    """A frozen dataclass that says which balancer, with which options.

    needs_free_choice: it works for routers with `Traits.free_choice` only.
    """

    needs_free_choice: ClassVar[bool]

    def build(self, num_experts: int, top_k: int) -> Balancer:
        """The balancer module for one layer."""
        ...


def bias_step(counts_E: Tensor, rate: float, rule: Literal["sign", "proportional"]) -> Tensor:
    """The change of the bias (E,) fp32, zero-centred. With v_e = (mean(c) - c_e) / mean(c):

    sign: rate * sign(v) (arXiv 2408.15664 algorithm 1). proportional: rate * v (its section 4.3, normalised by the
    mean load, so that the rate does not depend on the batch size).
    Centred, because steps of +-rate need not sum to zero and the common part would drift for ever.
    """
    violation_E = violation(counts_E)
    step_E = rate * (violation_E.sign() if rule == "sign" else violation_E)
    return step_E - step_E.mean()


def violation(counts_E: Tensor) -> Tensor:
    """(mean(c) - c) / mean(c), fp32 (E,): positive for starved experts; zeros when nothing was counted."""
    counts_E = counts_E.to(torch.float64)
    mean = counts_E.mean()
    return ((mean - counts_E) / mean.clamp_min(1e-12) * (mean > 0)).float()


def smooth_step(
    counts_E: Tensor, momentum_E: Tensor, rate: float, kappa: float = 2.0, beta: float = 0.5
) -> tuple[Tensor, Tensor]:
    """(change of the bias, new momentum): d = rate * tanh(kappa v), centred, then averaged with factor beta.

    Converges where sign steps keep hopping (SMEBU, arXiv 2602.17004).
    """
    step_E = rate * torch.tanh(kappa * violation(counts_E))
    momentum_E = beta * momentum_E + (1 - beta) * (step_E - step_E.mean())
    return momentum_E, momentum_E


def quantile_thresholds(scores_TE: Tensor, bias_E: Tensor, k: int) -> Tensor:
    """alpha (T, 1): the (k+1)-th largest of a token's biased scores: what an expert must beat to be selected."""
    return (scores_TE + bias_E).topk(k + 1, dim=-1).values[:, -1:]


def quantile_bias(scores_TE: Tensor, bias_E: Tensor, k: int) -> Tensor:
    """One step of quantile balancing (kexue.fm/11619): the bias (E,) that gives every expert its fair T K / E tokens.

    With alpha_t what an expert must beat at token t (`quantile_thresholds`), beta_e is the (q+1)-th largest over
    tokens of s_te - alpha_t, q = T k / E; the bias is -beta, zero-centred. Exact, by sorting T x E numbers; the
    balancer uses a histogram of the same numbers instead.
    """
    T, E = scores_TE.shape
    margin_TE = scores_TE - quantile_thresholds(scores_TE, bias_E, k)
    beta_E = margin_TE.sort(dim=0, descending=True).values[min(T * k // E, T - 1)]
    return beta_E.mean() - beta_E


@dataclass(frozen=True)
class BiasBalance:
    """Auxiliary-loss-free balancing (arXiv 2408.15664).

    rate: how far the bias moves per step, in units of what it is added to; a number or a schedule. 1e-3 is the
    paper's, for sigmoid scores; on the logits of a softmax router (`TopK.bias_on`), whose spread is about 1, take 1e-2.
    DeepSeek-V3 ends with a rate of 0: HighThenLow(1e-3, 0.0, hold=...), or `BiasBalancer.freeze`.
    rule: "sign", "proportional" or "smooth" (see `bias_step`, `smooth_step`).
    """

    needs_free_choice: ClassVar[bool] = False
    rate: float | Schedule = 1e-3
    rule: Literal["sign", "proportional", "smooth"] = "sign"

    def __post_init__(self) -> None:
        if isinstance(self.rate, int | float) and self.rate < 0:
            raise ValueError(f"BiasBalance.rate: expected 0 or more, got {self.rate}")
        if self.rule not in ("sign", "proportional", "smooth"):
            raise ValueError(f"BiasBalance.rule: expected sign, proportional or smooth, got {self.rule!r}")

    def build(self, num_experts: int, top_k: int) -> BiasBalancer:
        """The balancer module for one layer."""
        return BiasBalancer(self, num_experts)


class BiasBalancer(Balancer):
    """State of `BiasBalance`: bias_E and momentum_E (fp32, saved), pending_E (counts since the last update)."""

    momentum_E: Tensor
    pending_E: Tensor

    def __init__(self, config: BiasBalance, num_experts: int) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("momentum_E", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("pending_E", torch.zeros(num_experts, dtype=torch.int64), persistent=False)

    def start(self) -> None:
        """No bias."""

    @property
    def pending(self) -> Tensor:
        """int64 (E,): assignments since the last update."""
        return self.pending_E

    def observe(self, decision: RoutingDecision, drops: Mapping[str, Tensor] | None = None) -> None:
        """Count the decision's assignments (once, also when the forward is recomputed)."""
        accumulate_counts(self.pending_E, decision.expert_ids_N)

    def advance(self, step: int) -> None:
        """Move the bias against the counted load."""
        rate, rule = self.boost * value_at(self.config.rate, step), self.config.rule
        if rule == "smooth":
            step_E, momentum_E = smooth_step(self.pending_E, self.momentum_E, rate)
            self.momentum_E.copy_(momentum_E)
        else:
            step_E = bias_step(self.pending_E, rate, rule)
        self.bias_E.add_(step_E)


@dataclass(frozen=True)
class QuantileBalance:
    """Quantile balancing (kexue.fm/11619): each step sets the bias to what would have balanced the step before.

    No rate to tune, balanced within a few steps even from a saturated router, which no loss can rescue. The bias is
    one step old, so the load of single steps fluctuates; `ema` in [0, 1) averages the bias over steps.
    on_demand: wait, with a bias of zero, until `QuantileBalancer.activate` is called: a repair held ready.
    """

    needs_free_choice: ClassVar[bool] = True
    ema: float = 0.0
    on_demand: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.ema < 1:
            raise ValueError(f"QuantileBalance.ema: expected a value in [0, 1), got {self.ema}")

    def build(self, num_experts: int, top_k: int) -> QuantileBalancer:
        """The balancer module for one layer. Raises ValueError when every expert is selected anyway."""
        if top_k >= num_experts:
            raise ValueError(
                f"QuantileBalance: needs k < num_experts, got k = {top_k} of {num_experts}: every token takes every "
                "expert, there is nothing to balance; remove it"
            )
        return QuantileBalancer(self, num_experts, top_k)


class QuantileBalancer(Balancer):
    """State of `QuantileBalance`: bias_E and active (saved), a histogram of margins since the last update."""

    active: Tensor
    pending_EC: Tensor

    def __init__(self, config: QuantileBalance, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.config = config
        self.top_k = top_k
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32))
        self.register_buffer("active", torch.tensor(not config.on_demand))
        self.register_buffer("pending_EC", torch.zeros(num_experts, NUM_BINS, dtype=torch.int64), persistent=False)

    def start(self) -> None:
        """No bias, active unless on_demand."""
        self.active.fill_(not self.config.on_demand)

    @property
    def pending(self) -> Tensor:
        """int64 (E, bins): margins since the last update."""
        return self.pending_EC

    def activate(self) -> None:
        """Start to balance at the next update."""
        self.active.fill_(True)

    def observe(self, decision: RoutingDecision, drops: Mapping[str, Tensor] | None = None) -> None:
        """Add the decision's biased margins to the histogram (once, also when the forward is recomputed).

        Biased, because the histogram is fine near zero alone: once the bias is nearly right, so are its corrections,
        however far it has to be from zero to hold down a saturated expert.
        """
        selection_TE = decision.selection_TE.detach().float()
        margin_TE = selection_TE + self.bias_E - quantile_thresholds(selection_TE, self.bias_E, self.top_k)
        accumulate_values(self.pending_EC, margin_TE)

    def advance(self, step: int) -> None:
        """Set the bias from the margins of this step. Does nothing before activation."""
        num_tokens = self.pending_EC[0].sum()
        beta_E = upper_quantile(self.pending_EC, num_tokens * self.top_k / len(self.bias_E)) - self.bias_E
        target_E = beta_E.mean() - beta_E
        moved_E = torch.lerp(target_E, self.bias_E, self.config.ema)
        self.bias_E.copy_(torch.where(self.active & (num_tokens > 0), moved_E, self.bias_E))
