"""False alarms of whole models by chance alone: fair layers, judged together, beside the rate that the rules promise.

A part of benchmarks.detection. Thresholds of size are taken away, so that chance alone decides, and the promised rate
is one that can be counted. The same windows are judged by the rules as they are, too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.progress import track

from equipoise.bench.report import Table
from equipoise.monitor.baseline import baselines_of
from equipoise.monitor.chance import FALSE_ALARMS
from equipoise.monitor.detectors import CollapseDetector
from equipoise.monitor.profiles import rules_of
from equipoise.monitor.rules import DropRule, LoadDriftRule
from equipoise.monitor.stats import RoutingSums, routing_stats
from equipoise.types import Detector, RoutingStats

RATE = 0.05  # promised per rule and window, where chance alone decides
LOST = 0.01  # share of the assignments that every layer loses, one by one


@dataclass(frozen=True)
class Model:
    """num_layers fair layers. expected: assignments per expert in a window."""

    num_layers: int
    num_experts: int
    top_k: int
    expected: int

    @property
    def num_tokens(self) -> int:
        """Tokens per window."""
        return math.ceil(self.expected * self.num_experts / self.top_k)

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.num_layers} x {self.num_experts}, k={self.top_k}, {self.expected} each"


MODELS = (
    Model(2, 8, 1, 16),
    Model(32, 8, 2, 16),
    Model(32, 8, 2, 100),
    Model(28, 64, 6, 100),
    Model(61, 256, 8, 16),
    Model(61, 256, 8, 100),
)


def window_of(model: Model, rng: np.random.Generator) -> list[RoutingStats]:
    """One window of a model whose tokens choose distinct experts, each as likely as any other."""
    return [_layer(model, rng, layer) for layer in range(model.num_layers)]


def _layer(model: Model, rng: np.random.Generator, layer: int) -> RoutingStats:
    ids_TK = rng.integers(model.num_experts, size=(model.num_tokens, model.top_k))
    while True:
        ordered_TK = np.sort(ids_TK, axis=1)
        twice_T = (ordered_TK[:, 1:] == ordered_TK[:, :-1]).any(axis=1)
        if not twice_T.any():
            break
        ids_TK[twice_T] = rng.integers(model.num_experts, size=(int(twice_T.sum()), model.top_k))
    counts_E = np.bincount(ids_TK.ravel(), minlength=model.num_experts)
    even_E = np.full(model.num_experts, model.num_tokens / model.num_experts)
    dropped = {"capacity": int(rng.binomial(ids_TK.size, LOST))}
    return routing_stats(
        f"layers.{layer}", 1, RoutingSums(model.num_tokens, counts_E, even_E, 0.0, 0.0, 0.0, 0.0, dropped, {})
    )


def chance_alone(window: Sequence[RoutingStats]) -> dict[str, Detector]:
    """The rules with thresholds at what is fair; `window` is the baseline that drift is measured from."""
    return {
        "collapse": CollapseDetector(
            1.0, effective_ratio=1 - 1e-9, hot_excess=1e-9, hot_load=1 + 1e-9, false_alarms=RATE
        ),
        "drops": DropRule(((LOST, "warning"),), RATE, min_dropped=1),
        "load drift": LoadDriftRule(baselines_of(window), limit=0.0, false_alarms=RATE),
    }


def family_table(windows: int, models: Sequence[Model] = MODELS, *, quiet: bool = False) -> Table:
    """Share of the windows with a finding, for each model and rule."""
    rows = []
    for model in track(models, description="whole models", disable=quiet):
        rng = np.random.default_rng(0)
        found: dict[str, int] = {"collapse": 0, "drops": 0, "load drift": 0}
        apart, as_they_are = 0, 0
        for _ in range(windows):
            before, window = window_of(model, rng), window_of(model, rng)
            rules = chance_alone(before)
            for name, rule in rules.items():
                found[name] += bool(rule(window))
            apart += any(rule([stats]) for rule in rules.values() for stats in window)
            usual = [rule for rule in rules_of("relative", baselines_of(before)) if not isinstance(rule, DropRule)]
            as_they_are += any(rule(window) for rule in usual)
        shares = [round(100 * found[name] / windows, 2) for name in found]
        opinions = model.num_layers * (model.num_experts + 1)
        rows.append((model.name, opinions, windows, *shares, round(100 * apart / windows, 1), as_they_are))
    columns = (
        "layers x experts",
        "opinions on collapse",
        "windows",
        "collapse [%]",
        "drops [%]",
        "load drift [%]",
        "layer by layer [%]",
        "windows with a finding",
    )
    note = (
        f"Windows of fair models with a finding by chance alone; each rule promises at most {RATE:.0%}, load drift "
        "about that. Layer by layer: any rule, if each layer had the rate to itself. Last: by the rules as they are, "
        f"which promise {FALSE_ALARMS:g} each, without drops."
    )
    return Table("false alarms of whole models", columns, tuple(rows), note)
