"""Four ways to count who chose whom in a model: plain loops, equipoise, moewatch and plumb, for `benchmarks.monitors`.

Each watcher of somebody else's is used as its documentation says, and once more with what it can be told besides.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from benchmarks.monitors_worlds import World
from equipoise.monitor.watch import watch


@dataclass(frozen=True)
class Seen:
    """What a monitor says of one run.

    layers, experts: how many it found, experts of all layers together. tokens: that it says to have seen in a layer;
    None where it does not say. counts: choices per layer and expert. dead: "layer:expert", None where it does not look.
    """

    layers: int
    experts: int
    tokens: int | None
    counts: tuple[tuple[int, ...], ...]
    dead: tuple[str, ...] | None
    verdict: str

    @property
    def choices(self) -> int:
        """Counted, in all layers together."""
        return sum(map(sum, self.counts))

    @property
    def busiest(self) -> float:
        """The largest share of a layer's choices that one expert has; 0 without any."""
        return max((max(layer) / sum(layer) for layer in self.counts if sum(layer)), default=0.0)

    def differs(self, truth: Seen) -> tuple[str, ...]:
        """What of it is not so."""
        mine: dict[str, tuple[Any, Any]] = {
            "layers": (self.layers, truth.layers),
            "experts": (self.experts, truth.experts),
            "tokens": (truth.tokens if self.tokens is None else self.tokens, truth.tokens),
            "counts": tuple(tuple(map(_without_tail, seen.counts)) for seen in (self, truth)),
            "dead": (truth.dead if self.dead is None else self.dead, truth.dead),
        }
        return tuple(name for name, (said, so) in mine.items() if said != so)


def _without_tail(counts: tuple[int, ...]) -> tuple[int, ...]:
    """Without the zeros at the end: that an expert is not found is said by the number of experts."""
    length = max((number for number, count in enumerate(counts, start=1) if count), default=0)
    return counts[:length]


class MissingMonitorError(RuntimeError):
    """A monitor that was asked for is not installed."""


def required(module: str, distribution: str) -> ModuleType:
    """The module, or a MissingMonitorError that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingMonitorError(
            f"{distribution}: expected to be installed, got {error}; in an environment of its own: "
            f"pip install {distribution}==0.1.0, or leave it out with --monitors"
        ) from error


# ---------------------------------------------------------------------------------------------------- plain loops


def brute_force(world: World) -> Seen:
    """From each router's logits, token by token, in Python: the K largest, plus one to each. No tensor operations.

    It has to agree with the indices that the routers return. Dead is who was never chosen.
    """
    found: dict[str, list[int]] = {}
    handles = []

    def count(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: tuple[Tensor, ...]) -> None:
            logits, chosen = output[0].tolist(), output[2].tolist()
            counts = found.setdefault(name, [0] * len(logits[0]))
            for row, ids in zip(logits, chosen, strict=True):
                mine = sorted(range(len(row)), key=row.__getitem__, reverse=True)[: world.top_k]
                if set(mine) != set(ids):
                    raise ValueError(f"{name}: expected {sorted(ids)}, as the router chose, got {mine} from its logits")
                for expert in mine:
                    counts[expert] += 1

        return hook

    for name, router in world.routers().items():
        handles.append(router.register_forward_hook(count(name)))
    for _ in world.run():
        pass
    for handle in handles:
        handle.remove()
    counts = tuple(map(tuple, found.values()))
    dead = tuple(f"{n}:{e}" for n, layer in enumerate(counts) for e, value in enumerate(layer) if value == 0)
    return Seen(len(counts), sum(map(len, counts)), world.num_tokens, counts, dead, "-")


# ------------------------------------------------------------------------------------------------------ the monitors


def equipoise(world: World) -> Seen:
    """As in docs/watching.md, with a flush in the middle and one at the end: an alert takes two windows."""
    totals: dict[str, list[int]] = {}
    tokens: dict[str, int] = {}
    with watch(world.model, every=max(1, len(world.batches) // 2)) as eye:
        for step, _ in enumerate(world.run(), start=1):
            eye.step(step)
            if eye.is_due(step):
                _add(eye.stats(), totals, tokens)
        if len(world.batches) % max(1, len(world.batches) // 2):
            eye.flush(len(world.batches))
            _add(eye.stats(), totals, tokens)
        last, alerts = eye.stats(), eye.alerts
    dead = tuple(f"{n}:{e}" for n, stats in enumerate(last) for e in stats.dead_experts)
    rules = sorted({alert.key.rpartition(":")[2] for alert in alerts if alert.state == "firing"})
    counts = tuple(map(tuple, totals.values()))
    verdict = ", ".join(rules) or "healthy"
    return Seen(len(counts), sum(map(len, counts)), max(tokens.values(), default=0), counts, dead, verdict)


def _add(window: Any, totals: dict[str, list[int]], tokens: dict[str, int]) -> None:
    for stats in window:
        before = totals.get(stats.layer, [0] * stats.num_experts)
        totals[stats.layer] = [a + b for a, b in zip(before, stats.counts_E.tolist(), strict=True)]
        tokens[stats.layer] = tokens.get(stats.layer, 0) + stats.num_tokens


def moewatch(world: World, routers: tuple[str, ...] = ()) -> Seen:
    """`moewatch.audit`, with every forward sampled. routers: "specify router_modules explicitly", as its error says."""
    package = required("moewatch", "moewatch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sampling everything costs time
        config = package.WatchConfig(output="silent", sample_every=1, router_modules=list(routers))
        loader = [{"input_ids": batch} for batch in world.batches]
        try:
            report = package.audit(world.model, loader, steps=len(loader), config=config, verbose=False)
        except RuntimeError as error:
            return Seen(0, 0, 0, (), (), str(error).partition(".")[0])
    usage = report.utilization()
    counts = tuple(tuple(each.token_counts) for each in usage.values())
    order = {name: number for number, name in enumerate(report.layer_names())}
    dead = tuple(f"{order[each.layer_name]}:{each.expert_idx}" for each in report.dead_experts(include_cold=False))
    tokens = max((each.total_tokens for each in usage.values()), default=0)
    return Seen(report.n_layers, report.n_experts_total, tokens, counts, dead, report.overall_health.value)


def moewatch_told(world: World) -> Seen:
    """The same, told where the routers are."""
    return moewatch(world, tuple(world.routers()))


def plumb(world: World, window_size: int = 1000) -> Seen:
    """What `plumb.Session` is made of, with the right top_k; window_size is its default.

    Session itself also looks for the machine's topology, by a module that is in no package index (`plumb_session`).
    An expert that was never seen is in none of its numbers, so the number of experts is that of those seen.
    """
    hook, counter_module = required("plumb.hook", "plumb-moe"), required("plumb.counter", "plumb-moe")
    imbalance = required("plumb.analysis.imbalance", "plumb-moe")
    counter = counter_module.ActivationCounter(window_size=window_size)
    hooks = hook.ProfilingHooks(counter)
    layers = hooks.attach(world.model, top_k=world.top_k)
    for _ in world.run():
        pass
    hooks.detach()  # waits until everything is counted
    found = imbalance.compute_imbalance(counter)
    counts = tuple(tuple(each.expert_loads.get(e, 0) for e in range(max(each.expert_loads) + 1)) for each in found)
    worst = max((each.imbalance_ratio for each in found), default=None)
    verdict = "nothing recorded" if worst is None else f"max / mean {worst:.2f}"
    return Seen(layers, sum(len(each.expert_loads) for each in found), None, counts, None, verdict)


def plumb_wide(world: World) -> Seen:
    """The same with a window that nothing falls out of."""
    return plumb(world, window_size=10**8)


def plumb_session() -> str:
    """Whether the documented entry point can be imported."""
    try:
        required("plumb", "plumb-moe")
        importlib.import_module("plumb.session")
    except ImportError as error:
        return f"plumb.Session can't be imported ({error}): its hooks, counter and analysis are called one by one."
    return "plumb.Session can be imported; its hooks, counter and analysis are called one by one, as it does."


OBSERVERS: dict[str, Callable[[World], Seen]] = {
    "equipoise": equipoise,
    "moewatch": moewatch,
    "moewatch, told the routers": moewatch_told,
    "plumb": plumb,
    "plumb, wide window": plumb_wide,
}
DISTRIBUTIONS = {"moewatch": ("moewatch", "moewatch"), "plumb": ("plumb", "plumb-moe")}  # monitor: module, package


def versions(monitors: list[str]) -> dict[str, str]:
    """Of the packages behind these monitors. Raises MissingMonitorError before anything has been measured."""
    found = {}
    for monitor in monitors:
        if monitor in DISTRIBUTIONS:
            module, distribution = DISTRIBUTIONS[monitor]
            required(module, distribution)
            found[distribution] = version(distribution)
    return found
