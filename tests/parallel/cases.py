"""What the ranks train in the tests of this folder, and how: the same code for one process and for many."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from equipoise.layer import Capacity, reduce_and_update
from equipoise.models.config import DecoderConfig, MoEConfig
from equipoise.models.decoder import Decoder
from equipoise.routing import (
    ROUTERS,
    BiasBalance,
    QuantileBalance,
    SparsityCoef,
    SparsityLoss,
    SwitchLoss,
    TopK,
    ZLoss,
)
from equipoise.train.data import IGNORE, Batch
from equipoise.train.step import batch_scopes, count_targets, split, task_loss
from equipoise.types import Placement

B, S, V, E, STEPS, PARTS = 8, 12, 61, 6, 2, 4
CLIP = 0.5


@dataclass(frozen=True)
class Case:
    """moe: fields of MoEConfig. parallel: of ParallelConfig but for the sizes. data: of it, for 2 and 4 processes.

    placement: by the number of ranks in an expert group; move_to: the one after the first step. ignored: targets of
    the batch, from its start, to leave out.
    """

    moe: dict = field(default_factory=dict)
    parallel: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    placement: Callable[[int], Placement] | None = None
    move_to: Callable[[int], Placement] | None = None
    ignored: int = 5


def replicas(ranks: int) -> Placement:
    """Experts 0 and 1 everywhere, the others spread."""
    return Placement(tuple((*(e for e in range(2, E) if e % ranks == rank), 1, 0) for rank in range(ranks)))


def all_on_the_last(ranks: int) -> Placement:
    return Placement((*((),) * (ranks - 1), tuple(reversed(range(E)))))


def turned(ranks: int) -> Placement:
    """No expert where it is at first, unevenly."""
    return Placement(tuple(tuple(e for e in reversed(range(E)) if (e + 1) % ranks == rank) for rank in range(ranks)))


def _router_case(router) -> Case:
    if hasattr(router, "allow_future"):
        router = replace(router, allow_future=True)
    needs = router.traits.needs_loss
    balance = (SparsityLoss(SparsityCoef(1e-3)),) if needs else (SwitchLoss(0.01),)
    return Case({"router": router, "balance": balance}, {"dispatcher": "all_to_all"})


A2A, GATHER = {"dispatcher": "all_to_all"}, {"dispatcher": "all_gather"}
BALANCED = {"router": TopK(k=2), "balance": (SwitchLoss(0.5, "global"), ZLoss(0.1), BiasBalance())}
CASES = {type_.__name__: _router_case(type_()) for type_ in ROUTERS} | {
    "balanced, all_to_all": Case(BALANCED, A2A),
    "balanced, all_gather": Case(BALANCED, GATHER),
    "quantile": Case({"router": TopK(k=3), "balance": (SwitchLoss(0.5, "sequence"), QuantileBalance())}, A2A),
    "capacity": Case({"capacity": Capacity(1.0)}, A2A),
    "next choice, all_gather": Case({"capacity": Capacity(1.0, overflow="next_choice")}, GATHER),
    "spilled": Case({"capacity": Capacity(1.0, overflow="shared"), "shared_experts": 1, "shared_gate": True}, A2A),
    "recomputed": Case(BALANCED | {"checkpoint_experts": True}, A2A),
    "replicas, all_to_all": Case(BALANCED, A2A, placement=replicas),
    "replicas, all_gather": Case(BALANCED, GATHER, placement=replicas),
    "ranks without experts": Case(BALANCED, A2A, placement=all_on_the_last),
    "ranks without experts, all_gather": Case(BALANCED, GATHER, placement=all_on_the_last),
    "two data": Case(BALANCED, A2A, data={2: 2, 4: 2}),
    "two data, replicas": Case(BALANCED, A2A, data={4: 2}, placement=replicas),
    "two nodes": Case(BALANCED, A2A | {"nodes": 2}, placement=replicas),
    "grouped": Case({"router": TopK(k=2, num_groups=3, top_groups=1, score="sigmoid")}, A2A),
    "sharded": Case(BALANCED, A2A | {"shard": True}, data={4: 2}),
    "in three chunks": Case(BALANCED, A2A | {"chunks": 3}),
    "in chunks, capacity": Case(
        {"capacity": Capacity(1.0, overflow="shared"), "shared_experts": 1}, A2A | {"chunks": 2}
    ),
    "moved": Case(BALANCED, A2A, move_to=turned),
    "moved to replicas": Case(BALANCED, A2A, data={4: 2}, placement=turned, move_to=replicas),
    "moved from replicas": Case(BALANCED, A2A, placement=replicas, move_to=all_on_the_last),
    "no targets on a rank": Case(BALANCED, A2A, ignored=B * S // 2),
}


def names_for(world: int, every: bool) -> list[str]:
    """The cases to run with so many processes: every one that fits, or those that tell most."""
    fitting = [name for name, case in CASES.items() if case.parallel.get("nodes", 1) <= world <= PARTS]
    if every or world == PARTS:
        return fitting
    routers = {type_.__name__ for type_ in ROUTERS}
    return [name for name in fitting if name not in routers][: 2 if world == 1 else None]


def build(case: Case) -> Decoder:
    """The whole model, the same wherever it is built."""
    torch.manual_seed(1)
    moe = MoEConfig(num_experts=E, hidden_dim=16, **case.moe)
    sizes = {"vocab_size": V, "dim": 32, "num_layers": 2, "num_heads": 4, "hidden_dim": 32, "max_seq_len": S}
    return Decoder(DecoderConfig(**sizes, moe=moe, init_std=0.3)).double()


def whole_batch(step: int, ignored: int) -> Batch:
    tokens = torch.randint(0, V, (B, S + 1), generator=torch.Generator().manual_seed(step))
    targets = tokens[:, 1:].clone()
    targets.view(-1)[:ignored] = IGNORE
    return Batch(tokens[:, :-1].contiguous(), targets, torch.zeros_like(targets))


def parts_of(case: Case, step: int) -> list[Batch]:
    """The batch as it is always cut, however many processes there are: what a capacity sees does not depend on them."""
    return split(whole_batch(step, case.ignored), PARTS)


def backward(model: Decoder, parts: Sequence[Batch], numbers: Sequence[int], step: int, reduce=None) -> float:
    """Gradients of parts, by their numbers, which seed the noise; returns their share of the loss."""
    torch.manual_seed(step)
    num_targets = torch.tensor(count_targets(parts))
    if reduce is not None:
        reduce(num_targets)
    scopes = batch_scopes(model, parts, step, False, None, reduce)
    total = 0.0
    for part, number, scope in zip(parts, numbers, scopes, strict=True):
        torch.manual_seed(100 * step + number)
        loss = task_loss(model, part, scope, False) / num_targets
        loss.backward()
        total += loss.item()
    return total


def losses_alone(case: Case, steps: int, parts: int) -> list[float]:
    """Of a longer run of one process, each batch in so many parts."""
    model = build(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for step in range(1, steps + 1):
        batch = whole_batch(step, case.ignored)
        losses.append(backward(model, split(batch, parts), range(parts), step))
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        reduce_and_update(model.moe_layers.values(), step=step)
    return losses


def train_alone(case: Case) -> dict[str, torch.Tensor]:
    """One process and the whole model: what all others are compared with."""
    model = build(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    record = {}
    for step in range(1, STEPS + 1):
        record[f"loss.{step}"] = torch.tensor(backward(model, parts_of(case, step), range(PARTS), step)).double()
        record[f"norm.{step}"] = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        record |= {f"grad.{step}.{name}": p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
        reduce_and_update(model.moe_layers.values(), step=step)
    return record | {f"state.{name}": value.double() for name, value in model.state_dict().items()}
