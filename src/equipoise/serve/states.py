"""States of Mamba layers for the sequences that are served: a slot for each one that runs, beside its blocks.

A state is of all tokens so far, so it can be neither cut into blocks nor shared by a prefix. `States` is the memory;
`Apart` is what one forward sees of it. Who has which slot is the scheduler's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.models.config import DecoderConfig
from equipoise.models.mamba import KeepsStates, MambaState


class States:
    """Of the model's M Mamba layers, for num_slots sequences. What a sequence begins with is zeros, not a slot's.

    windows_MSIW: the convolutions' last inputs, in dtype. h_MSIN: the scans' states, in fp32, or fp64 where dtype is.
    """

    def __init__(
        self, config: DecoderConfig, num_slots: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        layers, inner, width, state = _sizes(config)
        self.place_of = {layer: place for place, layer in enumerate(config.mamba_layer_ids)}
        self.windows_MSIW = torch.zeros(layers, num_slots, inner, width, dtype=dtype, device=device)
        exact = torch.promote_types(dtype, torch.float32)
        self.h_MSIN = torch.zeros(layers, num_slots, inner, state, dtype=exact, device=device)

    @staticmethod
    def bytes_per_slot(config: DecoderConfig, dtype: torch.dtype) -> int:
        """Memory of one sequence in all Mamba layers; 0 without any."""
        layers, inner, width, state = _sizes(config)
        exact = torch.promote_types(dtype, torch.float32)
        return layers * inner * (width * dtype.itemsize + state * exact.itemsize)

    def read(self, layer: int, slots_B: Tensor, begins_B: Tensor) -> MambaState:
        """Of these slots; zeros where a sequence begins, whatever the slot's last one has left."""
        place, begins_B11 = self.place_of[layer], begins_B[:, None, None]
        window_BIW, h_BIN = (each[place].index_select(0, slots_B) for each in (self.windows_MSIW, self.h_MSIN))
        return MambaState(window_BIW.masked_fill_(begins_B11, 0), h_BIN.masked_fill_(begins_B11, 0))

    def write(self, layer: int, slots_B: Tensor, state: MambaState) -> None:
        """Replace what is in these slots."""
        place = self.place_of[layer]
        self.windows_MSIW[place].index_copy_(0, slots_B, state.window_BIW.to(self.windows_MSIW.dtype))
        self.h_MSIN[place].index_copy_(0, slots_B, state.h_BIN)


def _sizes(config: DecoderConfig) -> tuple[int, int, int, int]:
    """(layers, channels, inputs that a convolution keeps, numbers per channel)."""
    if config.mamba is None:
        return 0, 0, 0, 0
    mamba = config.mamba
    return len(config.mamba_layer_ids), mamba.inner(config.dim), mamba.conv_width - 1, mamba.state_dim


@dataclass(frozen=True, eq=False)
class Alike:
    """B pieces of S tokens each. rows_N: where they are in the row, piece after piece. begins_B: of their sequences."""

    rows_N: Tensor
    slots_B: Tensor
    begins_B: Tensor


class Apart:
    """A row of tokens of many sequences, each piece mixed with its own state: single tokens together, others alone.

    pieces: (slot, start in its sequence, number of tokens) of each, in the order of the row. States change at `commit`
    alone: until then the same pieces can be run again.
    """

    def __init__(self, states: States, pieces: Sequence[tuple[int, int, int]]) -> None:
        self._states = states
        self._coming: list[tuple[int, Tensor, MambaState]] = []
        device, row = states.h_MSIN.device, 0
        by_length: list[list[tuple[int, int, int, int]]] = [[]]  # the first: single tokens
        for slot, start, number in pieces:
            piece = (row, slot, start, number)
            row += number
            if number == 1:
                by_length[0].append(piece)
            else:
                by_length.append([piece])
        self._groups = [_alike(group, device) for group in by_length if group]

    def mix(self, layer: int, run: Callable[[Tensor, KeepsStates], Tensor], x_1TD: Tensor) -> Tensor:
        """What `run` makes of each piece, in the row's order."""
        out_TD = torch.empty_like(x_1TD[0])
        for group in self._groups:
            x_BSD = x_1TD[0, group.rows_N].view(len(group.slots_B), -1, x_1TD.shape[2])
            view = _View(self._states, self._coming, group)
            out_TD[group.rows_N] = run(x_BSD, view).flatten(0, 1).to(out_TD.dtype)
        return out_TD[None]

    def commit(self) -> None:
        """The forward's states are from now on those of its sequences."""
        for layer, slots_B, state in self._coming:
            self._states.write(layer, slots_B, state)
        self._coming = []


@dataclass(frozen=True, eq=False)
class _View:
    """The `KeepsStates` of one group."""

    states: States
    coming: list[tuple[int, Tensor, MambaState]]
    group: Alike

    def state(self, layer: int) -> MambaState | None:
        return self.states.read(layer, self.group.slots_B, self.group.begins_B)

    def keep(self, layer: int, state: MambaState) -> None:
        self.coming.append((layer, self.group.slots_B, state))


def _alike(group: Sequence[tuple[int, int, int, int]], device: torch.device) -> Alike:
    rows = [at for row, _, _, number in group for at in range(row, row + number)]
    slots, begins = [slot for _, slot, _, _ in group], [start == 0 for _, _, start, _ in group]
    return Alike(*(torch.tensor(each, device=device) for each in (rows, slots, begins)))
