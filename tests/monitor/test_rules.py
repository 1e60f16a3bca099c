"""Rules beyond collapse: drops, logits, drift; and the absolute checklist, beside what it gets wrong."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from equipoise.layer import MoE
from equipoise.monitor.baseline import baselines_of, from_json, to_json
from equipoise.monitor.profiles import rules_of
from equipoise.monitor.rules import AbsoluteRule, CountRule, DropRule, LoadDriftRule, LogitRule
from equipoise.monitor.stats import RoutingSums, routing_stats
from equipoise.monitor.watch import Watch


def record(counts_E, num_tokens, dropped=0, logit_std=1.0, logsumexp=2.0):
    counts_E = np.asarray(counts_E, dtype=np.int64)
    probs_sum_E = counts_E * (num_tokens / max(counts_E.sum(), 1))
    entries = num_tokens * len(counts_E)
    moments = (0.0, 0.0, entries * logit_std**2, num_tokens * logsumexp)
    drops = {"capacity": dropped, "hard_cap": 0, "tokens": 7}
    return routing_stats("layer", 1, RoutingSums(num_tokens, counts_E, probs_sum_E, *moments, drops, {}))


def healthy(rng, num_experts=64, k=8, num_tokens=4096):
    keys_TE = rng.gumbel(size=(num_tokens, num_experts))
    chosen_TK = np.argpartition(-keys_TE, k - 1, axis=1)[:, :k]
    return record(np.bincount(chosen_TK.reshape(-1), minlength=num_experts), num_tokens)


class TestDrops:
    def test_levels(self):
        for dropped, severity in ((0, None), (50, None), (300, "info"), (2000, "warning"), (7000, "critical")):
            stats = record([50_000, 50_000], 100_000, dropped)
            assert stats.drop_rate == dropped / 100_000  # tokens that lost all are not counted twice
            found = DropRule()([stats])
            assert [finding.severity for finding in found] == ([severity] if severity else [])

    def test_a_few_among_few_say_nothing(self):
        assert DropRule()([record([50, 50], 100, dropped=2)]) == []
        assert DropRule(false_alarms=None, min_dropped=1)([record([50, 50], 100, dropped=2)])[0].severity == "warning"


class TestLogits:
    def test_blow_up_and_not_finite(self):
        assert LogitRule()([record([5, 5], 10)]) == []
        for logsumexp in (150.0, float("inf")):
            (finding,) = LogitRule()([record([5, 5], 10, logsumexp=logsumexp)])
            assert (finding.rule, finding.severity) == ("logits", "critical")

    def test_against_the_baseline(self):
        baselines = baselines_of([record([5, 5], 10, logit_std=2.1)])
        rule = LogitRule(baselines=baselines)
        assert rule([record([5, 5], 10, logit_std=2.5)]) == []
        (finding,) = rule([record([5, 5], 10, logit_std=8.2)])  # 3.9 times: "more than 5 times" would have slept on
        assert finding.value == pytest.approx(8.2 / 2.1)
        absolute = AbsoluteRule(baselines=baselines)
        assert "logit_std" not in {f.rule for f in absolute([record([5, 5], 10, logit_std=8.2)])}
        assert "logit_std" in {f.rule for f in absolute([record([5, 5], 10, logit_std=10.6)])}


class TestDrift:
    def test_two_samples_of_one_router_do_not_drift(self):
        rng = np.random.default_rng(0)
        for num_tokens in (64, 512, 4096):
            for _ in range(20):
                rule = LoadDriftRule(baselines_of([healthy(rng, num_tokens=num_tokens)]))
                assert rule([healthy(rng, num_tokens=num_tokens)]) == []

    def test_a_moved_load_does(self):
        rng = np.random.default_rng(0)
        rule = LoadDriftRule(baselines_of([healthy(rng)]))
        moved = healthy(rng)
        counts_E = moved.counts_E.copy()
        counts_E[:16] //= 8
        (finding,) = rule([replace(moved, counts_E=counts_E)])
        assert finding.rule == "load_drift"
        assert finding.value > finding.threshold

    def test_another_number_of_experts_is_not_compared(self):
        rule = LoadDriftRule(baselines_of([record([5, 5, 5], 15)]))
        assert rule([record([50, 5], 55)]) == []


class TestAbsolute:
    def test_fires_on_every_healthy_layer_of_64(self):
        stats = healthy(np.random.default_rng(1))
        assert {finding.rule for finding in AbsoluteRule()([stats])} >= {"utilisation_low"}
        relative = [finding for rule in rules_of("relative") for finding in rule([stats])]
        assert relative == []

    def test_one_bin_above_half_is_impossible_for_top_2(self):
        collapsed = record([1000, 1000, 0, 0], 1000)  # every token takes the same two
        found = {finding.rule for finding in AbsoluteRule()([collapsed])}
        assert "one_bin" not in found
        assert {"utilisation_high", "entropy_target"} <= found  # tokens, not assignments, show it

    def test_half_the_experts_dead_passes_the_entropy_target(self):
        stats = record([300] * 128 + [0] * 128, 4800)
        assert stats.load_entropy > 0.8
        assert "entropy_target" not in {finding.rule for finding in AbsoluteRule()([stats])}
        assert "dead_experts" in {finding.rule for rule in rules_of("relative") for finding in rule([stats])}

    def test_silent_without_tokens(self):
        assert AbsoluteRule()([record([0, 0], 0)]) == []


def test_baselines_survive_json():
    baselines = baselines_of([healthy(np.random.default_rng(2))])
    assert from_json(json.loads(json.dumps(to_json(baselines)))) == baselines
    with pytest.raises(ValueError, match=r"baselines: expected what baseline\.to_json wrote"):
        from_json([{"layer": "x"}])


def test_profiles_by_name():
    with pytest.raises(ValueError, match=r"profile: expected relative or absolute, got 'strict'"):
        rules_of("strict")


# ---------------------------------------------------------------------------------- the monitor itself, and NaN


def even(num_tokens):
    return record([num_tokens // 2, num_tokens - num_tokens // 2], num_tokens)


def test_counters_are_judged_exactly_and_once():
    rule = CountRule(tokens_per_flush=1000)
    assert rule([even(1000), even(1000)]) == []
    for wrong in (0, 999, 1001, 2000):
        [finding] = rule([even(1000), even(wrong), even(wrong)])
        assert (finding.rule, finding.layer, finding.severity) == ("counters", "model", "critical")
        assert finding.value == wrong
    with pytest.raises(ValueError, match=r"CountRule\.tokens_per_flush: expected at least 1, got 0"):
        CountRule(0)


def test_a_watch_shows_the_count_rule_the_flush_itself():
    """Windows reach back to where there were tokens; a counter that stands still must not hide behind that."""
    layer = MoE(8, 8, 4)
    with Watch(layer, every=1, rules=(CountRule(640),)) as eye:
        for step in (1, 2, 3):
            layer(torch.randn(640, 8))
            assert eye.step(step) == []
        with eye.recorder.paused():
            layer(torch.randn(640, 8))
        eye.step(4)
        [alert] = [alert for alert in eye.step(5) if alert.finding.rule == "counters"]
        assert alert.state == "firing"


def test_logits_that_are_not_numbers_are_damage_where_they_are_known_to_be_numbers():
    wild = replace(record([500, 500], 1000), logit_mean=math.nan, logit_std=math.nan, logit_logsumexp=math.nan)
    assert LogitRule()([wild]) == []  # other libraries' routers may not tell their logits
    baselines = baselines_of([record([500, 500], 1000)])
    [finding] = LogitRule(baselines=baselines)([wild])
    assert (finding.rule, finding.severity) == ("not_finite", "critical")
