"""A recovery for any loop of one's own, in one call: the monitor, what is known to be good, a canary, the ladder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import nn

from equipoise.disk.checkpoint import CHECKPOINTS
from equipoise.layer import FeedForward
from equipoise.layer.choice import routed_layers
from equipoise.monitor.watch import Watch
from equipoise.recovery.actions import Patient, Training
from equipoise.recovery.canary import Canary
from equipoise.recovery.known_good import KnownGood, Record
from equipoise.recovery.policy import Policy
from equipoise.recovery.recent import RecentScores
from equipoise.recovery.recovery import Recovery
from equipoise.recovery.remember import remember
from equipoise.recovery.weights import reload_weights
from equipoise.types import Action, Alert, Sink


class Keeper:
    """A watch and a recovery that a loop calls once per step. See `recover`."""

    def __init__(self, watch: Watch, recovery: Recovery, canary: Canary, dense: dict[str, FeedForward]) -> None:
        self.watch, self.recovery = watch, recovery
        self._canary, self._dense = canary, dense

    def step(self, step: int) -> list[Alert | Action]:
        """In place of `watch.step`, after each step: what changed, alerts first, then repairs."""
        changed = self.watch.step(step)
        if not self.watch.is_due(step):
            return []
        done = self.recovery.after_flush(step, self.watch.alerts, self.watch.stats(), changed)
        return [*changed, *done]

    def remember(self, step: int, checkpoint: str | None = None) -> Record:
        """Keep this moment as known-good, with stand-ins for experts, distilled on held-out text.

        checkpoint: the name of the checkpoint that holds the same weights. Raises `RefusedError` (a ValueError), with
        the reason, when held-out text shows that something is wrong.
        """
        with self.watch.recorder.paused():
            return remember(
                self.recovery.patient,
                self._canary,
                self._dense,
                step,
                checkpoint=checkpoint,
                firing=self.watch.alerts,
            )


def recover(
    model: nn.Module,
    watch: Watch,
    held_out_loss: Callable[[], float],
    *,
    run_folder: Path | None = None,
    policy: Policy | None = None,
    act: bool = False,
    training: Training | None = None,
    sinks: Sequence[Sink] = (),
) -> Keeper:
    """Repair the model by the policy, `Ladder()` if none is named, when an alert of the watch calls for it.

    held_out_loss: takes the model in eval through the same held-out text each time and returns nats per token; by it a
    repair is kept or undone. act: False only proposes. run_folder: where known-good records are kept, see
    `Keeper.remember`, and checkpoints, in its folder "checkpoints". training: the optimizer, for repairs of a model in
    training. sinks: get each change of a repair, and the alert that calls a human; those of the watch do not by
    themselves.
    For layers of other libraries than equipoise, router_rollback and full_rollback are what can be done.
    """
    layers, dense = routed_layers(model), dict[str, FeedForward]()
    canary = Canary(model, held_out_loss)
    patient = Patient(
        model,
        layers,
        recent=RecentScores(layers),
        known_good=None if run_folder is None else KnownGood(run_folder),
        dense=dense,
        reload=None if run_folder is None else reload_weights(model, run_folder / CHECKPOINTS),
        training=training,
    )
    recovery = Recovery(patient, policy=policy, act=act, canary=canary, sinks=sinks, quiet=watch.recorder.paused)
    return Keeper(watch, recovery, canary, dense)
