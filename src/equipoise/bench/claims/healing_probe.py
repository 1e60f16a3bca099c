"""A probe: break the routers of a trained model in some ways, train on under each remedy, count steps to an even load.

Each fault and remedy starts from the same weights and optimizer state, and sees the same batches, as does a model that
is not broken. Numbers are named "fault.remedy.number".
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from equipoise.bench.claims.probes import Numbers
from equipoise.faults import BiasRunaway, Collapse, inject
from equipoise.layer import MoE
from equipoise.layer.mode import NORMAL, Mode
from equipoise.routing import BiasBalance, QuantileBalance, SwitchLoss, ZLoss
from equipoise.train.config import OptimConfig, TrainConfig
from equipoise.train.data import eval_batches
from equipoise.train.loop import Trainer
from equipoise.train.report import Silent

STEPS = 200  # of further training; the most that a count can be
STAYS = 5  # steps in a row: one of them may be even by chance
EVEN = 0.5  # MaxVio, mean over the layers
LATE = 20  # steps at the end over which its cost is averaged too
LR = 1e-3  # that of the middle of a run
BLOW, STRETCH = 20.0, 10.0
EXPERT = 0  # of every layer: the broken one
OTHER_BATCHES = 1000  # added to the seed: further training on batches in another order

Balance = tuple[SwitchLoss | ZLoss | BiasBalance | QuantileBalance, ...]


@dataclass(frozen=True)
class Remedy:
    """balance: of the further training. fresh: the routers are drawn anew first."""

    balance: Balance
    fresh: bool = False


REMEDIES: Mapping[str, Remedy] = {
    "nothing": Remedy(()),
    "switch_0.01": Remedy((SwitchLoss(coef=0.01),)),
    "switch_0.1": Remedy((SwitchLoss(coef=0.1),)),
    "switch_and_z": Remedy((SwitchLoss(coef=0.01), ZLoss(coef=0.01))),
    "sign_0.01": Remedy((BiasBalance(rate=0.01),)),
    "sign_0.1": Remedy((BiasBalance(rate=0.1),)),
    "smooth_0.1": Remedy((BiasBalance(rate=0.1, rule="smooth"),)),
    "quantile": Remedy((QuantileBalance(),)),
    "fresh_router": Remedy((SwitchLoss(coef=0.01),), fresh=True),
}


def spike(trainer: Trainer) -> None:
    """Every token's logit of one expert rises by BLOW, in every layer."""
    size = (trainer.config.batch_size, trainer.config.data.seq_len)
    tokens_BS = next(iter(eval_batches(trainer.data.train, *size, max_batches=8))).tokens_BS
    with trainer.watch.recorder.paused(), torch.no_grad():
        for name in trainer.model.moe_layers:
            inject(trainer.model, Collapse(name, EXPERT, BLOW), lambda: trainer.model(tokens_BS))


def stretch(trainer: Trainer) -> None:
    """One row of the router's weight is STRETCH times as long, in every layer."""
    for layer in trainer.model.moe_layers.values():
        with torch.no_grad():
            router_weight(layer)[EXPERT] *= STRETCH


def runaway(trainer: Trainer) -> None:
    """The selection bias of one expert rises by BLOW. Where nothing has a bias, one that nothing moves is added."""
    for name, layer in trainer.model.moe_layers.items():
        if layer.balancer is not None:
            inject(trainer.model, BiasRunaway(name, EXPERT, BLOW))
        else:
            layer.set_mode(Mode(bias=tuple(BLOW * (expert == EXPERT) for expert in range(layer.num_experts))))


FAULTS: Mapping[str, Callable[[Trainer], None]] = {"spike": spike, "stretch": stretch, "runaway": runaway}


def healing(trainer: Trainer) -> Numbers:
    """For each fault and remedy what `compare` says, and for the model that is not broken its MaxVio."""
    whole = _go_on(trainer, REMEDIES["switch_0.01"], None)
    numbers = {"whole.max_violation": float(whole.violation_S.mean())}
    for fault, break_it in FAULTS.items():
        for name, remedy in REMEDIES.items():
            found = compare(_go_on(trainer, remedy, break_it), whole)
            numbers |= {f"{fault}.{name}.{number}": value for number, value in found.items()}
    return numbers


@dataclass(frozen=True, eq=False)
class Course:
    """Training loss and MaxVio, mean over the layers, of each step."""

    loss_S: np.ndarray
    violation_S: np.ndarray


def compare(course: Course, whole: Course) -> Numbers:
    """Steps until the load stays even; MaxVio at first and at last; loss beyond the whole model's, mean and at last."""
    excess_S = course.loss_S - whole.loss_S
    return {
        "steps": float(steps_to_even(course.violation_S.tolist())),
        "first_violation": float(course.violation_S[0]),
        "last_violation": float(course.violation_S[-STAYS:].mean()),
        "cost": float(excess_S.mean()),
        "late_cost": float(excess_S[-LATE:].mean()),
    }


def steps_to_even(violation_S: Sequence[float]) -> int:
    """Updates before the first of STAYS steps in a row that are even; all of them where there are no such steps."""
    for step in range(len(violation_S) - STAYS + 1):
        if all(value < EVEN for value in violation_S[step : step + STAYS]):
            return step
    return len(violation_S)


def _go_on(trainer: Trainer, remedy: Remedy, break_it: Callable[[Trainer], None] | None) -> Course:
    """Train a copy on. The weights of `trainer` stay as they are."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Trainer(_config(trainer.config, remedy), trainer.data, Path(folder) / "run", Silent())
        try:
            _load(copy, trainer)
            if break_it is not None:
                break_it(copy)
            if remedy.fresh:
                _draw_routers(copy)
            copy.run(until=STEPS)
            history = [copy.store.routing_history(layer) for layer in copy.store.layers()]
            losses = [value for _, value, _ in copy.store.scalar_history("loss")]
        finally:
            copy.close("finished")
    return Course(np.array(losses), np.array([[s.max_violation for s in steps] for steps in history]).mean(0))


def _config(base: TrainConfig, remedy: Remedy) -> TrainConfig:
    assert base.model.moe is not None
    return replace(
        base,
        model=replace(base.model, moe=replace(base.model.moe, balance=remedy.balance)),
        optim=OptimConfig(lr=LR, warmup=0, min_lr_ratio=1.0),
        seed=base.seed + OTHER_BATCHES,
        steps=STEPS + 1,  # so that it never comes to its last, at which it would write a checkpoint
        watch_every=1,
        interference_every=0,
    )


def _load(copy: Trainer, trainer: Trainer) -> None:
    """Weights and the optimizer's moments. What adapts starts anew."""
    missing, unexpected = copy.model.load_state_dict(trainer.model.state_dict(), strict=False)
    strange = [*unexpected, *(name for name in missing if ".balancer." not in name)]
    if strange:
        raise ValueError(
            f"healing: expected a model that differs from its copy in the balancer alone, got {', '.join(strange)}; "
            "probe a run without one"
        )
    copy.optimizer.load_state_dict(trainer.optimizer.state_dict())


def _draw_routers(copy: Trainer) -> None:
    for layer in copy.model.moe_layers.values():
        layer.set_mode(NORMAL)
        layer.router.init_weights(copy.config.model.init_std)


def router_weight(layer: MoE) -> torch.Tensor:
    """(E, D). Raises ValueError for a router without one."""
    weight = layer.router.weight
    if weight is None:
        raise ValueError(f"healing: expected a linear router, got {type(layer.router).__name__}, which has no weight")
    return weight
