"""Switch routing: one expert per token, its output multiplied with the raw probability (arXiv 2101.03961).

The paper's choices as one config: never renormalised (or the router would not learn), input jitter of 1 %, and a
router initialised ten times smaller than the model.
"""

from __future__ import annotations

from dataclasses import dataclass

from equipoise.routing.router import Traits
from equipoise.routing.top_k import TopK, TopKRouter


@dataclass(frozen=True)
class Switch:
    """Configuration of a Switch router; see `TopK` for jitter. init_scale: s of the initial std sqrt(s / dim)."""

    jitter: float = 0.01
    init_scale: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.jitter < 1:
            raise ValueError(f"Switch.jitter: expected a value in [0, 1), got {self.jitter}")
        if not self.init_scale > 0:
            raise ValueError(f"Switch.init_scale: expected more than 0, got {self.init_scale}")

    @property
    def k(self) -> int:
        """Experts per token: 1."""
        return 1

    @property
    def traits(self) -> Traits:
        """Those of `TopK` with raw weights."""
        return Traits()

    def build(self, dim: int, num_experts: int) -> TopKRouter:
        """The router module: a `TopKRouter` with k = 1."""
        config = TopK(
            k=1,
            renormalize=False,
            jitter=self.jitter,
            init="truncated",
            init_std=(self.init_scale / dim) ** 0.5,
        )
        return config.build(dim, num_experts)
