"""What serving costs and how fast it is: for Prometheus since the start, and for people over the last minute.

Told by the engine about each step and by the API about each request. Names follow Prometheus's conventions; the
experts' own metrics are those of the monitor's exporter, in the same registry.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from equipoise.serve.api.served import Counted
from equipoise.serve.engine import Occupancy, StepReport
from equipoise.serve.rolling import Rolling

MOST_GROUPS = 512  # whose times are recorded with each look
_TIMES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


def client() -> Any:
    """prometheus_client. Raises ImportError, naming the extra, where it is not installed."""
    try:
        return import_module("prometheus_client")
    except ImportError as error:
        raise ImportError(
            "serving needs prometheus_client, which is not installed; pip install 'equipoise[serve]'"
        ) from error


class ServingMetrics:
    """Of one server. layers: names of the MoE layers. num_open: requests now. occupancy: of the engine, now."""

    def __init__(
        self, layers: tuple[str, ...], num_open: Callable[[], int], occupancy: Callable[[], Occupancy]
    ) -> None:
        prometheus = client()
        self._layers, self._occupancy = layers, occupancy
        self.registry = prometheus.CollectorRegistry()
        self._prometheus = prometheus
        self._requests = self._counter("requests", "Requests that have ended.", "endpoint", "status")
        self._prompt = self._counter("prompt_tokens", "Tokens of prompts.")
        self._cached = self._counter("cached_prompt_tokens", "Tokens of prompts whose keys were there already.")
        self._answer = self._counter("answer_tokens", "Tokens of answers.")
        self._degraded = self._counter("degraded_responses", "Responses that were marked as degraded.")
        self._finishes = self._counter("finishes", "Answers that have ended, by reason.", "reason")
        self._first = self._histogram("time_to_first_token_seconds", "From a request to its first token.")
        self._between = self._histogram("inter_token_seconds", "From one token of an answer to the next.")
        self._seconds = self._histogram("request_seconds", "From a request to its end.")
        self._steps = self._histogram("step_seconds", "Steps of the engine: one forward each.")
        self._preempted = self._gauge("preempted", "Answers that had to give their cache back, so far.")
        self._running = self._gauge("running", "Requests in the batch.")
        self._waiting = self._gauge("waiting", "Requests in the queue.")
        self._free = self._gauge("free_cache_blocks", "Blocks of the key/value cache that can be taken.")
        self._blocks = self._gauge("cache_blocks", "Blocks of the key/value cache.")
        self._last_step = self._gauge("last_step_timestamp_seconds", "When the engine's last step ended, unix time.")
        self._distinct = self._gauge("distinct_experts", "Experts that the last step's tokens went to.", "layer")
        self._gauge("open_requests", "Requests that have not ended.").set_function(lambda: float(num_open()))
        self._breaker = self._gauge("breaker_open", "1 where a breaker is not closed.", "group")
        self._p50 = self._gauge("experts_p50_seconds", "Median of a group's expert computation.", "group")
        self._p99 = self._gauge("experts_p99_seconds", "99th percentile of a group's expert computation.", "group")
        self._version = self._gauge("weights_version", "Counts changes of the weights in service.")
        self.first_token, self.between_tokens, self.completed = Rolling(), Rolling(), Rolling()
        self.answer_tokens, self.prompt_tokens, self.step_seconds = Rolling(), Rolling(), Rolling()
        self._experts = [Rolling() for _ in layers]
        self._report: StepReport | None = None

    def on_step(self, report: StepReport) -> None:
        """One step of the engine. In its thread."""
        self._report = report
        self._steps.observe(report.seconds)
        self._last_step.set(time.time())
        self.step_seconds.add(report.seconds)
        self.answer_tokens.add(report.num_answer_tokens)
        self.prompt_tokens.add(report.num_prompt_tokens)
        for rolling, number in zip(self._experts, report.distinct_experts, strict=False):
            rolling.add(number)

    def count(self, counted: Counted) -> None:
        """One request that has ended. In the event loop's thread."""
        self._requests.labels(counted.endpoint, str(counted.status)).inc()
        self._prompt.inc(counted.prompt_tokens)
        self._cached.inc(counted.cached_tokens)
        self._answer.inc(counted.answer_tokens)
        self._seconds.observe(counted.seconds)
        self._degraded.inc(bool(counted.degraded))
        for reason in counted.finishes:
            self._finishes.labels(reason).inc()
        if counted.first_token is not None:
            self._first.observe(counted.first_token)
            self.first_token.add(counted.first_token)
        for seconds in counted.between_tokens:
            self._between.observe(seconds)
        self.between_tokens.add(*counted.between_tokens)
        if counted.answer_tokens:
            self.completed.add(1.0)

    def guarded(self, states: Mapping[str, str], times: Mapping[str, tuple[float, float]], version: int) -> None:
        """What the breaker says, p50 and p99 in seconds of what it times, and which weights are in service."""
        for group, state in states.items():
            self._breaker.labels(group).set(state != "closed")
        for group, (half, most) in times.items():
            self._p50.labels(group).set(half)
            self._p99.labels(group).set(most)
        self._version.set(version)

    def retry_after(self) -> float:
        """Seconds until those who wait now have had their turn, by the rate of the last minute."""
        rate = self.completed.per_second()
        return min(60.0, max(1.0, self._occupancy().num_waiting / rate)) if rate else 5.0

    def scalars(self) -> dict[str, float]:
        """Of the last minute, and how full it is now, for the run store."""
        first, between, steps = self.first_token, self.between_tokens, self.step_seconds
        named = {
            "tokens_per_s": self.answer_tokens.per_second(),
            "prompt_tokens_per_s": self.prompt_tokens.per_second(),
        }
        named |= _quantiles("time_to_first_token_ms", first) | _quantiles("inter_token_ms", between)
        named |= _quantiles("step_ms", steps) | {"requests_per_s": self.completed.per_second()}
        now = self._occupancy()
        named |= {"running": now.num_running, "queue_depth": now.num_waiting}
        named["cache_used_share"] = 1 - now.free_blocks / now.num_blocks
        for layer, rolling in zip(self._layers, self._experts, strict=True):
            named[f"distinct_experts.{layer}"] = rolling.mean()
        return {name: value for name, value in named.items() if value == value}  # NaN: nothing to say

    def exposition(self) -> tuple[bytes, str]:
        """(all metrics as text, its content type)."""
        now = self._occupancy()
        self._running.set(now.num_running)
        self._waiting.set(now.num_waiting)
        self._free.set(now.free_blocks)
        self._blocks.set(now.num_blocks)
        if self._report is not None:
            self._preempted.set(self._report.num_preempted)
            for layer, number in zip(self._layers, self._report.distinct_experts, strict=False):
                self._distinct.labels(layer).set(number)
        text: bytes = self._prometheus.generate_latest(self.registry)
        return text, str(self._prometheus.CONTENT_TYPE_LATEST)

    def _counter(self, name: str, told: str, *labels: str) -> Any:
        return self._prometheus.Counter(f"equipoise_serve_{name}", told, labels, registry=self.registry)

    def _gauge(self, name: str, told: str, *labels: str) -> Any:
        return self._prometheus.Gauge(f"equipoise_serve_{name}", told, labels, registry=self.registry)

    def _histogram(self, name: str, told: str) -> Any:
        return self._prometheus.Histogram(f"equipoise_serve_{name}", told, registry=self.registry, buckets=_TIMES)


async def send_exposition(send: Callable[..., Any], text: bytes, kind: str) -> None:
    """Answer a request with metrics, by the ASGI function `send`. kind: their content type."""
    headers = [(b"content-type", kind.encode()), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def experts_ms(times: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """p50 and p99 of expert computations, for the run store. times: in seconds, by layer or by "layer/expert".

    Of experts the slowest are kept, as there may be very many; what stands for their layer is its slowest one's.
    """
    slowest = sorted(times.items(), key=lambda item: item[1][1])[-MOST_GROUPS:]
    by_layer = {group.partition("/")[0]: each for group, each in slowest}  # the last one wins
    named: dict[str, float] = {}
    for group, (half, most) in ({**dict(slowest), **by_layer}).items():
        named |= {f"experts_ms.{group}.p50": 1000 * half, f"experts_ms.{group}.p99": 1000 * most}
    return named


def _quantiles(name: str, seconds: Rolling) -> dict[str, float]:
    half, most = seconds.quantiles(0.5, 0.99)
    return {f"{name}.p50": 1000 * half, f"{name}.p99": 1000 * most}
