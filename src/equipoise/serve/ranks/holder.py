"""A rank that holds experts: it does what the front asks for, in order, until it is told to stop.

It knows no requests, no routing and no other holder. What it can't compute ends it, and with it the server; what it
can't read, it says.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.disk.row_file import RowFile
from equipoise.layer import Experts
from equipoise.ops.ragged import ragged_plan
from equipoise.parallel.payload import payloads
from equipoise.recovery.swap import Swap, swap
from equipoise.serve.ranks.held import Held, read_held
from equipoise.serve.ranks.lines import ASK, COMPUTE, Answer, Header, Line
from equipoise.serve.ranks.parcel import TYPES, errands_of, packed_like


class Reading:
    """Other weights, read in a thread of its own while rows go on being computed."""

    def __init__(self, read: Callable[[], dict[str, Tensor]]) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.problem = ""
        self._thread = threading.Thread(target=self._run, args=(read,), daemon=True)
        self._thread.start()

    def _run(self, read: Callable[[], dict[str, Tensor]]) -> None:
        try:
            self.tensors = read()
        except (ValueError, OSError) as error:
            self.problem = str(error)

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()


class Holder:
    """The experts of one rank. line: to the front."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._parts: list[Held] = []
        self._experts: list[Experts] = []  # by number of the layer
        self._model: nn.Module = nn.ModuleDict()  # the same, by its name
        self._dtype = torch.float32
        self._payloads = payloads("as_is")
        self._reading: Reading | None = None
        self._swaps: dict[int, Swap] = {}
        self._verbs: Mapping[str, Callable[..., Answer]] = {
            "ping": self._ping,
            "hold": self._hold,
            "read": self._read,
            "whether_read": self._whether_read,
            "take": self._take,
            "drop": self._drop,
            "undo": self._undo,
        }

    @torch.inference_mode()
    def run(self) -> None:
        """Until the front says stop. Raises CollectiveError when it has gone."""
        while True:
            header = self._line.header(forever=True)
            if header.verb == COMPUTE:
                self._compute(header)
            elif header.verb == ASK:
                command = self._line.json(header)
                self._line.send_json(self._answer(command))
                if command["do"] == "stop":
                    return
            else:
                self._line.send(*self._experts[header.layer].weights_of(header.rows))

    def _compute(self, header: Header) -> None:
        experts, (out, home) = self._experts[header.layer], self._payloads
        dtype = TYPES[header.dtype]
        errands = self._line.expect(torch.empty(header.errands, 3, dtype=torch.int32))
        rows = self._line.expect(packed_like(out, header.rows, experts.dim, dtype))
        row_ids_N, slots_N, weights_N = errands_of(errands())
        plan = ragged_plan(row_ids_N, slots_N, weights_N, experts.num_experts)
        y_UD = experts(out.unpack(rows(), dtype), plan)
        self._line.send(home.pack(y_UD).contiguous())

    # ------------------------------------------------------------------------------------------------- what is asked

    def _answer(self, command: Answer) -> Answer:
        if command["do"] == "stop":
            return {}
        arguments = {key: value for key, value in command.items() if key != "do"}
        try:
            with torch.inference_mode(False):
                return self._verbs[command["do"]](**arguments)
        except (ValueError, OSError) as error:
            return {"error": str(error)}

    def _ping(self, forget: list[int]) -> Answer:
        """forget: changes that nobody will undo any more."""
        for number in forget:
            self._swaps.pop(number, None)
        return {}

    def _hold(self, path: str, parts: list[dict[str, Any]], dtype: int, payload: Any) -> Answer:
        """Read this rank's part of each layer."""
        self._dtype, self._payloads = TYPES[dtype], payloads(payload)
        self._parts = [Held.from_json(part) for part in parts]
        file = RowFile(Path(path))
        try:
            self._experts = [part.module(read_held(file, part, self._dtype)) for part in self._parts]
        finally:
            file.close()
        self._model = nn.ModuleDict(dict(zip(map(_key, self._parts), self._experts, strict=True)))
        num_bytes = sum(each.nbytes for each in self._model.parameters())
        return {"host": socket.gethostname(), "pid": os.getpid(), "bytes": num_bytes}

    def _read(self, path: str) -> Answer:
        """Begin to read this rank's part of another checkpoint."""

        def read() -> dict[str, Tensor]:
            file = RowFile(Path(path))
            try:
                return {
                    f"{_key(part)}.{name}": tensor
                    for part in self._parts
                    for name, tensor in read_held(file, part, self._dtype).items()
                }
            finally:
                file.close()

        self._reading = Reading(read)
        return {}

    def _whether_read(self) -> Answer:
        assert self._reading is not None
        if self._reading.problem:
            return {"error": self._reading.problem}
        return {"done": self._reading.done}

    def _take(self, number: int) -> Answer:
        """Put in force what was read; `undo` with that number puts back what was before."""
        assert self._reading is not None
        reading, self._reading = self._reading, None
        self._swaps[number] = done = swap(self._model, reading.tensors, whole=True)
        return {"digest": done.digest}

    def _drop(self) -> Answer:
        """What was read is not wanted."""
        self._reading = None
        return {}

    def _undo(self, number: int) -> Answer:
        """Where nothing was taken under that number, nothing is undone."""
        if number in self._swaps:
            self._swaps[number].undo()
        return {}


def _key(part: Held) -> str:
    return part.layer.replace(".", "/")  # a name of a module has no dots
