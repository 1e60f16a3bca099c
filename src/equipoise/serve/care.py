"""What looks after a model while it is served: the monitor, the recovery and the breaker, in a thread of its own.

It and the engine meet at the gate: a flush, a measurement or a change waits for the step that runs, and the next step
for it. Whoever changes the model has this thread do it (`call`), so that changes come one after the other.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from equipoise.disk.checkpoint import CHECKPOINTS
from equipoise.layer.mode import NORMAL
from equipoise.models.run_files import Loaded
from equipoise.monitor.profiles import Profile
from equipoise.monitor.watch import Watch
from equipoise.recovery.actions import Patient
from equipoise.recovery.breaker import BreakerConfig, Granularity
from equipoise.recovery.gate import Gate
from equipoise.recovery.latency import LatencyGuard
from equipoise.recovery.patience import Patience
from equipoise.recovery.policy import PolicyName, policy_of
from equipoise.recovery.recent import RecentScores
from equipoise.recovery.recovery import Recovery
from equipoise.serve.aftermath import Aftermath
from equipoise.serve.equipment import Equipment
from equipoise.serve.posted import fulfil
from equipoise.serve.weights import Read, whole
from equipoise.types import Action, Alert, Finding, RoutingStats, Sink

T = TypeVar("T")


@dataclass(frozen=True)
class CareConfig:
    """flush_s: seconds between two looks at the routing. window_s, profile: see `Watch`. recover: act, or only propose.
    policy: which repairs, in which order. lift_after_s: seconds in health after which a kept repair is lifted on trial,
    0 for never. breaker: None for no clocks and no breaker; below 10 ms a layer is never slow
    here, as small layers on a busy machine easily take three times what they usually do, and nobody notices.
    breaker_by: what it times and shuts, whole layers or, computed one by one, their experts."""

    flush_s: float = 2.0
    window_s: float = 600.0
    profile: Profile = "relative"
    recover: bool = False
    policy: PolicyName = "ladder"
    lift_after_s: float = 600.0
    breaker: BreakerConfig | None = BreakerConfig(floor_s=0.01)  # noqa: RUF009 - frozen
    breaker_by: Granularity = "layer"

    def __post_init__(self) -> None:
        if not self.flush_s > 0:
            raise ValueError(f"flush_s: expected seconds, more than 0, got {self.flush_s}")
        if not 0 <= self.lift_after_s < math.inf:
            raise ValueError(f"lift_after_s: expected seconds, or 0 for never, got {self.lift_after_s}")


@dataclass(frozen=True, eq=False)
class Shared:
    """What care and the engine share.

    gate: the engine's steps are in `running`. num_steps: so far. forget_cache: keys and values are to be computed anew;
    called while no step runs. read: how other weights are read; None where all of the model is in this process.
    """

    gate: Gate
    num_steps: Callable[[], int]
    forget_cache: Callable[[], None]
    read: Read | None = None


class Care:
    """Of one model. sinks: get routing, alerts and actions, in this thread. after_look: called there after each."""

    def __init__(
        self,
        loaded: Loaded,
        equipment: Equipment,
        engine: Shared,
        config: CareConfig = CareConfig(),
        sinks: Sequence[Sink] = (),
        after_look: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.aftermath = Aftermath()
        self.config, self.engine, self.sinks = config, engine, (self.aftermath, *sinks)
        self.model, self.layers = loaded.model, loaded.model.routed_layers
        self.read = read = engine.read or whole(loaded.model)
        self.notes = list(equipment.notes)
        self.guard: LatencyGuard | None = None
        self.watch = Watch(
            self.model,
            every=1,
            window_s=config.window_s,
            profile=config.profile,
            rules=(self._slow,),
            sinks=self.sinks,
        )
        self.watch.sift(self.aftermath.sift)
        if equipment.baselines:
            self.watch.use_baselines(equipment.baselines)
        self._recent = RecentScores(self.layers)
        self.guard = self._guarded(equipment)
        patient = Patient(
            self.model,
            self.layers,
            recent=self._recent,
            known_good=equipment.known_good,
            dense=equipment.dense,
            reload=lambda name: read(loaded.folder / CHECKPOINTS / name)().undo,
            on_change=engine.forget_cache,
        )
        self.recovery = Recovery(
            patient,
            policy=policy_of(config.policy),
            act=config.recover,
            canary=equipment.canary,
            patience=Patience(lift_after=math.ceil(config.lift_after_s / config.flush_s) or None),
            sinks=self.sinks,
            gate=engine.gate,
            quiet=self.watch.recorder.paused,
        )
        self.after_look = after_look
        self._condition = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._stopping = False
        self._error = ""
        self._last_look = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="care", daemon=True)

    # ------------------------------------------------------------------------------------------------- the thread

    def start(self) -> None:
        """Begin to look after it."""
        self._last_look = time.monotonic()
        self._thread.start()

    def stop(self) -> None:
        """Do what was asked for, end the thread, and leave the model as it was, but for repairs in force."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self.watch.detach()
        self._recent.detach()
        if self.guard is not None:
            self.guard.detach()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Have this thread do it, between two looks. Raises RuntimeError when it is stopping."""
        future: Future[T] = Future()
        with self._condition:
            if self._stopping:
                raise RuntimeError("the server is stopping: nothing is changed any more")
            self._inbox.append(partial(fulfil, future, function))
            self._condition.notify_all()
        return future

    def _run(self) -> None:
        due = time.monotonic() + self.config.flush_s
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._inbox or self._stopping, max(0.0, due - time.monotonic()))
                inbox, self._inbox = self._inbox, []
                stopping = self._stopping
            for do in inbox:
                do()
            if stopping:
                return
            if time.monotonic() >= due:
                due = time.monotonic() + self.config.flush_s
                try:
                    self.look()
                    self._error = ""
                except Exception as error:  # what fails once must not end the looking; `reasons` tells of it
                    self._error = f"{type(error).__name__}: {error}"

    # ------------------------------------------------------------------------------------------------- looking

    def look(self) -> list[Action]:
        """Flush, judge, and repair if an alert calls for it. What was done. In the care thread, or without one."""
        step = self.engine.num_steps()
        changed, moved = self._flush(step)
        done = self.recovery.after_flush(step, self.watch.alerts, self.watch.stats(), changed)
        for proposed in self.aftermath.proposals(step):
            done = [*done, proposed]
            for sink in self.sinks:
                sink.action(proposed)
        self.after_look(step)
        self._last_look = time.monotonic()
        return [*moved, *done]

    def look_for(self, alert: Alert) -> list[Action]:
        """Someone else says that this alert fires: look, and act on it whatever the configuration says.

        Raises ValueError for a layer that is none of the model's.
        """
        self.recovery.patient.layer(alert.finding.layer)
        step = self.engine.num_steps()
        changed, _ = self._flush(step)
        firing = [each for each in self.watch.alerts if each.key == alert.key] or [
            replace(alert, step=step, since_step=step)
        ]
        return self.recovery.after_flush(step, firing, self.watch.stats(), changed, act=True)

    def _flush(self, step: int) -> tuple[list[Alert], list[Action]]:
        """(alerts that changed, transitions of the breaker)."""
        with self.engine.gate.changing():
            moved = [] if self.guard is None else self.guard.step(step)
            if moved:
                self.engine.forget_cache()
            changed = self.watch.flush(step)
        return changed, moved

    def _slow(self, window: Sequence[RoutingStats]) -> list[Finding]:
        """A rule of the watch, by the clocks."""
        return [] if self.guard is None else self.guard.findings()

    def reasons(self) -> tuple[str, ...]:
        """Why answers may be worse than usual: repairs in force, open breakers, critical alerts, a blind monitor."""
        in_force = [f"{name}: a repair is in force" for name, layer in self.layers.items() if layer.mode != NORMAL]
        states = {} if self.guard is None else self.guard.states()
        shut = [f"{name}: the breaker is {state}" for name, state in states.items() if state != "closed"]
        firing = [
            f"{alert.finding.layer}: {alert.finding.rule}"
            for alert in self.watch.alerts
            if alert.finding.severity == "critical"
        ]
        return (*in_force, *shut, *firing, *self._blind())

    def _blind(self) -> list[str]:
        if self._error:
            return [f"the monitor fails: {self._error}"]
        silent = time.monotonic() - self._last_look
        if self._thread.is_alive() and silent > 10 * self.config.flush_s + 30.0:
            return [f"the monitor has been silent for {silent:.0f} s"]
        return []

    def quietly(self) -> ExitStack:
        """A context in which neither the monitor nor the repairs count what runs."""
        stack = ExitStack()
        stack.enter_context(self.watch.recorder.paused())
        stack.enter_context(self._recent.paused())
        return stack

    def _guarded(self, equipment: Equipment) -> LatencyGuard | None:
        if self.config.breaker is None:
            return None
        try:
            return LatencyGuard(
                self.model.moe_layers,
                self.config.breaker,
                granularity=self.config.breaker_by,
                dense=equipment.dense,
                strict=False,
                sinks=self.sinks,
            )
        except ValueError as error:
            self.notes.append(f"no breaker: {error}")
            return None
