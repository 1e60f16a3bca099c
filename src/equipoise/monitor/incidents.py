"""Incidents: an alert's life with the repairs that it led to, put together from the records of a run. Pure functions.

The store keeps what happened, change by change; this is the one place that pairs the changes up, and that puts what a
repair did into words. It judges and draws nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from equipoise.types import Action, ActionState, Alert, Finding

EXHAUSTED = "recovery_exhausted"  # the rule of the alert that calls a human: no repair is left
EXPERT_SLOW = "expert_p99"  # the rule of the alert that an expert, or a layer's experts, take too long
PAGE = "page"  # the kind of the record that says so: it is no repair
LOOK_AT_INPUT = "look_at_input"  # the kind of a proposal that changes nothing: the input is to blame
DONE: tuple[ActionState, ...] = ("applied", "kept", "undone")  # the model was changed, if only for a while


@dataclass(frozen=True)
class Incident:
    """One alert's life.

    fired: the step at which the alert fired; since: the first step of the symptom. resolved: None while it lasts.
    finding: as it was when the alert fired. actions: the repairs made for it, as `repairs` has them, oldest first.
    changes: every change of theirs, and the call for a human, as `changes_of` has them. paged: the step of that call.
    """

    key: str
    since: int
    fired: int
    resolved: int | None
    finding: Finding
    actions: tuple[Action, ...] = ()
    changes: tuple[Action, ...] = ()
    paged: int | None = None

    @property
    def firing(self) -> bool:
        """Whether it still lasts."""
        return self.resolved is None

    def lasted_until(self, now: int) -> int:
        """The step of its end, or `now`."""
        return now if self.resolved is None else self.resolved


def incidents(alerts: Sequence[Alert], actions: Sequence[Action]) -> list[Incident]:
    """Alerts with the repairs made for them, the newest first; firing and resolved are paired by key and order."""
    found: list[Incident] = []
    open_by_key: dict[str, int] = {}
    for alert in alerts:
        index = open_by_key.get(alert.key)
        if alert.state == "firing" and index is None:
            open_by_key[alert.key] = len(found)
            found.append(Incident(alert.key, alert.since_step, alert.step, None, alert.finding))
        elif alert.state == "resolved" and index is not None:
            found[index] = replace(found[index], resolved=alert.step)
            del open_by_key[alert.key]
    records = _Records(actions)
    pages = [incident for incident in found if incident.finding.rule == EXHAUSTED]
    whole = [records.given_to(incident, pages) for incident in found]
    return sorted(whole, key=lambda i: (i.fired, i.key), reverse=True)


def repairs(actions: Sequence[Action]) -> list[Action]:
    """One record per repair, oldest first, out of one per change of its state.

    step: of its application (or proposal). state, note: the last ones. detail: of all its records, later ones first.
    """
    return [_whole(actions, life) for life in _lives(actions) if actions[life[0]].kind != PAGE]


def changes_of(actions: Sequence[Action]) -> list[Action]:
    """The records as a story tells them, in their order: later ones of a repair with the numbers that are new in them.

    What was measured after the repair has the same from before it at its side.
    """
    told = list(actions)
    for first, *later in _lives(actions):
        begun = actions[first].detail
        for place in later:
            new = {name: value for name, value in actions[place].detail.items() if begun.get(name) != value}
            befores = [name.replace("_after", "_before") for name in new if name.endswith("_after")]
            told[place] = replace(actions[place], detail={name: begun[name] for name in befores if name in begun} | new)
    return told


def without_alert(found: Sequence[Incident], made: Sequence[Action]) -> list[Action]:
    """The repairs, of those that `repairs` has, that belong to none of the incidents."""
    caused = {_identity(action) for incident in found for action in incident.actions}
    return [action for action in made if _identity(action) not in caused]


def pages_of(incident: Incident, found: Sequence[Incident]) -> list[Incident]:
    """The incidents for which this one, an exhausted recovery, calls a human; none for any other alert."""
    if incident.finding.rule != EXHAUSTED:
        return []
    return [i for i in found if (i.finding.layer, i.paged) == (incident.finding.layer, incident.fired)]


def _lives(actions: Sequence[Action]) -> list[list[int]]:
    """The places of each repair's records, in the order in which repairs began."""
    lives: list[list[int]] = []
    on_trial: dict[tuple[str, str, str], int] = {}
    for place, action in enumerate(actions):
        name = (action.kind, action.layer, action.reason)
        if action.state in ("kept", "undone") and name in on_trial:
            lives[on_trial.pop(name)].append(place)
            continue
        if action.state == "applied":
            on_trial[name] = len(lives)
        lives.append([place])
    return lives


def _whole(actions: Sequence[Action], life: Sequence[int]) -> Action:
    """The records of one life in one."""
    detail: dict[str, float] = {}
    for place in life:
        detail |= actions[place].detail
    return replace(actions[life[-1]], step=actions[life[0]].step, detail=detail)


class _Records:
    """The records of repairs, at hand by the alert that they were made for."""

    def __init__(self, actions: Sequence[Action]) -> None:
        self._actions, self._told = actions, changes_of(actions)
        self._lives: dict[str, list[list[int]]] = {}
        for life in _lives(actions):
            self._lives.setdefault(actions[life[0]].reason, []).append(life)
        self._calls = [action for action in actions if action.kind == PAGE]
        self._claimed = {(call.layer, call.step) for call in self._calls}

    def given_to(self, incident: Incident, pages: Sequence[Incident]) -> Incident:
        """The incident with what was done for it."""
        mine = [life for life in self._lives.get(incident.key, []) if _belongs(self._actions[life[0]], incident)]
        return replace(
            incident,
            actions=tuple(_whole(self._actions, life) for life in mine if self._actions[life[0]].kind != PAGE),
            changes=tuple(self._told[place] for place in sorted(place for life in mine for place in life)),
            paged=self._paged(incident, pages),
        )

    def _paged(self, incident: Incident, pages: Sequence[Incident]) -> int | None:
        """When a human was called for it: by its own record, else by an alert of its layer that no record claims."""
        own = [call.step for call in self._calls if _belongs(call, incident)]
        if own or incident.finding.rule == EXHAUSTED:
            return min(own, default=None)
        layer = incident.finding.layer
        steps = [page.fired for page in pages if page.finding.layer == layer]
        unclaimed = (step for step in steps if (layer, step) not in self._claimed)
        return min((s for s in unclaimed if incident.fired <= s <= incident.lasted_until(s)), default=None)


def _belongs(action: Action, incident: Incident) -> bool:
    ended = incident.resolved is not None and action.step > incident.resolved
    return action.reason == incident.key and action.step >= incident.since and not ended


def _identity(action: Action) -> tuple[str, str, int, str, str]:
    return action.kind, action.layer, action.step, action.reason, action.state


# --------------------------------------------------------------------------------------------- a repair in words


@dataclass(frozen=True)
class Effect:
    """A number that was measured around a repair, as texts; "" where it was not. name: "perplexity", "MaxVio", ..."""

    name: str
    before: str
    after: str


def effects(detail: Mapping[str, float]) -> list[Effect]:
    """What was measured: perplexity of held-out text, exp(loss); MaxVio of what the layer's router decides; and what
    its busiest expert computes, relative to fair. In this order.

    detail: loss (nats per token), max_violation and straggler, each with _before and _after, as far as known.
    """
    texts = {name: _number(name, value) for name, value in detail.items() if name in _MEASURED}
    pairs = (("perplexity", "loss"), ("MaxVio", "max_violation"), ("busiest expert", "straggler"))
    return [
        Effect(name, texts.get(f"{key}_before", ""), texts.get(f"{key}_after", ""))
        for name, key in pairs
        if f"{key}_before" in texts or f"{key}_after" in texts
    ]


def effect_text(detail: Mapping[str, float]) -> str:
    """The effects in a line: "perplexity 9.97 → 13.5, MaxVio 3.1 before"; "" where nothing was measured."""
    return ", ".join(f"{each.name} {_change(each)}" for each in effects(detail))


_WORDS = {"max_violation_expected": "MaxVio expected"}  # names of numbers, where people have another


def other_numbers(detail: Mapping[str, float]) -> str:
    """The numbers that are no effect, in a line: "experts 3, rate 0.5"."""
    others = ((name, value) for name, value in detail.items() if name not in _MEASURED and name != "steps")
    return ", ".join(f"{_WORDS.get(name, name)} {value:.4g}" for name, value in others)


def all_numbers(detail: Mapping[str, float]) -> str:
    """The effects and the others in a line; "" where there are none."""
    return ", ".join(filter(None, (effect_text(detail), other_numbers(detail))))


def state_text(action: Action) -> str:
    """Its state, and how long the trial took: "kept after 20 steps", "undone at once", "proposed"."""
    steps = action.detail.get("steps")
    if action.state not in ("kept", "undone") or steps is None or not math.isfinite(steps):
        return action.state
    return f"{action.state} after {steps:.0f} step{'s' * (steps != 1)}" if steps > 0 else f"{action.state} at once"


def target(action: Action) -> str:
    """What it changes, in words: the layer, or the whole model."""
    return action.layer or "the whole model"


def told(action: Action) -> str:
    """A repair in a line: what, where, when, how it went, what it did, and why."""
    text = f"{action.kind} on {target(action)} at step {action.step}, {state_text(action)}"
    numbers = all_numbers(action.detail)
    return text + (f", {numbers}" if numbers else "") + (f" ({action.note})" if action.note else "")


REPAIR_COLUMNS = ("step", "what", "why", "state", "perplexity", "MaxVio", "note")


def repair_row(action: Action) -> tuple[str, ...]:
    """A repair as texts for a table with `REPAIR_COLUMNS`; "-" for what was not measured."""
    known = {each.name: _change(each) for each in effects(action.detail)}
    measured = (known.get("perplexity", "-"), known.get("MaxVio", "-"))
    busiest = f"busiest expert {known['busiest expert']} fair loads" if "busiest expert" in known else ""
    note = "; ".join(filter(None, (action.note, busiest, other_numbers(action.detail))))
    return str(action.step), f"{action.kind} on {target(action)}", action.reason, state_text(action), *measured, note


def tally(made: Sequence[Action]) -> str:
    """How many repairs there are of each state: "1 undone, 1 kept"; "none" without any."""
    counted = Counter(action.state for action in made)
    return ", ".join(f"{counted[state]} {state}" for state in _TALLIED if counted[state]) or "none"


_MEASURED = tuple(f"{key}_{when}" for key in ("loss", "max_violation", "straggler") for when in ("before", "after"))
_TALLIED: tuple[ActionState, ...] = ("failed", "undone", "kept", "applied", "proposed")
_MAX_LOSS = 700.0  # nats; a float holds no larger perplexity than exp(709)


def _number(name: str, value: float) -> str:
    if name.startswith("loss"):
        return f"{math.inf if value > _MAX_LOSS else math.exp(value):.4g}"
    return f"{value:.3g}"


def _change(effect: Effect) -> str:
    if effect.before and effect.after:
        return f"{effect.before} → {effect.after}"
    return f"{effect.before} before" if effect.before else f"{effect.after} after"
