"""The 2 a.m. decision tree, walked with a run's own numbers: what is wrong, where, since when, what changed, what now.

Pure functions of the evidence. Each check asks one question and answers it with values; the conclusion names the most
likely cause. Nothing here repairs anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from equipoise.monitor.check import Check, Desk
from equipoise.monitor.detectors import CollapseDetector, expected_per_expert
from equipoise.monitor.evidence import Evidence
from equipoise.monitor.incidents import EXHAUSTED, LOOK_AT_INPUT, Incident, told
from equipoise.monitor.rules import LoadDriftRule, LogitRule, load_moved
from equipoise.monitor.triage_serving import FAULTS, WEIGHTS, changed_in_service, serving_checks
from equipoise.types import Action, RoutingStats

DETECT, WILD_LOGITS, MOVED_PSI = CollapseDetector(), LogitRule().max_logsumexp, LoadDriftRule().limit
LOGITS, OTHERS = "Did this router's logits change?", "Did the other layers' loads move at the same time?"
REPAIRED = "Has anything been done about it?"
STALE_S, JUMP = 300.0, 1.5
MAX_TOLD = 6  # repairs, the newest


@dataclass(frozen=True)
class Triage:
    """All checks in the order they were asked, and what they come to in a sentence or two."""

    run: str
    checks: tuple[Check, ...]
    conclusion: str

    @property
    def healthy(self) -> bool:
        """No check found trouble."""
        return all(check.verdict != "trouble" for check in self.checks)


def triage(evidence: Evidence, folder: str = "RUN") -> Triage:
    """Walk the tree. folder: the run's path, for the commands in the answers; a running server says its own."""
    live = evidence.serving
    desk = Desk(folder if live is None else live.folder, evidence.is_server, None if live is None else live.admin_port)
    alive = _alive(evidence, desk)
    judged = replace(evidence, routing={layer: _judged(history) for layer, history in evidence.routing.items()})
    uneven = _uneven(judged, desk)
    checks, rest = [alive, uneven], [_dead(evidence), _dropped(evidence), _logits(evidence)]
    rest = serving_checks(evidence, desk) + rest if evidence.is_server else [*rest, _loss(evidence)]
    over = uneven.verdict == "ok"
    if uneven.layer is not None and uneven.since_step is not None:
        changed = what_changed(judged, uneven.layer, uneven.since_step, desk)
        checks += [replace(each, verdict="past") if over and each.verdict == "trouble" else each for each in changed]
        checks.append(_repaired(evidence, uneven.layer, uneven.since_step, desk, over=over))
    elif any(incident.firing for incident in evidence.incidents):
        rest.append(_repaired(evidence, None, 0, desk))
    checks += rest
    return Triage(evidence.name, tuple(checks), _conclusion(checks))


def onset(history: Sequence[RoutingStats]) -> tuple[int, int] | None:
    """(first, last) step of the latest unbroken stretch of flushes in which the layer had collapsed, or None."""
    history = _judged(history)
    bad = [any(finding.rule == "collapse" for finding in DETECT([stats])) for stats in history]
    if not any(bad):
        return None
    last = len(bad) - 1 - bad[::-1].index(True)
    first = last
    while first > 0 and bad[first - 1]:
        first -= 1
    return history[first].step, history[last].step


def _judged(history: Sequence[RoutingStats]) -> tuple[RoutingStats, ...]:
    """The flushes with tokens enough for an opinion."""
    return tuple(stats for stats in history if expected_per_expert(stats) >= DETECT.min_expected)


def what_changed(evidence: Evidence, layer: str, step: int, desk: Desk) -> list[Check]:
    """What was different from `step` on: this router's logits, the other layers, the traffic; and in training the
    optimizer, in service the weights and the mix of the batches."""
    before, after = _around(evidence.routing[layer], step)
    if before is None or after is None:
        return [Check("What changed?", "unknown", "There is no flush from before with enough tokens to compare with.")]
    return [
        _router_changed(layer, before, after),
        _others_moved(evidence, layer, step),
        _traffic_changed(before, after),
        *(changed_in_service(evidence, before.step, step, desk) if desk.server else [_step_changed(evidence, step)]),
    ]


def _around(history: Sequence[RoutingStats], step: int) -> tuple[RoutingStats | None, RoutingStats | None]:
    """The last flush before `step`, and the first from it on."""
    before = [stats for stats in history if stats.step < step]
    after = [stats for stats in history if stats.step >= step]
    return (before[-1] if before else None), (after[0] if after else None)


def _alive(evidence: Evidence, desk: Desk) -> Check:
    question = f"Is the {'server' if desk.server else 'run'} alive, and are the numbers fresh?"
    if not evidence.routing and desk.server:
        return Check(question, "unknown", f"No request has been served yet, status {evidence.status}.")
    if not evidence.routing:
        return Check(
            question,
            "unknown",
            "No routing has been recorded yet.",
            remedy="Wait for the first flush, or attach the monitor: equipoise.watch(model, sinks=[RunStore(folder)]).",
        )
    age = f"status {evidence.status}, step {evidence.last_step}, newest number {_ago(evidence.age_s)} ago"
    if evidence.status == "running" and evidence.age_s > STALE_S:
        return Check(
            question,
            "trouble",
            f"It says it runs, but has been silent: {age}.",
            remedy="Look whether the process lives, and at its log. If it was killed, start it again.",
            command=desk.start_again,
        )
    return Check(question, "ok", f"{age[0].upper()}{age[1:]}.")


def _uneven(evidence: Evidence, desk: Desk) -> Check:
    question = "Does a layer send its tokens to few experts?"
    judged = {layer: history for layer, history in evidence.routing.items() if history}
    now = {
        layer: found
        for layer, history in judged.items()
        if (found := DETECT([history[-1]])) and found[0].rule == "collapse"
    }
    if now:
        layer = max(now, key=lambda name: judged[name][-1].max_token_share)
        since = onset(judged[layer])
        others = f" So have {len(now) - 1} more layers." if len(now) > 1 else ""
        return Check(
            question,
            "trouble",
            f"{now[layer][0].message}.{others}",
            since[0] if since else judged[layer][-1].step,
            layer,
            now[layer][0].remedy,
            desk.watch,
        )
    for incident in evidence.incidents:  # the monitor adds thin flushes up: it may know more than any of them shows
        if incident.firing and incident.finding.rule == "collapse":
            alarm = incident.finding
            answer = f"{alarm.message}: an alert since step {incident.fired}."
            return Check(question, "trouble", answer, incident.since, alarm.layer, alarm.remedy, desk.watch)
    if not judged:
        return Check(question, "unknown", "No flush has tokens enough to judge by, and no alert says so.")
    past = {layer: span for layer, history in judged.items() if (span := onset(history))}
    worst = max(judged.values(), key=lambda history: history[-1].max_violation)[-1]
    even = f"the least even layer now is {worst.layer}, MaxVio {worst.max_violation:.2f}, "
    even += f"{worst.effective_experts:.1f} effective experts of {worst.num_experts}"
    if past:
        layer = max(past, key=lambda name: past[name][1])
        first, last = past[layer]
        return Check(question, "ok", f"Not now, but {layer} had, from step {first} to {last}; {even}.", first, layer)
    return Check(question, "ok", f"No; {even}.")


def _router_changed(layer: str, before: RoutingStats, after: RoutingStats) -> Check:
    ratio = after.logit_std / before.logit_std if before.logit_std > 0 else math.inf
    text = (
        f"Their standard deviation went from {before.logit_std:.3g} to {after.logit_std:.3g}, the mean log-sum-exp "
        f"from {before.logit_logsumexp:.3g} to {after.logit_logsumexp:.3g}, token entropy from "
        f"{before.token_entropy:.2f} to {after.token_entropy:.2f} of ln E"
    )
    if not 1 / JUMP < ratio < JUMP:
        return Check(
            LOGITS,
            "trouble",
            f"{text}: the weights or the inputs of {layer} did.",
            after.step,
            layer,
            "Go back to the router of the last good checkpoint, or rebalance it with a quantile bias; temperature "
            "can't help, it never changes who is chosen.",
        )
    return Check(LOGITS, "ok", f"{text}: not enough to explain it.")


def _others_moved(evidence: Evidence, layer: str, step: int) -> Check:
    moved, compared = [], 0
    for name, history in evidence.routing.items():
        before, after = _around(history, step)
        if name == layer or before is None or after is None:
            continue
        compared += 1
        psi, floor = load_moved(after.counts_E, before.counts_E)
        if psi > MOVED_PSI + floor:
            moved.append(name)
    if not compared:
        return Check(OTHERS, "unknown", "There is no other layer.")
    if len(moved) * 2 > compared:
        return Check(
            OTHERS,
            "trouble",
            f"Yes, {len(moved)} of {compared}: the mix of the input changed, or something all layers share.",
            step,
            None,
            "Look at what was sent from that moment on. If that mix is meant, it is load and not damage: rebalance.",
        )
    which = f", {', '.join(moved)}" if moved else ""
    return Check(OTHERS, "ok", f"No, {len(moved)} of {compared}{which}: the cause is in this layer, not in the input.")


def _traffic_changed(before: RoutingStats, after: RoutingStats) -> Check:
    question = "Did the amount of traffic change?"
    text = f"{before.num_tokens:,} tokens in the flush before, {after.num_tokens:,} in the first one after"
    if after.num_tokens > 2 * before.num_tokens or 2 * after.num_tokens < before.num_tokens:
        return Check(question, "trouble", f"Yes: {text}.", after.step, None, "Compare with what the callers send.")
    return Check(question, "ok", f"No: {text}.")


def _step_changed(evidence: Evidence, step: int) -> Check:
    question = "Did the optimizer do something unusual just before?"
    norms = evidence.scalars.get("grad_norm", ())
    near = [value for at, value in norms if step - 50 <= at <= step]
    earlier = [value for at, value in norms if at < step - 50]
    if len(near) < 2 or len(earlier) < 10:
        return Check(question, "unknown", "Too few gradient norms are recorded.")
    usual, highest = float(np.median(earlier)), max(near)
    text = f"the largest gradient norm of the 50 steps before is {highest:.3g}, usual is {usual:.3g}"
    if highest > 5 * usual:
        return Check(question, "trouble", f"Yes: {text}.", step, None, "Lower the learning rate or clip harder.")
    return Check(question, "ok", f"No: {text}.")


def _repaired(evidence: Evidence, layer: str | None, since: int, desk: Desk, *, over: bool = False) -> Check:
    """What was done about a layer's collapse; without a layer, about the alerts that fire. over: it is even again."""
    firing = [incident for incident in evidence.incidents if incident.firing]
    page = next((incident for incident in firing if incident.finding.rule == EXHAUSTED), None)
    made = _made(evidence, layer, since, firing)
    done = [action for action in made if action.state != "proposed"]
    earlier = len(made) - MAX_TOLD
    text = "; ".join(told(action) for action in made[-MAX_TOLD:]) + (f"; {earlier} earlier" if earlier > 0 else "")
    if page is not None:
        answer = f"No repair is left, a human was called at step {page.fired}: {page.finding.message}."
        answer += f" Done: {text}." if text else ""
        return Check(REPAIRED, "trouble", answer, page.fired, page.finding.layer, page.finding.remedy, desk.watch)
    if not made:
        return Check(REPAIRED, "unknown", "No repair is recorded.", None, None, *desk.switch_on())
    if not done:
        looked = made[-1].kind == LOOK_AT_INPUT
        advice = ("Compare what is sent with what was sent before it began.", "") if looked else desk.switch_on()
        return Check(REPAIRED, "unknown", f"No, it was only proposed: {text}.", None, None, *advice)
    if done[-1].state not in ("undone", "failed"):
        return Check(REPAIRED, "ok", f"{text}.")
    advice = desk.go_back(since or done[0].step)
    return Check(REPAIRED, "past" if over else "trouble", f"{text}.", done[-1].step, layer, *advice)


def _made(evidence: Evidence, layer: str | None, since: int, firing: Sequence[Incident]) -> list[Action]:
    """The repairs of the layer and of the whole model since then; without a layer, those of the alerts that fire."""
    if layer is None:
        return sorted((action for incident in firing for action in incident.actions), key=lambda action: action.step)
    begin = min([since, *(incident.since for incident in firing if incident.finding.layer == layer)])
    return [action for action in evidence.repairs if action.layer in (layer, "") and action.step >= begin]


def _dead(evidence: Evidence) -> Check:
    question = "Are experts dead?"
    dead = {layer: h[-1].dead_experts for layer, h in evidence.routing.items() if h and h[-1].dead_experts}
    if not dead:
        return Check(question, "ok", "None gets less than a tenth of its fair load.")
    text = "; ".join(f"{layer}: {', '.join(map(str, experts[:8]))}" for layer, experts in list(dead.items())[:5])
    return Check(
        question,
        "trouble",
        f"In {len(dead)} layers: {text}.",
        layer=next(iter(dead)),
        remedy="A bias balancer or a one-shot quantile bias gives them tokens again.",
    )


def _dropped(evidence: Evidence) -> Check:
    question = "Are assignments dropped?"
    rates = {layer: h[-1].drop_rate for layer, h in evidence.routing.items() if h}
    worst = max(rates, key=lambda layer: rates[layer], default=None)
    if worst is None or rates[worst] <= 0.01:
        return Check(question, "ok", f"At most {max(rates.values(), default=0.0):.2%}.")
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in evidence.routing[worst][-1].dropped.items() if count)
    return Check(
        question,
        "trouble",
        f"{worst} drops {rates[worst]:.1%} ({reasons}).",
        layer=worst,
        remedy='overflow="next_choice" or "shared" loses nothing; a larger capacity factor loses less.',
    )


def _logits(evidence: Evidence) -> Check:
    question = "Are the router's logits sane?"
    last = [history[-1] for history in evidence.routing.values() if history]
    wild = [s for s in last if not math.isfinite(s.logit_logsumexp) and not math.isnan(s.logit_logsumexp)]
    wild += [s for s in last if math.isfinite(s.logit_logsumexp) and s.logit_logsumexp > WILD_LOGITS]
    if wild:
        text = ", ".join(f"{s.layer} {s.logit_logsumexp:.3g}" for s in wild)
        return Check(question, "trouble", f"Log-sum-exp: {text}.", layer=wild[0].layer, remedy="Add ZLoss(1e-3).")
    if not last:
        return Check(question, "unknown", "None are recorded.")
    largest = max((s.logit_logsumexp for s in last if not math.isnan(s.logit_logsumexp)), default=math.nan)
    return Check(question, "ok", f"The largest mean log-sum-exp is {largest:.3g}.")


def _loss(evidence: Evidence) -> Check:
    question = "Does the loss show anything?"
    losses = evidence.scalars.get("loss", ())
    if not losses:
        return Check(question, "unknown", "No loss is recorded.")
    if not math.isfinite(losses[-1][1]):
        return Check(
            question, "trouble", f"It is {losses[-1][1]}.", losses[-1][0], None, "Go back to the last checkpoint."
        )
    recent = [value for _, value in losses[-20:]]
    earlier = [value for _, value in losses[-60:-20]]
    text = f"{np.mean(recent):.3f} over the last {len(recent)} steps"
    if earlier and np.mean(recent) > np.mean(earlier) + 3 * np.std(earlier):
        return Check(question, "trouble", f"It rose: {text}, {np.mean(earlier):.3f} before.", losses[-20][0])
    return Check(question, "ok", f"No: {text}. A collapse seldom shows in the loss.")


def _conclusion(checks: Sequence[Check]) -> str:
    alive, uneven, *rest = checks
    trouble = [check for check in checks if check.verdict == "trouble"]
    if uneven.verdict == "trouble":
        tried = next((check.remedy for check in trouble if check.question == REPAIRED), "")
        source = next((check.remedy for check in trouble if check.question in (FAULTS, WEIGHTS)), "")
        remedy = source or tried or uneven.remedy  # what was tried in vain is not to be advised
        return f"{uneven.layer} has collapsed since step {uneven.since_step}. {_cause(rest)} {remedy}"
    if trouble:
        first = trouble[0]
        return f"No collapse. Begin with: {first.question} {first.answer} {first.remedy}".strip()
    if uneven.layer is not None:
        return f"Nothing is wrong now. {uneven.layer} had collapsed at step {uneven.since_step}: {_cause(rest)}"
    if alive.verdict == "unknown" or uneven.verdict == "unknown":
        return "Nothing can be said yet."
    return "Nothing is wrong that routing could show."


def _cause(checks: Sequence[Check]) -> str:
    """The most likely one, in a sentence."""
    changed = {check.question for check in checks if check.verdict in ("trouble", "past")}
    if FAULTS in changed:
        return "A fault was put in on purpose."
    if WEIGHTS in changed:
        return "Other weights were taken just before."
    if OTHERS in changed:
        return "Other layers moved with it: look at the input first."
    if LOGITS in changed:
        return "Its own logits jumped and the other layers did not: its weights were damaged."
    return "Nothing else moved at that moment: it drifted there, and the balancing is too weak for this layer."


def _ago(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "never"
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
