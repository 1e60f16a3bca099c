"""What is measured of a run that has reached its end: plain numbers by name. Averages are over the MoE layers.

A probe may change the model: the run is over. The table of their names is at the end.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from equipoise.faults import Collapse, inject
from equipoise.layer import Capacity
from equipoise.layer.mode import NORMAL, Mode
from equipoise.monitor.store import RunStore
from equipoise.recovery.actions import balancing_bias
from equipoise.recovery.recent import RecentScores
from equipoise.train.data import eval_batches
from equipoise.train.evaluate import evaluate
from equipoise.train.finetune.config import FinetuneConfig
from equipoise.train.loop import Trainer
from equipoise.train.report import Silent
from equipoise.train.run import open_data
from equipoise.train.specialisation import num_domains, route_text, specialisation

Numbers = dict[str, float]
Probe = Callable[[Trainer], Numbers]

LAST_WINDOWS = 5
SHUFFLES = 99
BLOW = 20.0  # logits, onto one expert of each layer
TUNE_STEPS, TUNE_DOMAINS = 150, ("cpp",)


def plain(trainer: Trainer) -> Numbers:
    """Loss, balance by layer and time, drops, specialisation, interference, speed."""
    store, config = trainer.store, trainer.config
    speeds = [speed for _, speed, _ in store.scalar_history("tokens_per_s")]
    numbers = {"loss": trainer.evaluate().loss, "log_tokens_per_s": float(np.log(np.median(speeds)))}
    layers = store.layers()
    if not layers:
        return numbers
    history = [store.routing_history(layer) for layer in layers]
    last = [float(np.mean([s.max_violation for s in windows[-LAST_WINDOWS:]])) for windows in history]
    quarter = max(config.steps / 4, history[0][0].step)
    early = [s.max_violation for windows in history for s in windows if s.step <= quarter]
    kept = [s for windows in history for s in windows[-LAST_WINDOWS:]]
    return numbers | {
        "max_violation": float(np.mean(last)),
        "early_violation": float(np.mean(early)),
        "first_violation": last[0],
        "last_violation": last[-1],
        "middle_violation": float(np.mean(last[1:-1])) if len(last) > 2 else last[0],
        "dead_share": float(np.mean([np.mean(s.counts_E < 0.1 * s.counts_E.mean()) for s in kept])),
        "drop_share": float(np.mean([_dropped(s.dropped) / max(s.counts_E.sum(), 1) for s in kept])),
        "token_entropy": float(np.mean([s.token_entropy for s in kept])),
        "specialisation": _specialisation(trainer),
        **{name: _late(store, f"interference_{name}", layers, config.steps) for name in ("cosine", "ratio")},
        "negative_share": _late(store, "interference_negative_share", layers, config.steps),
    }


def _dropped(dropped: Mapping[str, int]) -> int:
    return sum(count for reason, count in dropped.items() if reason in ("capacity", "hard_cap"))


def _specialisation(trainer: Trainer) -> float:
    config, stream = trainer.config, trainer.data.val
    size = (config.batch_size, config.data.seq_len, config.eval_batches)
    if num_domains(stream, *size) < 2:
        return 0.0
    with trainer.watch.recorder.paused():
        text = route_text(trainer.model, stream, *size, config.bf16)
    return float(np.mean([layer.beyond_chance for layer in specialisation(text, SHUFFLES)]))


def _late(store: RunStore, name: str, layers: Sequence[str], steps: int) -> float:
    values = [v for layer in layers for step, v, _ in store.scalar_history(f"{name}.{layer}") if step > steps / 2]
    return float(np.mean(values)) if values else 0.0


def temperature(trainer: Trainer, low: float, high: float) -> Numbers:
    """Loss at three temperatures of the router, and how many choices differ at the low one from those at 1."""
    numbers, chosen = {}, {}
    for name, value in (("low", low), ("one", 1.0), ("high", high)):
        _set_all(trainer, Mode(temperature=value))
        numbers[f"loss_{name}"] = _loss(trainer)
        chosen[name] = _choices(trainer)
    _set_all(trainer, NORMAL)
    changed = [(chosen["low"][layer] != chosen["one"][layer]).mean() for layer in chosen["one"]]
    return numbers | {"changed": float(np.mean(changed))}


def fallbacks(trainer: Trainer, blow: float = BLOW) -> Numbers:
    """Loss and MaxVio healthy, with one expert of each layer blown up, and under each fallback."""
    numbers = _measured(trainer, "healthy")
    size = (trainer.config.batch_size, trainer.config.data.seq_len)
    tokens_BS = next(iter(eval_batches(trainer.data.train, *size, max_batches=8))).tokens_BS
    with torch.no_grad(), trainer.watch.recorder.paused():
        for name in trainer.model.moe_layers if blow else ():
            inject(trainer.model, Collapse(name, 0, blow), lambda: trainer.model(tokens_BS))
        numbers |= _measured(trainer, "broken")
        recent = RecentScores(trainer.model.moe_layers)
        trainer.model(tokens_BS)
    for name, layer in trainer.model.moe_layers.items():
        layer.set_mode(Mode(bias=tuple(balancing_bias(recent.scores(name), layer.k)[0].tolist())))
    recent.detach()
    numbers |= _measured(trainer, "bias")
    _set_all(trainer, Mode(round_robin=True))
    numbers |= _measured(trainer, "round_robin")
    _set_all(trainer, Mode(capacity=Capacity(1.25, overflow="next_choice", at_inference=True)))
    return numbers | _measured(trainer, "next_choice")


def tuned(trainer: Trainer, freeze: int) -> Numbers:
    """After fine-tuning on another domain, the router left as it is for the first steps: loss and worst MaxVio."""
    base = trainer.config
    config = replace(
        base,
        data=replace(base.data, domains=TUNE_DOMAINS, tokenizer="base"),
        optim=replace(base.optim, lr=base.optim.lr / 3),
        steps=TUNE_STEPS,
        specialisation=False,
        interference_every=0,
        finetune=FinetuneConfig(base=str(trainer.out), freeze_router=freeze, lr_router=1.0),
    )
    with tempfile.TemporaryDirectory() as folder:
        config, data = open_data(config)
        tuner = Trainer(config, data, Path(folder) / "run", Silent())
        try:
            tuner.run()
            store = tuner.store
            worst = max(s.max_violation for layer in store.layers() for s in store.routing_history(layer))
            return {"tuned_loss": tuner.evaluate().loss, "tuned_violation": worst}
        finally:
            tuner.close("finished")


def _set_all(trainer: Trainer, mode: Mode) -> None:
    for layer in trainer.model.moe_layers.values():
        layer.set_mode(mode)


def _loss(trainer: Trainer) -> float:
    config = trainer.config
    with trainer.watch.recorder.paused():
        size = (config.batch_size, config.data.seq_len, config.eval_batches)
        return evaluate(trainer.model, trainer.data.val, *size, config.bf16).loss


def _choices(trainer: Trainer) -> dict[str, np.ndarray]:
    """bool (T, E) by layer: who goes where, on the validation text."""
    config = trainer.config
    with trainer.watch.recorder.paused():
        size = (config.batch_size, config.data.seq_len, config.eval_batches)
        text = route_text(trainer.model, trainer.data.val, *size, config.bf16)
    found = {}
    for name, (token_ids_N, expert_ids_N) in text.assignments.items():
        found[name] = np.zeros((len(text.positions_T), text.num_experts[name]), dtype=bool)
        found[name][token_ids_N, expert_ids_N] = True
    return found


def _measured(trainer: Trainer, name: str) -> Numbers:
    loads = [chosen_TE.sum(0) for chosen_TE in _choices(trainer).values()]
    worst = float(np.mean([load_E.max() / load_E.mean() - 1 for load_E in loads]))
    loss = _loss(trainer)
    return {f"loss_{name}": loss if math.isfinite(loss) else 1e3, f"violation_{name}": worst}


PROBES: dict[str, Probe] = {
    "plain": plain,
    "temperature": partial(temperature, low=0.3, high=3.0),
    "temperature_same": partial(temperature, low=1.0, high=1.0),
    "fallbacks": fallbacks,
    "fallbacks_unbroken": partial(fallbacks, blow=0.0),
    "tuned_frozen": partial(tuned, freeze=100),
    "tuned_thawed": partial(tuned, freeze=0),
}
