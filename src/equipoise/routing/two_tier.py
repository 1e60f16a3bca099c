"""Two-tier routing: first a group of experts for the token, then its k best experts within that group.

With one group per device a token crosses to one device only, whatever k is. The first tier is a hash of the token id,
or learned: the hierarchical mixture of arXiv 1701.06538 appendix B with one group, whose probabilities multiply.
`TopK(num_groups=..., top_groups=...)` is the variant that scores groups by their experts (DeepSeek-V3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from equipoise.ops.router_linear import router_linear
from equipoise.routing.hash_tables import random_table
from equipoise.routing.router import Router, Traits, check_k, init_linear, refuse_bias
from equipoise.types import Preferences, RoutingDecision


@dataclass(frozen=True)
class TwoTier:
    """One of num_groups groups of neighbouring experts by `first`, then the softmax top-k within it.

    k: experts per token, all in one group. first: "learned" is the group with the largest logit of a second linear
        router, and a token's weights are multiplied with the group's probability. "hash" is a random table over
        vocab_size token ids, drawn with `seed`; the weights of k >= 2 then sum to 1.
    A `BiasBalance` moves the choice within the group, and of the group by the mean bias of its experts. With "hash" the
    groups' loads are what the token ids make them, and a bias is refused: it would chase them and not settle.
    """

    k: int = 2
    num_groups: int = 2
    first: Literal["learned", "hash"] = "learned"
    vocab_size: int = 65_536
    seed: int = 0

    def __post_init__(self) -> None:
        check_k("TwoTier", self.k)
        if self.num_groups < 1 or self.vocab_size < 1:
            raise ValueError(
                f"TwoTier: expected num_groups and vocab_size of at least 1, got {self.num_groups}, {self.vocab_size}"
            )
        if self.first not in ("learned", "hash"):
            raise ValueError(f"TwoTier.first: expected learned or hash, got {self.first!r}")

    @property
    def traits(self) -> Traits:
        """Token choice; reads token ids when the first tier hashes them."""
        hashed = self.first == "hash"
        return Traits(
            takes_bias=not hashed,
            free_choice=False,
            needs_token_ids=hashed,
            num_token_ids=self.vocab_size if hashed else None,
            weights_sum_to=1.0 if hashed and self.k > 1 else None,
        )

    def build(self, dim: int, num_experts: int) -> TwoTierRouter:
        """The router module for inputs of size dim. Raises ValueError when the groups are too small."""
        if num_experts % self.num_groups:
            raise ValueError(
                f"TwoTier.num_groups: expected a divisor of num_experts = {num_experts}, got {self.num_groups}"
            )
        if self.k > num_experts // self.num_groups:
            raise ValueError(
                f"TwoTier.k: expected at most the {num_experts // self.num_groups} experts of a group, got {self.k}; "
                "lower k or num_groups"
            )
        return TwoTierRouter(self, dim, num_experts)


class TwoTierRouter(Router):
    """The router of `TwoTier`: weight (E, D), and group_weight (G, D) or the buffer groups_V for the first tier."""

    weight: Tensor
    groups_V: Tensor

    def __init__(self, config: TwoTier, dim: int, num_experts: int) -> None:
        super().__init__()
        self.config, self.group_size = config, num_experts // config.num_groups
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.group_weight = None
        if config.first == "learned":
            self.group_weight = nn.Parameter(torch.empty(config.num_groups, dim))
        else:
            self.register_buffer("groups_V", torch.empty(config.vocab_size, dtype=torch.int64))
        self.init_weights(0.02)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Draw the weights, and a hash table by the config's seed."""
        config = self.config
        init_linear(self.weight, std)
        if self.group_weight is not None:
            init_linear(self.group_weight, std)
        else:
            self.groups_V.copy_(random_table(config.vocab_size, config.num_groups, 1, config.seed)[:, 0])

    def forward(self, x_TD: Tensor, bias_E: Tensor | None = None, token_ids_T: Tensor | None = None) -> RoutingDecision:
        """Decide. bias_E (E,) fp32 is added for the selection only. token_ids_T: int64, needed for a hash tier."""
        config = self.config
        if self.group_weight is None:
            refuse_bias("TwoTier", bias_E, "whose groups are hashed")
        logits_TE = router_linear(x_TD, self.weight)
        within_TGe = logits_TE.view(-1, config.num_groups, self.group_size).log_softmax(-1)
        if self.group_weight is None:
            group_T1, joint_TGe = self._hashed(token_ids_T), within_TGe
        else:
            group_log_TG = router_linear(x_TD, self.group_weight).log_softmax(-1)
            group_T1 = _best_group(group_log_TG, bias_E)
            joint_TGe = group_log_TG.unsqueeze(-1) + within_TGe
        chosen_TG1 = (torch.arange(config.num_groups, device=x_TD.device) == group_T1).unsqueeze(-1)
        selection_TE = joint_TGe.flatten(1)
        probs_TE = selection_TE.exp()
        if self.group_weight is None:  # the other groups are out of the token's reach
            probs_TE = probs_TE * chosen_TG1.expand_as(within_TGe).flatten(1)
        ranking_TE = selection_TE.detach() if bias_E is None else selection_TE.detach() + bias_E
        ranking_TE = ranking_TE.masked_fill(~chosen_TG1.expand_as(within_TGe).flatten(1), float("-inf"))
        sums = config.first == "hash" and config.k > 1
        preferences = Preferences(ranking_TE, selection_TE if sums else probs_TE, "softmax" if sums else "raw")
        ids_TK = ranking_TE.topk(config.k, dim=-1).indices
        return RoutingDecision.from_topk(
            ids_TK,
            preferences.weights(ids_TK),
            probs_TE=probs_TE,
            logits_TE=logits_TE,
            selection_TE=selection_TE,
            preferences=preferences,
        )

    def _hashed(self, token_ids_T: Tensor | None) -> Tensor:
        if token_ids_T is None:
            raise ValueError("TwoTier: a hashed first tier needs token ids; call the layer with token_ids=")
        return self.groups_V.index_select(0, token_ids_T).unsqueeze(1)


def _best_group(group_log_TG: Tensor, bias_E: Tensor | None) -> Tensor:
    """int64 (T, 1): the group with the largest logit; a bias counts with the mean over the group's experts."""
    worth_TG = group_log_TG.detach()
    if bias_E is not None:
        worth_TG = worth_TG + bias_E.view(worth_TG.shape[1], -1).mean(-1)
    return worth_TG.argmax(-1, keepdim=True)
