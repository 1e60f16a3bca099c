"""What experts are placed on: ranks, their slots and their nodes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cluster:
    """Ranks with equally many slots each, on nodes with equally many ranks each, in order.

    num_slots: for all experts of a layer and their replicas together. Raises ValueError for numbers that do not divide
    each other.
    """

    num_ranks: int
    num_slots: int
    num_nodes: int = 1

    def __post_init__(self) -> None:
        for name, number in (("ranks", self.num_ranks), ("slots", self.num_slots), ("nodes", self.num_nodes)):
            if number < 1:
                raise ValueError(f"{name}: expected at least 1, got {number}")
        if self.num_ranks % self.num_nodes:
            raise ValueError(
                f"nodes: expected a divisor of {self.num_ranks} ranks, got {self.num_nodes}; "
                "nodes have equally many ranks each"
            )
        if self.num_slots % self.num_ranks:
            lower = self.num_slots // self.num_ranks * self.num_ranks
            raise ValueError(
                f"slots: expected a multiple of {self.num_ranks} ranks, got {self.num_slots}; ranks hold equally many "
                f"each, so take {lower or self.num_ranks} or {lower + self.num_ranks}"
            )

    @property
    def slots_per_rank(self) -> int:
        """S/R."""
        return self.num_slots // self.num_ranks

    @property
    def ranks_per_node(self) -> int:
        """R/N."""
        return self.num_ranks // self.num_nodes
