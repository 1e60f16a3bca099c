"""Where a run takes requests for faults: it puts them in, takes them out, and answers. The loop calls it once per step.

It does what a request says and nothing else: layers are looked up in the model, checkpoints among the run's own by
name; no request names code or a path. Whatever goes wrong is told to the sender, never to the loop.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from equipoise.faults.catalogue import Fault, sentence
from equipoise.faults.counters import StaleCounters, inject_counters
from equipoise.faults.data import SkewedInput, skewed_rows
from equipoise.faults.files import CheckpointDamage, checkpoint_of, damage, put_all_back
from equipoise.faults.injection import Change, Injection, TeamRun, inject
from equipoise.faults.requests import Remove, Request, answer, from_record, listen, take, to_record
from equipoise.faults.targets import routers_digest
from equipoise.monitor.recorder import Recorder
from equipoise.types import ALONE, Team

T = TypeVar("T")

MOST_TOLD = 500  # characters of an error


class FaultDesk:
    """Takes a run's requests for faults, from now until `close`.

    run_folder: where the requests are; the folder is made. model: what faults are put into. run: takes the model
    through a batch of tokens, with the recorder paused, to see a layer's inputs. recorder: for StaleCounters. team: the
    processes that hold the model; each has a desk, the main one's takes the requests.
    Raises ValueError where another process takes this run's requests.
    """

    def __init__(
        self,
        run_folder: Path,
        model: nn.Module,
        run: Callable[[], object],
        recorder: Recorder | None = None,
        team: Team = ALONE,
    ) -> None:
        self._folder, self._model, self._recorder, self._team = Path(run_folder), model, recorder, team
        self._run = TeamRun(run, team)
        self._lock: int | None = listen(self._folder) if team.is_main else None
        self._in_place: list[Injection] = []
        self._asked_for_rows = False
        self._trouble = ""

    @property
    def in_place(self) -> list[Any]:
        """The faults that are in place, the oldest first."""
        return [injection.fault for injection in self._in_place]

    def step(self) -> list[str]:
        """Call once per step, between two steps, not inside `recorder.paused()`.

        Obeys what was posted, lets drifts go on, and returns a sentence for the log about each thing that was done or
        refused. Raises nothing.
        """
        said: list[str] = []
        taken = self._taken(said)
        records = self._team.tell([to_record(request) for _, request in taken])
        for number, record in enumerate(records):
            text, ok = self._obey(from_record(record))
            said.append(text)
            try:
                if self._team.is_main:
                    answer(self._folder, taken[number][0], text, ok)
            except (ValueError, OSError) as error:
                said.append(f"the sender could not be told: {_told(error)}")
        for injection in list(self._in_place):
            try:
                injection.advance()
            except Exception as error:
                self._in_place.remove(injection)
                said.append(f"{sentence(injection.fault)} stands still: {_told(error)}")
        return said

    def rows(self, domains: Tensor) -> Tensor | None:
        """Which sequence of a batch to put in which place while a SkewedInput is in place: int64 (B,).

        domains: int64 (B,) or (B, S). None to leave the batch as it is: no such fault, or nothing to copy in this
        batch. Call it for each batch; a run that does not can't be asked for this fault.
        """
        self._asked_for_rows = True
        skewed = [fault for fault in self.in_place if isinstance(fault, SkewedInput)]
        if not skewed:
            return None
        try:
            return skewed_rows(skewed[-1], domains)
        except ValueError:
            return None  # no sequence of that domain in this batch

    def close(self) -> None:
        """Take no more requests. Faults stay in place. Twice is once."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _taken(self, said: list[str]) -> list[tuple[str, Request]]:
        """(id, request) of what was posted; what is wrong with the folder is said."""
        if self._lock is None:
            return []
        try:
            requests = take(self._folder)
        except (ValueError, OSError) as error:  # the folder is gone, or out of reach
            if self._trouble != str(error):  # once, not at every step
                said.append(f"faults can't be taken: {_told(error)}")
            self._trouble = str(error)
            return []
        self._trouble = ""
        return requests

    def _obey(self, request: Request) -> tuple[str, bool]:
        """(a sentence, whether it was done). Nothing that a request leads to may end the run."""
        if isinstance(request, Remove):
            try:
                return self._take_out(request)
            except ValueError as error:
                return f"refused: {_told(error)}", False
        put_in = partial(_foreseen, partial(self._put_in, request.fault))
        injection, problem = self._team.together(put_in, Injection.remove, lambda _: routers_digest(self._model))
        if injection is None:
            return f"refused: {problem}", False
        self._in_place.append(injection)
        return f"fault put in: {sentence(request.fault)}", True

    def _put_in(self, fault: Fault) -> Injection:
        if isinstance(fault, CheckpointDamage):
            if not self._team.is_main:
                return Injection(fault, Change())
            return damage(checkpoint_of(self._folder, fault.checkpoint), fault)
        if isinstance(fault, StaleCounters):
            if self._recorder is None:
                raise ValueError("stale-counters: this run has no recorder that could stop counting")
            return inject_counters(self._recorder, fault)
        if isinstance(fault, SkewedInput):
            if not self._asked_for_rows:
                raise ValueError("skewed-input: this run does not let its batches be changed")
            return Injection(fault, Change())
        return inject(self._model, fault, self._run)

    def _take_out(self, request: Remove) -> tuple[str, bool]:
        """The last one first: a blow-up and what was added to the same weight do not commute.

        One that can't be taken out, such as damage to a checkpoint that was pruned since, does not keep the others in.
        """
        doomed = [
            each
            for each in reversed(self._in_place)
            if request.layer is None or getattr(each.fault, "layer", None) == request.layer
        ]
        told: list[str] = []
        left: dict[str, str] = {}
        for injection in doomed:
            _, problem = self._team.together(partial(_foreseen, injection.remove), lambda _: None, lambda _: "")
            if problem:
                left[problem] = f"{sentence(injection.fault)} stays: {problem}"
                continue
            self._in_place.remove(injection)
            told.append(sentence(injection.fault))
        if request.layer is None and self._team.is_main:  # also what an earlier process has damaged
            try:
                told += [f"damage to {name}" for name in put_all_back(self._folder)]
            except (ValueError, OSError) as error:
                left.setdefault(_told(error), _told(error))
        if not told and not left:
            where = "" if request.layer is None else f" in {request.layer!a}"
            raise ValueError(f"expected a fault in place{where}, there is none")
        parts = [f"taken out: {'; '.join(told)}"] if told else []
        return "; ".join([*parts, *left.values()]), not left


def _foreseen(do: Callable[[], T]) -> T:
    """Do it; whatever goes wrong is a ValueError."""
    try:
        return do()
    except Exception as error:
        raise ValueError(_told(error)) from error


def _told(error: Exception) -> str:
    """An error for a sender or a log: with its kind where it was not foreseen."""
    text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
    return text if len(text) <= MOST_TOLD else f"{text[: MOST_TOLD - 3]}..."
