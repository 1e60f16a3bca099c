"""What a measurement tells while it runs, and whether it is to stop: a line on stderr, or nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol, TextIO


class Progress(Protocol):
    """stopped: set once Ctrl-C was pressed; what was measured by then is still shown."""

    stopped: bool

    def begin(self, what: str) -> None:
        """A new part of the measurement."""
        ...

    def advance(self, done: int, total: int) -> None:
        """So many of its rounds are done."""
        ...

    def stop(self) -> bool:
        """Ctrl-C was pressed. Returns whether to go on with what there is, instead of raising."""
        ...


class Quiet:
    """Says nothing, and lets Ctrl-C raise."""

    stopped = False

    def begin(self, what: str) -> None:
        """Nothing."""

    def advance(self, done: int, total: int) -> None:
        """Nothing."""

    def stop(self) -> bool:
        """Raise."""
        return False


class Line:
    """One line of stderr, rewritten on a terminal; elsewhere a line for each part.

    With the rate of rounds and the time left of this part.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stopped = False
        self._stream = sys.stderr if stream is None else stream
        self._rewritten = self._stream.isatty()
        self._what, self._since = "", time.perf_counter()

    def begin(self, what: str) -> None:
        """A line of its own."""
        self._what, self._since = what, time.perf_counter()
        self._show(f"{datetime.now(UTC):%H:%M:%S} {what}", "" if self._rewritten else "\n")

    def advance(self, done: int, total: int) -> None:
        """Rate and time left, on a terminal; elsewhere once, at the end."""
        seconds = time.perf_counter() - self._since
        rate = done / seconds if seconds else 0.0
        left = (total - done) / rate if rate else 0.0
        if self._rewritten:
            self._show(f"{self._what}: round {done} of {total}, {rate:.2g} a second, {left:.0f} s left", "")
        elif done == total:
            self._show(f"{'':8} {self._what}: {total} rounds in {seconds:.1f} s", "\n")

    def stop(self) -> bool:
        """Go on with what there is."""
        self.stopped = True
        return True

    def end(self) -> None:
        """Leave the line empty."""
        if self._rewritten:
            self._show("", "")

    def _show(self, text: str, end: str) -> None:
        print(f"\r\033[K{text}" if self._rewritten else text, end=end, file=self._stream, flush=True)


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Pieces:
    """Of work that takes minutes: a line for each piece that is finished, with the rate and the time left.

    total: pieces there are to do. say: takes the lines; stderr's by default.
    """

    def __init__(self, total: int, say: Callable[[str], object] = _to_stderr) -> None:
        self._total, self._say = total, say
        self._done, self._since = 0, time.perf_counter()

    def done(self, what: str) -> None:
        """One more is finished. The rate is that of all so far."""
        self._done += 1
        minutes = max(time.perf_counter() - self._since, 1e-9) / 60
        left = max(self._total - self._done, 0) * minutes / self._done
        said = f"{self._done / minutes:.2g} a minute, {left:.0f} min left" if self._done < self._total else "the last"
        self._say(f"{self._done} of {self._total}  {what} ({said})")
