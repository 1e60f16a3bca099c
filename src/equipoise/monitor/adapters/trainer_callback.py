"""A callback for the `Trainer` of transformers that closes a watch's windows after optimizer steps.

The watch counts what the Trainer trains on, and nothing of its evaluations. It decides nothing about alerts: that is
for the watch's sinks, or for `on_alert`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from equipoise.monitor.adapters.counting import Counting
from equipoise.monitor.watch import Watch
from equipoise.types import Alert

if TYPE_CHECKING:
    from transformers import TrainerCallback


def trainer_callback(watch: Watch, on_alert: Callable[[Alert], None] | None = None) -> TrainerCallback:
    """A callback for `Trainer(callbacks=[...])` that calls `watch.step` after each optimizer step.

    on_alert: gets each alert when it fires and when it is resolved. Between optimizer steps, where evaluations are, the
    watch is paused; it counts again when training ends. On several ranks, give the `Watch` a `reduce`.
    Raises ModuleNotFoundError without transformers.
    """
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ModuleNotFoundError(
            "trainer_callback: expected transformers to be installed, got none; pip install 'equipoise[hf]'"
        ) from error
    counting = Counting(watch, on_alert)

    class WatchCallback(TrainerCallback):
        """Training forwards happen between on_step_begin and on_step_end, all others outside."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Nothing before the first step counts."""
            counting.stop()

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """The first micro-batch of a step comes next."""
            counting.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """The optimizer has stepped."""
            counting.stop()
            counting.step(state.global_step)

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Leave the watch as it was."""
            counting.start()

    return WatchCallback()
