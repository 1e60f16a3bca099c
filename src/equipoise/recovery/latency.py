"""Clocks on the experts of live layers, and the guard that opens a breaker where they are too slow.

Times are those of a layer's expert computation, or of single experts where they are computed one by one; on a GPU
events are read when they have passed, so that nobody waits. The numbers say which they are.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from equipoise.layer import FeedForward, MoE
from equipoise.monitor.incidents import EXPERT_SLOW
from equipoise.ops.count import inside_backward
from equipoise.ops.ragged import RaggedPlan
from equipoise.recovery.breaker import Breaker, BreakerConfig, Granularity, State, Transition
from equipoise.types import Action, Finding, Sink

MAX_CALLS = 10_000  # kept until they are taken; the oldest go first, where nobody takes them


@dataclass(frozen=True)
class Call:
    """One computation: how long, and of how many rows. Rows that were dropped or diverted are not among them."""

    seconds: float
    size: int


class _Stopwatch:
    """Times calls that follow each other. key: whose. size: rows, on a GPU maybe still on their way to the host."""

    def __init__(self) -> None:
        self._began: tuple[Any, int | Tensor] | None = None
        self._calls: deque[tuple[Any, Call]] = deque(maxlen=MAX_CALLS)
        self._pending: deque[tuple[Any, Any, Any, int | Tensor]] = deque(maxlen=MAX_CALLS)  # (key, CUDA events, size)

    def begin(self, device: torch.device, size: int | Tensor) -> None:
        self._began = (_event(device) if device.type == "cuda" else time.perf_counter()), size

    def end(self, device: torch.device, key: Any = None) -> None:
        """A call without rows is none; an end without its begin, a recomputation, too."""
        if self._began is None:
            return
        (began, size), self._began = self._began, None
        if device.type == "cuda":
            self._pending.append((key, began, _event(device), size))
        elif size:
            self._calls.append((key, Call(time.perf_counter() - began, int(size))))

    def take(self) -> list[tuple[Any, Call]]:
        while self._pending and self._pending[0][2].query():
            key, start, end, size = self._pending.popleft()
            if size:
                self._calls.append((key, Call(start.elapsed_time(end) / 1000, int(size))))
        calls = list(self._calls)
        self._calls.clear()
        return calls


class LayerClock:
    """Times each call of a layer's experts, from its begin to its end. Recomputations in backward are left out."""

    def __init__(self, layer: MoE) -> None:
        self._watch = _Stopwatch()
        self._handles = [
            layer.experts.register_forward_pre_hook(self._begin, prepend=True),  # before all that others add
            layer.experts.register_forward_hook(self._end),
        ]

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def _begin(self, module: nn.Module, args: tuple[Tensor, RaggedPlan]) -> None:
        if not inside_backward():
            self._watch.begin(args[0].device, _num_rows(args[1]))

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def _end(self, module: nn.Module, args: tuple[Tensor, RaggedPlan], output: Tensor) -> None:
        self._watch.end(args[0].device)

    def take(self) -> list[Call]:
        """The calls that have ended since this was last asked."""
        return [call for _, call in self._watch.take()]

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


class ExpertClock:
    """A probe that times each expert of a layer. `take` has the calls by expert."""

    def __init__(self, layer: MoE) -> None:
        self._experts, self._watch = layer.experts, _Stopwatch()
        layer.experts.probes = (self, *layer.experts.probes)  # outermost: it sees all that others add

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def begin(self, expert: int, num_rows: int) -> None:
        """Start."""
        if not inside_backward():
            self._watch.begin(self._experts.device, num_rows)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # torch's
    def end(self, expert: int) -> None:
        """Stop."""
        self._watch.end(self._experts.device, expert)

    def take(self) -> dict[int, list[Call]]:
        """The calls since this was last asked, by expert."""
        calls: dict[int, list[Call]] = {}
        for expert, call in self._watch.take():
            calls.setdefault(expert, []).append(call)
        return calls

    def detach(self) -> None:
        """No longer a probe."""
        self._experts.probes = tuple(probe for probe in self._experts.probes if probe is not self)


class LatencyGuard:
    """Clocks and a breaker: a layer, or an expert, that is too slow is bypassed by its stand-in.

    granularity: "layer", or "expert", which computes experts one by one to time them (a GPU then waits for the host in
    every forward); while an expert is half-open it gets all of its tokens. dense: the stand-ins of layers without
    shared experts. strict: a layer without a stand-in is an error; else it is left out, and named in `unguarded`.
    sinks: get each transition as an action of kind "breaker", for the alert that `findings` leads to. clock: of the
    breaker's waits, in seconds.
    It sets a layer's `bypass`, which is no part of its mode: repairs may come and go meanwhile. `step` is called by the
    loop between forwards.
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
        if not layers:
            raise ValueError("LatencyGuard.layers: expected at least one layer, got none")
        self.unguarded = tuple(bare)
        self._layers = {name: layer for name, layer in layers.items() if name not in bare}
        groups = [
            (name, expert)
            for name, layer in self._layers.items()
            for expert in (range(layer.num_experts) if granularity == "expert" else (None,))
        ]
        self._group_of = {name if expert is None else f"{name}/{expert}": (name, expert) for name, expert in groups}
        self.breaker = Breaker(list(self._group_of), config, granularity=granularity, clock=clock)
        make: type[LayerClock] | type[ExpertClock] = ExpertClock if granularity == "expert" else LayerClock
        self._clocks = {name: make(layer) for name, layer in self._layers.items()}
        self._opened: dict[str, Transition] = {}  # of groups that are not closed, why

    def step(self, step: int) -> list[Action]:
        """Feed the breaker with the calls since the last time, and act on what changed."""
        if not self._clocks:  # detached
            return []
        calls = self._taken()
        moved: list[Transition] = []
        for turn in range(max(map(len, calls.values()), default=0)):  # the first calls of all groups, then the second
            seconds_G, sizes_G = np.full(len(self._group_of), np.nan), np.zeros(len(self._group_of))
            for group, each in calls.items():
                if turn < len(each):
                    seconds_G[group], sizes_G[group] = each[turn].seconds, each[turn].size
            moved += self.breaker.record(seconds_G, sizes_G)
        moved += self.breaker.tick()
        self._opened |= {change.name: change for change in moved if change.after == "open"}
        for change in moved:
            if change.after == "closed":
                self._opened.pop(change.name, None)
        self._keep_away(self._group_of[each.name][0] for each in moved)
        return [self._tell(step, each) for each in moved]

    def _taken(self) -> dict[int, list[Call]]:
        """By number of the group; groups without a call are left out."""
        calls: dict[int, list[Call]] = {}
        first = 0
        for name, clock in self._clocks.items():
            taken = clock.take()
            calls |= {first: taken} if isinstance(taken, list) else {first + e: each for e, each in taken.items()}
            first += 1 if self.granularity == "layer" else self._layers[name].num_experts
        return calls

    def states(self) -> dict[str, State]:
        """By layer, or by "layer/expert"."""
        return self.breaker.states

    def times(self) -> dict[str, tuple[float, float]]:
        """(p50, p99) of the calls in the window, in seconds, by layer or by "layer/expert"; those without are left out.

        Of a group that gets no calls any more, those that opened its breaker.
        """
        breaker = self.breaker
        measured = zip(breaker.names, breaker.p50_s.tolist(), breaker.p99_s.tolist(), strict=True)
        times = {name: (half, most) for name, half, most in measured if most == most}  # NaN: no calls
        return {name: (each.p50_s, each.p99_s) for name, each in self._opened.items()} | times

    def findings(self) -> list[Finding]:
        """Who is too slow: whoever the breaker has not closed, and whose p99 is more than what is always too slow.

        The slowest first: an alert names one expert of a layer.
        """
        p99_s, slow_s = self.breaker.p99_s, self.breaker.config.slow_s
        always = np.flatnonzero(self.breaker.has_opinion & (p99_s > slow_s))
        limits = {self.breaker.names[group]: (float(p99_s[group]), slow_s) for group in always}
        limits |= {name: (each.p99_s, each.limit_s) for name, each in self._opened.items()}
        slowest_first = sorted(limits.items(), key=lambda item: -item[1][0])
        return [self._finding(name, p99_s, limit_s) for name, (p99_s, limit_s) in slowest_first]

    def _finding(self, group: str, p99_s: float, limit_s: float) -> Finding:
        layer, expert = self._group_of[group]
        who = "its experts take" if expert is None else f"expert {expert} takes"
        kept = f"; its breaker is {self.breaker.states[group]}" if group in self._opened else ""
        message = f"{layer}: {who} {1000 * p99_s:.3g} ms (p99), more than {1000 * limit_s:.3g} ms is too slow{kept}"
        remedy = "Look at the device that computes it, and at its load. The breaker tries it again by itself."
        return Finding(EXPERT_SLOW, layer, expert, "warning", 1000 * p99_s, 1000 * limit_s, message, remedy)

    def _tell(self, step: int, moved: Transition) -> Action:
        name, _ = self._group_of[moved.name]
        slow = round(moved.slow_share * moved.num_calls)
        why = f"{slow} of {moved.num_calls} calls were too slow" if moved.num_calls else "the wait is over"
        note = f"{moved.name}: {moved.before} -> {moved.after}; {why}"
        numbers = {"slow_share": moved.slow_share, "limit_ms": 1000 * moved.limit_s, "p99_ms": 1000 * moved.p99_s}
        detail = {key: value for key, value in numbers.items() if not np.isnan(value)}
        action = Action("breaker", name, step, f"{name}:{EXPERT_SLOW}", detail, "applied", note)
        for sink in self._sinks:
            sink.action(action)
        return action

    def _keep_away(self, names: Iterable[str]) -> None:
        """Put the breaker's states into the layers' bypasses. An expert that is half-open gets all of its tokens."""
        states = self.breaker.states
        shares = dict(zip(self.breaker.names, self.breaker.dense_share_G.tolist(), strict=True))
        for name in dict.fromkeys(names):
            layer, dense = self._layers[name], self._dense.get(name)
            if self.granularity == "layer":
                layer.set_bypass(replace(layer.bypass, dense_share=shares[name], dense=dense))
            else:
                shut = tuple(e for e in range(layer.num_experts) if states[f"{name}/{e}"] == "open")
                layer.set_bypass(replace(layer.bypass, shut_experts=shut, dense=dense))

    def detach(self) -> None:
        """Remove the clocks, and let tokens reach the experts from which this guard keeps them."""
        for name, clock in self._clocks.items():
            clock.detach()
            free = {"dense_share": 0.0} if self.granularity == "layer" else {"shut_experts": ()}
            self._layers[name].set_bypass(replace(self._layers[name].bypass, **free))
        self._clocks.clear()


def _num_rows(plan: RaggedPlan) -> int | Tensor:
    """What is computed. On a GPU, where rows may be dropped, a number that is there when later events have passed."""
    if not plan.may_drop:
        return len(plan.token_ids_R)
    total = plan.counts_e.sum()
    return total.to("cpu", non_blocking=True) if total.is_cuda else int(total)


def _event(device: torch.device) -> Any:
    """Passes when the device comes to it. On that device's stream: the model may be spread over several."""
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's
    event.record(torch.cuda.current_stream(device))
    return event
