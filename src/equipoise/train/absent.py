"""What takes the place of the store, the repairs and a fine-tuning's choices where a process or a run has none.

A run with FSDP2 is watched, and its alerts are told; it does not repair itself, which needs whole routers. All but the
main rank keep no records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from equipoise.models.decoder import Decoder
from equipoise.monitor.baseline import Baseline
from equipoise.monitor.recorder import Recorder
from equipoise.recovery.recovery import STATE_VERSION
from equipoise.train.config import OptimConfig
from equipoise.train.optim import build_optimizer
from equipoise.types import Action, Alert, Detector, RoutingStats

_NOTHING = {"version": STATE_VERSION, "modes": {}, "cases": {}, "trial": None, "rest": 0}


class NoStore:
    """A store that keeps nothing."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Forgotten."""

    def routing(self, window: Sequence[RoutingStats]) -> None:
        """Forgotten."""

    def alert(self, alert: Alert) -> None:
        """Forgotten."""

    def action(self, action: Action) -> None:
        """Forgotten."""

    def set_meta(self, **values: Any) -> None:
        """Forgotten."""

    def truncate_after(self, step: int) -> None:
        """There is nothing."""

    def alerts(self) -> list[Alert]:
        """None."""
        return []

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Of nothing."""
        yield

    def close(self) -> None:
        """There is nothing to close."""


class NoRepairs:
    """Repairs of a run that makes none."""

    rate_scale = 1.0

    def after_flush(self, step: int, changed: Sequence[Alert]) -> list[Action]:
        """None."""
        return []

    def rescue(self, step: int) -> list[Action]:
        """Nothing helps."""
        return []

    def remember(self, step: int, checkpoint: Path) -> str | None:
        """No record is kept."""
        return None

    def forget_after(self, step: int) -> None:
        """There is no record."""

    def remembers(self, step: int) -> bool:
        """There is nothing to be made up for."""
        return True

    def protected(self) -> list[str]:
        """No checkpoint."""
        return []

    def detach(self) -> None:
        """Nothing was attached."""

    def state_dict(self) -> dict[str, Any]:
        """As of a run that never needed a repair."""
        return {"recovery": _NOTHING, "rate_scale": self.rate_scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError for a run with a repair in force: it would be lost."""
        if modes := state["recovery"]["modes"]:
            raise ValueError(
                f"a repair is in force in {', '.join(modes)}, which needs a run that repairs itself; resume without "
                "--parallel.shard, and go on with it when the repair has been lifted"
            )
        self.rate_scale = float(state["rate_scale"])


class NoTuning:
    """The tuning of a run that trains all of its weights from the first step, from fresh ones."""

    rules: tuple[Detector, ...] = ()
    baselines: Mapping[str, Baseline] | None = None

    def __init__(self, model: Decoder) -> None:
        self._model = model

    def parameters(self) -> list[nn.Parameter]:
        """All of them."""
        return list(self._model.parameters())

    def optimizer(self, config: OptimConfig) -> torch.optim.AdamW:
        """Over all of them."""
        return build_optimizer(self._model, config)

    def begin(self, step: int) -> None:
        """Nothing is frozen."""

    def pull(self) -> None:
        """The optimizer holds the model's parameters."""

    def push(self) -> None:
        """They are in place."""

    def compare(self, step: int, recorder: Recorder) -> dict[str, float]:
        """There is no base to compare with."""
        return {}

    def keep(self, out: Path) -> list[str]:
        """There is nothing to keep."""
        return []

    def saved(self, out: Path) -> None:
        """There is no adapter."""
