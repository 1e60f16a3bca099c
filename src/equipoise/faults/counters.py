"""A fault of the monitor itself: its counters stand still, or forget. The model is not touched."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import torch

from equipoise.faults.injection import Change, Injection
from equipoise.monitor.recorder import Recorder
from equipoise.monitor.watch import Watch


@dataclass(frozen=True)
class StaleCounters:
    """The monitor's recorder no longer counts ("stale"), or forgets what it has counted ("reset").

    Imitates hooks that were lost in a reload, and counters that start again from zero. reset: forgets now, and again at
    each `advance`. Taken out: it counts again from then on; what was not counted, or was forgotten, stays unknown.
    """

    mode: Literal["stale", "reset"] = "stale"

    def __post_init__(self) -> None:
        if self.mode not in ("stale", "reset"):
            raise ValueError(f"StaleCounters.mode: expected stale or reset, got {self.mode!r}")


def inject_counters(monitor: Recorder | Watch, fault: StaleCounters) -> Injection:
    """Put the fault into a recorder, or into that of a watch. Not inside `recorder.paused()`, which would end it."""
    recorder = monitor.recorder if isinstance(monitor, Watch) else monitor
    if fault.mode == "reset":
        _forget(recorder)
        return Injection(fault, Change(advance=lambda: _forget(recorder)))
    pause = recorder.paused()
    pause.__enter__()
    return Injection(fault, Change(lambda: _end(pause)))


def _end(pause: AbstractContextManager[None]) -> None:
    pause.__exit__(None, None, None)


def _forget(recorder: Recorder) -> None:
    recorder.load_state_dict({name: torch.zeros_like(x) for name, x in recorder.state_dict().items()})
