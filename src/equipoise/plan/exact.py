"""The optimum of small cases, by integer programming: what the search is measured against. Needs SciPy (HiGHS)."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from equipoise.plan.cluster import Cluster


def best_balance(load_E: np.ndarray, cluster: Cluster) -> float:
    """The smallest load of the fullest rank over the mean, over all places for copies, shared as they may.

    For up to about 8 experts on 4 ranks. Variables: x[e, r], whether rank r holds expert e; f[e, r], the part of e's
    load that r gets, at most x; the peak. What lies at home is not forced to stay there, so it is a lower bound.
    """
    E, R = len(load_E), cluster.num_ranks
    x_ER = np.arange(E * R).reshape(E, R)
    f_ER, peak = E * R + x_ER, 2 * E * R
    rows, low, high = [], [], []
    for expert in range(E):
        rows.append(_indicator(peak + 1, f_ER[expert]))
        low.append(1.0)
        high.append(1.0)
    for rank in range(R):
        rows.append(_indicator(peak + 1, x_ER[:, rank]))
        low.append(float(cluster.slots_per_rank))
        high.append(float(cluster.slots_per_rank))
        loads = -_indicator(peak + 1, np.array([peak]))
        loads[f_ER[:, rank]] = load_E / (load_E.sum() / R)
        rows.append(loads)
        low.append(-np.inf)
        high.append(0.0)
        for expert in range(E):
            rows.append(_indicator(peak + 1, f_ER[expert, rank]) - _indicator(peak + 1, x_ER[expert, rank]))
            low.append(-np.inf)
            high.append(0.0)
    whole = np.arange(peak + 1) < E * R
    return float(_solved(_indicator(peak + 1, np.array([peak])), (rows, low, high), whole)[-1])


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
    found = _solved(_indicator(size, z_TR.reshape(-1)), (rows, low, high), np.ones(size, dtype=bool))
    return float(found[E * R :].sum() / T)


def _indicator(size: int, places: np.ndarray) -> np.ndarray:
    row = np.zeros(size)
    row[places] = 1
    return row


def _solved(
    objective: np.ndarray, limits: tuple[list[np.ndarray], list[float], list[float]], whole: np.ndarray
) -> np.ndarray:
    """The minimum. limits: rows of factors, and the least and the most of each. whole: bool, variables that are 0 or 1;
    the others are 0 or more.
    """
    try:
        optimize: Any = import_module("scipy.optimize")
    except ImportError as error:
        raise ImportError(
            "exact placement needs SciPy; install it with: pip install 'equipoise[place-exact]'"
        ) from error
    rows, low, high = limits
    found = optimize.milp(
        objective,
        integrality=whole,
        bounds=optimize.Bounds(0, np.where(whole, 1, np.inf)),
        constraints=optimize.LinearConstraint(np.array(rows), low, high),
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None:
        raise ValueError(f"exact placement: expected a solution, got: {found.message}; allow more load, or other sizes")
    solution: np.ndarray = found.x
    return solution
