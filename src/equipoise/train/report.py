"""What a person sees of a run in the terminal: a live screen, or plain lines where there is no terminal."""

from __future__ import annotations

import math
import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live

from equipoise.monitor.incidents import told
from equipoise.monitor.store import RunStore
from equipoise.monitor.terminal import RunView, render, view_of
from equipoise.types import Action, Alert


class Reporter(Protocol):
    """Shows a run to a person."""

    def follow(self, store: RunStore) -> None:
        """Show what is in this store from now on."""
        ...

    def update(self) -> None:
        """Something in the store has changed."""
        ...

    def say(self, text: str) -> None:
        """One line about an event."""
        ...


class ConsoleReporter:
    """Draws the view of the run store at most every `interval` seconds. A context manager.

    With a terminal the screen is redrawn in place and lines scroll above it; without, one line per interval.
    """

    def __init__(self, console: Console, interval: float = 1.0) -> None:
        self._console = console
        self._interval = interval if console.is_terminal else 10 * interval
        self._live = (
            Live(console=console, auto_refresh=False, vertical_overflow="crop") if console.is_terminal else None
        )
        self._store: RunStore | None = None
        self._drawn = 0.0

    def follow(self, store: RunStore) -> None:
        """Draw this store from now on."""
        self._store = store

    def update(self) -> None:
        """Something in the store has changed; draws when the last drawing is old enough."""
        if self._store is None or time.monotonic() - self._drawn < self._interval:
            return
        view = view_of(self._store)
        if self._live is not None:
            self._live.update(render(view), refresh=True)
        elif view.step:
            self._console.print(progress_line(view), highlight=False)
        self._drawn = time.monotonic()

    def say(self, text: str) -> None:
        """A line about an event, at once."""
        self._console.print(text, highlight=False, markup=False)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()


class Silent:
    """Says nothing: for tests and for --json."""

    def follow(self, store: RunStore) -> None:
        """Nothing."""

    def update(self) -> None:
        """Nothing."""

    def say(self, text: str) -> None:
        """Nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing."""


def progress_line(view: RunView) -> str:
    """The view in one line: step, loss, speed, time left, the most uneven layer."""
    parts = [f"step {view.step}/{view.total_steps or '?'}"]
    if view.loss is not None:
        parts.append(f"loss {view.loss:.3f}")
    if view.tokens_per_s:
        parts.append(f"{view.tokens_per_s:,.0f} tokens/s")
    if view.seconds_left is not None:
        parts.append(f"{view.seconds_left:.0f} s left")
    if view.routing:
        worst = max(view.routing, key=lambda stats: stats.max_violation)
        parts.append(f"MaxVio {worst.max_violation:.2f} in {worst.layer}")
    return ", ".join(parts)


def sentence(change: Alert | Action) -> str:
    """An alert's or a repair's change, in one line."""
    if isinstance(change, Alert):
        if change.state == "firing":
            return f"firing: {change.finding.message}"
        return f"resolved: {change.key}, since step {change.since_step}"
    return f"repair {told(change)}"


def perplexity(loss: float) -> float:
    """exp(loss), for a loss in nats per token; infinite where it can't be held."""
    return math.exp(loss) if loss < 700 else math.inf
