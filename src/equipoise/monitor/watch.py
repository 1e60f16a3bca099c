"""Keep an eye on a model: record, judge, alert, tell. One object that a loop calls once per step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from equipoise.monitor.alerts import AlertBook
from equipoise.monitor.detectors import CollapseDetector, layers_without_opinion
from equipoise.monitor.recorder import Recorder
from equipoise.types import Alert, Detector, RoutingStats, Sink


class Watch:
    """Watches the routers of a model from outside; the model's outputs stay bit-identical.

    every: steps per window. A window is judged when it is complete.
    detectors: pure functions from a window to findings. sinks: get each window and each change of an alert.
    reduce: sums a tensor over data-parallel ranks in place; None on one rank.
    Use it as a context manager, or call `detach` when done.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int = 50,
        detectors: Sequence[Detector] = (CollapseDetector(),),
        sinks: Sequence[Sink] = (),
        reduce: Callable[[Tensor], None] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"every: expected at least 1 step per window, got {every}")
        self.recorder = Recorder(model, reduce)
        self._every = every
        self._detectors = tuple(detectors)
        self._sinks = tuple(sinks)
        self._book = AlertBook()
        self._window: list[RoutingStats] = []

    def step(self, step: int) -> list[Alert]:
        """Call after each optimizer step, numbered from 1. Returns the alerts that fired or were resolved now."""
        return self.flush(step) if step % self._every == 0 else []

    def flush(self, step: int) -> list[Alert]:
        """Close the window now, whatever its length."""
        self._window = self.recorder.flush(step)
        findings = [finding for detector in self._detectors for finding in detector(self._window)]
        changed = self._book.observe(step, findings, unjudged=layers_without_opinion(self._window))
        for sink in self._sinks:
            sink.routing(self._window)
            for alert in changed:
                sink.alert(alert)
        return changed

    def stats(self) -> list[RoutingStats]:
        """The last complete window, a record per layer; empty before the first."""
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
    detectors: Sequence[Detector] = (CollapseDetector(),),
    sinks: Sequence[Sink] = (),
) -> Watch:
    """Attach to every MoE layer of the model. See `Watch`.

    Raises ValueError when the model has no layer that can be watched.
    """
    return Watch(model, every=every, detectors=detectors, sinks=sinks)
