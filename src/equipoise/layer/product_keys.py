"""PEER: very many experts of a single neuron each, found by product keys.

arXiv 2407.04153, algorithm 1; product keys are arXiv 1907.05242's, section 3.2. Expert i n + j of N = n^2 has the key
(first_i, second_j), so its score is the sum of two, and the k best of all N are among the k best first times the k best
second keys: h heads cost h (2 n d + k^2), not h N d. The papers normalise queries over the batch; here each query is
normalised by itself, or not at all: over the batch, a token's experts would depend on the other tokens, also on later
ones, and decoding would not be what prefilling is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from equipoise.layer.tap import Tap
from equipoise.layer.tokens import tokens_of
from equipoise.ops.activation import activate
from equipoise.ops.count import count_assignments
from equipoise.types import BatchScope, ProductDecision, Routed


@dataclass(frozen=True, kw_only=True)
class Peer:
    """The PEER layers of a decoder; all of them are alike.

    num_experts: N, a square. heads: h, queries per token, each with sub-keys of its own; the experts are the same.
    k: experts per head. key_dim: d, of a sub-key; None is half the model dim. query_norm: layer norm of each query.
    """

    num_experts: int
    heads: int = 8
    k: int = 16
    key_dim: int | None = None
    query_norm: bool = True

    def __post_init__(self) -> None:
        for name in ("num_experts", "heads", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"Peer.{name}: expected at least 1, got {getattr(self, name)}.")
        if self.num_keys**2 != self.num_experts:
            raise ValueError(
                f"Peer.num_experts: expected a square, for two sets of sub-keys, got {self.num_experts}. "
                f"Take {self.num_keys**2} or {(self.num_keys + 1) ** 2}."
            )
        if self.k > self.num_keys:
            raise ValueError(
                f"Peer.k: expected at most the square root of num_experts, {self.num_keys}, got {self.k}. The k best "
                "of each half are kept first: lower k, or raise num_experts."
            )
        if self.key_dim is not None and self.key_dim < 1:
            raise ValueError(f"Peer.key_dim: expected at least 1, or None for half of dim, got {self.key_dim}.")

    @property
    def num_keys(self) -> int:
        """n, sub-keys in each half."""
        return math.isqrt(self.num_experts)

    def width(self, dim: int) -> int:
        """What `key_dim` comes to."""
        return max(1, dim // 2) if self.key_dim is None else self.key_dim

    def parameters(self, dim: int) -> int:
        """Of one layer: experts 2 N D, queries 2 h d D, keys 2 h n d, norm 4 d."""
        return 2 * self.num_experts * dim + self._to_find(dim)

    def active_parameters(self, dim: int) -> int:
        """Those that one token uses: 2 h k D of the experts, and all that finds them."""
        return 2 * self.heads * self.k * dim + self._to_find(dim)

    def _to_find(self, dim: int) -> int:
        d = self.width(dim)
        return 2 * self.heads * d * (dim + self.num_keys) + (4 * d if self.query_norm else 0)

    def flops(self, dim: int) -> int:
        """Of one token in one layer, forward, products alone: queries 4 h d D, keys 4 h n d, experts 4 h k D."""
        d = self.width(dim)
        return 4 * self.heads * (d * dim + self.num_keys * d + self.k * dim)


class ProductKeys(nn.Module):
    """Finds each query's experts. Its arithmetic is fp32 (fp64 for fp64 inputs) under any autocast."""

    def __init__(self, dim: int, config: Peer) -> None:
        super().__init__()
        self.config, d = config, config.width(dim)
        self.query = nn.Linear(dim, config.heads * 2 * d, bias=False)
        self.norm = nn.LayerNorm(2 * d) if config.query_norm else None
        self.keys = nn.Parameter(torch.empty(2 * config.heads, config.num_keys, d))

    def init_weights(self, std: float) -> None:
        """Keys have unit length on average, so that scores of normed queries are about standard normal."""
        nn.init.normal_(self.query.weight, std=std)
        nn.init.normal_(self.keys, std=self.keys.shape[2] ** -0.5)
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(self, x_TD: Tensor) -> ProductDecision:
        """The k experts of each of the T h queries, head by head within a token, and what they weigh."""
        heads, k, n = self.config.heads, self.config.k, self.config.num_keys
        first_Qn, second_Qn = self.scores(x_TD)
        first_Qk, i_Qk = first_Qn.topk(k, dim=-1)
        second_Qk, j_Qk = second_Qn.topk(k, dim=-1)
        both_QC = (first_Qk[:, :, None] + second_Qk[:, None, :]).flatten(1)
        scores_Qk, best_Qk = both_QC.topk(k, dim=-1)
        ids_Qk = i_Qk.gather(1, best_Qk // k) * n + j_Qk.gather(1, best_Qk % k)
        return ProductDecision(
            token_ids_N=torch.arange(len(x_TD) * heads, device=x_TD.device).repeat_interleave(k),
            expert_ids_N=ids_Qk.flatten(),
            weights_N=scores_Qk.softmax(-1).flatten(),
            first_TA=first_Qn,
            second_TB=second_Qn,
            top_k=k,
        )

    def scores(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """(Q, n) twice, Q = T h: what each first and each second sub-key scores for each query."""
        exact = torch.promote_types(x_TD.dtype, torch.float32)
        T, (halves, n, d) = len(x_TD), self.keys.shape
        with torch.autocast(x_TD.device.type, enabled=False):
            q_THd = F.linear(x_TD.to(exact), self.query.weight.to(exact)).view(T, halves // 2, 2 * d)
            if self.norm is not None:
                weight, bias = self.norm.weight.to(exact), self.norm.bias.to(exact)
                q_THd = F.layer_norm(q_THd, self.norm.normalized_shape, weight, bias, self.norm.eps)
            scores_HTn = torch.bmm(q_THd.reshape(T, halves, d).transpose(0, 1), self.keys.to(exact).transpose(1, 2))
        scores_Q2n = scores_HTn.transpose(0, 1).reshape(-1, 2, n)
        return scores_Q2n[:, 0], scores_Q2n[:, 1]


class ProductKeyExperts(nn.Module):
    """A PEER layer: y = sum over heads and their k experts of softmax(score) gelu(u_e x) v_e.

    Observers see N experts. What the layer shows them for a token is one retrieval: there are h of them per real token.
    """

    loss_names: tuple[str, ...] = ()

    def __init__(self, dim: int, config: Peer) -> None:
        super().__init__()
        self.config, self.num_experts = config, config.num_experts
        self.router = ProductKeys(dim, config)
        self.down = nn.Parameter(torch.empty(config.num_experts, dim))
        self.up = nn.Parameter(torch.empty(config.num_experts, dim))
        self.tap = Tap()
        self.init_weights(0.02, 0.02)

    def init_weights(self, std: float, output_std: float) -> None:
        """Normal values: std for keys' queries and u, output_std for v, which writes into the residual stream."""
        self.router.init_weights(std)
        nn.init.normal_(self.down, std=std)
        nn.init.normal_(self.up, std=output_std)

    def forward(
        self,
        x: Tensor,
        *,
        token_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        scope: BatchScope | None = None,
    ) -> Tensor:
        """Same shape and dtype as x. Arguments as of `MoE.forward`; token ids and scope make no difference here."""
        view = tokens_of(x, padding_mask, token_ids)
        decision = self.router(view.x_TD)
        ids_TN = decision.expert_ids_N.view(len(view.x_TD), self.config.heads * self.config.k)
        inner_TN = (F.embedding(ids_TN, self.down) @ view.x_TD[:, :, None].to(self.down.dtype)).squeeze(-1)
        weights_TN = decision.weights_N.view_as(ids_TN)
        weighted_TN = (activate(inner_TN.to(weights_TN.dtype), "gelu") * weights_TN).to(self.up.dtype)
        y_TD = F.embedding_bag(ids_TN, self.up, per_sample_weights=weighted_TN, mode="sum")
        self.tap(Routed(decision, NeuronPlan(decision.expert_ids_N, self.num_experts), {}))
        return view.restore(y_TD.to(x.dtype))


@dataclass(frozen=True, eq=False)
class NeuronPlan:
    """Who is used; nothing is dropped. See `DispatchPlan`."""

    expert_ids_N: Tensor
    num_experts: int

    @property
    def counts_e(self) -> Tensor:
        """How often each neuron is used, counted when it is asked for."""
        return count_assignments(self.expert_ids_N, self.num_experts)

    @property
    def drops(self) -> dict[str, Tensor]:
        """None."""
        return {}
