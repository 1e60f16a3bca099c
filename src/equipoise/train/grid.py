"""The grid of a sweep: coefficients of the Switch loss, rates of the bias, seeds; and the run of each of its cells.

One seed gives all settings the same weights, data order and noise, so that settings can be compared seed by seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from equipoise.routing import BiasBalance, SwitchLoss
from equipoise.train.config import TrainConfig

LAST_WINDOWS = 5  # of the monitor, over which MaxVio is averaged
MEASUREMENTS = 20  # of the interference, over a run
EVAL_BATCHES = 16  # at least; a loss over fewer tokens is too rough to compare


@dataclass(frozen=True)
class Cell:
    """One training run of a sweep. coef: of the Switch loss. rate: of the bias, 0 is none."""

    coef: float
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"coef-{self.coef:g}_rate-{self.rate:g}_seed-{self.seed}"

    def __str__(self) -> str:
        return f"coef {self.coef:g}, rate {self.rate:g}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What a sweep goes through: every coefficient with every rate and every seed. Kept in ascending order."""

    coefs: tuple[float, ...] = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    """Coefficients of the Switch loss; 0 is none. Differences are to the smallest one."""
    rates: tuple[float, ...] = (0.0, 1e-2)
    """How far the balancing bias moves per step; 0 is no bias."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One run each per setting, compared pairwise: a seed has the same weights and data order in all settings."""
    scope: Literal["micro", "sequence", "global"] = "micro"
    """The tokens over which the Switch loss takes the load."""

    def __post_init__(self) -> None:
        for name in ("coefs", "rates", "seeds"):
            values = getattr(self, name)
            if not values or min(values) < 0 or len(set(values)) < len(values):
                raise ValueError(f"{name}: expected one or more numbers of at least 0, each once, got {values}")
            object.__setattr__(self, name, tuple(sorted(values)))

    @property
    def cells(self) -> list[Cell]:
        """All of them, seed by seed: an early stop leaves whole comparisons."""
        return [Cell(coef, rate, seed) for seed, rate, coef in product(self.seeds, self.rates, self.coefs)]

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        return {"coefs": self.coefs, "rates": self.rates, "seeds": self.seeds, "scope": self.scope}


def cell_config(base: TrainConfig, grid: Grid, cell: Cell) -> TrainConfig:
    """The configuration of one cell: that of `base` but for its Switch losses and its balancer.

    Other losses, such as the router z-loss, stay. Repairs are off: they would mend what is to be measured. Raises
    ValueError when the model of `base` has no MoE layers.
    """
    moe = base.model.moe
    if moe is None or not base.model.moe_layer_ids:
        raise ValueError(f"sweep: expected a model with MoE layers, got {base.name!r} without; choose another recipe")
    kept = tuple(item for item in moe.balance if hasattr(item, "coef") and not isinstance(item, SwitchLoss))
    bias = (BiasBalance(rate=cell.rate),) if cell.rate else ()
    balance = (SwitchLoss(coef=cell.coef, scope=grid.scope), *kept, *bias)
    return replace(
        base,
        name=f"{base.name}, {cell}",
        model=replace(base.model, moe=replace(moe, balance=balance)),
        seed=cell.seed,
        recover=False,
        eval_every=0,
        eval_batches=max(base.eval_batches, EVAL_BATCHES),
        keep_checkpoints=1,
        watch_every=max(1, min(base.watch_every, base.steps // LAST_WINDOWS)),
        interference_every=max(1, base.steps // MEASUREMENTS),
        specialisation=False,  # measured where the text has two domains; not asked of a text that has one
    )
