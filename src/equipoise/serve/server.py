"""A server: one model's engine, care, metrics and the two applications, put together, started and drained.

Signals, sockets and pages are the command's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.models.run_files import Loaded
from equipoise.monitor.baseline import Baseline
from equipoise.monitor.prometheus.collector import Detail, RoutingCollector
from equipoise.monitor.prometheus.live import LiveSource
from equipoise.recovery.gate import Gate
from equipoise.serve.admin import admin_token, endpoints, for_operators
from equipoise.serve.api.app import create_app
from equipoise.serve.api.endpoints import ENDPOINTS
from equipoise.serve.api.served import Bounds, Served
from equipoise.serve.api.template import BUILT_IN, ChatTemplate
from equipoise.serve.care import Care, CareConfig, Shared
from equipoise.serve.delivery import DeliveryCollector, queues_of
from equipoise.serve.engine import Engine, blocks_that_fit
from equipoise.serve.equipment import equip
from equipoise.serve.evidence import Witness
from equipoise.serve.expert_cache import ExpertCacheCollector
from equipoise.serve.loop import EngineLoop
from equipoise.serve.metrics import ServingMetrics, experts_ms
from equipoise.serve.operator import Operator
from equipoise.serve.record import ServerRecord
from equipoise.serve.scheduler import Limits
from equipoise.small import expert_bytes, offload_of
from equipoise.small.experts import StoredExperts
from equipoise.types import Sink

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from equipoise.serve.ranks.front import Ranks


@dataclass(frozen=True)
class ServerConfig:
    """name: of the model in the API. folder: of the server's own records. cache_gb: for keys and values. detail: of
    the experts' metrics. keys: whoever has one of them may use the API; empty for everybody."""

    name: str
    folder: Path
    cache_gb: float = 1.0
    block_size: int = 16
    prefix_reuse: bool = True
    limits: Limits = field(default_factory=Limits)
    care: CareConfig = field(default_factory=CareConfig)
    detail: Detail = "layer"
    keys: tuple[str, ...] = field(default=(), repr=False)
    template: ChatTemplate = BUILT_IN
    bounds: Bounds = field(default_factory=Bounds)


class Server:
    """Built, then `start`, then `stop`.

    sinks: get routing, alerts and repairs besides the server's own record; how those behind a `Background` fare is
    exported. ranks: where the model's experts are, if it is spread; whoever made them ends them.
    """

    def __init__(
        self,
        loaded: Loaded,
        config: ServerConfig,
        environment: Mapping[str, str],
        sinks: Sequence[Sink] = (),
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.loaded, self.ranks = config, loaded, ranks
        model, layers = loaded.model, tuple(loaded.model.moe_layers)
        gate = Gate()
        self.record = ServerRecord(config.folder, config.name, model.config)
        self.metrics = ServingMetrics(layers, self._num_open, lambda: self.engine.occupancy())
        self.engine = Engine(
            model,
            loaded.tokenizer,
            limits=config.limits,
            num_blocks=blocks_that_fit(model, config.block_size, config.cache_gb, config.limits.max_running),
            block_size=config.block_size,
            prefix_reuse=config.prefix_reuse,
            on_step=self.metrics.on_step,
            fatal=() if ranks is None else ranks.fatal,
        )
        self.loop = EngineLoop(self.engine, running=gate.running)
        self._told = tuple(sinks)
        self._live = live = LiveSource(config.name)
        self.offload = offload_of(model)
        if self.offload is not None:
            self.metrics.registry.register(ExpertCacheCollector(self.offload.counts))
        if queues := queues_of(sinks):
            self.metrics.registry.register(DeliveryCollector(queues))
        self.care, self.operator = None, None
        normal: Mapping[str, Baseline] = {}
        if layers:
            equipment = equip(loaded, config.folder)
            normal = equipment.baselines
            read = None if ranks is None else ranks.read
            shared = Shared(gate, lambda: self.loop.progress().num_steps, self.loop.forget_cache, read)
            told: tuple[Sink, ...] = (self.record, live, *sinks)
            self.care = Care(loaded, equipment, shared, config.care, told, self._after_look)
            self.operator = Operator(loaded, self.care, equipment.canary)
        self.metrics.registry.register(RoutingCollector(live, detail=config.detail, baselines=normal))
        self.served = self._served(layers)
        self.token = admin_token(config.folder, environment)

    def public_app(self, admin_port: int | None = None) -> Starlette:
        """For clients. admin_port: where the verbs are, for whoever asks what is wrong."""
        if self.operator is None:
            return create_app(self.served)
        witness = Witness(self.operator, self.config.folder, self.config.limits.max_waiting, admin_port)
        return create_app(self.served, (*ENDPOINTS, witness.endpoint))

    def admin_app(self) -> Starlette | None:
        """For operators; None for a model without experts, which has nothing to operate on."""
        if self.care is None or self.operator is None:
            return None
        return create_app(for_operators(self.served, self.token), endpoints(self.care, self.operator))

    def start(self) -> None:
        """Take requests from now on."""
        self.loop.start()
        if self.care is not None:
            self.care.call(self.record.open)
            self.care.start()

    def stop(self, drain_s: float = 30.0) -> bool:
        """Finish what is open, at most for so long, and end. Whether all was finished."""
        finished = self.loop.drain(drain_s)
        self.loop.stop()
        if self.care is not None:
            self.care.call(self.record.close)
            self.care.stop()
            self._end_alerts()
        self.engine.close()
        if self.offload is not None:
            self.offload.close()
        return finished

    def experts_kept(self) -> list[str]:
        """How the experts are kept, in a line, where it is not as usual."""
        if self.ranks is not None:
            return [self.ranks.told()]
        layer = next(iter(self.loaded.model.moe_layers.values()), None)
        experts = None if layer is None else layer.get_submodule("experts")
        if not isinstance(experts, StoredExperts):
            return []
        where = f"{expert_bytes(self.loaded.model) / 2**20:.1f} MB in memory"
        if self.offload is not None:
            where = f"at most {self.offload.memory / 2**20:.1f} MB in memory, the others in {self.offload.file.path}"
        return [f"experts in {experts.format.name}: {where}"]

    def metrics_text(self) -> tuple[bytes, str]:
        """(for Prometheus, its content type)."""
        return self.metrics.exposition()

    def _end_alerts(self) -> None:
        """What still fires is about a model that is served no more: nobody else would end it where it was told."""
        for alert in self._live.read().firing:
            finding = replace(alert.finding, message=f"the server has ended; until then: {alert.finding.message}")
            for sink in self._told:
                sink.alert(replace(alert, state="resolved", finding=finding))

    def _num_open(self) -> int:
        return self.loop.progress().num_open

    def _served(self, layers: tuple[str, ...]) -> Served:
        nothing: Callable[[], tuple[str, ...]] = lambda: ()  # noqa: E731 - typed
        return Served(
            name=self.config.name,
            loop=self.loop,
            tokenizer=self.loaded.tokenizer,
            max_tokens=self.engine.max_tokens,
            created=int(time.time()),
            layers=layers,
            template=self.config.template,
            degraded=nothing if self.care is None else self.care.reasons,
            retry_after=self.metrics.retry_after,
            count=self.metrics.count,
            keys=self.config.keys,
            bounds=self.config.bounds,
        )

    def _after_look(self, step: int) -> None:
        """In the care thread."""
        assert self.care is not None
        assert self.operator is not None
        self.operator.advance_faults()
        self._live.left(self.care.aftermath.findings)
        guard, scalars = self.care.guard, self.metrics.scalars()
        times = {} if guard is None else guard.times()
        scalars |= experts_ms(times) | ({} if self.ranks is None else self.ranks.scalars())
        self.metrics.guarded({} if guard is None else guard.states(), times, self.operator.weights.version.number)
        if scalars:
            self.record.scalars(step, scalars)
