"""Tokens to text, piece by piece: no half letters, and nothing that may turn out to be the beginning of a stop."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """The text of one answer. stops: texts that end it; they are not part of it."""

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped: str | None = None

    def push(self, token: bytes) -> str:
        """What is certain now. After a stop was found there is no more."""
        if self.stopped is not None:
            return ""
        self._held += self._decoder.decode(token)
        if self._find():
            return self._take(len(self._held))
        return self._take(len(self._held) - self._undecided())

    def finish(self) -> str:
        """What was held back. Bytes that are no whole letter become U+FFFD."""
        if self.stopped is not None:
            return ""
        self._held += self._decoder.decode(b"", final=True)
        self._find()
        return self._take(len(self._held))

    def _find(self) -> bool:
        """Cut at the stop that is complete first, the longest one of those: however the text was cut into tokens."""
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            _, at, self.stopped = min(found)
            self._held = self._held[:at]
        return bool(found)

    def _undecided(self) -> int:
        """Characters at the end that a stop may begin with."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text
