"""Alert rules for Prometheus: the thresholds of the monitor's own profiles, over Prometheus' windows.

`export_rules` makes the file. Conditions are written with the recording rules of recording.py; what to do when one
fires is in docs/runbooks.md, a section per alert. The rules judge runs that go on: the last numbers of a finished run
stay as they are and alarm nobody.
"""

from __future__ import annotations

from dataclasses import dataclass

from equipoise.monitor.alert_names import alert_name, anchor_of
from equipoise.monitor.profiles import Profile
from equipoise.monitor.prometheus.recording import BY, TARGET, recording_rules
from equipoise.monitor.prometheus.timing import Timing, duration
from equipoise.monitor.prometheus.yaml_text import to_yaml
from equipoise.types import Severity

JOB = "equipoise"  # what the scrape job has to be called for ExporterDown to know it
RUNBOOKS = "docs/runbooks.md"
# Standard errors: the normal form of `DropRule`'s bound, sqrt(2 ln(61 layers * 3 levels / a false alarm in a million))
DROP_Z = 6.2
_RUNNING = f"on ({TARGET}) (run:equipoise_run_running:max == 1)"
_ENOUGH = f"on ({BY}) (run_layer:equipoise_judged_assignments:per_expert >= 100)"
_LAYER = "{{ $labels.run }}: {{ $labels.layer }}"
_EXPERT = f"{_LAYER}, expert {{{{ $labels.expert }}}}"


@dataclass(frozen=True)
class AlertRule:
    """One alert of Prometheus.

    severity: "" where the series carry their own. seconds: that the condition must last. The rest are annotations.
    """

    name: str
    severity: Severity | str
    expr: str
    seconds: int
    summary: str
    description: str
    remedy: str

    def record(self, runbooks: str) -> dict[str, object]:
        """As it stands in a rule file. runbooks: address of the page with a section per alert."""
        return {
            "alert": self.name,
            "expr": self.expr,
            "for": duration(self.seconds),
            **({"labels": {"severity": self.severity}} if self.severity else {}),
            "annotations": {
                "summary": self.summary,
                "description": self.description,
                "remedy": self.remedy,
                "runbook_url": f"{runbooks}#{anchor_of(self.name)}",
            },
        }


def export_rules(profile: Profile = "relative", *, timing: Timing | None = None, runbooks: str = RUNBOOKS) -> str:
    """A rule file for Prometheus: YAML text of recording rules and alerts.

    profile: "relative" judges against the fair share and asks for enough tokens; "absolute" takes a checklist's fixed
    limits literally. Load one of the two: their recording rules are the same. Where the exporter has no series of
    experts, alerts about single experts stay silent.
    runbooks: where docs/runbooks.md is published. Raises ValueError for another profile.
    """
    timing = timing or Timing()
    rules = recording_rules(timing) + [alert.record(runbooks) for alert in alert_rules(profile, timing)]
    # one group: its rules are evaluated in order, so that alerts see what was recorded just before
    group = {"name": f"equipoise-{profile}", "interval": duration(timing.evaluate), "rules": rules}
    return to_yaml({"groups": [group]})


def alert_rules(profile: Profile, timing: Timing) -> list[AlertRule]:
    """The alerts of a profile, and those about the monitor itself. Raises ValueError for another name."""
    if profile == "relative":
        return [
            *_balance(timing),
            *_experts(timing),
            *_drops(timing, z=DROP_Z, least=20),
            *_logits(timing),
            *_health(timing),
        ]
    if profile == "absolute":
        return [*_checklist(timing), *_drops(timing, z=0.0, least=1), *_health(timing)]
    raise ValueError(f"profile: expected relative or absolute, got {profile!r}")


# ------------------------------------------------------------------------------------------------ profile "relative"


def _balance(timing: Timing) -> list[AlertRule]:
    share, limit = "run_layer:equipoise_max_token_share:ratio", "run_layer:equipoise_max_token_share:limit"
    ratio = "run_layer:equipoise_effective_experts:ratio"
    return [
        AlertRule(
            name=alert_name("collapse"),
            severity="critical",
            # the value is the share of experts that the load is worth: it exists whichever condition holds
            expr=f"({ratio} and ({share} > {limit} or {ratio} < 0.5)) and {_ENOUGH} and {_RUNNING}",
            seconds=timing.hold,
            summary=f"{_LAYER} has collapsed onto few experts",
            description="The load is worth {{ $value | humanizePercentage }} of the experts, or one of them takes "
            "more of the tokens than a router in balance ever gives one.",
            remedy="Rebalance this router with a one-shot quantile bias; if it collapses again, raise the balancing "
            "coefficient or go back to the last good checkpoint.",
        ),
        AlertRule(
            name=alert_name("dead_experts"),
            severity="warning",
            expr=f"(run_layer:equipoise_dead_experts:count > 0) and {_ENOUGH} and {_RUNNING}",
            seconds=timing.hold,
            summary=f"{_LAYER} has dead experts",
            description="{{ $value }} experts get less than a tenth of their fair load.",
            remedy="Give them tokens again with a bias balancer or a one-shot quantile bias.",
        ),
    ]


def _experts(timing: Timing) -> list[AlertRule]:
    load = f"run_layer_expert:equipoise_expert_load:ratio{duration(timing.window)}"
    description = "Its load is {{ $value | humanize }} times the fair one."
    return [
        AlertRule(
            name="EquipoiseExpertCold",
            severity="info",
            expr=f"({load} < 0.1) and {_ENOUGH} and {_RUNNING}",
            seconds=timing.hold,
            summary=f"{_EXPERT} gets hardly any tokens",
            description=description,
            remedy="See EquipoiseDeadExperts: it counts the experts of a layer that are in this state.",
        ),
        AlertRule(
            name="EquipoiseExpertHot",
            severity="warning",
            expr=f"({load} > 4) and {_ENOUGH} and {_RUNNING}",
            seconds=timing.hold,
            summary=f"{_EXPERT} is overloaded",
            description=description,
            remedy="Replicate or re-place the expert where experts are spread over devices; else raise the balancing.",
        ),
    ]


def _drops(timing: Timing, z: float, least: int) -> list[AlertRule]:
    """z: standard errors by which the share must pass the limit. least: drops to be seen at all."""
    window = duration(timing.window)
    rate, total = f"run_layer:equipoise_drop:ratio{window}", f"run_layer:equipoise_layer_assignments:increase{window}"
    levels: tuple[tuple[float, Severity], ...] = ((0.05, "critical"), (0.01, "warning"), (0.001, "info"))
    return [
        AlertRule(
            name=alert_name("drops"),
            severity=severity,
            expr=(
                f"({rate} > {limit} + {z * (limit * (1 - limit)) ** 0.5:.6g} / sqrt({total})) "
                f"and ({rate} * {total} >= {least}) and {_RUNNING}"
            ),
            seconds=timing.hold,
            summary=f"{_LAYER} drops assignments",
            description="{{ $value | humanizePercentage }} of the assignments are lost, " + f"more than {limit:.1%}.",
            remedy="Set overflow to next_choice or shared, raise the capacity factor, or balance the router.",
        )
        for limit, severity in levels
    ]


def _logits(timing: Timing) -> list[AlertRule]:
    lse, ratio = f"max by ({BY}) (equipoise_layer_logit_logsumexp)", "run_layer:equipoise_logit_std_baseline:ratio"
    left = f'max by ({BY}) (equipoise_aftermath{{rule="logits"}}) == 1'  # by a repair: its incident has told of it
    return [
        AlertRule(
            name=alert_name("logits", "critical"),
            severity="critical",
            expr=f"({lse} > 100 or {lse} == -Inf) and {_RUNNING}",
            seconds=timing.hold,
            summary=f"{_LAYER}: the router's logits blow up",
            description="Their mean log-sum-exp is {{ $value | humanize }}; in health it stays in the tens.",
            remedy="Add a z-loss, lower the router's learning rate, or go back to the last good checkpoint.",
        ),
        AlertRule(
            name=alert_name("logits", "warning"),
            severity="warning",
            expr=f"(({ratio} > 3 or {ratio} < {1 / 3:.6g}) unless on ({BY}) {left}) and {_RUNNING}",
            seconds=timing.hold,
            summary=f"{_LAYER}: the spread of the router's logits has moved",
            description="Their standard deviation is {{ $value | humanize }} times the baseline's.",
            remedy="Add a z-loss or lower the router's learning rate; compare the text with the baseline's.",
        ),
    ]


# ------------------------------------------------------------------------------------------------ profile "absolute"


def _checklist(timing: Timing) -> list[AlertRule]:
    """Fixed limits, as `AbsoluteRule` (monitor/rules.py) has them: no fair share, no sample gate."""
    experts, entropy = "run_layer:equipoise_layer_experts:max", "run_layer:equipoise_load_entropy:ratio"
    most, least = "run_layer:equipoise_max_load:ratio", "run_layer:equipoise_min_load:ratio"
    share, std = "run_layer:equipoise_max_token_share:ratio", "run_layer:equipoise_logit_std_baseline:ratio"
    percent, times = "{{ $value | humanizePercentage }}", "{{ $value | humanize }} times"
    table: list[tuple[str, Severity, str, str]] = [
        ("utilisation_low", "warning", f"{least} / {experts} < 0.05", f"An expert gets {percent} of the assignments."),
        ("utilisation_high", "critical", f"{share} > 0.8", f"An expert gets {percent} of the tokens."),
        ("one_bin", "critical", f"{most} / {experts} > 0.5", f"An expert gets {percent} of the assignments."),
        ("entropy", "critical", f"{entropy} < 0.5", f"The entropy of the load is {percent} of the most."),
        ("entropy_target", "warning", f"{entropy} < 0.8", f"The entropy of the load is {percent} of the most."),
        ("cold_expert", "warning", f"{least} < 0.1", f"The load of the least loaded expert is {times} the fair one."),
        ("hot_expert", "warning", f"{most} > 1.25", f"The load of the busiest expert is {times} the fair one."),
        ("logit_std", "critical", f"{std} > 5", f"The spread of the router's logits is {times} the baseline's."),
    ]
    return [
        AlertRule(
            name=alert_name(rule),
            severity=severity,
            expr=f"({condition}) and {_RUNNING}",
            seconds=timing.hold,
            summary=f"{_LAYER}: a fixed limit of the checklist is passed",
            description=description,
            remedy="Look at it under the profile relative before acting: a fixed limit knows no fair share.",
        )
        for rule, severity, condition, description in table
    ]


# ------------------------------------------------------------------------------------------------ about the monitor


def _health(timing: Timing) -> list[AlertRule]:
    fired = f"equipoise_alert_firing[{duration(timing.window)}]"
    age = f"time() - max by ({TARGET}) (equipoise_last_flush_timestamp_seconds)"
    return [
        AlertRule(
            name="EquipoiseMonitorAlert",
            severity="",  # that of the monitor's finding, a label of the series
            # for a window after its end: rates over the window go on showing what is over, and are inhibited meanwhile
            expr=f"(max by ({BY}, rule, severity) (max_over_time({fired})) == 1) and {_RUNNING}",
            seconds=0,  # it has lasted already: the monitor's own alert book sees to that
            summary=f"{_LAYER}: the monitor's rule {{{{ $labels.rule }}}} fires",
            description="The run's own monitor has found this in two flushes in a row, now or a moment ago.",
            remedy="Run: equipoise watch RUN. It shows the finding with its numbers, and what to do.",
        ),
        AlertRule(
            name="EquipoiseMonitorStalled",
            severity="warning",
            expr=f"({age} > {timing.stalled}) and {_RUNNING}",
            seconds=timing.hold,
            summary="{{ $labels.run }}: no routing statistics for a while",
            description="The newest flush is {{ $value | humanizeDuration }} old, and the run has not ended.",
            remedy="See whether the process lives and makes steps; a killed run leaves its state as running.",
        ),
        AlertRule(
            name="EquipoiseExporterDown",
            severity="critical",
            expr=f'up{{job="{JOB}"}} == 0',
            seconds=timing.hold,
            summary="{{ $labels.instance }}: the exporter cannot be scraped",
            description="Nothing is known about the run behind it, and no other alert of it can fire.",
            remedy="Start the exporter again, or the process that it is part of.",
        ),
        AlertRule(
            name="EquipoiseSourceUnreadable",
            severity="warning",
            expr=f"min by ({TARGET}) (equipoise_source_up) == 0",
            seconds=timing.hold,
            summary="{{ $labels.run }}: the exporter cannot read the run",
            description="It exports the last numbers that it could read.",
            remedy="See whether the run folder is where it was, and readable by the exporter.",
        ),
        AlertRule(
            name="EquipoiseSeriesDropped",
            severity="info",
            expr=f"max by ({TARGET}) (equipoise_series_dropped) > 0",
            seconds=timing.hold,
            summary="{{ $labels.run }}: metrics are missing",
            description="{{ $value }} series did not fit the exporter's budget; its level of detail was lowered.",
            remedy="Raise max_series, or ask for less detail. Alerts about single experts need the detail expert.",
        ),
    ]
