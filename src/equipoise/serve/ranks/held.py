"""Which experts a rank holds, as plain data, and how it reads them out of a checkpoint: those and no others."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.disk.checkpoint import CheckpointError
from equipoise.disk.row_file import RowFile
from equipoise.layer import Experts


@dataclass(frozen=True)
class Held:
    """A rank's part of one layer's experts. slots: the logical experts, in order. The rest is as in `Experts`."""

    layer: str
    slots: tuple[int, ...]
    dim: int
    hidden_dim: int
    activation: str
    bias: bool
    backend: Any

    @staticmethod
    def of(layer: str, experts: Experts, slots: tuple[int, ...]) -> Held:
        """Of a layer's experts, which may be on `meta`."""
        bias = experts.biases is not None
        return Held(layer, slots, experts.dim, experts.hidden_dim, experts.activation, bias, experts.backend)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @staticmethod
    def from_json(record: dict[str, Any]) -> Held:
        """What `to_json` made."""
        return Held(**{**record, "slots": tuple(record["slots"])})

    def on_meta(self) -> Experts:
        """The module, without memory."""
        with torch.device("meta"):
            return Experts(len(self.slots), self.dim, self.hidden_dim, self.activation, self.backend, self.bias)

    def module(self, tensors: dict[str, Tensor]) -> Experts:
        """The module with these weights, for inference."""
        experts = self.on_meta()
        for name, tensor in tensors.items():
            setattr(experts, name, nn.Parameter(tensor, requires_grad=False))
        return experts.eval()


def read_held(file: RowFile, held: Held, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of a rank's part, by name in `Experts`, read row by row into memory of their own.

    Raises CheckpointError for a file in which they are missing or have other shapes.
    """
    tensors: dict[str, Tensor] = {}
    for part, like in held.on_meta().named_parameters():
        name = f"{held.layer}.experts.{part}"
        entry = file.entries.get(name)
        if entry is None or entry.shape[1:] != like.shape[1:] or entry.shape[0] <= max(held.slots, default=0):
            shape = "none" if entry is None else entry.shape
            raise CheckpointError(
                f"{file.path}: expected {name} with rows of {tuple(like.shape[1:])}, got {shape}; use a checkpoint of "
                "this run"
            )
        with torch.inference_mode(False):  # it outlives whoever asked for it
            tensors[part] = torch.empty(like.shape, dtype=dtype)
        for slot, expert in enumerate(held.slots):
            if entry.dtype == dtype:
                file.row(name, expert, tensors[part][slot])
            else:
                tensors[part][slot].copy_(file.row(name, expert))
    return tensors
