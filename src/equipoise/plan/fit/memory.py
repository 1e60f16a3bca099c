"""Memory of one rank, at the moment when it is fullest.

Not everything is there at the same time: in backward, gradients come as activations go. So a training step is a list
of moments (the loss, the backward of each layer, the optimizer), each a sum of parts, and the fullest one counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from equipoise.plan.fit import activations as act
from equipoise.plan.fit.architecture import Architecture
from equipoise.plan.fit.communication import cache_bytes, destinations
from equipoise.plan.fit.imbalance import max_vio
from equipoise.plan.fit.parameters import Parameters, parameters
from equipoise.plan.fit.setup import BYTES, Kept, Mesh, Optimizer, Setup, Training

GIB = 2**30
# Bytes of optimizer state per parameter besides those that depend on the weights' precision.
STATES: dict[Optimizer, int] = {"adamw-master": 12, "adamw-8bit": 2, "sgd": 0}
PARTS = (
    "dense weights",
    "expert weights",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "KV cache",
    "temporaries",
    "exchange buffers",
    "imbalance headroom",
)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank by part (`PARTS`) at the fullest moment. max_vio: of ranks, that the headroom is for.

    host: bytes in host memory instead.
    """

    moment: str
    parts: dict[str, int]
    max_vio: float
    host: int = 0

    @property
    def total(self) -> int:
        """Of all parts."""
        return sum(self.parts.values())

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"total": self.total}


def memory(model: Architecture, setup: Setup) -> Memory:
    """Of the busiest rank. Raises ValueError for a mesh that the model does not fit on."""
    check(model, setup)
    held = _held(model, setup)
    moments = _training(model, setup) if isinstance(setup.work, Training) else _serving(model, setup)
    vio = _max_vio(model, setup)
    best: Memory | None = None
    for name, parts, rows in moments:
        parts = held | parts | _exchange(model, setup, vio, rows)
        found = Memory(name, {part: parts.get(part, 0) for part in PARTS}, vio, _host(model, setup))
        if best is None or found.total > best.total:
            best = found
    assert best is not None
    return best


def check(model: Architecture, setup: Setup) -> None:
    """Raise ValueError where the experts can't be spread so, or the context is longer than the model's positions."""
    ranks = setup.mesh.expert
    if ranks > 1 and model.routed is None:
        raise ValueError(f"expert: expected 1 rank for {model.name}, which has no experts, got {ranks}; use data")
    if model.routed is not None and (ranks > model.routed.num or model.routed.num % ranks):
        raise ValueError(
            f"expert: expected a divisor of the {model.routed.num} experts of {model.name}, got {ranks}; each rank "
            "holds equally many"
        )
    if model.positions and setup.context > model.positions:
        raise ValueError(f"context: expected at most {model.positions} tokens for {model.name}, got {setup.context}")


# ---------------------------------------------------------------------------------------------- what is always there


def weight_bytes(model: Architecture, setup: Setup, counts: Parameters) -> tuple[float, float]:
    """(all but the routed experts, routed experts) of the whole model."""
    small = counts.embedding + counts.head + counts.norm + counts.router
    matrices = counts.outside_experts - small
    dense = small * setup.small_bytes + matrices * BYTES[setup.precision]
    return dense, counts.experts * BYTES[setup.expert_precision]


def _shares(mesh: Mesh, what: str) -> tuple[float, float]:
    """(share of the dense part, share of the experts) of weights, gradients or optimizer state on one rank."""
    dense = mesh.shard in ("all", "dense") or (mesh.shard == "optimizer" and what == "optimizer")
    experts = mesh.shard == "all" or (mesh.shard == "optimizer" and what == "optimizer")
    return 1 / mesh.ranks if dense else 1.0, 1 / (mesh.expert * (mesh.data if experts else 1))


def optimizer_of(setup: Setup) -> Optimizer:
    """The one that is asked for, or that goes with the precision."""
    assert isinstance(setup.work, Training)
    return setup.work.optimizer or ("adamw" if setup.precision == "fp32" else "adamw-master")


def state_bytes(optimizer: Optimizer, size: float) -> float:
    """Per parameter whose weight has that size."""
    return 2 * size if optimizer == "adamw" else float(STATES[optimizer])


def _held(model: Architecture, setup: Setup) -> dict[str, int]:
    """Weights and optimizer state on this rank."""
    counts = parameters(model)
    dense, experts = weight_bytes(model, setup, counts)
    dense_share, expert_share = _shares(setup.mesh, "weights")
    here = 1 - setup.offload
    held = {"dense weights": round(dense * dense_share), "expert weights": round(experts * expert_share * here)}
    if isinstance(setup.work, Training) and not setup.offload_state:
        held["optimizer"] = round(_states(setup, counts))
    return held


def _states(setup: Setup, counts: Parameters) -> float:
    dense_share, expert_share = _shares(setup.mesh, "optimizer")
    per_parameter = state_bytes(optimizer_of(setup), setup.small_bytes)
    return per_parameter * (counts.outside_experts * dense_share + counts.experts * expert_share)


def _host(model: Architecture, setup: Setup) -> int:
    counts = parameters(model)
    _, experts = weight_bytes(model, setup, counts)
    moved = experts * _shares(setup.mesh, "weights")[1] * setup.offload
    if isinstance(setup.work, Training) and setup.offload_state:
        moved += _states(setup, counts)
    return round(moved)


# ---------------------------------------------------------------------------------------------- moments

Moment = tuple[str, dict[str, int], int]  # name, parts, and bytes of them that grow with the rank's load


def _serving(model: Architecture, setup: Setup) -> Iterator[Moment]:
    cache = cache_bytes(model, setup)
    temporary = act.serving_temporaries(model, setup)
    yield "a layer's forward", {"KV cache": cache, "temporaries": temporary.total}, temporary.rows
    logits = setup.batch * model.vocab * setup.small_bytes
    stream = setup.small_bytes * setup.together * model.dim
    yield "logits", {"KV cache": cache, "logits": logits, "temporaries": stream}, 0


@dataclass(frozen=True)
class _Gradients:
    """Bytes on this rank. size: of an element."""

    size: int
    dense_share: float
    expert_share: float

    def of(self, dense: int, experts: int = 0) -> int:
        """Of so many parameters of the whole model."""
        return round(self.size * (dense * self.dense_share + experts * self.expert_share))


def _training(model: Architecture, setup: Setup) -> Iterator[Moment]:
    """The loss; the backward of each layer, from the last one; the optimizer."""
    assert isinstance(setup.work, Training)
    counts, mode = parameters(model), setup.work.activations
    size = 4 if setup.work.micro_batches > 1 else setup.small_bytes
    share = _Gradients(size, *_shares(setup.mesh, "gradients"))
    whole = share.of(counts.outside_experts, counts.experts)
    stay = setup.work.micro_batches > 1  # they are there from the first micro-batch on
    kept = [act.layer_kept(model, layer, setup, mode) for layer in range(model.layers)]
    below = act.Sizes(act.head_kept(model, setup))
    for each in kept:
        below += each
    gathered = _gathered(model, setup, counts)
    logits = act.logits_in_training(model, setup)
    parts = {"activations": below.total, "logits": logits, "gradients": whole if stay else 0, "temporaries": gathered}
    yield "the loss", parts, below.rows
    done = share.of(counts.embedding if model.tied else counts.head)
    below = act.Sizes(below.fixed - act.head_kept(model, setup), below.rows)
    for layer in reversed(range(model.layers)):
        again = _recomputed(model, layer, setup, mode)
        temporary = act.backward_temporaries(model, layer, setup, "naive" if mode == "naive" else "lean") + again
        attention, rest, experts = _layer_parameters(model, layer, counts)
        here = share.of(rest if layer in model.moe_layers else rest // model.matrices, experts)  # so far
        there = whole if stay else done + here
        parts = {"activations": below.total, "gradients": there, "temporaries": temporary.total + gathered}
        yield f"backward of layer {layer}", parts, below.rows + temporary.rows
        done += share.of(attention + rest, experts)
        below = act.Sizes(below.fixed - kept[layer].fixed, below.rows - kept[layer].rows)
    yield "the optimizer", {"gradients": whole, "temporaries": _optimizer_temporaries(model, setup)}, 0


def _recomputed(model: Architecture, layer: int, setup: Setup, mode: Kept) -> act.Sizes:
    """What a checkpointed layer has again before its own backward begins."""
    if mode == "checkpoint-layers":  # whose input is what the first norm keeps, but for an fp32 copy of bf16
        same = setup.device == "gpu" or setup.precision == "fp32"
        again = act.layer_kept(model, layer, setup, "lean")
        return act.Sizes(again.fixed - (setup.small_bytes * setup.together * model.dim if same else 0), again.rows)
    if mode == "checkpoint-experts" and layer in model.moe_layers:
        return act.moe_kept(model, setup, "lean")
    return act.Sizes()


def _layer_parameters(model: Architecture, layer: int, counts: Parameters) -> tuple[int, int, int]:
    """(attention and norms, feed-forward part or shared experts and router, routed experts) of a layer."""
    attention = model.attention.parameters(model.dim) + 2 * model.dim * model.norm_size
    if layer not in model.moe_layers:
        return attention, model.feed_forward(model.hidden_dim, model.ffn_bias), 0
    return attention, (counts.shared + counts.router) // model.num_moe, counts.experts // model.num_moe


def _gathered(model: Architecture, setup: Setup, counts: Parameters) -> int:
    """Weights of one layer that sharding brings together for its products, and their gradients as a whole."""
    if setup.mesh.shard not in ("dense", "all"):
        return 0
    most = 0
    for layer in {0, model.layers - 1}:
        attention, rest, experts = _layer_parameters(model, layer, counts)
        here = experts // setup.mesh.expert if setup.mesh.shard == "all" else 0
        most = max(most, attention + rest + here)
    return 2 * most * setup.small_bytes


def _optimizer_temporaries(model: Architecture, setup: Setup) -> int:
    """Two of the size of the largest parameter; none in a fused kernel, which is what a GPU is taken to have."""
    if optimizer_of(setup) == "sgd" or setup.offload_state or setup.device == "gpu":
        return 0
    dense_share, expert_share = _shares(setup.mesh, "optimizer")
    largest = model.vocab * model.dim * dense_share
    if model.num_dense:
        largest = max(largest, (model.matrices - 1) * model.dim * model.hidden_dim * dense_share)
    if model.routed is not None:
        stacked = model.routed.num * (model.matrices - 1) * model.dim * model.routed.hidden_dim
        largest = max(largest, stacked * expert_share)
    return round(2 * largest * setup.small_bytes)


# ---------------------------------------------------------------------------------------------- between ranks


def _max_vio(model: Architecture, setup: Setup) -> float:
    if model.routed is None:
        return 0.0
    return max_vio(setup.together * model.routed.k * setup.mesh.expert, setup.mesh.expert, setup.imbalance)


def _exchange(model: Architecture, setup: Setup, vio: float, rows: int) -> dict[str, int]:
    """Buffers of one layer's dispatch and combine, sent and received; and what the busiest rank has more of."""
    if model.routed is None or setup.mesh.expert == 1:
        return {"exchange buffers": 0, "imbalance headroom": 0}
    copies = destinations(setup.mesh.expert, model.routed, remote=True)
    one = round(setup.together * copies * model.dim * setup.small_bytes)
    return {"exchange buffers": 4 * one, "imbalance headroom": round(vio * (rows + 2 * one))}
