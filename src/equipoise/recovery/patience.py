"""How patient a recovery is: when it gives a repair up, and when it tries again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Patience:
    """When to give up, and when to try again.

    trial_flushes: that a repair may take until its alert is resolved. relapse_steps: an alert that comes back within
    so many steps goes on from the rung that did not last. cool_down: flushes of rest after a trial, so that its effect
    is seen before anything else is changed. warning_flushes: a warning is only repaired when it has been firing for so
    many flushes, as it may go away by itself; what is critical is repaired at once. tolerance: how much the held-out
    loss may rise, in nats per token; None takes each repair's own. lift_after: flushes in health after which a repair
    that was kept is lifted on trial (`lifting.py`); None never does.
    """

    trial_flushes: int = 6
    relapse_steps: int = 200
    cool_down: int = 2
    warning_flushes: int = 10
    tolerance: float | None = None
    lift_after: int | None = None

    def __post_init__(self) -> None:
        if min(self.trial_flushes, self.warning_flushes) < 1 or min(self.relapse_steps, self.cool_down) < 0:
            raise ValueError(
                f"Patience: expected trial_flushes, warning_flushes >= 1 and relapse_steps, cool_down >= 0, got {self}"
            )
        if self.lift_after is not None and self.lift_after < 1:
            raise ValueError(
                f"Patience.lift_after: expected at least 1 flush, or None for never, got {self.lift_after}"
            )
