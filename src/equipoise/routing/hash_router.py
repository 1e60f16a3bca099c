"""Hash routing: a fixed table says which experts a token id goes to (arXiv 2106.04426).

Nothing to learn about who goes where, so nothing that could collapse; but nothing that could balance either: one
frequent id is one expert's load. Weights are equal, or learned scores as in the first layers of DeepSeek-V4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from equipoise.ops.router_linear import router_linear
from equipoise.routing.hash_tables import balanced_table, random_table
from equipoise.routing.router import Router, Traits, check_k, init_linear, normalized, refuse_bias
from equipoise.types import Preferences, RoutingDecision


@dataclass(frozen=True)
class Hash:
    """Token id v goes to the k distinct experts table[v].

    vocab_size: ids that may come. k: experts per token.
    table: "random", or "balanced", which deals ids to the least loaded experts from the most frequent one down and
        needs their frequencies: call `HashRouter.fit` before training (`equipoise train` does).
    weights: "equal" is 1/k each. "learned" is the sigmoid of a linear router's logits for the chosen experts, divided
        by their sum (DeepSeek-V4); refused for k = 1, where it is the constant 1.
    scale: the weights are multiplied with it. seed: of the random table.
    """

    vocab_size: int = 65_536
    k: int = 1
    table: Literal["random", "balanced"] = "random"
    weights: Literal["equal", "learned"] = "equal"
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_k("Hash", self.k)
        if self.vocab_size < 1:
            raise ValueError(f"Hash.vocab_size: expected at least 1, got {self.vocab_size}")
        if not self.scale > 0:
            raise ValueError(f"Hash.scale: expected more than 0, got {self.scale}")
        for name, known in (("table", ("random", "balanced")), ("weights", ("equal", "learned"))):
            if getattr(self, name) not in known:
                raise ValueError(f"Hash.{name}: expected {known[0]} or {known[1]}, got {getattr(self, name)!r}")
        if self.k == 1 and self.weights == "learned":
            raise ValueError(
                'Hash.weights: "learned" with k=1 is the constant 1, and its router gets no gradient; use "equal"'
            )

    @property
    def traits(self) -> Traits:
        """Needs token ids; no bias moves it."""
        return Traits(
            takes_bias=False,
            ranks=False,
            needs_token_ids=True,
            num_token_ids=self.vocab_size,
            weights_sum_to=self.scale,
        )

    def build(self, dim: int, num_experts: int) -> HashRouter:
        """The router module for inputs of size dim."""
        return HashRouter(self, dim, num_experts)


class HashRouter(Router):
    """The router of `Hash`: table_VK, int64, saved in checkpoints; weight (E, D) for learned weights, else None."""

    table_VK: Tensor

    def __init__(self, config: Hash, dim: int, num_experts: int) -> None:
        super().__init__()
        check_k("Hash", config.k, num_experts)
        self.config, self.num_experts = config, num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, dim)) if config.weights == "learned" else None
        self.register_buffer("table_VK", torch.empty(config.vocab_size, config.k, dtype=torch.int64))
        self.fitted = False
        # A saved table is the one that was trained with.
        self.register_load_state_dict_post_hook(_mark_fitted)  # type: ignore[no-untyped-call]  # torch's
        self.init_weights(0.02)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Draw the weight of learned weights, and the table by the config's seed; a balanced one waits for `fit`."""
        config = self.config
        self.table_VK.copy_(random_table(config.vocab_size, self.num_experts, config.k, config.seed))
        self.fitted = config.table == "random"
        if self.weight is not None:
            init_linear(self.weight, std)

    @torch.no_grad()
    def fit(self, frequencies_V: Tensor) -> None:
        """Balance the table over how often each token id occurs: counts or shares, (V,). Raises ValueError."""
        if frequencies_V.shape != (self.config.vocab_size,):
            raise ValueError(
                f"Hash: expected the frequencies of vocab_size = {self.config.vocab_size} token ids, got shape "
                f"{tuple(frequencies_V.shape)}"
            )
        self.table_VK.copy_(balanced_table(frequencies_V, self.num_experts, self.config.k))
        self.fitted = True

    def forward(self, x_TD: Tensor, bias_E: Tensor | None = None, token_ids_T: Tensor | None = None) -> RoutingDecision:
        """Look up. token_ids_T: int64 in [0, vocab_size), needed. A bias is refused."""
        refuse_bias("Hash", bias_E, "which is a fixed table")
        if token_ids_T is None:
            raise ValueError("Hash: needs token ids to look up; call the layer with token_ids=")
        if not self.fitted:
            raise ValueError(
                'Hash.table: "balanced" needs the frequencies of the token ids; call router.fit(frequencies_V) before '
                'training, or use table="random"'
            )
        config, k = self.config, self.config.k
        ids_TK = self.table_VK.index_select(0, token_ids_T)  # unlike [], it takes no negative id for one from the end
        if self.weight is None:
            dtype = torch.promote_types(x_TD.dtype, torch.float32)
            chosen_TE = torch.zeros(len(x_TD), self.num_experts, dtype=dtype, device=x_TD.device)
            chosen_TE.scatter_(1, ids_TK, 1.0)
            weights_TK = torch.full_like(ids_TK, config.scale / k, dtype=dtype)
            return RoutingDecision.from_topk(ids_TK, weights_TK, probs_TE=chosen_TE / k, logits_TE=chosen_TE)
        logits_TE = router_linear(x_TD, self.weight)
        scores_TE = logits_TE.sigmoid()
        weigh = Preferences(logits_TE.detach(), scores_TE, "sum", config.scale)
        return RoutingDecision.from_topk(
            ids_TK, weigh.weights(ids_TK), probs_TE=normalized(scores_TE), logits_TE=logits_TE
        )


def _mark_fitted(router: nn.Module, keys: Any) -> None:
    assert isinstance(router, HashRouter)
    router.fitted = router.fitted or not any(key.endswith("table_VK") for key in keys.missing_keys)
