"""What lets a training run repair itself: what is known to be good, a canary, stand-ins for experts, the recovery.

The loop calls it after each flush, after each checkpoint, and when the loss is no longer a number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equipoise.disk.checkpoint import CHECKPOINTS
from equipoise.layer import FeedForward, MoE
from equipoise.models.decoder import Decoder
from equipoise.monitor.watch import Watch
from equipoise.recovery.actions import Patient, Training
from equipoise.recovery.canary import Canary, Health
from equipoise.recovery.dense_path import dense_from_state
from equipoise.recovery.held import finite_experts
from equipoise.recovery.known_good import KnownGood, Record, RefusedError
from equipoise.recovery.policy import TRAINING_RUNGS, policy_of
from equipoise.recovery.recent import NUM_TOKENS, RecentScores
from equipoise.recovery.recovery import Recovery
from equipoise.recovery.rehearsal import Rehearsal, rehearse
from equipoise.recovery.remember import remember
from equipoise.train.config import TrainConfig
from equipoise.train.data import TokenData
from equipoise.train.evaluate import evaluate
from equipoise.train.spread import Spread
from equipoise.types import ALONE, Action, Alert, Finding, Sink, Team


class Repairs:
    """Of one run. rate_scale: multiplies the learning rate; a repair may lower it."""

    def __init__(
        self,
        config: TrainConfig,
        model: Decoder,
        optimizer: torch.optim.Optimizer,
        data: TokenData,
        out: Path,
        watch: Watch,
        sinks: Sequence[Sink],
        spread: Spread,
    ) -> None:
        self._config, self._model, self._data, self._watch, self._out = config, model, data, watch, out
        self._optimizer, self._spread = optimizer, spread
        self.rate_scale = 1.0
        self.known_good = KnownGood(out, keep=config.keep_known_good)
        self._dense: dict[str, FeedForward] = {}
        layers = model.routed_layers
        # No more than a step's tokens: what a repair sees is then the same in a run that was resumed.
        tokens_per_step = config.batch_size * config.data.seq_len
        self._recent = RecentScores(layers, max(1, min(NUM_TOKENS, tokens_per_step) // spread.size))
        self._canary = Canary(model, self.held_out_loss, spread.team)
        patient = Patient(
            model,
            layers,
            recent=self._recent,
            known_good=self.known_good,
            dense=self._dense,
            reload=self._reload,
            training=Training(optimizer, self._set_rate_scale, lambda: self.rate_scale),
            team=spread.team,
        )
        self.recovery = Recovery(
            patient,
            policy=policy_of(config.policy),
            act=config.recover,
            canary=self._canary,
            sinks=sinks,
            quiet=watch.recorder.paused,
        )

    def held_out_loss(self) -> float:
        """Mean nats per token on a few batches of the validation text."""
        config, val = self._config, self._data.val
        sizes = (config.batch_size, config.data.seq_len, config.canary_batches)
        return evaluate(self._model, val, *sizes, config.bf16, self._spread).loss

    # ------------------------------------------------------------------------------------------------- the loop

    def after_flush(self, step: int, changed: Sequence[Alert]) -> list[Action]:
        """Repair, or propose to, if an alert calls for it. All processes go by the main one's alerts: theirs may be
        judged over another span, by their own clocks.
        """
        told = self._spread.team.tell([[asdict(alert) for alert in each] for each in (self._watch.alerts, changed)])
        firing, changed = ([_alert(record) for record in each] for each in told)
        return self.recovery.after_flush(step, firing, self._watch.stats(), changed)

    def rescue(self, step: int) -> list[Action]:
        """The loss or the gradient is not finite: repair what can be; the last action is "kept" if it could."""
        return self.recovery.rescue(step, broken(self._model, self._spread.team))

    def rehearse(self, finding: Finding) -> tuple[Health, list[Rehearsal]]:
        """(as it is, under each rung of the ladder), on held-out text; the model is left as it is."""
        with self._watch.recorder.paused(), self._recent.paused():
            now = self._canary.measure(0)
        patient, rungs = self.recovery.patient, TRAINING_RUNGS[finding.rule]
        return now, rehearse(patient, self._canary, finding, rungs, quiet=self._watch.recorder.paused)

    def remember(self, step: int, checkpoint: Path) -> str | None:
        """Keep this moment as known-good, if held-out text shows that it is; a sentence when it is refused.

        The monitor compares with it from now on, as far as a model that goes on learning can be compared.
        """
        patient = self.recovery.patient
        try:
            with self._watch.recorder.paused(), self._recent.paused():
                record = remember(
                    patient,
                    self._canary,
                    self._dense,
                    step,
                    checkpoint=checkpoint.name,
                    firing=self._watch.alerts,
                    distil=self._config.recover,
                )
        except RefusedError as refused:
            return f"step {step}: not kept as known-good: {refused}"
        self._compare_with(record)
        return None

    def _compare_with(self, record: Record) -> None:
        """From now on, unless the model is tuned: then the monitor goes on comparing with what it began as."""
        if self._config.finetune is None:
            self._watch.use_baselines(record.baselines, learning=True)

    def forget_after(self, step: int) -> None:
        """Drop records of later steps: the run takes another way from there."""
        if self._spread.is_main:
            self.known_good.truncate_after(step)
        self._spread.team.tell(None)  # the others look at it after that

    def remembers(self, step: int) -> bool:
        """Whether there is a record of this step."""
        return self._spread.team.tell(step in {record.step for record in self.known_good.records})

    def protected(self) -> list[str]:
        """The names of checkpoints that must not be pruned: the newest that is known to be good."""
        named = [record.checkpoint for record in self.known_good.records if record.checkpoint is not None]
        return named[-1:]

    # ------------------------------------------------------------------------------------------------- handles

    def _set_rate_scale(self, scale: float) -> None:
        self.rate_scale = scale

    def _reload(self, name: str) -> Callable[[], None]:
        """Weights, balancers and optimizer of a checkpoint; step, data and history go on. Returns what undoes it."""
        return self._spread.reload(self._out / CHECKPOINTS / name, self._model, self._optimizer)

    def detach(self) -> None:
        """Leave the model as it was, but for modes in force."""
        self._recent.detach()

    # ------------------------------------------------------------------------------------------------- state

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, JSON-able."""
        return {"recovery": self.recovery.state_dict(), "rate_scale": self.rate_scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned. Stand-ins and baselines come from the newest known-good record."""
        records: Sequence[Record] = self.known_good.records
        if records:
            kept: Mapping[str, Tensor] = self.known_good.load(records[-1])
            self._dense.update(dense_from_state(self._model.moe_layers, kept))
            self._compare_with(records[-1])
        self.recovery.load_state_dict(state["recovery"])
        self.rate_scale = float(state["rate_scale"])


def _alert(record: Mapping[str, Any]) -> Alert:
    """What `asdict` made of it."""
    return Alert(**{**record, "finding": Finding(**record["finding"])})


@torch.no_grad()
def broken(model: Decoder, team: Team = ALONE) -> Finding:
    """Where the model is not finite: the first expert or router of a layer, or the model as a whole."""
    for name, layer in model.routed_layers.items():
        expert = _broken_expert(layer, name, team) if isinstance(layer, MoE) else None
        if expert is not None:
            message = f"{name}: weights of expert {expert} are not finite"
            remedy = "Copy another expert over it, or go back to a checkpoint."
            return Finding("not_finite", name, expert, "critical", nan, 0.0, message, remedy)
        if layer.router.weight is not None and not bool(torch.isfinite(layer.router.weight).all()):
            remedy = "Go back to a good router."
            message = f"{name}: weights of the router are not finite"
            return Finding("not_finite", name, None, "critical", nan, 0.0, message, remedy)
    message = "the loss or its gradient is not finite, with finite expert weights"
    remedy = "Lower the learning rate, or go back to a checkpoint."
    return Finding("diverged", "model", None, "critical", nan, 0.0, message, remedy)


def _broken_expert(layer: MoE, name: str, team: Team) -> int | None:
    """The first with a weight that is not finite."""
    finite_E = finite_experts(layer, name, team)
    return None if bool(finite_E.all()) else int((~finite_E).nonzero()[0, 0])
