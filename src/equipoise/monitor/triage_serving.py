"""The branches of the decision tree that only a server has: does it take requests, is it overloaded, is it slow, and
which weights came when. Pure functions of the evidence.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from equipoise.monitor.check import Check, Desk
from equipoise.monitor.evidence import EXPERTS_P99, Evidence
from equipoise.monitor.incidents import EXPERT_SLOW, told

WEIGHTS, MIX = "Were other weights taken just before?", "Did the mix of prompts and answers change?"
FAULTS = "Has someone put faults in on purpose?"
TAKES = "Does it take requests, and are its answers as good as usual?"
FULL, SLOW, MOVED = 0.5, 3.0, 0.3  # of the queue; times the usual; of all tokens
RECENT, ENOUGH = 30, 30  # points: what counts as now, and how many from before say what is usual
CHANGES = ("reload", "router_rollback")
TIMES = {"time_to_first_token_ms.p99": "first token", "inter_token_ms.p99": "next token"}


def serving_checks(evidence: Evidence, desk: Desk) -> list[Check]:
    """What is asked of every server."""
    return [
        _takes(evidence, desk),
        *_faults(evidence, desk),
        _weights(evidence),
        _load(evidence),
        _slow(evidence, desk),
    ]


def changed_in_service(evidence: Evidence, before: int, after: int, desk: Desk) -> list[Check]:
    """What may explain a collapse whose first flush is `after`, when that of `before` was even."""
    return [_weights_changed(evidence, before, after, desk), _mix_changed(evidence, before, after)]


def _takes(evidence: Evidence, desk: Desk) -> Check:
    live = evidence.serving
    if live is None:
        if evidence.status != "running":
            return Check(TAKES, "ok", f"It has ended, status {evidence.status}.")
        return Check(
            TAKES, "unknown", "Its records don't say; ask the server.", command="equipoise triage http://HOST:PORT"
        )
    if live.down:
        draining = "shutting down" in live.down
        remedy = "Requests may come again, if it is only drained." if draining else "Replace the process; read its log."
        command = desk.admin("resume") if draining else desk.start_again
        return Check(TAKES, "trouble", f"No: {live.down}.", remedy=remedy, command=command)
    if live.degraded:
        remedy = "Responses are marked with it (x-equipoise-degraded). The operator's view says more."
        return Check(TAKES, "trouble", f"{'; '.join(live.degraded)}.", remedy=remedy, command=desk.admin("state"))
    return Check(TAKES, "ok", f"Yes, {live.num_open} are open.")


def _faults(evidence: Evidence, desk: Desk) -> list[Check]:
    if evidence.serving is None:
        return []
    if not evidence.serving.faults:
        return [Check(FAULTS, "ok", "No.")]
    answer = f"Yes: {'; '.join(evidence.serving.faults)}."
    return [Check(FAULTS, "trouble", answer, remedy="Take them out.", command=desk.admin("faults/remove"))]


def _weights(evidence: Evidence) -> Check:
    question, live = "Which weights are in service, and since when?", evidence.serving
    made = [action for action in evidence.actions if action.kind in CHANGES]
    last = f"the last change: {told(made[-1])}" if made else "nobody has changed them"
    now = "" if live is None else f"Those of {live.weights}, version {live.version}; "
    return Check(question, "ok", f"{now}{last}.")


def _load(evidence: Evidence) -> Check:
    question, live = "Is there more to do than it can do?", evidence.serving
    depths = [value for _, value in evidence.scalars.get("queue_depth", ())][-RECENT:]
    if not depths:
        return Check(question, "unknown", "Nothing is recorded about the queue.")
    names = (("running", "{:.0f} run"), ("requests_per_s", "{:.1f} requests/s"), ("tokens_per_s", "{:,.0f} tokens/s"))
    told_ = [form.format(value) for name, form in names if (value := _last(evidence, name)) is not None]
    used = _last(evidence, "cache_used_share")
    told_ += [] if used is None else [f"{used:.0%} of the cache is used"]
    most = "" if live is None else f" of at most {live.max_waiting}"
    text = f"{depths[-1]:.0f} requests wait{most}, {max(depths):.0f} at most lately; {', '.join(told_)}"
    if live is not None and max(depths) >= FULL * live.max_waiting:
        remedy = (
            "Clients get 429 when the queue is full. More --max-running or --cache-gb if there is memory, more servers "
            "if there is not."
        )
        return Check(question, "trouble", f"Yes: {text}.", remedy=remedy)
    return Check(question, "ok", f"No: {text}.")


def _slow(evidence: Evidence, desk: Desk) -> Check:
    question = "Is it slower than usual?"
    alarms = [incident for incident in evidence.incidents if incident.firing and incident.finding.rule == EXPERT_SLOW]
    if alarms:
        text, alarm = "; ".join(each.finding.message for each in alarms), alarms[0].finding
        since = alarms[0].since
        return Check(question, "trouble", f"Yes: {text}.", since, alarm.layer, alarm.remedy, desk.admin("state"))
    compared = {words: found for name, words in TIMES.items() if (found := _usual(evidence.scalars.get(name, ())))}
    if not compared:
        return Check(question, "unknown", "There is too little to compare with.")
    text = "; ".join(f"{words} {now:.3g} ms (p99), usual is {usual:.3g}" for words, (now, usual) in compared.items())
    if all(now <= SLOW * usual for now, usual in compared.values()):
        return Check(question, "ok", f"No: {text}.")
    layers = {layer: _usual(evidence.scalars.get(EXPERTS_P99.format(layer), ())) for layer in evidence.routing}
    slow = [layer for layer, found in layers.items() if found and found[0] > SLOW * found[1]]
    if slow:
        remedy = "Its experts are slow: a hot expert, or a device that is. The breaker bypasses a layer that stays so."
        return Check(
            question, "trouble", f"Yes: {text}; {', '.join(slow)}.", None, slow[0], remedy, desk.admin("state")
        )
    remedy = (
        "No layer's experts are known to be slower: look at the load, longer prompts, and what else the machine does."
    )
    return Check(question, "trouble", f"Yes: {text}.", remedy=remedy)


def _weights_changed(evidence: Evidence, before: int, after: int, desk: Desk) -> Check:
    near = [a for a in evidence.actions if a.kind in CHANGES and a.state == "kept" and before <= a.step <= after]
    if not near:
        return Check(WEIGHTS, "ok", "No.")
    last = near[-1]
    remedy = "If the collapse came with them, go back to the weights from before."
    return Check(WEIGHTS, "trouble", f"Yes: {told(last)}.", last.step, None, remedy, desk.admin("reload/undo"))


def _mix_changed(evidence: Evidence, before: int, after: int) -> Check:
    answers = dict(evidence.scalars.get("tokens_per_s", ()))
    shares = {
        step: prompts / (prompts + answers[step])
        for step, prompts in evidence.scalars.get("prompt_tokens_per_s", ())
        if prompts + answers.get(step, 0.0) > 0 and step in answers
    }
    then, now = [shares[s] for s in shares if s <= before], [shares[s] for s in shares if s >= after]
    if not then or not now:
        return Check(MIX, "unknown", "Too little is recorded.")
    first, second = float(np.median(then[-RECENT:])), float(np.median(now[:RECENT]))
    text = f"of the tokens, {first:.0%} were prompts before and {second:.0%} after"
    if abs(second - first) > MOVED:
        return Check(MIX, "trouble", f"Yes: {text}.", after, None, "Compare with what the callers send.")
    return Check(MIX, "ok", f"No: {text}.")


def _usual(points: Sequence[tuple[int, float]]) -> tuple[float, float] | None:
    """(now, usually), or None where too little is known."""
    values = [value for _, value in points]
    if len(values) < RECENT + ENOUGH:
        return None
    return float(np.median(values[-RECENT // 10 :])), float(np.median(values[:-RECENT]))


def _last(evidence: Evidence, name: str) -> float | None:
    points = evidence.scalars.get(name, ())
    return points[-1][1] if points else None
