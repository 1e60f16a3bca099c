"""Which rank is called what: names are free, so each rank takes the place where it gains most. Matching by greed."""

from __future__ import annotations

import numpy as np


def renamed(gain_RR: np.ndarray, num_nodes: int) -> np.ndarray:
    """int64 (R,): which rank takes each place, so that the sum of gain[place, rank] is large.

    Ranks of one node stay together: nodes are matched first, by the sum of what their ranks gain, then ranks in them.
    """
    on_node = len(gain_RR) // num_nodes
    gain_NnMm = gain_RR.reshape(num_nodes, on_node, num_nodes, on_node)
    nodes_N = matched(gain_NnMm.sum(axis=(1, 3)))
    ranks = [node * on_node + matched(gain_NnMm[place, :, node, :]) for place, node in enumerate(nodes_N.tolist())]
    return np.concatenate(ranks)


def matched(gain_PI: np.ndarray) -> np.ndarray:
    """int64 (P,): the item for each place, P of each. At least half of the best sum, for gains of 0 and more.

    The largest gain that is left first; then places swap items while that gains.
    """
    size = len(gain_PI)
    item_P = np.full(size, -1)
    taken_I = np.zeros(size, dtype=bool)
    for flat in np.argsort(-gain_PI, axis=None, kind="stable").tolist():
        place, item = divmod(flat, size)
        if item_P[place] < 0 and not taken_I[item]:
            item_P[place], taken_I[item] = item, True
    least = 1e-12 * max(float(np.abs(gain_PI).max(initial=0.0)), 1e-300)  # rounding is no gain
    while True:
        crossed_PP = gain_PI[:, item_P]
        own_P = np.diag(crossed_PP)
        more_PP = crossed_PP + crossed_PP.T - own_P[:, None] - own_P
        a, b = divmod(int(more_PP.argmax()), size)
        if more_PP[a, b] <= least:
            return item_P
        item_P[[a, b]] = item_P[[b, a]]
