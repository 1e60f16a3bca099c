"""ReLU routing: an expert is active where its logit is positive, and the logit is its weight (ReMoE, arXiv 2412.14711).

No top-k, so the router is continuous: an expert fades in and out. How many are active is up to a regulariser,
`SparsityLoss`, whose coefficient follows the sparsity that is reached. Training starts nearly dense: for about the
first hundred steps it costs up to E / k times what it costs later.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from equipoise.ops.router_linear import router_linear
from equipoise.routing.router import LinearRouter, Traits, check_k, normalized, refuse_bias
from equipoise.types import RoutingDecision


@dataclass(frozen=True)
class ReLURouting:
    """Configuration; needs `SparsityLoss()` in `balance`. k: experts per token to aim at, on average."""

    k: int = 2

    def __post_init__(self) -> None:
        check_k("ReLURouting", self.k)

    @property
    def traits(self) -> Traits:
        """Causal; the number of experts varies between tokens."""
        return Traits(takes_bias=False, ranks=False, fixed_k=False, needs_loss="sparsity")

    def build(self, dim: int, num_experts: int) -> ReLURouter:
        """The router module for inputs of size dim."""
        return ReLURouter(self, dim, num_experts)


class ReLURouter(LinearRouter):
    """The router of `ReLURouting`. Its only parameter is weight (E, D)."""

    def forward(self, x_TD: Tensor, bias_E: Tensor | None = None, token_ids_T: Tensor | None = None) -> RoutingDecision:
        """Decide. A bias is refused; token_ids_T is not used. One host synchronisation on a GPU."""
        refuse_bias("ReLURouting", bias_E, "which is the sign of the logit")
        logits_TE = router_linear(x_TD, self.weight)
        scores_TE = logits_TE.relu()
        mask_TE = scores_TE.detach() > 0
        return RoutingDecision.from_mask(mask_TE, scores_TE, probs_TE=normalized(scores_TE), logits_TE=logits_TE)
