"""The baseline: DeepSeek's expert-parallelism load balancer, made anew from its description (deepseek-ai/EPLB).

It balances load alone. Hierarchical: groups of experts are packed onto nodes, hot experts replicated within a node,
and the replicas packed onto the node's ranks, each time the heaviest first. Where the nodes do not divide the groups,
all of it happens on one node: the global policy.
"""

from __future__ import annotations

import numpy as np

from equipoise.plan.packing import copies_of, packed
from equipoise.types import Placement


def eplb(load_E: np.ndarray, num_slots: int, num_ranks: int, num_nodes: int = 1, num_groups: int = 1) -> np.ndarray:
    """int64 (R, S/R): the expert in each slot of each rank. A rank may hold an expert twice: EPLB does not look.

    load_E: what each expert is expected to do. num_groups: experts whose routing is limited to groups come in
    consecutive groups of equal size. Raises ValueError for numbers that do not divide each other, or too few slots.
    """
    num_experts = len(load_E)
    for what, whole, part in (
        ("slots, ranks", num_slots, num_ranks),
        ("ranks, nodes", num_ranks, num_nodes),
        ("experts, groups", num_experts, num_groups),
    ):
        if part < 1 or whole % part:
            raise ValueError(f"{what}: expected the second to divide the first, got {whole} and {part}")
    if num_groups % num_nodes:
        num_groups = num_nodes = 1
    in_group = num_experts // num_groups
    groups_NG = packed(load_E.reshape(num_groups, in_group).sum(1), num_nodes)
    of_node_NI = (groups_NG[:, :, None] * in_group + np.arange(in_group)).reshape(num_nodes, -1)
    return np.concatenate(
        [_on_node(load_E, experts_I, num_slots // num_nodes, num_ranks // num_nodes) for experts_I in of_node_NI]
    )


def _on_node(load_E: np.ndarray, experts_I: np.ndarray, num_slots: int, num_ranks: int) -> np.ndarray:
    """The ranks of one node, which holds these experts."""
    load_I = load_E[experts_I]
    copies_I = copies_of(load_I, num_slots, most=num_slots)
    # the first copy of everyone, then the others, as they were given out
    item_S = np.concatenate([np.arange(len(load_I)), np.repeat(np.arange(len(load_I)), copies_I - 1)])
    packs_RS = packed(load_I[item_S] / copies_I[item_S], num_ranks)
    slots_RS: np.ndarray = experts_I[item_S[packs_RS]]
    return slots_RS


def eplb_placement(
    load_E: np.ndarray, num_slots: int, num_ranks: int, num_nodes: int = 1, num_groups: int = 1
) -> Placement:
    """The same as a `Placement`. A second copy on one rank is left out: its tokens go to the first one there."""
    slots_RS = eplb(load_E, num_slots, num_ranks, num_nodes, num_groups)
    return Placement(tuple(tuple(dict.fromkeys(rank)) for rank in slots_RS.tolist()))
