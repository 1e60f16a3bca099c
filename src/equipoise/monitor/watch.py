"""Keep an eye on a model: record, judge, alert, tell. One object that a loop calls once per step."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from equipoise.monitor.alerts import AlertBook
from equipoise.monitor.baseline import Baseline
from equipoise.monitor.detectors import MIN_EXPECTED, layers_without_opinion
from equipoise.monitor.profiles import Profile, rules_of
from equipoise.monitor.recorder import Recorder, observable_layers
from equipoise.monitor.stats import RoutingSums, all_routing_stats
from equipoise.monitor.window import TimeWindow
from equipoise.types import Alert, CoSelection, CoSelectionSink, Detector, Finding, RoutingStats, Sink

# (findings of a flush, alerts that fire, layers without an opinion) -> those of the findings that count
Sift = Callable[[Sequence[Finding], Sequence[Alert], Collection[str]], Sequence[Finding]]


class Watch:
    """Watches the routers of a model from outside; the model's outputs stay bit-identical.

    every: steps per flush. What is judged after a flush are its tokens; where they are too few for an opinion, as when
    single tokens are decoded, those of the flushes before it too, as far back as it takes, at most window_s seconds.
    profile: which rules judge: "relative" or "absolute" (see `rules_of`), which judges the whole window; None for none.
    rules: more rules, pure functions from a window to findings. `use_baselines` says what is normal.
    sinks: get each flush and each change of an alert, in the loop: the error of one is raised after all have been told.
    Behind a `Background` a sink may hang or raise as it likes, the loop does not notice.
    reduce: sums a tensor over data-parallel ranks in place, once per flush: torch.distributed.all_reduce, with a group
    partial(all_reduce, group=...). Each rank then sees the whole batch, and each must flush at the same steps: give the
    sinks to one of them. None counts this rank alone. clock: seconds.
    A model that routes nothing has nothing to say; `watch` refuses it.
    Use it as a context manager, or call `detach` when done.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 50,
        window_s: float = 600.0,
        profile: Profile | None = "relative",
        rules: Sequence[Detector] = (),
        sinks: Sequence[Sink] = (),
        reduce: Callable[[Tensor], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if every < 1:
            raise ValueError(f"every: expected at least 1 step per flush, got {every}")
        self._profile, self._rules = profile, tuple(rules)
        self._detectors = (rules_of(profile) if profile else ()) + self._rules
        self._literal = profile == "absolute"
        self._span, self._clock = TimeWindow(window_s), clock
        self._layers = tuple(observable_layers(model, required=False))
        self.recorder = Recorder(model, reduce, required=False)
        self._every = every
        self._sinks = tuple(sinks)
        self._book = AlertBook()
        self._sift: Sift | None = None
        self._window: list[RoutingStats] = []

    def step(self, step: int) -> list[Alert]:
        """Call after each optimizer step, numbered from 1. Returns the alerts that fired or were resolved now."""
        return self.flush(step) if self.is_due(step) else []

    def is_due(self, step: int) -> bool:
        """Whether `step` flushes after this step."""
        return step % self._every == 0

    def flush(self, step: int) -> list[Alert]:
        """Flush now, whatever has been seen since the last time."""
        sums = self.recorder.flush_sums(step)
        self._window = all_routing_stats(step, sums)
        judged = self._judged(step, sums)
        findings = [
            finding
            for detector in self._detectors
            for finding in detector(self._window if getattr(detector, "per_flush", False) else judged)
        ]
        unjudged = set() if self._literal else layers_without_opinion(judged)
        if self._sift is not None:
            findings = list(self._sift(findings, self._book.firing, unjudged))
        changed = self._book.observe(step, findings, unjudged=unjudged)
        self._tell(changed)
        return changed

    def _tell(self, changed: Sequence[Alert]) -> None:
        """Hand window and alerts to all sinks; one that raises keeps them from none of the others."""
        failed: list[Exception] = []
        for sink in self._sinks:
            try:
                sink.routing(self._window)
                for alert in changed:
                    sink.alert(alert)
                if self.recorder.co_selection and isinstance(sink, CoSelectionSink):
                    sink.co_selection(self.recorder.co_selection)
            except Exception as error:
                failed.append(error)
        if failed:
            raise failed[0]

    def _judged(self, step: int, sums: Mapping[str, RoutingSums]) -> list[RoutingStats]:
        """What the rules look at: per layer this flush, or as many more as are needed."""
        self._span.add(self._clock(), sums)
        seen = self._span.whole() if self._literal else self._span.recent(MIN_EXPECTED)
        records = {stats.layer: stats for stats in self._window}
        longer = {layer: seen[layer] for layer, each in sums.items() if seen[layer] is not each}
        records |= {stats.layer: stats for stats in all_routing_stats(step, longer)}
        return list(records.values())

    def use_baselines(self, baselines: Mapping[str, Baseline] | None, *, learning: bool = False) -> None:
        """Compare with these layers in health from the next flush on, as `KnownGood(run).latest().baselines` has them.

        Takes the place of those before; None compares with nothing. Alerts go on. learning: see `rules_of`. May be
        called by another thread than the one that flushes.
        Raises ValueError when none of them is about a layer of this model, or no profile is there to use them.
        """
        if baselines and self._profile is None:
            raise ValueError(
                "baselines: expected a profile whose rules compare, got profile=None; give your own rules theirs"
            )
        if baselines and not set(baselines) & set(self._layers):
            raise ValueError(
                f"baselines: expected layers of this model, such as {self._layers[0]}, got {', '.join(baselines)}"
                "; record them on this model, or rename them"
            )
        self._detectors = (rules_of(self._profile, baselines, learning=learning) if self._profile else ()) + self._rules

    def sift(self, by: Sift) -> None:
        """From the next flush on, only what `by` leaves of the findings can become, or end, an alert."""
        self._sift = by

    def co_select(self, tokens: int = 256) -> None:
        """From now on, also count which experts at most so many tokens of each forward choose together, in every layer.

        Sinks that are a `CoSelectionSink`, as the run store, get it with each flush. It takes 8 E^2 bytes per layer.
        Raises ValueError below 1.
        """
        self.recorder.co_select(tokens)

    def co_selection(self) -> list[CoSelection]:
        """Of the last flush, a record per layer; empty where `co_select` was not called."""
        return list(self.recorder.co_selection)

    def stats(self) -> list[RoutingStats]:
        """The last flush, a record per layer; empty before the first."""
        return list(self._window)

    @property
    def alerts(self) -> list[Alert]:
        """The alerts that are firing."""
        return self._book.firing

    def state_dict(self) -> dict[str, Any]:
        """The alerts, JSON-able. The open window is in `recorder.state_dict`."""
        return self._book.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._book.load_state_dict(state)

    def detach(self) -> None:
        """Leave the model as it was."""
        self.recorder.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def watch(
    model: nn.Module,
    *,
    every: int = 50,
    window_s: float = 600.0,
    profile: Profile | None = "relative",
    rules: Sequence[Detector] = (),
    sinks: Sequence[Sink] = (),
    baselines: Mapping[str, Baseline] | None = None,
    reduce: Callable[[Tensor], object] | None = None,
) -> Watch:
    """Attach to every MoE layer of the model, before or after it is wrapped for data parallelism.

    See `Watch`, and `Watch.use_baselines` for what baselines are.

    Raises ValueError when the model has no layer that can be watched, and for baselines of another one.
    """
    observable_layers(model)
    watching = Watch(model, every=every, window_s=window_s, profile=profile, rules=rules, sinks=sinks, reduce=reduce)
    try:
        watching.use_baselines(baselines)
    except ValueError:
        watching.detach()
        raise
    return watching
