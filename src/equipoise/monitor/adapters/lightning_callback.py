"""A callback for the `Trainer` of Lightning that closes a watch's windows after optimizer steps.

The watch counts what `training_step` puts through the model, and nothing of validation and the sanity check before it.
It decides nothing about alerts: that is for the watch's sinks, or for `on_alert`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from equipoise.monitor.adapters.counting import Counting
from equipoise.monitor.watch import Watch
from equipoise.types import Alert


def lightning_callback(watch: Watch, on_alert: Callable[[Alert], None] | None = None) -> Any:
    """A callback for `Trainer(callbacks=[...])` that calls `watch.step` after each optimizer step.

    on_alert: gets each alert when it fires and when it is resolved. Between batches, where validation is, the watch is
    paused; it counts again when the fit ends, or fails. On several ranks, give the watch a `reduce`.
    Raises ModuleNotFoundError without lightning.
    """
    counting = Counting(watch, on_alert)

    class WatchCallback(_callback_class()):  # type: ignore[misc]  # a class of a library that need not be there
        """Training forwards happen between on_train_batch_start and on_train_batch_end, all others outside."""

        stepped = 0

        def on_fit_start(self, trainer: Any, module: Any) -> None:
            """Nothing before the first batch counts."""
            self.stepped = trainer.global_step
            counting.stop()

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            """A micro-batch comes next."""
            counting.start()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            """The optimizer has stepped, or gradients are still accumulated."""
            counting.stop()
            if trainer.global_step > self.stepped:
                self.stepped = trainer.global_step
                counting.step(self.stepped)

        def on_fit_end(self, trainer: Any, module: Any) -> None:
            """Leave the watch as it was."""
            counting.start()

        def on_exception(self, trainer: Any, module: Any, exception: BaseException) -> None:
            """Leave the watch as it was."""
            counting.start()

    return WatchCallback()


def _callback_class() -> Any:
    """Of the package under either of its names."""
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return import_module(name).Callback
        except ImportError:
            continue
    raise ModuleNotFoundError(
        "lightning_callback: expected lightning to be installed, got none; pip install 'equipoise[lightning]'"
    )
