"""The machines of a simulation, of steps that real ranks have rehearsed: what each part costs, and how steps vary.

A rehearsed step is one whose tokens and experts are known, with the seconds that it took, on ranks that do all of their
work: collectives, experts, and waiting for each other and for a core. The costs are those with which `step.py` comes
nearest to the seconds; what is left, how much longer or shorter steps of about that length take, is kept as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from equipoise.plan.fleet.scenario import Machines, ModelShape
from equipoise.plan.fleet.step import Array, Step, step
from equipoise.plan.links import Cost

ENOUGH = 10  # steps, to fit anything
ROUNDS = 30
NUDGE = 1e-3  # of a part, to see what it changes: the seconds are piecewise linear in the parts
LEAST = 1e-15  # of a part: none is so cheap


@dataclass(frozen=True, eq=False)
class Rehearsed:
    """A step of T tokens: ids_LTK int64, their experts; home_T int64, their ranks; what it took.

    seconds: from the first row to the last result. expert_R: what each rank computed for in its experts, without
    waiting for a core.
    """

    ids_LTK: Array
    home_T: Array
    seconds: float
    expert_R: Array


def calibrated(model: ModelShape, begin: Machines, holder_LER: Array, steps: Sequence[Rehearsed]) -> Machines:
    """Machines like `begin`, with the costs that the steps show, and their spread.

    The expert's cost is that of the ranks' own computing; step_s and link are what explains the rest of the seconds.
    What a layer takes beside its exchanges and experts is in the start of its exchanges. Least squares of
    (taken - fitted) / fitted, so that means are met, and each size of step counts the same; nothing is negative.
    holder_LER: as in `step`. Raises ValueError for fewer than ten steps.
    """
    if len(steps) < ENOUGH:
        raise ValueError(f"calibrated: expected at least {ENOUGH} rehearsed steps, got {len(steps)}; rehearse longer")

    def by(machines: Machines) -> list[Step]:
        return [
            step(model, machines, holder_LER, each.ids_LTK, np.ones(each.ids_LTK.shape, dtype=bool), each.home_T)
            for each in steps
        ]

    _, size_N, count_S = np.unique([len(each.home_T) for each in steps], return_inverse=True, return_counts=True)
    weight_N = 1 / np.sqrt(count_S[size_N])
    begin = replace(begin, rest_s=0.0, spread=(), expert=_expert(by, steps, weight_N))
    seconds_N = np.array([each.seconds for each in steps])
    machines = _fitted(by, begin, seconds_N, weight_N)
    fitted_N = np.array([each.seconds for each in by(machines)])
    order_N = np.argsort(fitted_N, kind="stable")
    pairs = zip(fitted_N[order_N].tolist(), (seconds_N / fitted_N)[order_N].tolist(), strict=True)
    return replace(machines, spread=tuple(pairs))


def _expert(by: Callable[[Machines], list[Step]], steps: Sequence[Rehearsed], weight_N: Array) -> Cost:
    """Of how many experts each rank had rows for, and of how many operations these were."""
    ranks = len(steps[0].expert_R)
    each_NR2 = np.stack(
        [[done.busy_R for done in by(Machines(ranks=ranks, expert=cost))] for cost in (Cost(1.0, inf), Cost(0.0, 1.0))],
        axis=2,
    )
    taken_M, parts_M2 = np.array([s.expert_R for s in steps]).reshape(-1), each_NR2.reshape(-1, 2)
    used_M = parts_M2[:, 0] > 0
    taken_M, parts_M2, weight_M = taken_M[used_M], parts_M2[used_M], np.repeat(weight_N, ranks)[used_M]
    fitted_M = taken_M.mean() * parts_M2[:, 1] / parts_M2[:, 1].mean()
    for _ in range(ROUNDS):
        cost_2 = _least_squares(parts_M2 * (weight_M / fitted_M)[:, None], weight_M * taken_M / fitted_M)
        fitted_M = np.maximum(parts_M2 @ cost_2, LEAST)
    return Cost(float(cost_2[0]), float(1 / max(cost_2[1], LEAST)))


def _fitted(by: Callable[[Machines], list[Step]], begin: Machines, seconds_N: Array, weight_N: Array) -> Machines:
    """With step_s and link; the rounds go half way each, as which rank is waited for changes with them."""

    def with_parts(parts_P: Array) -> Machines:
        step_s, start_s, byte_s = parts_P.tolist()
        return replace(begin, step_s=step_s, link=Cost(start_s, 1 / byte_s))

    def fitted(parts_P: Array) -> Array:
        return np.array([each.seconds for each in by(with_parts(parts_P))])

    parts_P = np.maximum([seconds_N.min() / 4, begin.link.start_s, 1 / begin.link.rate], LEAST)
    for _ in range(ROUNDS):
        fitted_N = fitted(parts_P)
        slope_NP = np.stack(
            [
                (fitted(parts_P * (1 + NUDGE * (np.arange(len(parts_P)) == part))) - fitted_N) / NUDGE
                for part in range(len(parts_P))
            ],
            axis=1,
        )
        left_N = seconds_N - fitted_N + slope_NP.sum(axis=1)  # what the experts don't explain
        factor_P = _least_squares(slope_NP * (weight_N / fitted_N)[:, None], weight_N * left_N / fitted_N)
        parts_P = np.maximum(parts_P * (1 + factor_P) / 2, LEAST)
    return with_parts(parts_P)


def _least_squares(slope_NP: Array, target_N: Array) -> Array:
    """Factors of the parts, none negative: the most negative one is left out, one by one."""
    used_P = np.ones(slope_NP.shape[1], dtype=bool)
    while True:
        factor_P = np.zeros(slope_NP.shape[1])
        if used_P.any():
            factor_P[used_P] = np.linalg.lstsq(slope_NP[:, used_P], target_N, rcond=None)[0]
        if (factor_P >= 0).all():
            return factor_P
        used_P[factor_P.argmin()] = False
