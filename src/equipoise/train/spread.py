"""How a run is spread over processes, as the loop sees it: alone, or over ranks.

`Alone` is a run of one process and costs nothing. `OverRanks` has the experts spread, the batch divided, sums taken
over all ranks, checkpoints written and read together. Both give the same training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from equipoise.disk.checkpoint import JSON, CheckpointError, group_file, load_checkpoint, read_state, save_checkpoint
from equipoise.disk.rows import read_rows
from equipoise.models.decoder import Decoder
from equipoise.monitor.recorder import Recorder
from equipoise.parallel import ExpertParallel, Ranks, apply_expert_parallel, clip_gradients, sum_gradients
from equipoise.parallel.checkpoint import (
    Share,
    expert_tensors,
    load_shares,
    read_shares,
    save_shares,
    shares_of,
    verify_together,
)
from equipoise.parallel.shard import shard_dense
from equipoise.parallel.team import RankTeam, everyone
from equipoise.plan.placement_file import read_placements
from equipoise.recovery.swap import swap
from equipoise.train.config import TrainConfig
from equipoise.train.data import Batch
from equipoise.train.snapshot import pack_optimizer, rng_state, set_rng_state, unpack_optimizer
from equipoise.train.spread_optimizer import logical_shapes, optimizer_shares, restore_optimizer
from equipoise.train.step import split
from equipoise.types import ALONE, Team

Reduce = Callable[[Tensor], None]
Content = tuple[Mapping[str, Mapping[str, Tensor]], Mapping[str, JSON]]  # tensors by group, and plain state
Restored = tuple[int, Mapping[str, JSON]]  # step, and plain state
Undo = Callable[[], None]


def check_ranks(config: TrainConfig, ranks: Ranks | None) -> None:
    """Raise ValueError for a configuration that can't be spread over these ranks."""
    if ranks is None:
        return
    if config.finetune is not None:
        raise ValueError(f"finetune: needs the whole model in one process, got {ranks.size}; leave it out")
    for name, value in (("recover", config.recover), ("accept_faults", config.accept_faults)):
        if value and ranks.config.shard:
            raise ValueError(
                f"{name}: expected False with parallel.shard: no rank holds a whole router to repair or to break; "
                "leave out one of the two"
            )
    if config.interference_every:
        raise ValueError("interference_every: is measured in one process only; set it to 0 for a run over ranks")
    if ranks.config.shard and config.model.moe is not None and config.model.moe.shortcut is not None:
        raise ValueError(
            "parallel.shard: expected False for a model with a shortcut, whose blocks are computed in parts: FSDP2 "
            "gathers a block's weights when the block is called; leave out --parallel.shard"
        )
    per_rank, micro_batches = config.batch_size // ranks.size, max(1, config.num_micro_batches // ranks.size)
    if config.batch_size % ranks.size or per_rank % micro_batches:
        raise ValueError(
            f"batch_size: expected a multiple of the {ranks.size} ranks, each of which takes its share in "
            f"{micro_batches} micro-batches, got {config.batch_size}"
        )


class Spread(Protocol):
    """What differs between one process and many."""

    reduce: Reduce | None
    is_main: bool
    size: int
    team: Team
    repairable: bool  # each process has whole routers

    def parts(self, batch: Batch, micro_batches: int) -> list[Batch]:
        """This process's micro-batches of the batch, of which there are so many for all processes together."""
        ...

    def total(self, loss: float) -> float:
        """The loss over all processes."""
        ...

    def clip(self, max_norm: float) -> float:
        """Complete the gradients, bound their norm, and return it as it was."""
        ...

    def any(self, value: bool) -> bool:
        """Whether it is so on any process."""
        ...

    def first(self, found: str | None) -> str | None:
        """What the first process has found that has found something, and which."""
        ...

    def share(self, batch: Batch) -> Batch:
        """This process's rows of a batch of held-out text, of any size; none where there are fewer than processes."""
        ...

    def save(self, root: Path, step: int, content: Content, optimizer: torch.optim.Optimizer) -> Path:
        """Write a checkpoint of what this process holds."""
        ...

    def restore(self, path: Path, model: Decoder, optimizer: torch.optim.Optimizer, recorder: Recorder) -> Restored:
        """Weights, optimizer and open window of a checkpoint, which any number of processes wrote."""
        ...

    def reload(self, path: Path, model: Decoder, optimizer: torch.optim.Optimizer) -> Undo:
        """Weights and optimizer of a checkpoint into a run that goes on. Returns what undoes it, to the bit. Raises
        ValueError, and has changed nothing, for one that is damaged or of another model.
        """
        ...

    def set_rng(self, state: Mapping[str, JSON]) -> None:
        """The random state of a checkpoint; last, for building modules draws numbers."""
        ...

    def scalars(self, seconds: float) -> dict[str, float]:
        """What spreading costs, for the run store, in the seconds since it was last asked."""
        ...


class Alone:
    """One process."""

    reduce: Reduce | None = None
    is_main = True
    size = 1
    team = ALONE
    repairable = True

    def __init__(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        self._parameters = tuple(parameters)

    def parts(self, batch: Batch, micro_batches: int) -> list[Batch]:
        """All of them."""
        return split(batch, micro_batches)

    def total(self, loss: float) -> float:
        """It is."""
        return loss

    def clip(self, max_norm: float) -> float:
        """By torch."""
        return float(torch.nn.utils.clip_grad_norm_(self._parameters, max_norm))

    def any(self, value: bool) -> bool:
        """It is."""
        return value

    def first(self, found: str | None) -> str | None:
        """It."""
        return found

    def share(self, batch: Batch) -> Batch:
        """All."""
        return batch

    def save(self, root: Path, step: int, content: Content, optimizer: torch.optim.Optimizer) -> Path:
        """As it is."""
        return save_checkpoint(root, step, *content)

    def restore(self, path: Path, model: Decoder, optimizer: torch.optim.Optimizer, recorder: Recorder) -> Restored:
        """As it was."""
        checkpoint = load_checkpoint(path)
        model.load_state_dict(dict(checkpoint.tensors["model"]))
        unpack_optimizer(optimizer, checkpoint.tensors["optimizer"], checkpoint.state["optimizer"])
        recorder.load_state_dict(checkpoint.tensors["recorder"])
        return checkpoint.step, checkpoint.state

    def reload(self, path: Path, model: Decoder, optimizer: torch.optim.Optimizer) -> Undo:
        """All of it."""
        checkpoint = load_checkpoint(path)
        packed, described = checkpoint.tensors["optimizer"], checkpoint.state["optimizer"]
        return _exchange(
            model, checkpoint.tensors["model"], optimizer, partial(unpack_optimizer, optimizer, packed, described)
        )

    def set_rng(self, state: Mapping[str, JSON]) -> None:
        """As it was."""
        set_rng_state(state["rng"])

    def scalars(self, seconds: float) -> dict[str, float]:
        """Nothing."""
        return {}


class OverRanks:
    """Processes of a job. Applies expert parallelism, and FSDP2 where it is asked for, to the model."""

    def __init__(self, model: Decoder, ranks: Ranks) -> None:
        self.ranks = ranks
        placements = None if ranks.config.placement is None else read_placements(ranks.config.placement)
        self.parallel: ExpertParallel = apply_expert_parallel(model, ranks, placements)
        if ranks.config.shard:
            shard_dense(self.parallel, list(model.layers))
        self.reduce: Reduce | None = ranks.sum
        self.is_main, self.size = ranks.is_main, ranks.size
        self.team: Team = RankTeam(self.parallel)
        self.repairable = not ranks.config.shard

    def parts(self, batch: Batch, micro_batches: int) -> list[Batch]:
        """This rank's share of each."""
        per_rank = max(1, micro_batches // self.ranks.size)
        return split(split(batch, self.ranks.size)[self.ranks.rank], per_rank)

    def total(self, loss: float) -> float:
        """The sum of the ranks' shares."""
        value = torch.tensor(loss, dtype=torch.float64, device=self.ranks.mesh.device_type)
        self.ranks.sum(value)
        return float(value)

    def clip(self, max_norm: float) -> float:
        """Each logical parameter counts once."""
        sum_gradients(self.parallel)
        return clip_gradients(self.parallel, max_norm)

    def any(self, value: bool) -> bool:
        """One small sum."""
        return self.total(float(value)) > 0

    def first(self, found: str | None) -> str | None:
        """With the rank."""
        named = [(rank, text) for rank, text in enumerate(everyone(found, self.ranks)) if text]
        return f"rank {named[0][0]}: {named[0][1]}" if named else None

    def share(self, batch: Batch) -> Batch:
        """As even as it gets."""
        tensors = (batch.tokens_BS, batch.targets_BS, batch.domains_BS)
        return Batch(*(tensor.tensor_split(self.ranks.size)[self.ranks.rank] for tensor in tensors))

    def scalars(self, seconds: float) -> dict[str, float]:
        """exposed_communication: the share of the time in which this rank waited for exchanges of tokens. sent_mb: what
        it sent in them.
        """
        taken = [meter.take() for meter in self.parallel.meters.values()]
        return {
            "exposed_communication": sum(waited for waited, _ in taken) / seconds,
            "sent_mb": sum(sent for _, sent in taken) / 1e6,
        }

    # ------------------------------------------------------------------------------------------------- checkpoints

    def save(self, root: Path, step: int, content: Content, optimizer: torch.optim.Optimizer) -> Path:
        """Together, in logical coordinates. Each rank's random state goes with it."""
        named, state = content
        recorder = {name: tensor.clone() for name, tensor in named["recorder"].items()}
        for tensor in recorder.values():
            self.ranks.sum(tensor)
        groups = {
            "model": self._model_shares(named["model"]),
            "optimizer": optimizer_shares(self.parallel, optimizer, named["optimizer"]),
            "recorder": shares_of(self.parallel, recorder, {}),
        }
        described = state["optimizer"] | {"shapes": logical_shapes(self.parallel, optimizer)}
        all_rng: list[Any] = [None] * self.ranks.size
        dist.all_gather_object(all_rng, rng_state(), group=self.ranks.world)
        whole = dict(state) | {"optimizer": described, "rng_of_ranks": all_rng}
        return save_shares(root, step, groups, whole, self.ranks)

    def restore(self, path: Path, model: Decoder, optimizer: torch.optim.Optimizer, recorder: Recorder) -> Restored:
        """To each rank what it holds."""
        step, state = load_shares(path, {"model": self._model_shares(dict(model.state_dict()))}, self.ranks)
        restore_optimizer(path, self.parallel, optimizer, state["optimizer"])
        if self.is_main:  # the others go on with an empty window: what they count is added to it
            window = recorder.state_dict()
            recorder.load_state_dict({name: read_rows(group_file(path, "recorder"), name, None) for name in window})
        return step, state

    def reload(self, path: Path, model: Decoder, optimizer: torch.optim.Optimizer) -> Undo:
        """Each rank its own, all or none."""
        verify_together(path, self.ranks)

        def own() -> Undo:
            weights = read_shares(path, "model", self._model_shares(dict(model.state_dict())))
            described = read_state(path)[1]["optimizer"]
            load = partial(restore_optimizer, path, self.parallel, optimizer, described)
            return _exchange(model, weights, optimizer, load)

        done, problem = self.team.together(own, _take_back, lambda undo: "")
        if done is None:
            raise CheckpointError(problem)
        return done

    def set_rng(self, state: Mapping[str, JSON]) -> None:
        """As it was, on as many ranks; else another for each."""
        of_ranks = state.get("rng_of_ranks", [])
        same = len(of_ranks) == self.ranks.size
        set_rng_state(of_ranks[self.ranks.rank] if same else state["rng"])
        if not same and self.ranks.rank:  # noise must differ from rank to rank
            torch.manual_seed(torch.initial_seed() + self.ranks.rank)

    def _model_shares(self, tensors: Mapping[str, Tensor]) -> dict[str, Share]:
        return shares_of(self.parallel, tensors, expert_tensors(self.parallel, tensors))


def _take_back(undo: Undo) -> None:
    undo()


def _exchange(
    model: Decoder, weights: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, load: Callable[[], None]
) -> Undo:
    """Put in the weights, and have `load` fill the optimizer: both or neither. Returns what undoes both."""
    tensors, described = pack_optimizer(optimizer)
    before = {key: tensor.clone() for key, tensor in tensors.items()}
    done = swap(model, weights, whole=True)
    try:
        load()
    except BaseException:
        done.undo()
        raise

    def undo() -> None:
        done.undo()
        unpack_optimizer(optimizer, before, described)

    return undo
