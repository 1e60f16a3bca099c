"""Everything the page of one run shows, read at one moment, so that its charts agree with each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from equipoise.dashboard import reader
from equipoise.dashboard.records import Evenness, ExpertTimes, Frame, Head, Series
from equipoise.dashboard.runs import RunRef
from equipoise.monitor.incidents import Incident, incidents, repairs
from equipoise.monitor.store import RunStore
from equipoise.types import Action, CoSelection, RoutingStats

MAX_KEPT = 20  # newest alerts whose flush is in every map
# Of a server: title, what the curves are called, the scalars they are of; {layer} is the chosen one.
SPEED_CHARTS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("Tokens per second", (("answers", "tokens_per_s"), ("prompts", "prompt_tokens_per_s"))),
    ("Time to first token, ms", (("p50", "time_to_first_token_ms.p50"), ("p99", "time_to_first_token_ms.p99"))),
    ("Between tokens, ms", (("p50", "inter_token_ms.p50"), ("p99", "inter_token_ms.p99"))),
    ("Requests", (("running", "running"), ("waiting", "queue_depth"))),
    ("Experts' time per step, ms", (("p50", "experts_ms.{layer}.p50"), ("p99", "experts_ms.{layer}.p99"))),
    ("Experts that a step touches", (("distinct experts", "distinct_experts.{layer}"),)),
)
MAIN_SCALARS = ("loss", "val_perplexity", "grad_norm", "learning_rate", "tokens_per_s")


@dataclass(frozen=True, eq=False)
class RunData:
    """head: the run at a glance. steps: the flushes that the slider stops at. frame: the one that is shown.

    layer: the chosen layer; history: its records, thinned; map_history: fewer of them, for the map of its experts.
    scalars: curves by name. scalar_names: all there are. repairs: a record for each.
    expert_times: of a server that times experts one by one; else of none.
    together: which experts of the chosen layer are chosen together at the chosen step; None where it is not recorded.
    """

    head: Head
    steps: tuple[int, ...]
    layers: tuple[str, ...]
    frame: Frame | None
    layer: str
    history: tuple[RoutingStats, ...]
    map_history: tuple[RoutingStats, ...]
    evenness: Evenness
    scalars: dict[str, Series]
    scalar_names: tuple[str, ...]
    incidents: tuple[Incident, ...]
    repairs: tuple[Action, ...]
    together: CoSelection | None
    expert_times: ExpertTimes = ExpertTimes((), ())  # noqa: RUF009 - frozen


@dataclass(frozen=True)
class Choice:
    """What the viewer has chosen. layer: "" for the worst. step: None for the newest. scalar: one more curve."""

    layer: str = ""
    step: int | None = None
    scalar: str = ""


def read_run(run: RunStore, ref: RunRef, choice: Choice) -> RunData:
    """Read the run for its page."""
    head = reader.head(run, ref.path)
    changes, actions = reader.alerts(run), reader.actions(run)
    found = tuple(incidents(changes, actions))
    events = [step for incident in found for step in (incident.since, incident.fired)] + [a.step for a in actions]
    steps, layers = reader.flush_steps(run, keep=events), run.layers()
    layer = choice.layer if choice.layer in layers else _first_choice(head, found, layers)
    history = reader.history(run, layer, steps)
    num_experts = max((stats.num_experts for stats in history), default=1)
    fired = [incident.fired for incident in found[:MAX_KEPT]]
    columns = min(reader.MAX_COLUMNS, max(16, reader.MAX_CELLS // max(1, num_experts)))
    map_columns = min(reader.MAX_COLUMNS, max(16, reader.MAX_CELLS // max(1, len(layers))))
    near = set(thinned([stats.step for stats in history], columns, fired))
    names = reader.scalar_names(run)
    wanted = [name for name in dict.fromkeys((*MAIN_SCALARS, choice.scalar)) if name in names]
    wanted += speed_names(layer) if head.is_server else []  # there may be more names than are listed
    return RunData(
        head=head,
        steps=tuple(steps),
        layers=tuple(layers),
        frame=reader.frame(run, choice.step),
        layer=layer,
        history=tuple(history),
        map_history=tuple(stats for stats in history if stats.step in near),
        evenness=reader.evenness(run, thinned(steps, map_columns, fired), layers),
        scalars={name: reader.scalar(run, name) for name in wanted},
        scalar_names=tuple(names),
        incidents=found,
        repairs=tuple(repairs(actions)),
        together=run.latest_co_selection(layer, choice.step),
        expert_times=reader.expert_times(run, layer, num_experts if head.is_server else 0),
    )


def speed_names(layer: str) -> list[str]:
    """The scalars of a server's charts, with those of one layer."""
    return [name.format(layer=layer) for _, curves in SPEED_CHARTS for _, name in curves]


def thinned(steps: Sequence[int], at_most: int, keep: Sequence[int] = ()) -> list[int]:
    """Every n-th step, the last, and those of `keep` among them: an alert must not fall between columns."""
    stride = max(1, -(-len(steps) // max(1, at_most)))
    return sorted({*steps[::stride], *steps[-1:], *(set(keep) & set(steps))})


def _first_choice(head: Head, found: Sequence[Incident], layers: Sequence[str]) -> str:
    """The layer to begin with: of a firing alert, else of the newest alert, else the most uneven."""
    of_alerts = [incident.finding.layer for incident in sorted(found, key=lambda i: not i.firing)]
    worst = [head.worst.layer] if head.worst else []
    return next((name for name in (*of_alerts, *worst) if name in layers), layers[0] if layers else "")
