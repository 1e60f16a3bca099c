"""The rank that serves: all of the model but the experts that others hold; those are read and changed from here."""

from __future__ import annotations

import hashlib
import itertools
import os
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from equipoise.disk.checkpoint import group_file, verify
from equipoise.disk.row_file import RowFile
from equipoise.models.decoder import Decoder
from equipoise.models.run_files import MODEL, Loaded, cast, fill, loaded, locate
from equipoise.parallel.apply import check_placements
from equipoise.parallel.exchange import CollectiveError
from equipoise.parallel.payload import PayloadName, payloads
from equipoise.recovery.swap import Swap, swap
from equipoise.serve.ranks.held import Held, read_held
from equipoise.serve.ranks.lines import Lines
from equipoise.serve.ranks.parcel import TYPES
from equipoise.serve.ranks.remote_experts import Reach, RemoteExperts, put_in
from equipoise.small.load import all_but_experts
from equipoise.types import Placement

POLL_S = 0.05  # between two questions whether the others have read a checkpoint


@dataclass(frozen=True)
class SpreadConfig:
    """placements: by layer, None spreads consecutive experts evenly. payload: what rows look like on their way."""

    placements: Mapping[str, Placement] | None = None
    payload: PayloadName = "as_is"


class SpreadSwap:
    """Weights that were changed on all ranks, and the way back. digest: of those of all ranks together."""

    def __init__(self, own: Swap, lines: Lines, number: int, digests: Sequence[str]) -> None:
        self._own, self._lines, self._number = own, lines, number
        self.digest = hashlib.sha256(" ".join([own.digest, *digests]).encode()).hexdigest()

    def undo(self) -> None:
        """Put the old values back exactly, on all ranks. Twice is once."""
        self._own.undo()
        self._lines.ask(do="undo", number=self._number)


class Ranks:
    """A model over ranks, seen from the one that serves. fatal: what it raises when one of the others is lost."""

    fatal = (CollectiveError,)

    def __init__(self, path: Path, lines: Lines, config: SpreadConfig, dtype: torch.dtype | None) -> None:
        self.lines = lines
        self._numbers, self._measured = itertools.count(), self._measure()
        self._unneeded: deque[int] = deque()  # changes that can't be undone any more, of which others keep a copy
        folder, model_config, checkpoint = locate(path)
        verify(checkpoint)
        with torch.device("meta"):
            model = Decoder(model_config)
        self.layers = model.moe_layers
        self.placements = self._placed(config)
        self._all_parts = {
            name: [Held.of(name, layer.experts, slots) for slots in self.placements[name].slots]
            for name, layer in self.layers.items()
        }
        for layer in self.layers.values():
            layer.register_module("experts", nn.Identity())  # no memory for what others hold
        others = all_but_experts(checkpoint, self.layers)
        self.dtype = dtype or others["embed_tokens.weight"].dtype
        fill(model.to_empty(device="cpu"), others, checkpoint)
        cast(model, self.dtype)
        self._hold(checkpoint, config)
        self.loaded: Loaded = loaded(model.requires_grad_(False), folder, checkpoint)

    def _placed(self, config: SpreadConfig) -> Mapping[str, Placement]:
        if not self.layers:
            raise ValueError("parallel.expert: expected a model with MoE layers, this one has none; serve it alone")
        world = 1 + len(self.lines.all)
        num_experts = {name: layer.experts.num_experts for name, layer in self.layers.items()}
        if config.placements is None:
            return {name: Placement.even(number, world) for name, number in num_experts.items()}
        check_placements(config.placements, num_experts, world)
        return config.placements

    def _hold(self, checkpoint: Path, config: SpreadConfig) -> None:
        """All ranks read their experts, at the same time."""
        path = group_file(checkpoint, MODEL)
        common = {
            "do": "hold",
            "path": str(path.resolve()),
            "dtype": TYPES.index(self.dtype),
            "payload": config.payload,
        }
        commands = [
            {**common, "parts": [parts[line.peer].to_json() for parts in self._all_parts.values()]}
            for line in self.lines.all
        ]
        own = self._read_own(path)
        both = payloads(config.payload)
        modules = {
            name: RemoteExperts(
                self._all_parts[name][0].module(own[name]), Reach(self.lines, number, self.placements[name], both)
            )
            for number, name in enumerate(self.layers)
        }
        put_in(self.layers, modules)
        answers = self.lines.ask_each(commands)
        for line, answer in zip(self.lines.all, answers, strict=True):
            if problem := answer.get("error"):
                raise ValueError(f"{line.name}: {problem}; all ranks need the run folder at the same path")
            line.name = f"rank {line.peer} (process {answer['pid']} on {answer['host']})"
        self._told = [
            sum(p.nbytes for each in modules.values() for p in each.parameters()),
            *(a["bytes"] for a in answers),
        ]

    def _read_own(self, path: Path) -> dict[str, dict[str, Tensor]]:
        file = RowFile(path)
        try:
            return {name: read_held(file, parts[0], self.dtype) for name, parts in self._all_parts.items()}
        finally:
            file.close()

    # ------------------------------------------------------------------------------------------------- while it serves

    def read(self, checkpoint: Path) -> Callable[[], SpreadSwap]:
        """See `weights.Read`: every rank its own, while rows go on being computed."""
        verify(checkpoint)
        path = group_file(checkpoint, MODEL)
        self.lines.ask(do="read", path=str(path.resolve()))
        try:
            tensors = all_but_experts(checkpoint, self.layers)
            for name, named in self._read_own(path).items():
                tensors |= {f"{name}.experts.local.{part}": tensor for part, tensor in named.items()}
            while not all(answer["done"] for answer in self.lines.ask(do="whether_read")):
                time.sleep(POLL_S)
        except (ValueError, OSError):
            self.lines.ask(do="drop")
            raise
        return lambda: self._take(tensors)

    def _take(self, tensors: Mapping[str, Tensor]) -> SpreadSwap:
        """On all ranks or none. Raises ValueError that names the rank which can't."""
        number = next(self._numbers)
        try:
            own = swap(self.loaded.model, tensors, whole=True)
        except ValueError:
            self.lines.ask(do="drop")
            raise
        answers = self.lines.ask_each([{"do": "take", "number": number}] * len(self.lines.all))
        named = zip(self.lines.all, answers, strict=True)
        if refused := [f"{line.name}: {answer['error']}" for line, answer in named if "error" in answer]:
            own.undo()
            self.lines.ask(do="undo", number=number)
            self._unneeded.append(number)
            raise ValueError("; ".join(refused))
        done = SpreadSwap(own, self.lines, number, [answer["digest"] for answer in answers])
        weakref.finalize(done, self._unneeded.append, number)
        return done

    def watch(self, period_s: float) -> None:
        """Ask the others every so often whether they are there, also while nothing is computed."""
        self.lines.watch(period_s, self._pulse)

    def _pulse(self) -> Mapping[str, object]:
        return {"forget": [self._unneeded.popleft() for _ in range(len(self._unneeded))]}

    def scalars(self) -> dict[str, float]:
        """For the run store, since they were last asked for. exposed_communication: the share of the time in which this
        rank could do nothing but wait for the others. sent_mb: what it sent them.
        """
        before, self._measured = self._measured, self._measure()
        seconds, waited, sent = (now - then for now, then in zip(self._measured, before, strict=True))
        return {"exposed_communication": waited / seconds, "sent_mb": sent / 1e6}

    def _measure(self) -> tuple[float, float, float]:
        """(now, seconds waited so far, bytes sent so far)."""
        lines = self.lines.all
        return time.perf_counter(), sum(line.seconds for line in lines), sum(line.sent_bytes for line in lines)

    def told(self) -> str:
        """Where the experts are, in a line."""
        sizes = ", ".join(f"{size / 2**20:.1f}" for size in self._told)
        return f"experts on {len(self._told)} ranks: {sizes} MB; SIGTERM to process {os.getpid()} ends all"
