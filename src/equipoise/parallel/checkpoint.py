"""Checkpoints of a model that is spread over ranks: the same files as those of one process.

Every tensor is written in logical coordinates, as one process would: each rank puts the rows that it holds where they
belong. So a checkpoint can be resumed on any number of ranks, and on one; a rank reads the rows that it needs, and no
more. Ranks need a file system in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from equipoise.disk.checkpoint import (
    JSON,
    CheckpointError,
    discard,
    draft,
    group_file,
    not_written,
    publish,
    read_state,
    verify,
)
from equipoise.disk.rows import lay_out, read_rows, shapes, write_rows
from equipoise.parallel.apply import ExpertParallel
from equipoise.parallel.mesh import Ranks

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Share:
    """This rank's part of a tensor.

    local: what it holds. rows: which rows of the whole these are; None: all, the same on every rank. num_rows: of the
    whole. writes: for each row, or for the whole, whether this rank is the one to write it.
    """

    local: Tensor
    rows: tuple[int, ...] | None
    num_rows: int
    writes: tuple[bool, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return tuple(self.local.shape) if self.rows is None else (self.num_rows, *self.local.shape[1:])


def shares_of(parallel: ExpertParallel, tensors: Mapping[str, Tensor], layer_of: Mapping[str, str]) -> dict[str, Share]:
    """By name, this rank's part of each tensor. layer_of: the MoE layer of those that have a row per expert."""
    return {name: _share(parallel, tensor, layer_of.get(name)) for name, tensor in tensors.items()}


def _share(parallel: ExpertParallel, tensor: Tensor, layer: str | None) -> Share:
    ranks = parallel.ranks
    if layer is not None:
        placement = parallel.placements[layer]
        first = [placement.ranks_of(expert)[0] for expert in parallel.slots(layer)]
        writes = tuple(rank == ranks.expert_rank and ranks.data_rank == 0 for rank in first)
        return Share(tensor, parallel.slots(layer), placement.num_experts, writes)
    if isinstance(tensor, DTensor):
        rows = own_rows(tensor)
        return Share(tensor.to_local(), rows, tensor.shape[0], (True,) * len(rows))
    return Share(tensor, None, len(tensor) if tensor.dim() else 0, (ranks.is_main,))


def own_rows(tensor: DTensor) -> tuple[int, ...]:
    """The rows of a tensor that is sharded on its first axis over a mesh of one axis, as `torch.chunk` deals them."""
    [placement] = tensor.placements
    assert isinstance(placement, Shard)
    assert placement.dim == 0
    world, rank = tensor.device_mesh.size(), tensor.device_mesh.get_local_rank()
    per_rank = -(-tensor.shape[0] // world)
    first = min(rank * per_rank, tensor.shape[0])
    return tuple(range(first, min(first + per_rank, tensor.shape[0])))


def save_shares(
    root: Path, step: int, groups: Mapping[str, Mapping[str, Share]], state: Mapping[str, JSON], ranks: Ranks
) -> Path:
    """Write one checkpoint together; see `save_checkpoint`. state: the main rank's counts.

    Raises CheckpointError on all ranks when one of them can't write; then nothing is left of it.
    """
    temporary = _lay_out(root, step, groups, ranks)
    problem = None if temporary is not None else "the main rank could not begin"
    if temporary is not None:
        try:
            for group, named in groups.items():
                write_rows(group_file(temporary, group), _to_write(named))
        except OSError as error:
            problem = str(error)
    path: Path | None = None
    if not _any(problem is not None, ranks) and ranks.is_main and temporary is not None:
        try:
            path = publish(temporary, root, step, state)
        except OSError as error:
            problem = str(error)
    path = _tell(path, ranks)
    if path is None:
        if ranks.is_main and temporary is not None:
            discard(temporary)
        reason = OSError(problem or "another rank could not write its part")
        raise CheckpointError(not_written(root, step, _num_bytes(groups), reason))
    return path


def _lay_out(root: Path, step: int, groups: Mapping[str, Mapping[str, Share]], ranks: Ranks) -> Path | None:
    """The draft, with files of full size, on all ranks; None when the system refused."""
    temporary: Path | None = None
    if ranks.is_main:
        try:
            temporary = draft(root, step)
            for group, named in groups.items():
                described = {name: (share.local.dtype, share.shape) for name, share in named.items()}
                lay_out(group_file(temporary, group), described)
        except OSError:
            temporary = None
    return _tell(temporary, ranks)


def _to_write(named: Mapping[str, Share]) -> dict[str, tuple[Tensor, Sequence[int] | None]]:
    parts: dict[str, tuple[Tensor, Sequence[int] | None]] = {}
    for name, share in named.items():
        mine = [place for place, own in enumerate(share.writes) if own]
        if share.rows is None and mine:
            parts[name] = share.local, None
        elif share.rows is not None:
            parts[name] = share.local[mine], tuple(share.rows[place] for place in mine)
    return parts


def load_shares(path: Path, groups: Mapping[str, Mapping[str, Share]], ranks: Ranks) -> tuple[int, Mapping[str, JSON]]:
    """Fill this rank's parts, in place, from a checkpoint of any number of ranks; returns (step, plain state).

    Raises CheckpointError, on all ranks, for one that is damaged or of another model; then nothing is changed.
    """
    verify_together(path, ranks)
    for group, named in groups.items():
        _check_names(path, group, named)
    with torch.no_grad():
        for group, named in groups.items():
            for name, share in named.items():
                share.local.copy_(read_rows(group_file(path, group), name, share.rows))
    return read_state(path)


def verify_together(path: Path, ranks: Ranks) -> None:
    """The main rank reads it through once. Raises CheckpointError, on all ranks, for one that is damaged."""
    problem: str | None = None
    if ranks.is_main:
        try:
            verify(path)
        except CheckpointError as error:
            problem = str(error)
    problem = _tell(problem, ranks)
    if problem is not None:
        raise CheckpointError(problem)


def read_shares(path: Path, group: str, named: Mapping[str, Share]) -> dict[str, Tensor]:
    """This rank's parts of a verified checkpoint's tensors, in memory of their own. Raises CheckpointError for one of
    another model.
    """
    _check_names(path, group, named)
    return {name: read_rows(group_file(path, group), name, share.rows) for name, share in named.items()}


def _check_names(path: Path, group: str, named: Mapping[str, Share]) -> None:
    there = shapes(group_file(path, group))
    for name, share in named.items():
        if there.get(name) != share.shape:
            raise CheckpointError(
                f"checkpoint {path} does not fit this run: {group}/{name} is expected with shape {share.shape}, the "
                f"checkpoint has {there.get(name, 'none')}. Resume with the configuration it was made with"
            )
    if foreign := sorted(set(there) - set(named)):
        raise CheckpointError(
            f"checkpoint {path} does not fit this run: it holds {group}/{foreign[0]}, which this model has not. Resume "
            "with the configuration it was made with"
        )


def _num_bytes(groups: Mapping[str, Mapping[str, Share]]) -> int:
    return sum(
        torch.Size(share.shape).numel() * share.local.element_size()
        for named in groups.values()
        for share in named.values()
    )


def _tell(value: T | None, ranks: Ranks) -> T | None:
    """The main rank's value, on all ranks."""
    values = [value]
    dist.broadcast_object_list(values, src=0, group=ranks.world)
    return values[0]


def _any(value: bool, ranks: Ranks) -> bool:
    count = torch.tensor([int(value)], device=ranks.mesh.device_type)
    ranks.sum(count)
    return bool(count)


def expert_tensors(parallel: ExpertParallel, names: Iterable[str]) -> dict[str, str]:
    """By name, the MoE layer, of those tensors of the model's state dict that have a row per expert of this rank."""
    experts = parallel.expert_parameters
    return {name: experts[name][0] for name in names if name in experts}


def load_weights(path: Path, parallel: ExpertParallel, group: str = "model") -> None:
    """The weights of a checkpoint into a spread model: to each rank its own. See `load_shares`."""
    tensors = dict(parallel.model.state_dict())
    shares = shares_of(parallel, tensors, expert_tensors(parallel, tensors))
    load_shares(path, {group: shares}, parallel.ranks)
