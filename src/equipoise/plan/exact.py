"""The optimum of small cases, by integer programming: what the search is measured against. Needs SciPy (HiGHS)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from equipoise.plan.cluster import Cluster


def best_balance(load_E: np.ndarray, cluster: Cluster) -> float:
    """The smallest load of the fullest rank over the mean, over all numbers of copies and all places for them.

    Copies share their expert's load evenly, at most one of them on a rank. For up to about 8 experts on 4 ranks.
    Variables: y[e, c], whether expert e has c copies; x[e, c, r], whether one of those c is on rank r; the peak.
    """
    E, R = len(load_E), cluster.num_ranks
    num_y, num_x = E * R, E * R * R
    size = num_y + num_x + 1
    y_EC = np.arange(num_y).reshape(E, R)  # c = column + 1
    x_ECR = num_y + np.arange(num_x).reshape(E, R, R)
    rows, low, high = [], [], []

    def constrain(terms: list[tuple[int, float]], least: float, most: float) -> None:
        row = np.zeros(size)
        for place, factor in terms:
            row[place] += factor
        rows.append(row)
        low.append(least)
        high.append(most)

    for expert in range(E):
        constrain([(y, 1.0) for y in y_EC[expert].tolist()], 1, 1)
        for c in range(R):
            constrain([(x, 1.0) for x in x_ECR[expert, c].tolist()] + [(int(y_EC[expert, c]), -(c + 1.0))], 0, 0)
    for rank in range(R):
        constrain(
            [(x, 1.0) for x in x_ECR[:, :, rank].reshape(-1).tolist()], cluster.slots_per_rank, cluster.slots_per_rank
        )
        loads = [(int(x_ECR[e, c, rank]), float(load_E[e]) / (c + 1)) for e in range(E) for c in range(R)]
        constrain([*loads, (size - 1, -1.0)], -np.inf, 0)
    objective = np.zeros(size)
    objective[-1] = 1
    return float(_solved(objective, rows, low, high)[-1] / (load_E.sum() / R))


def least_fan_out(ids_TK: np.ndarray, num_experts: int, cluster: Cluster, most_load: float = np.inf) -> float:
    """The smallest number of distinct ranks per token, without replicas. For about 8 experts, 3 ranks, 50 tokens.

    most_load: the fullest rank's load over the mean may be so much. Variables: x[e, r], whether rank r holds expert e;
    z[t, r], whether token t needs rank r. Raises ValueError where no placement is so balanced.
    """
    E, R, T = num_experts, cluster.num_ranks, len(ids_TK)
    x_ER, z_TR = np.arange(E * R).reshape(E, R), E * R + np.arange(T * R).reshape(T, R)
    size = E * R + T * R
    rows, low, high = [], [], []
    for expert in range(E):
        rows.append(_indicator(size, x_ER[expert]))
        low.append(1.0)
        high.append(1.0)
    load_E = np.bincount(ids_TK[ids_TK >= 0], minlength=E)
    for rank in range(R):
        rows.append(_indicator(size, x_ER[:, rank]))
        low.append(float(cluster.slots_per_rank))
        high.append(float(cluster.slots_per_rank))
        loads = np.zeros(size)
        loads[x_ER[:, rank]] = load_E
        rows.append(loads)
        low.append(-np.inf)
        high.append(most_load * load_E.sum() / R)
        for token in range(T):
            for expert in ids_TK[token][ids_TK[token] >= 0]:
                rows.append(_indicator(size, x_ER[expert, rank]) - _indicator(size, z_TR[token, rank]))
                low.append(-np.inf)
                high.append(0.0)
    found = _solved(_indicator(size, z_TR.reshape(-1)), rows, low, high)
    return float(found[E * R :].sum() / T)


def _indicator(size: int, places: np.ndarray) -> np.ndarray:
    row = np.zeros(size)
    row[places] = 1
    return row


def _solved(objective: np.ndarray, rows: list[np.ndarray], low: list[float], high: list[float]) -> np.ndarray:
    """The minimum. Variables are 0 or 1; the last one may be any number from 0 on where it is the whole objective."""
    try:
        optimize: Any = import_module("scipy.optimize")
    except ImportError as error:
        raise ImportError(
            "exact placement needs SciPy; install it with: pip install 'equipoise[place-exact]'"
        ) from error
    free = np.zeros(len(objective), dtype=bool)
    free[-1] = np.count_nonzero(objective) == 1
    found = optimize.milp(
        objective,
        integrality=~free,
        bounds=optimize.Bounds(0, np.where(free, np.inf, 1)),
        constraints=optimize.LinearConstraint(np.array(rows), low, high),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise ValueError(f"exact placement: expected a solution, got: {found.message}; allow more load, or other sizes")
    solution: np.ndarray = found.x
    return solution
