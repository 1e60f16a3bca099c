"""The demonstration: train a small MoE on real text, break a router on purpose, see it caught and repaired.

Nothing is staged: the fault is written into the router's weight, the monitor sees only what the routers decide, and
the repair is the ladder that any run with recover=True has. What every rung of it would do is tried beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from equipoise.faults import Collapse, inject
from equipoise.host.extras import require
from equipoise.host.interrupt import interruptible
from equipoise.monitor.incidents import repairs
from equipoise.monitor.plot import plot_layer_load
from equipoise.monitor.sinks.options import NOWHERE, Alerts, delivering
from equipoise.monitor.store import RunStore
from equipoise.recovery.rehearsal import Rehearsal
from equipoise.train.config import TrainConfig
from equipoise.train.data import TokenData
from equipoise.train.evaluate import sample_text
from equipoise.train.loop import Trainer
from equipoise.train.recipes import recipe
from equipoise.train.repair import Repairs
from equipoise.train.report import Reporter, perplexity
from equipoise.train.run import PROMPT, open_data
from equipoise.types import Finding, Sink


@dataclass(frozen=True)
class Demonstration:
    """What is going to happen: the run, and when and where its router is broken."""

    config: TrainConfig
    inject_at: int
    fault: Collapse


@dataclass(frozen=True)
class Rung:
    """What one repair would do; None where it can't be done. straggler: load of the broken layer's busiest expert."""

    repair: str
    straggler: float | None
    perplexity: float | None
    note: str


@dataclass(frozen=True)
class DemoResult:
    """What happened. Perplexities are of the validation text.

    detected_at, repaired_at, resolved_at: steps, None when it did not happen. perplexity_broken: right after the
    injection. perplexity_detected: when the alert fired. repair: the kind that was kept. ladder: what each rung would
    do to the broken layer, on held-out text. signal: what interrupted the demonstration, if anything did.
    """

    out: str
    layer: str
    expert: int
    injected_at: int
    detected_at: int | None
    repaired_at: int | None
    repair: str | None
    resolved_at: int | None
    perplexity_before: float
    perplexity_broken: float
    perplexity_detected: float | None
    perplexity_after: float
    checkpoint: str
    picture: str
    sample: str
    ladder: tuple[Rung, ...] = ()
    signal: int | None = None

    @property
    def caught_and_repaired(self) -> bool:
        """Whether the monitor named this layer and expert, and a repair was kept and the alert resolved."""
        return None not in (self.detected_at, self.repaired_at, self.resolved_at)

    def summary(self) -> str:
        """One line."""
        if not self.caught_and_repaired:
            return f"NOT REPAIRED: detected at {self.detected_at}, resolved at {self.resolved_at}; see {self.out}"
        return (
            f"{self.layer} expert {self.expert}: collapsed at step {self.injected_at}, detected at {self.detected_at}, "
            f"balanced again by {self.resolved_at} ({self.repair}); perplexity {self.perplexity_before:.1f} before, "
            f"{self.perplexity_broken:.1f} broken, {self.perplexity_after:.1f} at the end"
        )

    def fields(self) -> dict[str, object]:
        """For --json."""
        return asdict(self) | {"caught_and_repaired": self.caught_and_repaired}


def demonstration(quick: bool = False, seed: int = 0) -> Demonstration:
    """About five minutes on two cores; `quick` is under one, with a smaller model."""
    config = replace(recipe("tiny" if quick else "demo"), name="demo", seed=seed, recover=True)
    fault = Collapse(layer="layers.1.mlp", expert=5, intensity=40.0)
    return Demonstration(config, inject_at=int(config.steps * 0.6), fault=fault)


def run_demo(plan: Demonstration, out: Path, reporter: Reporter, alerts: Alerts = NOWHERE) -> DemoResult:
    """Run it in the folder `out`, which must not hold a run yet. alerts: where they go beside it."""
    require("matplotlib", "plot")
    with delivering(alerts, out, reporter.say) as sinks:
        return _run_demo(plan, out, reporter, sinks)


def _run_demo(plan: Demonstration, out: Path, reporter: Reporter, sinks: Sequence[Sink]) -> DemoResult:
    reporter.say("preparing the text: files that this Python installation already has")
    config, data = open_data(plan.config)
    _introduce(config, data, reporter.say)
    trainer = Trainer(config, data, out, reporter, sinks=sinks)
    status = "failed"
    try:
        with interruptible() as interrupted:
            perplexities, ladder = _train_and_break(trainer, plan, lambda: interrupted() is not None)
            status = "finished" if interrupted() is None else "interrupted"
            checkpoint = trainer.save()
            picture = _picture(trainer.store, plan, out)
            sample = sample_text(trainer.model, data, PROMPT)
            result = _result(trainer, plan, perplexities, checkpoint, picture, sample, interrupted())
            return replace(result, ladder=ladder)
    finally:
        trainer.close(status)


def _train_and_break(
    trainer: Trainer, plan: Demonstration, stop: Callable[[], bool]
) -> tuple[tuple[float, float, float], tuple[Rung, ...]]:
    """(perplexity before, right after the injection, at the end), and what each rung would do."""
    if not trainer.run(until=plan.inject_at, stop=stop):
        now = trainer.evaluate().perplexity
        return (now, now, now), ()
    before = trainer.evaluate()
    trainer.save()  # what the rollbacks go back to
    inject(trainer.model, plan.fault, trainer.show_text)
    trainer.reporter.say(
        f"step {trainer.step_number}: FAULT INJECTED: the router of {plan.fault.layer} now prefers expert "
        f"{plan.fault.expert} for every token (+{plan.fault.intensity:g} logits). The monitor does not know."
    )
    broken = trainer.evaluate()
    trainer.run(until=plan.inject_at + 1, stop=stop)  # the repairs look at traffic that the broken router has routed
    ladder = _climb(trainer, plan.fault)
    trainer.run(stop=stop)
    return (before.perplexity, broken.perplexity, trainer.evaluate().perplexity), ladder


def _climb(trainer: Trainer, fault: Collapse) -> tuple[Rung, ...]:
    """Try every rung of the ladder on the broken model, and undo it."""
    message = f"{fault.layer} is broken on purpose"
    finding = Finding("collapse", fault.layer, fault.expert, "critical", 1.0, 0.5, message, "")
    assert isinstance(trainer.repairs, Repairs)  # one process
    now, tried = trainer.repairs.rehearse(finding)
    rungs = [Rehearsal("as it is", now, ""), *tried]
    ladder = tuple(
        Rung(each.kind, None, None, each.note)
        if each.health is None
        else Rung(each.kind, each.health.straggler[fault.layer], perplexity(each.health.loss), each.note)
        for each in rungs
    )
    say = trainer.reporter.say
    say("the ladder, gentlest first, each rung tried on the broken model and undone (held-out text):")
    for rung in ladder:
        effect = f"can't be done: {rung.note}"
        if rung.perplexity is not None:
            effect = f"busiest expert {rung.straggler:4.2f} fair loads, perplexity {rung.perplexity:6.1f}"
        say(f"    {rung.repair:16} {effect}")
    return ladder


def _introduce(config: TrainConfig, data: TokenData, say: Callable[[str], None]) -> None:
    moe = config.model.moe
    assert moe is not None
    say(
        f"text: {data.train.num_tokens:,} tokens to train on, {data.val.num_tokens:,} to validate, "
        f"domains {', '.join(data.train.domains)}"
    )
    say(
        f"model: {config.model.num_layers} layers of {moe.num_experts} experts, top-{moe.router.k}; "
        f"{config.steps} steps of {config.batch_size * config.data.seq_len:,} tokens"
    )


def _picture(store: RunStore, plan: Demonstration, out: Path) -> Path:
    marks = {"injected": plan.inject_at}
    for action in repairs(store.actions()):
        if action.layer == plan.fault.layer and action.step >= plan.inject_at:
            marks.setdefault("detected, repaired", action.step)
    return plot_layer_load(store, plan.fault.layer, out / "load.png", marks=marks)


def _result(
    trainer: Trainer,
    plan: Demonstration,
    perplexities: tuple[float, float, float],
    checkpoint: Path,
    picture: Path,
    sample: str,
    signal: int | None,
) -> DemoResult:
    store, fault = trainer.store, plan.fault
    since = [a for a in store.alerts() if a.step > plan.inject_at and a.finding.layer == fault.layer]
    collapses = [alert for alert in since if alert.finding.rule == "collapse"]
    fired = next((a.step for a in collapses if a.state == "firing" and a.finding.expert == fault.expert), None)
    made = [a for a in repairs(store.actions()) if a.layer == fault.layer and a.step > plan.inject_at]
    kept = next((action for action in made if action.state == "kept"), None)
    repaired = None if kept is None else kept.step
    resolved = next((a.step for a in collapses if a.state == "resolved"), None)
    before, broken, after = perplexities
    return DemoResult(
        out=str(trainer.out),
        layer=fault.layer,
        expert=fault.expert,
        injected_at=plan.inject_at,
        detected_at=fired,
        repaired_at=repaired,
        repair=None if kept is None else kept.kind,
        resolved_at=resolved,
        perplexity_before=before,
        perplexity_broken=broken,
        perplexity_detected=None if kept is None else perplexity(kept.detail["loss_before"]),
        perplexity_after=after,
        checkpoint=str(checkpoint),
        picture=str(picture),
        sample=sample,
        signal=signal,
    )
