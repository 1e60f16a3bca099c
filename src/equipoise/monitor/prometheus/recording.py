"""Recording rules: what Prometheus derives from the exported metrics, so that alerts share one definition.

Names are level:metric:operation (prometheus.io/docs/practices/rules), each of one target: what two of them say about
the same run is never added up. Where the exporter has the detail "expert",
loads are exact over the window, from counters; at "layer" they are those of the newest flush.
"""

from __future__ import annotations

from equipoise.monitor.detectors import CollapseDetector
from equipoise.monitor.prometheus.timing import Timing, duration
from equipoise.monitor.stats import DEAD_LOAD

TARGET = "job, instance, replica, run"  # replica: of those behind one address; two that train or serve one run are two
BY = f"{TARGET}, layer"
RULE = CollapseDetector()  # whose thresholds these are

Rule = dict[str, object]


def recording_rules(timing: Timing) -> list[Rule]:
    """The rules in the order in which they need each other. The numbers are those of monitor/stats.py, per layer."""
    every = {
        **_traffic(timing),
        **_loads(timing),
        **_collapse(),
        "run:equipoise_run_running:max": f"max by ({TARGET}) (equipoise_run_running)",
        # of the router's logits against the same layer in health, where a baseline is exported
        "run_layer:equipoise_logit_std_baseline:ratio": (
            f"max by ({BY}) (equipoise_layer_logit_std) / max by ({BY}) (equipoise_layer_baseline_logit_std)"
        ),
    }
    return [{"record": name, "expr": expr} for name, expr in every.items()]


def _traffic(timing: Timing) -> dict[str, str]:
    """Rates per second, experts, and the shares that follow."""
    window = duration(timing.window)
    rates = {
        f"run_layer:equipoise_layer_{name}:rate{window}": (
            f"sum by ({BY}) (rate(equipoise_layer_{name}_total[{window}]))"
        )
        for name in ("tokens", "assignments", "dropped_assignments")
    }
    assignments = f"run_layer:equipoise_layer_assignments:rate{window}"
    return {
        **rates,
        "run_layer:equipoise_layer_experts:max": f"max by ({BY}) (equipoise_layer_experts)",
        f"run_layer:equipoise_layer_assignments:increase{window}": f"{assignments} * {timing.window}",
        f"run_layer:equipoise_drop:ratio{window}": (
            f"run_layer:equipoise_layer_dropped_assignments:rate{window} / ({assignments} > 0)"
        ),
    }


def _loads(timing: Timing) -> dict[str, str]:
    """Loads relative to fair, and what they are worth; exact where there are counters of experts."""
    window = duration(timing.window)
    rate = f"run_layer_expert:equipoise_expert_assignments:rate{window}"
    load = f"run_layer_expert:equipoise_expert_load:ratio{window}"
    experts = "run_layer:equipoise_layer_experts:max"
    return {
        rate: f"sum by ({BY}, expert) (rate(equipoise_expert_assignments_total[{window}]))",
        load: f"{rate} / on ({BY}) group_left () (avg by ({BY}) ({rate}) > 0)",
        "run_layer:equipoise_max_load:ratio": (
            f"max by ({BY}) ({load}) or (max by ({BY}) (equipoise_layer_max_violation_ratio) + 1)"
        ),
        "run_layer:equipoise_min_load:ratio": (
            f"min by ({BY}) ({load}) or min by ({BY}) (equipoise_layer_min_load_ratio)"
        ),
        # exp(H)/E with H = -sum f ln f over the shares f = load/E is exp(-(sum load ln load)/E); 0 ln 0 counts as 0
        "run_layer:equipoise_effective_experts:ratio": (
            f"exp(-(sum by ({BY}) (({load} > 0) * ln({load} > 0)) / {experts})) "
            f"or (min by ({BY}) (equipoise_layer_effective_experts) / {experts})"
        ),
        "run_layer:equipoise_load_entropy:ratio": (
            f"1 + ln(run_layer:equipoise_effective_experts:ratio) / ln({experts} > 1)"
        ),
        "run_layer:equipoise_dead_experts:count": (
            f"sum by ({BY}) ({load} < bool {DEAD_LOAD}) or max by ({BY}) (equipoise_layer_dead_experts)"
        ),
        "run_layer:equipoise_max_token_share:ratio": (
            f"(max by ({BY}) ({rate}) / (run_layer:equipoise_layer_tokens:rate{window} > 0)) "
            f"or max by ({BY}) (equipoise_layer_max_token_share_ratio)"
        ),
        # mu: assignments per expert behind the numbers above, of the window or of the newest flush
        "run_layer:equipoise_judged_assignments:per_expert": (
            f"(run_layer:equipoise_layer_assignments:increase{window} and count by ({BY}) ({load})) / {experts} "
            f"or min by ({BY}) (equipoise_layer_window_assignments) / {experts}"
        ),
        "run_layer:equipoise_fair_token_share:ratio": _fair_share(window),
    }


def _fair_share(window: str) -> str:
    """K/E, the share of the tokens that a fair router sends to each expert.

    Of the window, or of the newest flush while the window has no tokens: flushes may be rare.
    """
    tokens = f"run_layer:equipoise_layer_tokens:rate{window}"
    flush = f"max by ({BY}) (equipoise_layer_window_assignments) / (max by ({BY}) (equipoise_layer_window_tokens) > 0)"
    return (
        f"(run_layer:equipoise_layer_assignments:rate{window} / ({tokens} > 0) or {flush}) "
        "/ run_layer:equipoise_layer_experts:max"
    )


def _collapse() -> dict[str, str]:
    """The share of tokens above which an expert's is called collapse: `CollapseDetector.token_share_limit`."""
    fair = "run_layer:equipoise_fair_token_share:ratio"
    halfway, hot = f"({fair} + {RULE.hot_excess:g} * (1 - {fair}))", f"({RULE.hot_load:g} * {fair})"
    floor = (
        f"{fair} * sqrt(2 * ln(run_layer:equipoise_layer_experts:max) "
        f"/ run_layer:equipoise_judged_assignments:per_expert) * sqrt(clamp_min(1 - {fair}, 0))"
    )
    return {
        "run_layer:equipoise_max_token_share:limit": f"(({halfway} >= {hot}) or {hot}) + {floor}",
    }
