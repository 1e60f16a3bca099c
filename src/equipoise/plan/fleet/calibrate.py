"""The machines of a simulation, of steps that real ranks have rehearsed: what each part costs, and how steps vary.

A rehearsed step is one whose tokens and experts are known, with the seconds that it took, on ranks that do all of their
work: collectives, experts, and waiting for each other and for a core. The costs are those with which `step.py` comes
nearest to the seconds; what is left, how much longer or shorter steps of about that length take, is kept as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from equipoise.plan.fleet.scenario import Machines, ModelShape
from equipoise.plan.fleet.step import Array, step
from equipoise.plan.links import Cost

ROUNDS = 30
NUDGE = 1e-3  # of a part, to see what it changes: the seconds are piecewise linear in the parts
LEAST = 1e-15  # of a part: none is so cheap


@dataclass(frozen=True, eq=False)
class Rehearsed:
    """A step of T tokens: ids_LTK int64, their experts; home_T int64, their ranks; seconds that it took."""

    ids_LTK: Array
    home_T: Array
    seconds: float


def calibrated(model: ModelShape, begin: Machines, holder_LER: Array, steps: Sequence[Rehearsed]) -> Machines:
    """Machines like `begin`, with the costs that the steps show, and their spread.

    step_s, link and expert are fitted; the rest of a layer is in the start of its three exchanges. Weighted least
    squares of (seconds - fitted) / fitted: means are met, where relative errors to what was measured would be met below
    them. Parts are not negative. holder_LER: as in `step`. Raises ValueError for fewer than ten steps.
    """
    if len(steps) < 10:
        raise ValueError(f"calibrated: expected at least 10 rehearsed steps, got {len(steps)}; rehearse longer")
    seconds_N = np.array([each.seconds for each in steps])
    parts_P = np.maximum(_parts(begin), LEAST)
    best: tuple[float, Array] = (np.inf, parts_P)
    for _ in range(ROUNDS):
        fitted_N = _seconds(model, _with(begin, parts_P), holder_LER, steps)
        error = float((np.log(seconds_N / fitted_N) ** 2).mean())
        best = min(best, (error, parts_P), key=lambda each: each[0])
        slope_NP = np.empty((len(steps), len(parts_P)))
        for part in range(len(parts_P)):
            nudged_P = parts_P.copy()
            nudged_P[part] *= 1 + NUDGE
            more_N = _seconds(model, _with(begin, nudged_P), holder_LER, steps) - fitted_N
            slope_NP[:, part] = more_N / NUDGE
        factor_P = _least_squares(slope_NP / fitted_N[:, None], seconds_N / fitted_N)
        parts_P = np.maximum(
            parts_P * np.sqrt(np.maximum(factor_P, 1e-4)), LEAST
        )  # half a step: ranks that decide change
    machines = _with(begin, best[1])
    fitted_N = _seconds(model, machines, holder_LER, steps)
    order_N = np.argsort(fitted_N, kind="stable")
    return replace(machines, spread=tuple(zip(fitted_N[order_N].tolist(), (seconds_N / fitted_N)[order_N].tolist(), strict=True)))


def _parts(machines: Machines) -> Array:
    link, expert = machines.link, machines.expert
    return np.array([machines.step_s, link.start_s, 1 / link.rate, expert.start_s, 1 / expert.rate])


def _with(machines: Machines, parts_P: Array) -> Machines:
    step_s, start_s, byte_s, expert_s, flop_s = parts_P.tolist()
    return replace(
        machines,
        step_s=step_s,
        rest_s=0.0,
        link=Cost(start_s, 1 / byte_s),
        expert=Cost(expert_s, 1 / flop_s),
        spread=(),
    )


def _seconds(model: ModelShape, machines: Machines, holder_LER: Array, steps: Sequence[Rehearsed]) -> Array:
    everything = [np.ones(each.ids_LTK.shape, dtype=bool) for each in steps]
    return np.array(
        [
            step(model, machines, holder_LER, each.ids_LTK, fits_LTK, each.home_T).seconds
            for each, fits_LTK in zip(steps, everything, strict=True)
        ]
    )


def _least_squares(slope_NP: Array, target_N: Array) -> Array:
    """Factors of the parts, none negative: the most negative one is left out, one by one."""
    used_P = np.ones(slope_NP.shape[1], dtype=bool)
    while True:
        factor_P = np.zeros(slope_NP.shape[1])
        factor_P[used_P] = np.linalg.lstsq(slope_NP[:, used_P], target_N, rcond=None)[0]
        if (factor_P >= 0).all():
            return factor_P
        used_P[factor_P.argmin()] = False
