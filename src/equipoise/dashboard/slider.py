"""The slider through a run's flushes, with marks where alerts fired and repairs were made.

A native range input: arrow keys, Page Up and Down, Home and End work as everywhere. Its value lives in the browser and
is set from here only when the page follows the newest flush, so that it does not jump under the hand.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Awaitable, Callable, Sequence

from equipoise.dashboard.widgets import button, el, set_class, set_prop, set_text
from equipoise.monitor.incidents import DONE, Incident

THROTTLE_SECONDS = 0.06
MAX_MARKS = 40


class Slider:
    """on_change is called with the step that was chosen, or None to follow the newest."""

    def __init__(self, on_change: Callable[[int | None], Awaitable[None]], label: str = "Step") -> None:
        self.on_change = on_change
        self.steps: tuple[int, ...] = ()
        self._marked: list[tuple[int, str]] = []
        self.follows = True
        self._sent = -1  # the place that the browser was last told
        with el("div", "slider"):
            with el("div", "slider-row"):
                self.label = el("output", "slider-label", "-")
                self.live = button("Follow newest", lambda: self._choose(None), "small-button", aria_pressed="true")
            with el("div", "slider-track"):
                self.marks = el("div", "slider-marks", aria_hidden="true")
                self.input = el("input", "", type="range", min="0", max="0", step="1", aria_label=label)
        self.input.on(
            "input",
            lambda e: self._slid(int(e.args)),
            js_handler="(e) => emit(Number(e.target.value))",
            throttle=THROTTLE_SECONDS,
        )

    def show(self, steps: Sequence[int], incidents: Sequence[Incident], step: int | None, follows: bool) -> None:
        """Take the flushes there are now. step: the one shown. follows: whether that is always the newest."""
        self.steps, self.follows = tuple(steps), follows
        set_prop(self.input, "max", str(max(0, len(steps) - 1)))
        set_prop(self.live, "aria-pressed", "true" if follows else "false")
        set_class(self.live, "pressed", follows)
        self._mark(incidents)
        if step is not None:
            self.at(step)
            self._set_in_browser(step)

    def at(self, step: int) -> None:
        """Say which step is shown."""
        last = self.steps[-1] if self.steps else step
        set_text(self.label, f"step {step} of {last}" + (" · newest" if self.follows else ""))
        set_prop(self.input, "aria-valuetext", f"step {step}")

    async def _slid(self, index: int) -> None:
        if 0 <= index < len(self.steps):
            await self._choose(self.steps[index])

    async def _choose(self, step: int | None) -> None:
        self._sent = -1  # the hand has moved it since
        self.follows = step is None
        set_prop(self.live, "aria-pressed", "true" if self.follows else "false")
        set_class(self.live, "pressed", self.follows)
        await self.on_change(step)

    def _set_in_browser(self, step: int) -> None:
        from nicegui import ui

        index = max(0, bisect.bisect_right(self.steps, step) - 1)
        if index == self._sent:
            return
        self._sent = index
        ui.run_javascript(f"eqp.slide({json.dumps(self.input.html_id)}, {index}, {json.dumps(f'step {step}')})")

    def _mark(self, incidents: Sequence[Incident]) -> None:
        wanted = [(incident.fired, "alert") for incident in incidents]
        done = [action for incident in incidents for action in incident.actions if action.state in DONE]
        wanted += [(action.step, f"repair {action.state}") for action in done]
        wanted = [(bisect.bisect_left(self.steps, step), kind) for step, kind in wanted[:MAX_MARKS]]
        key = [(len(self.steps), ""), *wanted]
        if key == self._marked:
            return
        self._marked = key
        self.marks.clear()
        with self.marks:
            for index, kind in wanted:
                share = min(1.0, index / max(1, len(self.steps) - 1))
                el("span", f"mark {kind}").style(f"--at: {share:.4f}")
