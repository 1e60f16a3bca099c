"""One fault, one way to repair it, one seed, in training or in serving: what happened. For benchmarks/chaos.py.

Real runs on real text with the parts that any run has: the trainer, the monitor, the recovery. Nothing is timed; all is
counted in steps, tokens and nats.
"""

from __future__ import annotations

import math
import shutil
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.chaos_faults import LAYER, NOBODY, POLICIES, SCENARIOS, Case, E, Fault, put_in
from equipoise.disk.checkpoint import latest_checkpoint, load_checkpoint
from equipoise.models.decoder import Decoder
from equipoise.monitor.incidents import repairs
from equipoise.monitor.rules import CountRule
from equipoise.monitor.watch import Watch
from equipoise.recovery.actions import Patient
from equipoise.recovery.breaker import BreakerConfig
from equipoise.recovery.canary import Canary
from equipoise.recovery.dense_path import dense_from_state
from equipoise.recovery.known_good import KnownGood
from equipoise.recovery.latency import LatencyGuard
from equipoise.recovery.patience import Patience
from equipoise.recovery.policy import OneRung, Policy, policy_of
from equipoise.recovery.recent import RecentScores
from equipoise.recovery.recovery import Recovery
from equipoise.recovery.weights import reload_weights
from equipoise.train.config import TrainConfig
from equipoise.train.data import Loader, TokenData
from equipoise.train.diagnose import DivergenceError
from equipoise.train.evaluate import evaluate
from equipoise.train.loop import Trainer, load_config
from equipoise.train.recipes import recipe
from equipoise.train.repair import broken
from equipoise.train.report import Silent
from equipoise.train.run import open_data
from equipoise.types import Action, Alert, Routed

HEALTHY_STEPS, STEPS_AFTER = 500, 40
UNEVEN = 2.0  # fair loads of the busiest expert


@dataclass
class Outcome:
    """What happened; steps count from the injection, None where it did not happen.

    detected: steps to the first alert. repaired: steps to the repair that was kept, and repair: its kind.
    restored: steps from that repair until the busiest expert had less than two fair loads, 1 is the next one; of faults
    that leave the load even, until the alert was resolved, if it was. loss_*: held-out nats per token. straggler_*: the
    busiest expert's load relative to fair, in the broken layer, at its worst and at the end. lost: positions of served
    logits that were not finite, and tokens that every expert dropped. false_actions: repairs of a layer that was not
    broken, or of an undamaged model. exact: every weight and bias is as before the fault. stopped: training gave up.
    """

    case: Case
    detected: int | None = None
    repaired: int | None = None
    repair: str | None = None
    restored: int | None = None
    loss_before: float = math.nan
    loss_broken: float = math.nan
    loss_after: float = math.nan
    straggler_worst: float = 1.0
    straggler_end: float = 1.0
    lost: int = 0
    false_actions: int = 0
    exact: bool | None = None
    stopped: bool = False
    rules: list[str] = field(default_factory=list)
    story: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------- the runs


def healthy_run(seed: int, folder: Path) -> Path:
    """Train a small model until it is worth breaking; kept, so that it is made once per seed."""
    out = folder / f"healthy-{seed}"
    if latest_checkpoint(out / "checkpoints") is not None and (out / "done").exists():
        return out
    shutil.rmtree(out, ignore_errors=True)
    config, data = _data(replace(recipe("tiny"), seed=seed, steps=HEALTHY_STEPS, eval_every=0))
    # Repairs are on for the last step alone, which builds stand-ins: an early one would leave its balancer switched on,
    # and that undoes a collapse by itself.
    for until, recover in ((HEALTHY_STEPS - 1, False), (HEALTHY_STEPS, True)):
        trainer = Trainer(replace(config, recover=recover), data, out, Silent(), resume=recover)
        trainer.run(until=until)
        if not recover:
            trainer.save()
        trainer.close("finished")
    (out / "done").touch()
    return out


@cache
def _tokens(seed: int) -> TokenData:
    return open_data(replace(recipe("tiny"), seed=seed))[1]


def _data(config: TrainConfig) -> tuple[TrainConfig, TokenData]:
    """As `open_data`, read once per seed and process."""
    data = _tokens(config.seed)
    return config.with_vocab(data.tokenizer.vocab_size), data


def run_case(case: Case, folder: Path) -> Outcome:
    """The cell."""
    torch.set_num_threads(1)
    torch.manual_seed(case.seed)
    healthy, out = healthy_run(case.seed, folder), folder / "work" / case.name.replace(" ", "-")
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(healthy, out)
    try:
        return _train(case, out) if case.mode == "training" else _serve(case, out)
    finally:
        shutil.rmtree(out, ignore_errors=True)


def _policy(rung: str) -> Policy:
    named = next((name for name in POLICIES if name == rung), None)
    return OneRung(rung) if named is None else policy_of(named)


def _bits(model: Decoder) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _train(case: Case, out: Path) -> Outcome:
    """Training goes on from the healthy checkpoint; the fault strikes before its first step."""
    config = replace(load_config(out), watch_every=1, steps=HEALTHY_STEPS + STEPS_AFTER, checkpoint_every=0)
    config, data = _data(config)
    trainer = Trainer(config, data, out, Silent(), resume=True)
    outcome = Outcome(case)
    try:
        trainer.repairs.recovery.act = case.rung != NOBODY
        if case.rung != NOBODY:
            trainer.repairs.recovery.policy = _policy(case.rung)
        with trainer.watch.recorder.paused():
            outcome.loss_before = trainer.repairs.held_out_loss()
        tokens = trainer.loader.next_batch().tokens_BS
        fault = put_in(case, trainer.model, trainer.watch, out, lambda: trainer.model(tokens))
        with trainer.watch.recorder.paused():
            outcome.loss_broken = trainer.repairs.held_out_loss()
        next_batch = trainer.loader.next_batch
        trainer.loader.next_batch = lambda: fault.batch(next_batch())  # type: ignore[method-assign]
        load = _Load(trainer.model)
        with suppress(DivergenceError):
            for _ in range(STEPS_AFTER):
                load.on = True  # of its forwards, the training step's is the first
                before = len(load.by_step)
                trainer.step()
                del load.by_step[before + 1 :]
                fault.advance()
        load.on = False
        outcome.stopped = trainer.step_number < config.steps
        with trainer.watch.recorder.paused():
            outcome.loss_after = trainer.repairs.held_out_loss()
        after = [alert for alert in trainer.store.alerts() if alert.step > HEALTHY_STEPS]
        made = [action for action in trainer.store.actions() if action.step > HEALTHY_STEPS]
        return _judged(outcome, after, made, load, HEALTHY_STEPS)
    finally:
        trainer.close("finished")


class _Load:
    """What the broken layer's busiest expert computed in each step, relative to its fair share."""

    def __init__(self, model: Decoder) -> None:
        self.by_step: list[float] = []
        model.moe_layers[LAYER].tap.register_forward_hook(self._add)
        self.on = False

    def _add(self, module: object, args: object, routed: Routed) -> None:
        if self.on:
            fair = len(routed.decision.expert_ids_N) / E
            self.by_step.append(float(routed.plan.counts_e.max()) / fair)


class _Notes:
    """A sink that keeps alerts and actions."""

    def __init__(self) -> None:
        self.alerts: list[Alert] = []
        self.actions: list[Action] = []

    def routing(self, window: object) -> None:
        pass

    def alert(self, alert: Alert) -> None:
        self.alerts.append(alert)

    def action(self, action: Action) -> None:
        self.actions.append(action)


def _serve(case: Case, out: Path) -> Outcome:
    """The checkpoint is served: forwards on a stream of text; each answer must be a number."""
    config, data = _data(load_config(out))
    model = Decoder(config.model).eval()
    path = latest_checkpoint(out / "checkpoints")
    assert path is not None
    model.load_state_dict(dict(load_checkpoint(path).tensors["model"]))
    server = _Server(case, model, data, out, config.batch_size, config.data.seq_len)
    outcome = Outcome(case)
    before, outcome.loss_before = _bits(model), server.held_out_loss()
    fault = put_in(case, model, server.watch, out, lambda: model(server.peek.tokens_BS))
    with server.watch.recorder.paused():
        outcome.loss_broken = server.held_out_loss()
    load = _Load(model)
    for step in range(1, STEPS_AFTER + 1):
        load.on, before_step = True, len(load.by_step)
        outcome.lost += server.step(step, fault)
        del load.by_step[before_step + 1 :]
        fault.advance()
    load.on = False
    with server.watch.recorder.paused():
        outcome.loss_after = server.held_out_loss()
    outcome.exact = all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return _judged(outcome, server.notes.alerts, server.notes.actions, load, 0)


class _Server:
    """A model under watch, a recovery, a breaker, and a stream of text."""

    def __init__(self, case: Case, model: Decoder, data: TokenData, out: Path, batch_size: int, seq_len: int) -> None:
        self.model, self.data, self.shape = model, data, (batch_size, seq_len)
        self.notes, layers = _Notes(), model.moe_layers
        self.loader = Loader(data.train, batch_size, seq_len, seed=1000 + case.seed)
        self.peek = self.loader.next_batch()
        known_good = KnownGood(out)
        record = known_good.latest()
        self.watch = Watch(model, every=1, rules=(CountRule(batch_size * seq_len),), sinks=(self.notes,))
        self.watch.use_baselines(record.baselines)
        dense = dense_from_state(layers, known_good.load(record))
        patient = Patient(
            model,
            layers,
            recent=RecentScores(layers, 2048),
            known_good=known_good,
            dense=dense,
            reload=reload_weights(model, out / "checkpoints"),
        )
        acts = case.rung not in (NOBODY, "breaker")
        self.recovery = Recovery(
            patient,
            policy=_policy(case.rung) if acts else None,
            act=acts,
            canary=Canary(model, self.held_out_loss),
            patience=Patience(),
            sinks=(self.notes,),
            quiet=self.watch.recorder.paused,
        )
        self.clock = 0.0
        self.guard = None
        if case.rung == "breaker":
            config = BreakerConfig(window=20, min_calls=5, open_s=5.0, probe_calls=3, slow_ratio=5.0)
            self.guard = LatencyGuard(layers, config, dense=dense, sinks=(self.notes,), clock=lambda: self.clock)
            for step in range(-20, 0):  # what is usual
                self._forward(step)
        self.watch.recorder.flush(0)

    def held_out_loss(self) -> float:
        return evaluate(self.model, self.data.val, *self.shape, max_batches=2, bf16=False).loss

    def step(self, step: int, fault: Fault) -> int:
        """Serve one batch, flush, look. How many outputs were lost."""
        self.peek = fault.batch(self.loader.next_batch())
        logits = self._forward(step)
        if not bool(torch.isfinite(logits).all()):
            self.recovery.rescue(step, broken(self.model))
            with self.watch.recorder.paused():  # the same tokens again
                logits = self._forward(step)
        lost = int((~torch.isfinite(logits).all(-1)).sum())
        changed = self.watch.step(step)
        self.recovery.after_flush(step, self.watch.alerts, self.watch.stats(), changed)
        return lost + sum(stats.dropped["tokens"] for stats in self.watch.stats())

    def _forward(self, step: int) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.model(self.peek.tokens_BS)
        self.clock += 1.0
        if self.guard is not None:
            self.guard.step(step)
        return logits


# ------------------------------------------------------------------------------------------------- what it comes to


def _judged(outcome: Outcome, alerts: list[Alert], actions: list[Action], load: _Load, start: int) -> Outcome:
    case, blames = outcome.case, SCENARIOS[outcome.case.fault].blames
    if load.by_step:
        outcome.straggler_worst, outcome.straggler_end = max(load.by_step), load.by_step[-1]
    fired = [alert for alert in alerts if alert.state == "firing" and alert.finding.rule != "recovery_exhausted"]
    mine = [alert for alert in fired if not blames or alert.finding.layer in (blames, "model") or _nan(case)]
    made = [action for action in repairs(actions) if action.state in ("applied", "kept", "undone")]
    if mine or made:
        outcome.detected = min([alert.step for alert in mine] + [action.step for action in made]) - start
    outcome.rules = sorted({alert.finding.rule for alert in fired})
    outcome.story = [f"{action.kind} {action.state} at {action.step - start}" for action in repairs(actions)]
    outcome.false_actions = sum(action.layer not in (blames, "model") or not blames for action in made)
    last = next((a for a in made if a.state == "kept" or (a.kind == "breaker" and "-> open" in a.note)), None)
    if last is not None:
        outcome.repaired, outcome.repair = last.step - start, last.kind
        outcome.restored = _restored(outcome, alerts, load.by_step, start)
    return outcome


def _restored(outcome: Outcome, alerts: list[Alert], loads: list[float], start: int) -> int | None:
    """Steps from the repair until it was even again, for good; see `Outcome`."""
    repaired = outcome.repaired
    assert repaired is not None
    if max(loads, default=0.0) > UNEVEN:
        uneven = [step for step, each in enumerate(loads, start=1) if each > UNEVEN]
        return None if uneven[-1] == len(loads) else max(uneven[-1] - repaired + 1, 1)
    resolved = [a.step - start for a in alerts if a.state == "resolved" and a.step - start > repaired]
    return max(resolved[0] - repaired - 1, 1) if resolved else None  # two clean flushes resolve an alert


def _nan(case: Case) -> bool:
    """NaN spreads: the layers after the broken one show it."""
    return case.fault.startswith("NaN")
