"""Repairs on trial, remembered until they are kept or undone, so that a message about their end has both numbers.

A sink that sends each change on its own uses it; those that keep an alert's changes have them all. It sends nothing.
"""

from __future__ import annotations

from dataclasses import replace

from equipoise.types import Action

MAX_REPAIRS = 100  # remembered; more than one on trial are rare


class OnTrial:
    """The records of repairs whose trial goes on, by what, where and why."""

    def __init__(self) -> None:
        self._begun: dict[tuple[str, str, str], Action] = {}

    def take(self, action: Action) -> Action:
        """The record with what was measured before the repair at its side: of kept and undone ones seen to begin."""
        name = (action.kind, action.layer, action.reason)
        if action.state == "applied":
            self._begun.pop(name, None)
            self._begun[name] = action  # the newest is the last
            if len(self._begun) > MAX_REPAIRS:
                del self._begun[next(iter(self._begun))]
        elif action.state in ("kept", "undone"):
            begun = self._begun.pop(name, action)
            return replace(action, detail={**begun.detail, **action.detail})
        return action
