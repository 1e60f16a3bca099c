"""Two greedy steps that planners begin with: how many copies of whom, and which pack for each piece of load."""

from __future__ import annotations

import heapq

import numpy as np


def copies_of(load_E: np.ndarray, num_slots: int, most: int) -> np.ndarray:
    """int64 (E,): copies of each expert, num_slots in all, each at least 1 and at most `most`.

    One by one to the expert with the largest load per copy, which makes the largest load per copy as small as it can
    be. Raises ValueError where there are fewer slots than experts, or more than `most` copies of each would fill.
    """
    num_experts = len(load_E)
    if num_slots < num_experts:
        raise ValueError(
            f"slots: expected at least one for each of {num_experts} experts, got {num_slots}; allow more replicas"
        )
    if num_slots > most * num_experts:
        raise ValueError(
            f"slots: {num_slots} cannot be filled with {num_experts} experts, a rank holds each at most once: at most "
            f"{most * num_experts} on {most} ranks; allow fewer replicas"
        )
    copies_E = np.ones(num_experts, dtype=np.int64)
    heap = [(-load, expert) for expert, load in enumerate(load_E.tolist())] if most > 1 else []
    heapq.heapify(heap)
    for _ in range(num_slots - num_experts):
        _, expert = heap[0]
        copies_E[expert] += 1
        if copies_E[expert] < most:
            heapq.heapreplace(heap, (-float(load_E[expert]) / float(copies_E[expert]), expert))
        else:
            heapq.heappop(heap)
    return copies_E


def packed(load_I: np.ndarray, num_packs: int) -> np.ndarray:
    """int64 (P, I/P): the items of each pack, equally many, in the order in which they came.

    Longest first, each to the lightest pack that has room (LPT, Graham 1969).
    """
    room = len(load_I) // num_packs
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    heap = [(0.0, pack) for pack in range(num_packs)]
    loads = load_I.tolist()
    for item in np.argsort(-load_I, kind="stable").tolist():
        load, pack = heap[0]
        packs[pack].append(item)
        if len(packs[pack]) < room:
            heapq.heapreplace(heap, (load + loads[item], pack))
        else:
            heapq.heappop(heap)
    return np.array(packs, dtype=np.int64).reshape(num_packs, room)
