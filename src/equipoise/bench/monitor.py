"""What watching costs: steps with and without an attached Watch, a flush of a large model, and the window's memory.

Two figures for a step. The ratio of whole steps includes every side effect, but drowns in
the noise of the steps; the share is the time inside the recording hooks and the flush, taken directly.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import nn

from equipoise.bench.harness import Effort, Spread, Variant, ratio, spread, time_side_by_side
from equipoise.bench.problem import LeftOutError, Shape
from equipoise.bench.report import Cell, Table
from equipoise.bench.workloads import (
    Workload,
    decode_workload,
    layer_workload,
    recipe_workload,
    transformers_workloads,
)
from equipoise.monitor.recorder import Recorder
from equipoise.monitor.watch import Watch, watch
from equipoise.monitor.window import TimeWindow
from equipoise.train.config import TrainConfig
from equipoise.types import Routed, RoutingDecision

# ---------------------------------------------------------------------------------------------- the two figures


def side_by_side(work: Workload, every: int, effort: Effort) -> tuple[Spread, Spread]:
    """(seconds of an unwatched step, watched / unwatched). A round is one window of each; attaching is on the clock."""

    def unwatched() -> None:
        for _ in range(every):
            work.step()

    def watched() -> None:
        with watch(work.model, every=every) as eye:
            for number in range(1, every + 1):
                work.step()
                eye.step(number)

    # A step off the clock before each, so that none of the two has to warm the caches for the other.
    variants = [Variant("unwatched", unwatched, work.step), Variant("watched", watched, work.step)]
    seconds = time_side_by_side(variants, effort)
    return spread(seconds["unwatched"]).times(1 / every), ratio(seconds, "watched", "unwatched")


@dataclass(frozen=True)
class Window:
    """Seconds of one window: inside the recording hooks, in the flush, and in all."""

    recording: float
    flush: float
    total: float


def timed_window(work: Workload, every: int) -> Window:
    """Watch one window with a clock around the hooks: ours are registered before the recorder's, or after them."""
    starts: list[float] = []
    spans: list[float] = []

    def start(*args: object) -> None:
        starts.append(time.perf_counter())

    def stop(*args: object) -> None:
        spans.append(time.perf_counter() - starts[-1])

    handles = [module.register_forward_pre_hook(start) for module in (*work.after, *work.before)]
    work.step()
    starts.clear()
    with watch(work.model, every=every) as eye:
        handles += [module.register_forward_hook(stop) for module in work.after]
        handles += [module.register_forward_pre_hook(stop) for module in work.before]
        begin = time.perf_counter()
        for _ in range(every):
            work.step()
        before_flush = time.perf_counter()
        eye.flush(every)
        end = time.perf_counter()
    for handle in handles:
        handle.remove()
    return Window(sum(spans), end - before_flush, end - begin)


def row(work: Workload, every: int, effort: Effort) -> tuple[Cell, ...]:
    """One line of the table."""
    effort.progress.begin(f"{work.name}: steps side by side")
    step, watched = side_by_side(work, every, effort)
    effort.progress.begin(f"{work.name}: inside the hooks")
    windows = [timed_window(work, every) for _ in range(effort.rounds)]
    return (
        work.name,
        step.times(1e3),
        watched,
        spread([1e3 * window.recording / every for window in windows]),
        spread([1e3 * window.flush / every for window in windows]),
        spread([100 * (window.recording + window.flush) / window.total for window in windows]),
    )


# ------------------------------------------------------------------------------------------ a flush, and the window


@dataclass(frozen=True)
class Size:
    """A model, as the monitor sees it."""

    num_layers: int
    num_experts: int
    top_k: int = 8


class Layer(nn.Module):
    """An observable layer that computes nothing."""

    loss_names = ("switch", "z")

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.tap: nn.Module = nn.Identity()
        self.num_experts = num_experts


def feed(model: nn.ModuleList, size: Size, num_tokens: int) -> None:
    """Every layer routes the same random tokens."""
    logits_TE = torch.randn(num_tokens, size.num_experts)
    probs_TE = logits_TE.softmax(-1)
    weights_TK, ids_TK = probs_TE.topk(size.top_k)
    decision = RoutingDecision.from_topk(ids_TK, weights_TK, probs_TE=probs_TE, logits_TE=logits_TE)
    for layer in model:
        layer.get_submodule("tap")(Routed(decision, SimpleNamespace(drops={}, counts_e=None), {}))


def flush_of(size: Size, num_tokens: int, spans: int) -> Variant:
    """A flush of a watch whose window is full. num_tokens: of each; with too few, rules look at earlier ones too."""
    model = nn.ModuleList(Layer(size.num_experts) for _ in range(size.num_layers))
    eye = Watch(model, every=1)
    for step in range(1, spans + 1):
        feed(model, size, num_tokens)
        eye.flush(step)
    enough = num_tokens * size.top_k >= 100 * size.num_experts
    name = f"{num_tokens} tokens, {'enough' if enough else 'too few'} for an opinion"
    return Variant(name, lambda: eye.flush(spans + 1), lambda: feed(model, size, num_tokens))


def window_memory(size: Size) -> tuple[float, float]:
    """MiB of a full window: allocated as seen by tracemalloc, and by the formula of its docstring."""
    model = nn.ModuleList(Layer(size.num_experts) for _ in range(size.num_layers))
    recorder, window = Recorder(model), TimeWindow(float("inf"))
    feed(model, size, 64)
    tracemalloc.start()
    for now in range(window.max_spans):
        window.add(float(now), recorder.flush_sums())
    measured = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    formula = window.max_spans * size.num_layers * size.num_experts * 16
    return measured / 2**20, formula / 2**20


def flush_table(size: Size, token_counts: Sequence[int], spans: int, effort: Effort) -> Table:
    """Milliseconds of a flush, and the window's memory."""
    effort.progress.begin(f"flush of {size.num_layers} layers of {size.num_experts} experts")
    variants = [flush_of(size, num_tokens, spans) for num_tokens in token_counts]
    seconds = time_side_by_side(variants, effort)
    measured, formula = window_memory(size)
    rows = tuple((variant.name, spread(seconds[variant.name]).times(1e3)) for variant in variants)
    note = f"The window holds {spans} flushes. Full, it takes {measured:.1f} MiB; by its formula {formula:.1f} MiB."
    return Table(f"Watch.flush, {size.num_layers} x {size.num_experts} experts", ("flush of", "time [ms]"), rows, note)


COLUMNS = (
    "step of",
    "unwatched [ms]",
    "watched / unwatched",
    "recording [ms per step]",
    "flush [ms per step]",
    "share of the step [%]",
)


@dataclass(frozen=True)
class Sizes:
    """What is watched. their_batch: sequences and tokens. new: tokens that are decoded. spans: flushes in a window."""

    config: TrainConfig
    shape: Shape
    num_tokens: int
    theirs: Shape
    num_layers: int
    their_batch: tuple[int, int]
    new: int
    flush: Size
    token_counts: tuple[int, ...]
    spans: int


def measure(sizes: Sizes, every: int, effort: Effort, only: tuple[str, ...] = ()) -> Iterator[Table | str]:
    """The cost of watching each step, then of a flush. every: steps per window."""
    works = [
        recipe_workload(sizes.config),
        decode_workload(sizes.config, sizes.their_batch[0], sizes.new),
        layer_workload(sizes.shape, sizes.num_tokens),
    ]
    try:
        works += transformers_workloads(sizes.theirs, sizes.num_layers, sizes.their_batch, sizes.new)
    except LeftOutError as reason:
        yield f"{reason}."
    rows: list[tuple[Cell, ...]] = []
    works = [work for work in works if not only or any(part in work.name for part in only)]
    note = f"A window is {every} steps; one flush and one judgement by the detectors per window. Aim: a share of 1 %."
    for work in works:
        try:
            rows.append(row(work, every, effort))
        except KeyboardInterrupt:
            if not rows or not effort.progress.stop():
                raise
            break
    yield Table("The cost of watching", COLUMNS, tuple(rows), note)
    if not only and not effort.progress.stopped:
        yield flush_table(sizes.flush, sizes.token_counts, sizes.spans, effort)
