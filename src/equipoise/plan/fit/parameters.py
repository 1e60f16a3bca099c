"""How many parameters a model has, by part: all of them, and those that one token uses."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from equipoise.plan.fit.architecture import Architecture


@dataclass(frozen=True)
class Parameters:
    """Parameters by part; the parts add up to `total`. experts: routed ones, all of them. head: 0 when tied.

    active: what one token uses, the embedding counted as the whole table. active_no_embedding leaves the input's
    table out, of which a token reads one row; a tied table stays, since it is the head too. Published counts follow
    either convention.
    """

    total: int
    active: int
    active_no_embedding: int
    embedding: int
    attention: int
    dense: int
    experts: int
    shared: int
    router: int
    norm: int
    head: int

    @property
    def active_share(self) -> float:
        """Of the total."""
        return self.active / self.total

    @property
    def outside_experts(self) -> int:
        """What every token uses."""
        return self.total - self.experts

    def fields(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)


def parameters(model: Architecture) -> Parameters:
    """Count by arithmetic alone.

    With V vocabulary, D dim, L layers, E experts of width F of which a token uses k:

        embedding  V D (+ positions D)
        attention  L times that of a layer, see `GroupedQuery` and `Latent`
        ffn(F)     3 D F, or 2 D F where it isn't gated (+ biases)
        dense      ffn(hidden_dim) per layer without experts
        experts    E ffn(F) per MoE layer; active: k instead of E
        shared     ffn(shared_dim) (+ D with a gate) per MoE layer
        router     E D per MoE layer (+ E for a bias, and one of selection)
        norm       (2 L + 1) D, twice that with biases
        head       0 if tied, else V D (+ V with a bias)
    """
    experts = shared = router = used = 0
    if model.routed is not None:
        routed, many = model.routed, model.num_moe
        per_expert = model.feed_forward(routed.hidden_dim, routed.biases)
        first = min(routed.first_layers, many)
        experts = many * routed.num * per_expert
        used = (first * routed.first_k + (many - first) * routed.k) * per_expert
        if routed.shared_dim:
            shared = many * (model.feed_forward(routed.shared_dim, False) + (model.dim if routed.shared_gate else 0))
        router = first * routed.first_router + (many - first) * routed.router_parameters
    table = model.vocab * model.dim
    parts = {
        "embedding": table + model.positions * model.dim,
        "attention": model.layers * model.attention.parameters(model.dim),
        "dense": model.num_dense * model.feed_forward(model.hidden_dim, model.ffn_bias) if model.num_dense else 0,
        "experts": experts,
        "shared": shared,
        "router": router,
        "norm": (2 * model.layers + 1) * model.dim * model.norm_size,
        "head": (0 if model.tied else table) + (model.vocab if model.head_bias else 0),
    }
    total = sum(parts.values())
    active = total - experts + used
    return Parameters(total, active, active if model.tied else active - table, **parts)
