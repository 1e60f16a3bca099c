"""What is counted: rolling windows by hand, metrics as Prometheus reads them, a server's own run folder."""

import math
import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families

from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.monitor.store import RunStore
from equipoise.serve.api.served import Counted
from equipoise.serve.engine import Occupancy, StepReport
from equipoise.serve.metrics import ServingMetrics
from equipoise.serve.record import ServerRecord
from equipoise.serve.rolling import Rolling
from equipoise.types import Action


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class TestRolling:
    def test_by_hand(self):
        clock = Clock()
        rolling = Rolling(10.0, clock=clock)
        assert math.isnan(rolling.mean())
        assert math.isnan(rolling.quantiles(0.5)[0])
        clock.now += 2
        rolling.add(1.0, 3.0)
        assert rolling.per_second() == 4.0 / 2  # two seconds so far
        clock.now += 8
        rolling.add(5.0)
        assert rolling.quantiles(0.0, 0.5, 1.0) == [1.0, 3.0, 5.0]
        assert rolling.per_second() == 0.9
        clock.now += 3  # the first two are 11 seconds old
        assert rolling.mean() == 5.0

    def test_bounded(self):
        rolling = Rolling(most=3, clock=Clock())
        rolling.add(*range(10))
        assert rolling.mean() == 8.0

    def test_from_several_threads(self):
        rolling = Rolling(most=100_000)
        threads = [threading.Thread(target=lambda: [rolling.add(1.0) for _ in range(500)]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(rolling._recent()) == 2000


def report(**changes):
    values = {
        "seconds": 0.01,
        "num_prompt_tokens": 30,
        "num_answer_tokens": 4,
        "num_preempted": 2,
        "distinct_experts": (5, 7),
    }
    return StepReport(**(values | changes))


def occupied(**changes):
    """An engine that is so full."""
    return lambda: Occupancy(**({"num_running": 4, "num_waiting": 6, "free_blocks": 60, "num_blocks": 100} | changes))


def read(metrics):
    text, kind = metrics.exposition()
    assert kind.startswith("text/plain")
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_metrics_as_prometheus_reads_them():
    metrics = ServingMetrics(("layers.0.mlp", "layers.1.mlp"), lambda: 9, occupied())
    metrics.on_step(report())
    metrics.on_step(report(num_answer_tokens=2))
    metrics.count(
        Counted(
            "/v1/completions", 200, 1.5, prompt_tokens=30, cached_tokens=16, answer_tokens=6, first_token=0.2,
            between_tokens=(0.01, 0.03), finishes=("stop",), degraded=("because",),
        )
    )  # fmt: skip
    metrics.count(Counted("/v1/completions", 429, 0.001))
    metrics.guarded({"layers.0.mlp": "open", "layers.1.mlp": "closed"}, {"layers.0.mlp": (0.2, 0.7)}, 3)
    found = read(metrics)
    expected = {
        ("requests_total", "/v1/completions", "200"): 1,
        ("requests_total", "/v1/completions", "429"): 1,
        ("prompt_tokens_total",): 30,
        ("cached_prompt_tokens_total",): 16,
        ("answer_tokens_total",): 6,
        ("degraded_responses_total",): 1,
        ("finishes_total", "stop"): 1,
        ("time_to_first_token_seconds_count",): 1,
        ("inter_token_seconds_sum",): 0.04,
        ("step_seconds_count",): 2,
        ("open_requests",): 9,
        ("running",): 4,
        ("waiting",): 6,
        ("free_cache_blocks",): 60,
        ("cache_blocks",): 100,
        ("preempted",): 2,
        ("distinct_experts", "layers.1.mlp"): 7,
        ("breaker_open", "layers.0.mlp"): 1,
        ("breaker_open", "layers.1.mlp"): 0,
        ("experts_p50_seconds", "layers.0.mlp"): 0.2,
        ("experts_p99_seconds", "layers.0.mlp"): 0.7,
        ("weights_version",): 3,
    }
    for (name, *labels), value in expected.items():
        assert found[(f"equipoise_serve_{name}", *labels)] == pytest.approx(value), name
    assert not [name for name, *_ in found if ":" in name]


def test_scalars_for_people():
    metrics = ServingMetrics(("layers.0.mlp",), lambda: 0, occupied())
    assert "time_to_first_token_ms.p50" not in metrics.scalars()  # nothing is known yet, and nothing is said
    metrics.on_step(report(distinct_experts=(4,)))
    metrics.count(Counted("/v1/completions", 200, 1.0, first_token=0.25, between_tokens=(0.5,), answer_tokens=2))
    scalars = metrics.scalars()
    assert scalars["time_to_first_token_ms.p99"] == pytest.approx(250)
    assert scalars["inter_token_ms.p50"] == pytest.approx(500)
    assert scalars["cache_used_share"] == pytest.approx(0.4)
    assert scalars["distinct_experts.layers.0.mlp"] == 4
    assert scalars["queue_depth"] == 6


def test_retry_after_follows_the_rate():
    metrics = ServingMetrics((), lambda: 0, occupied(num_waiting=40))
    assert metrics.retry_after() == 5.0
    metrics.completed._began -= 10.0  # ten seconds ago
    for _ in range(20):
        metrics.count(Counted("/v1/completions", 200, 1.0, answer_tokens=1))
    assert metrics.retry_after() == pytest.approx(20.0, rel=0.05)  # 40 at two a second


class TestRecord:
    CONFIG = DecoderConfig(
        vocab_size=32, dim=16, num_layers=1, num_heads=2, hidden_dim=32, max_seq_len=16,
        moe=MoEConfig(num_experts=4, hidden_dim=8),
    )  # fmt: skip

    def test_is_a_run_folder(self, tmp_path, serve):
        served = serve()
        served.traffic()
        served.care.look()
        record = ServerRecord(tmp_path / "r", "demo", self.CONFIG)
        record.routing(served.heard.flushes[0])
        record.action(Action("reload", "", 3, "operator", {"version": 2.0}, "kept", "weights of step-000080"))
        record.scalars(5, {"tokens_per_s": 100.0})
        with RunStore.open_readonly(tmp_path / "r") as store:
            assert (store.meta()["status"], store.meta()["kind"], store.meta()["name"]) == ("running", "server", "demo")
            assert store.layers() == list(served.care.layers)
            assert store.actions()[0].kind == "reload"
        record.close()
        record.close()
        with RunStore.open_readonly(tmp_path / "r") as store:
            assert store.meta()["status"] == "finished"

    def test_a_silent_flush_is_not_kept_and_old_ones_are_forgotten(self, tmp_path, serve):
        served = serve()
        served.care.look()
        record = ServerRecord(tmp_path / "r", "demo", self.CONFIG, keep_flushes=3)
        record.routing(served.heard.flushes[0])
        assert record._store is None  # nothing was written
        for _ in range(8):
            served.traffic(2)
            served.care.look()
            record.routing(served.heard.flushes[-1])
        with RunStore.open_readonly(tmp_path / "r") as store:
            kept = [stats.step for stats in store.routing_history("layers.0.mlp")]
        assert kept == [flush[0].step for flush in served.heard.flushes[-len(kept) :]]
        assert 3 <= len(kept) < 6
        record.close()
