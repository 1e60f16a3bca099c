"""Zero-computation experts beside ordinary ones in one router: nothing, the token itself, or a learned constant.

MoE++ (arXiv 2410.07348); identity experts alone are LongCat-Flash's (arXiv 2509.01322). A token that chooses them uses
fewer of the experts that compute, so how much is computed varies by token. They have the ids after the others', E to
E + Z - 1, and no rows: nothing of theirs is dispatched. Two things of MoE++ are not here: residuals between
the routers of consecutive layers, and a zero expert's weight handed to the token's other experts, as its code does
(`SkyworkAI/MoE-plus-plus:MoE++/moe_plus_plus_layer.py`); here the weight is spent on nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from equipoise.layer.overflow import Fitted


@dataclass(frozen=True, kw_only=True)
class ZeroExperts:
    """How many of each kind: `zero` give 0, `copy` give x, `constant` give a1 x + a2 v, (a1, a2) = softmax(W x).

    weight: tau of MoE++, in (0, 1]: what a zero-computation expert counts in the balancing loss, where others count 1.
    At the balance that the loss asks for it has 1 / tau times the load of another expert; capacities are in the same
    ratio. 1 is the same load for all, LongCat-Flash's aim; MoE++ has 0.75.
    """

    zero: int = 1
    copy: int = 1
    constant: int = 0
    weight: float = 1.0

    def __post_init__(self) -> None:
        if min(self.zero, self.copy, self.constant) < 0 or self.count == 0:
            raise ValueError(
                f"ZeroExperts: expected 0 or more of each kind and at least 1 of any, got zero={self.zero}, "
                f"copy={self.copy}, constant={self.constant}. Without any, leave zero_experts=None."
            )
        if not 0 < self.weight <= 1:
            raise ValueError(
                f"ZeroExperts.weight: expected more than 0 and at most 1, got {self.weight}. Less than 1 sends more "
                "tokens to zero-computation experts; MoE++ has 0.75."
            )

    @property
    def count(self) -> int:
        """Z, of all kinds."""
        return self.zero + self.copy + self.constant

    def parameters(self, dim: int) -> int:
        """Of one layer: v and two rows of W for each constant."""
        return 3 * self.constant * dim

    def flops(self, dim: int) -> int:
        """Of one token in one layer, products alone: W x and the sum over v, for all constants, chosen or not."""
        return 6 * self.constant * dim

    def loss_weights(self, num_experts: int) -> tuple[float, ...]:
        """E + Z numbers: what each expert counts in a balancing loss."""
        return (1.0,) * num_experts + (self.weight,) * self.count

    def fair_shares(self, num_experts: int) -> tuple[float, ...]:
        """E + Z numbers, sum 1: the load shares at which all experts count the same in the balancing loss."""
        unit = 1 / (self.weight * num_experts + self.count)
        return (self.weight * unit,) * num_experts + (unit,) * self.count


class ZeroComputation(nn.Module):
    """What the zero-computation experts of one layer add to each token. forward(x_TD, fitted) -> (T, D)."""

    def __init__(self, dim: int, num_experts: int, config: ZeroExperts) -> None:
        super().__init__()
        self.num_experts, self.config = num_experts, config
        self.values = nn.Parameter(torch.empty(config.constant, dim)) if config.constant else None
        self.mix = nn.Parameter(torch.empty(2 * config.constant, dim)) if config.constant else None

    def init_weights(self, std: float, output_std: float) -> None:
        """Constants begin as small vectors, and half of what they give as the token."""
        if self.values is not None and self.mix is not None:
            nn.init.normal_(self.values, std=output_std)
            nn.init.normal_(self.mix, std=std)

    def split(self, fitted: Fitted) -> Fitted:
        """What is left for the experts that compute: the same decision, without the others' assignments."""
        computes_N = fitted.decision.expert_ids_N < self.num_experts
        keep_N = computes_N if fitted.keep_N is None else computes_N & fitted.keep_N
        return replace(fitted, keep_N=keep_N, num_computing=self.num_experts)

    def forward(self, x_TD: Tensor, fitted: Fitted) -> Tensor:
        """The weighted sum over each token's zero-computation experts that were kept."""
        config, decision = self.config, fitted.decision
        slots_N = decision.expert_ids_N - self.num_experts
        here_N = slots_N >= 0 if fitted.keep_N is None else (slots_N >= 0) & fitted.keep_N
        weights_TZ = decision.weights_N.new_zeros(len(x_TD), config.count).index_put(
            (decision.token_ids_N, slots_N.clamp(min=0)),
            decision.weights_N.masked_fill(~here_N, 0.0),
            accumulate=True,
        )
        weights_TZ = weights_TZ.to(x_TD.dtype)
        copies_TZ, constants_TZ = weights_TZ[:, config.zero :].tensor_split([config.copy], dim=1)
        of_x_T, y_TD = copies_TZ.sum(1), torch.zeros_like(x_TD)
        if self.values is not None and self.mix is not None:
            shares_TZ2 = (x_TD @ self.mix.t().to(x_TD.dtype)).view(-1, config.constant, 2).softmax(-1)
            of_x_T = of_x_T + (constants_TZ * shares_TZ2[..., 0]).sum(1)
            y_TD = (constants_TZ * shares_TZ2[..., 1]) @ self.values.to(x_TD.dtype)
        return y_TD + of_x_T[:, None] * x_TD


def computing_per_token(counts_E: Tensor, num_experts: int, num_tokens: int) -> float:
    """How many computing experts a token used on average: the first num_experts of the monitor's counts, per token.

    Times an expert's FLOPs it is what a token's experts cost. Raises ValueError without tokens.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens: expected at least 1, got {num_tokens}. Wait for a window with tokens.")
    return float(counts_E[:num_experts].sum()) / num_tokens
