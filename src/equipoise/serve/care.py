"""What looks after a model while it is served: the monitor, the recovery, the breaker, reloads; in a thread of its own.

It and the engine meet at the gate: a flush, a measurement or a change waits for the step that runs, and the next step
for it. Everything that changes the model is done in this thread, one after the other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as fn
from torch import Tensor

from equipoise.faults.catalogue import Fault, from_json, sentence
from equipoise.faults.injection import Injection, inject
from equipoise.layer import FeedForward
from equipoise.layer.mode import NORMAL
from equipoise.models.decoder import Decoder
from equipoise.models.run_files import CHECKPOINTS, Loaded
from equipoise.monitor.profiles import Profile
from equipoise.monitor.watch import Watch
from equipoise.recovery.actions import Patient
from equipoise.recovery.breaker import BreakerConfig
from equipoise.recovery.canary import Canary
from equipoise.recovery.catalogue import REPAIRS
from equipoise.recovery.dense_path import dense_from_state
from equipoise.recovery.gate import Gate
from equipoise.recovery.known_good import KnownGood, KnownGoodError, RefusedError
from equipoise.recovery.latency import LatencyGuard
from equipoise.recovery.policy import PolicyName, policy_of
from equipoise.recovery.recent import RecentScores
from equipoise.recovery.recovery import Recovery
from equipoise.recovery.remember import remember
from equipoise.recovery.weights import reload_weights
from equipoise.serve.weights import Version, Weights
from equipoise.types import Action, Alert, Finding, Sink

T = TypeVar("T")


@dataclass(frozen=True)
class CareConfig:
    """flush_s: seconds between two looks at the routing. window_s, profile: see `Watch`. recover: act, or only propose.
    policy: which repairs, in which order. breaker: None for no clocks and no breaker."""

    flush_s: float = 2.0
    window_s: float = 600.0
    profile: Profile = "relative"
    recover: bool = False
    policy: PolicyName = "ladder"
    breaker: BreakerConfig | None = BreakerConfig()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if not self.flush_s > 0:
            raise ValueError(f"flush_s: expected seconds, more than 0, got {self.flush_s}")


class Care:
    """Of one model.

    gate: the engine's steps are in its `running`. num_steps: of the engine so far. forget: keys and values are to be
    computed anew; called while no step runs. sinks: get routing, alerts and actions in this thread; `at_flush` is
    called after each flush with its step.
    """

    def __init__(
        self,
        loaded: Loaded,
        gate: Gate,
        config: CareConfig = CareConfig(),
        *,
        folder: Path,
        num_steps: Callable[[], int],
        forget: Callable[[], None],
        sinks: Sequence[Sink] = (),
        at_flush: Callable[[int], None] = lambda step: None,
    ) -> None:
        self.config, self._loaded, self._gate, self._forget = config, loaded, gate, forget
        self._num_steps, self._sinks, self._at_flush = num_steps, tuple(sinks), at_flush
        self.model, self.layers = loaded.model, loaded.model.moe_layers
        self.notes: list[str] = []
        self._injected: list[Injection] = []
        held_out = loaded.held_out_BS
        self._canary = None if held_out is None else Canary(self.model, lambda: held_out_loss(self.model, held_out))
        self.known_good = self._registry(folder)
        self._dense = self._stand_ins()
        self.watch = Watch(self.model, every=1, window_s=config.window_s, profile=config.profile, sinks=self._sinks)
        self._recent = RecentScores(self.layers)
        self.guard = self._guarded()
        self.recovery = Recovery(
            self._patient(),
            policy=policy_of(config.policy),
            act=config.recover,
            canary=self._canary,
            sinks=self._sinks,
            gate=gate,
            quiet=self.watch.recorder.paused,
        )
        measure = None if self._canary is None else self._loss_alone
        self.weights = Weights(
            self.model, loaded.folder / CHECKPOINTS, loaded.checkpoint.name, gate, measure, on_change=forget
        )
        self._condition = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._stopping = False
        self.error = ""
        self.last_flush = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="care", daemon=True)

    # ------------------------------------------------------------------------------------------------- the thread

    def start(self) -> None:
        """Begin to look after it."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and leave the model as it was, but for repairs in force."""
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
        """Have this thread do it, between two looks."""
        future: Future[T] = Future()

        def do() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # it belongs to whoever asked
                    future.set_exception(error)

        with self._condition:
            if self._stopping:
                raise RuntimeError("the server is stopping: nothing is changed any more")
            self._inbox.append(do)
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
                    self.error = ""
                except Exception as error:  # what fails here must not end the looking
                    self.error = f"{type(error).__name__}: {error}"

    # ------------------------------------------------------------------------------------------------- looking

    def look(self) -> list[Action]:
        """Flush, judge, and repair if an alert calls for it. What was done."""
        step = self._num_steps()
        with self._gate.changing():
            changed = self.watch.flush(step)
            moved = [] if self.guard is None else self.guard.step(step)
        if moved:
            self._forget_between()
        resolved = [alert for alert in changed if alert.state == "resolved"]
        done = self.recovery.after_flush(step, self.watch.alerts, self.watch.stats(), resolved)
        for injection in self._injected:
            injection.advance()
        self._at_flush(step)
        self.last_flush = time.monotonic()
        return [*moved, *done]

    def _forget_between(self) -> None:
        with self._gate.changing():
            self._forget()

    def fallbacks(self) -> tuple[str, ...]:
        """Why answers may be worse than usual: repairs in force, breakers that are open, alerts that are critical."""
        in_force = [f"{name}: a repair is in force" for name, layer in self.layers.items() if layer.mode != NORMAL]
        states = {} if self.guard is None else self.guard.states()
        shut = [f"{name}: the breaker is {state}" for name, state in states.items() if state != "closed"]
        firing = [
            f"{alert.finding.layer}: {alert.finding.rule}"
            for alert in self.watch.alerts
            if alert.finding.severity == "critical"
        ]
        silent = time.monotonic() - self.last_flush
        lost = [f"the monitor fails: {self.error}"] if self.error else []
        if not lost and self._thread.is_alive() and silent > 10 * self.config.flush_s + 30.0:
            lost = [f"the monitor has been silent for {silent:.0f} s"]
        return (*in_force, *shut, *firing, *lost)

    # ------------------------------------------------------------------------------------------------- verbs

    def repair_now(self, layer: str, rule: str, message: str) -> list[Action]:
        """Someone else's alert calls for a repair: flush, and act on it whatever the configuration says.

        Raises ValueError for a layer that is none.
        """
        self.recovery.patient.layer(layer)
        step = self._num_steps()
        with self._gate.changing():
            changed = self.watch.flush(step)
        key = f"{layer}:{rule}"
        known = [alert for alert in self.watch.alerts if alert.key == key]
        finding = Finding(rule, layer, None, "critical", 1.0, 0.0, message, "Sent by an alert manager.")
        firing = known or [Alert(key, "firing", step, step, finding)]
        resolved = [alert for alert in changed if alert.state == "resolved"]
        before, self.recovery.act = self.recovery.act, True
        try:
            return self.recovery.after_flush(step, firing, self.watch.stats(), resolved)
        finally:
            self.recovery.act = before

    def set_act(self, act: bool) -> bool:
        """Whether repairs are made, or only proposed. For `call`."""
        self.recovery.act = act
        return act

    def rollback_router(self, layer: str | None = None) -> list[Action]:
        """Routers and balancers of one layer, or of all, from the newest known-good record. For `call`."""
        step = self._num_steps()
        done = []
        for name in self.layers if layer is None else [layer]:
            self.recovery.patient.layer(name)
            finding = Finding("operator", name, None, "critical", 1.0, 0.0, "asked for by an operator", "")
            with self._gate.changing():
                change = REPAIRS["router_rollback"].apply(self.recovery.patient, finding)
                self._forget()
            note = f"asked for by an operator; {change.note}"
            done.append(Action("router_rollback", name, step, "operator", change.detail, "kept", note))
        self._tell(done)
        return done

    def reload(self, name: str | None, most_worse: float) -> Version:
        """See `Weights.reload`. For `call`."""
        try:
            version = self.weights.reload(name, most_worse=most_worse)
        except ValueError as error:
            self._tell([Action("reload", "", self._num_steps(), "operator", {}, "failed", str(error))])
            raise
        self._tell([self._told(version, f"weights of {version.source}")])
        return version

    def undo_reload(self) -> Version:
        """See `Weights.undo`. For `call`."""
        version = self.weights.undo()
        self._tell([self._told(version, f"back to {version.source}")])
        return version

    def put_in(self, record: object) -> str:
        """A fault, as JSON; says what. For `call`. Raises ValueError for one that can't be put in."""
        fault: Fault = from_json(record)
        held_out = self._loaded.held_out_BS
        run = None if held_out is None else (lambda: held_out_loss(self.model, held_out[:4]))
        with self._gate.changing(), self._quietly():
            self._injected.append(inject(self.model, fault, run))  # type: ignore[arg-type]  # faults of models alone
            self._forget()
        return sentence(fault)

    def take_out(self) -> list[str]:
        """All faults that were put in, the last one first. For `call`."""
        taken = []
        with self._gate.changing():
            while self._injected:
                injection = self._injected.pop()
                injection.remove()
                taken.append(sentence(injection.fault))
            self._forget()
        return taken

    def state(self) -> dict[str, Any]:
        """For people: JSON."""
        return {
            "weights": vars(self.weights.version) | {"checkpoints": self.weights.names()},
            "recovery": {
                "acts": self.recovery.act,
                "policy": self.config.policy,
                "on_trial": None if self.recovery.on_trial is None else vars(self.recovery.on_trial) | {"detail": None},
            },
            "breaker": None if self.guard is None else self.guard.states(),
            "modes": {name: layer.mode.to_json() for name, layer in self.layers.items() if layer.mode != NORMAL},
            "alerts": [vars(alert.finding) | {"since_step": alert.since_step} for alert in self.watch.alerts],
            "faults": [sentence(injection.fault) for injection in self._injected],
            "degraded": list(self.fallbacks()),
            "notes": list(self.notes),
        }

    # ------------------------------------------------------------------------------------------------- parts

    def _tell(self, actions: Sequence[Action]) -> None:
        for action in actions:
            for sink in self._sinks:
                sink.action(action)

    def _told(self, version: Version, note: str) -> Action:
        loss = {} if version.loss is None else {"loss_after": version.loss}
        return Action(
            "reload", "", self._num_steps(), "operator", loss | {"version": float(version.number)}, "kept", note
        )

    def _loss_alone(self) -> float:
        """On held-out text, with nobody else's tokens in between."""
        assert self._canary is not None
        with self._gate.changing(), self._quietly():
            return self._canary.run()

    def _quietly(self) -> ExitStack:
        """Inside, neither the monitor nor the repairs count what runs."""
        stack = ExitStack()
        stack.enter_context(self.watch.recorder.paused())
        stack.enter_context(self._recent.paused())
        return stack

    def _registry(self, folder: Path) -> KnownGood | None:
        """The run's own records; where it has none, a registry of this server, for the model as it was loaded."""
        of_run = KnownGood(self._loaded.folder)
        if of_run.records:
            return of_run
        return KnownGood(folder) if self._canary is not None else None

    def remember(self) -> None:
        """Make a record of the model as it is, where there is none yet. For before the first request."""
        if self.known_good is None or self._canary is None:
            self.notes.append(
                "there is no held-out text: repairs are judged by alerts alone, and nothing is known good"
            )
        elif not self.known_good.records:
            try:
                with self._quietly():
                    remember(self.recovery.patient, self._canary, self._dense, 0)
            except RefusedError as error:
                self.notes.append(f"the model as it was loaded is not kept as known-good: {error}")
        if self.known_good is not None and self.known_good.records:
            self.watch.use_baselines(self.known_good.latest().baselines)

    def _stand_ins(self) -> dict[str, FeedForward]:
        """Dense paths that the newest known-good record has."""
        if self.known_good is None or not self.known_good.records:
            return {}
        try:
            return dense_from_state(self.layers, self.known_good.load(self.known_good.latest()))
        except KnownGoodError as error:
            self.notes.append(str(error))
            return {}

    def _guarded(self) -> LatencyGuard | None:
        if self.config.breaker is None:
            return None
        try:
            return LatencyGuard(self.layers, self.config.breaker, dense=self._dense, strict=False, sinks=self._sinks)
        except ValueError as error:
            self.notes.append(f"no breaker: {error}")
            return None

    def _patient(self) -> Patient:
        return Patient(
            self.model,
            self.layers,
            recent=self._recent,
            known_good=self.known_good,
            dense=self._dense,
            reload=reload_weights(self.model, self._loaded.folder / CHECKPOINTS),
            on_change=self._forget,
        )


@torch.inference_mode()
def held_out_loss(model: Decoder, tokens_BS: Tensor) -> float:
    """Mean nats per token. tokens_BS: the last of each row is a target only."""
    device = next(model.parameters()).device
    nats, count = 0.0, 0
    for rows_BS in torch.split(tokens_BS.to(device), 8):
        logits_BSV = model(rows_BS[:, :-1])
        targets_T = rows_BS[:, 1:].reshape(-1)
        nats += float(fn.cross_entropy(logits_BSV.float().flatten(0, 1), targets_T, reduction="sum"))
        count += len(targets_T)
    return nats / count
