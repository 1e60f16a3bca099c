"""Routing as TensorBoard scalars per layer; alerts and repairs as text.

Needs tensorboard (`equipoise[tensorboard]`) for torch's SummaryWriter. Counts per expert are not written.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equipoise.monitor.incidents import all_numbers, state_text
from equipoise.monitor.sinks.layer_numbers import layer_numbers
from equipoise.monitor.sinks.on_trial import OnTrial
from equipoise.monitor.sinks.plain import name_line, one_line
from equipoise.types import Action, Alert, RoutingStats

MAX_TAG, MAX_TEXT = 200, 2000
_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~])")


class TensorBoard:
    """Writes event files into `folder`, one scalar "routing/NUMBER/LAYER" per layer and window, by optimizer step.

    Raises ImportError where tensorboard is missing.
    """

    def __init__(self, folder: str | Path) -> None:
        try:
            from torch.utils import tensorboard
        except ImportError as error:
            raise ImportError(
                "TensorBoard needs the package tensorboard, which is not installed; "
                "pip install 'equipoise[tensorboard]'"
            ) from error
        writer: Any = tensorboard.SummaryWriter  # untyped in torch
        self._writer = writer(log_dir=str(folder))
        self._on_trial = OnTrial()

    def routing(self, window: Sequence[RoutingStats]) -> None:
        """Write the numbers of each layer."""
        for stats in window:
            for name, value in layer_numbers(stats).items():
                number = "/".join(map(tag, name.split("/", 1)))
                self._writer.add_scalar(f"routing/{number}/{tag(stats.layer)}", value, stats.step)

    def alert(self, alert: Alert) -> None:
        """Write one change of an alert as text."""
        finding = alert.finding
        text = (
            f"**{alert.state}**, {finding.severity}, since step {alert.since_step}: {escape(finding.message)}\n\n"
            f"What to do: {escape(finding.remedy)}"
        )
        self._writer.add_text(f"alerts/{tag(finding.rule)}/{tag(finding.layer)}", text, alert.step)
        self._writer.flush()

    def action(self, action: Action) -> None:
        """Write one change of a repair as text: its state, what it did, and why."""
        action = self._on_trial.take(action)
        numbers = all_numbers(action.detail)
        text = f"**{state_text(action)}**: {escape(action.kind)} because of {escape(action.reason)}"
        text += (f": {escape(numbers)}" if numbers else "") + (f"\n\n{escape(action.note)}" if action.note else "")
        self._writer.add_text(f"actions/{tag(action.kind)}/{tag(action.layer)}", text, action.step)
        self._writer.flush()

    def close(self) -> None:
        """Write what is left and close the files."""
        self._writer.close()


def tag(name: str) -> str:
    """The name as a part of a tag: what TensorBoard would replace is "_", with a hash behind to keep names apart."""
    safe = re.sub(r"[^-\w.]", "_", name, flags=re.ASCII)
    unique = name_line(name if safe == name else f"{name}\n", MAX_TAG)  # with a line break it gets its hash
    return re.sub(r"[^-\w.]", "_", unique, flags=re.ASCII)


def escape(text: str) -> str:
    """One line of Markdown that shows the text as it is."""
    return _MARKDOWN.sub(r"\\\1", html.escape(one_line(text, MAX_TEXT), quote=False))
