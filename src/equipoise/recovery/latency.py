"""Clocks on the experts of live layers, and the guard that opens a breaker where they are too slow.

Times are those of a layer's expert computation, or of single experts where they are computed one by one; on a GPU
events are read when they have passed, so that nobody waits. The numbers say which they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from equipoise.layer import FeedForward, MoE
from equipoise.ops.count import inside_backward
from equipoise.recovery.breaker import Breaker, BreakerConfig, Granularity, State, Transition
from equipoise.types import Action, Sink

REASON = "latency"


@dataclass(frozen=True)
class Call:
    """One computation: how long, and of how many tokens or rows."""

    seconds: float
    size: int


class LayerClock:
    """Times each call of a layer's experts, from its begin to its end. Recomputations in backward are left out."""

    def __init__(self, layer: MoE) -> None:
        self._calls: list[Call] = []
        self._began: Any = None
        self._pending: list[tuple[Any, Any, int]] = []  # CUDA events that have not passed
        self._handles = [
            layer.experts.register_forward_pre_hook(self._begin, prepend=True),  # before all that others add
            layer.experts.register_forward_hook(self._end),
        ]

    def _begin(self, module: nn.Module, args: tuple[Tensor, Any]) -> None:
        self._began = _event() if args[0].is_cuda else time.perf_counter()

    def _end(self, module: nn.Module, args: tuple[Tensor, Any], output: Tensor) -> None:
        began, self._began = self._began, None
        if began is None or inside_backward() or not len(args[0]):
            return
        if args[0].is_cuda:
            self._pending.append((began, _event(), len(args[0])))
        else:
            self._calls.append(Call(time.perf_counter() - began, len(args[0])))

    def take(self) -> list[Call]:
        """The calls that have ended since this was last asked."""
        while self._pending and self._pending[0][1].query():
            start, end, size = self._pending.pop(0)
            self._calls.append(Call(start.elapsed_time(end) / 1000, size))
        calls, self._calls = self._calls, []
        return calls

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


class ExpertClock:
    """A probe that times each expert of a layer. `take` has the calls by expert."""

    def __init__(self, layer: MoE) -> None:
        self._layer = layer
        self._began, self._rows = 0.0, 0
        self._calls: dict[int, list[Call]] = {}
        layer.experts.probes = (self, *layer.experts.probes)  # outermost: it sees all that others add

    def begin(self, expert: int, num_rows: int) -> None:
        """Start."""
        self._began, self._rows = time.perf_counter(), num_rows

    def end(self, expert: int) -> None:
        """Stop."""
        if not inside_backward():
            self._calls.setdefault(expert, []).append(Call(time.perf_counter() - self._began, self._rows))

    def take(self) -> dict[int, list[Call]]:
        """The calls since this was last asked, by expert."""
        calls, self._calls = self._calls, {}
        return calls

    def detach(self) -> None:
        """No longer a probe."""
        self._layer.experts.probes = tuple(probe for probe in self._layer.experts.probes if probe is not self)


class LatencyGuard:
    """Clocks, a breaker, and the layers' modes: a layer, or an expert, that is too slow is bypassed by its stand-in.

    granularity: "layer", or "expert", which computes experts one by one to time them. dense: the stand-ins of layers
    without shared experts. strict: a layer without a stand-in is an error; else it is left out, and named in
    `unguarded`. sinks: get each transition as an action of kind "breaker". clock: of the breaker's waits, in seconds.
    It changes only `dense_share` or `shut_experts` of a layer's mode. `step` is called by the loop between forwards.
    """

    def __init__(
        self,
        layers: Mapping[str, MoE],
        config: BreakerConfig = BreakerConfig(),  # noqa: B008 - frozen
        *,
        granularity: Granularity = "layer",
        dense: Mapping[str, FeedForward] | None = None,
        strict: bool = True,
        sinks: Sequence[Sink] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if granularity not in ("layer", "expert"):
            raise ValueError(f"granularity: expected layer or expert, got {granularity!r}")
        self._dense, self._sinks, self.granularity = dict(dense or {}), tuple(sinks), granularity
        bare = [name for name, layer in layers.items() if layer.shared is None and name not in self._dense]
        if bare and (strict or len(bare) == len(layers)):
            raise ValueError(
                f"LatencyGuard: nothing can stand in for the experts of {', '.join(bare)}; give it a dense path "
                "(equipoise.recovery.dense_path), or build the layers with shared_experts=1"
            )
        self.unguarded = tuple(bare)
        self._layers = {name: layer for name, layer in layers.items() if name not in bare}
        self._groups = [
            (name, expert)
            for name, layer in self._layers.items()
            for expert in (range(layer.num_experts) if granularity == "expert" else (None,))
        ]
        names = [name if expert is None else f"{name}/{expert}" for name, expert in self._groups]
        self.breaker = Breaker(names, config, granularity=granularity, clock=clock)
        make: type[LayerClock] | type[ExpertClock] = ExpertClock if granularity == "expert" else LayerClock
        self._clocks = {name: make(layer) for name, layer in self._layers.items()}

    def step(self, step: int) -> list[Action]:
        """Feed the breaker with the calls since the last time, and act on what changed."""
        calls = [self._calls_of(*group) for group in self._taken()]
        moved: list[Transition] = []
        for turn in range(max(map(len, calls), default=0)):
            these = [each[turn] if turn < len(each) else Call(np.nan, 0) for each in calls]
            moved += self.breaker.record(
                np.array([call.seconds for call in these]), np.array([call.size for call in these])
            )
        moved += self.breaker.tick()
        return [self._act(step, transition) for transition in moved]

    def _taken(self) -> list[tuple[Any, int | None]]:
        taken = {name: clock.take() for name, clock in self._clocks.items()}
        return [(taken[name], expert) for name, expert in self._groups]

    @staticmethod
    def _calls_of(taken: Any, expert: int | None) -> list[Call]:
        calls: list[Call] = taken if expert is None else taken.get(expert, [])
        return calls

    def states(self) -> dict[str, State]:
        """By layer, or by "layer/expert"."""
        return self.breaker.states

    def _act(self, step: int, moved: Transition) -> Action:
        """Put the transition into the layer's mode, and tell."""
        name, expert = self._groups[self.breaker.names.index(moved.name)]
        layer, config = self._layers[name], self.breaker.config
        if expert is None:
            share = {"closed": 0.0, "open": 1.0, "half_open": 1.0 - config.probe_share}[moved.after]
            mode = replace(layer.mode, dense_share=share)
        else:
            shut = {*layer.mode.shut_experts} - {expert} | ({expert} if moved.after == "open" else set())
            mode = replace(layer.mode, shut_experts=tuple(sorted(shut)))
        layer.set_mode(mode, self._dense.get(name))
        slow = round(moved.slow_share * moved.num_calls)
        note = f"{moved.name}: {moved.before} -> {moved.after}; {slow} of {moved.num_calls} calls were too slow"
        numbers = {"slow_share": moved.slow_share, "p99_ms": 1000 * moved.p99_s}
        detail = {key: value for key, value in numbers.items() if not np.isnan(value)}
        action = Action("breaker", name, step, REASON, detail, "applied", note)
        for sink in self._sinks:
            sink.action(action)
        return action

    def detach(self) -> None:
        """Remove the clocks, and let every token reach its experts again."""
        for clock in self._clocks.values():
            clock.detach()
        for name, layer in self._layers.items():
            layer.set_mode(replace(layer.mode, dense_share=0.0, shut_experts=()), self._dense.get(name))


def _event() -> Any:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
    event.record()
    return event
