"""What would make it fit: changes of a setup, in the order of what they cost in quality, with the bytes that result.

First what changes nothing but time, then what takes less work at once, then what rounds, then what is slow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from equipoise.plan.fit.architecture import Architecture
from equipoise.plan.fit.memory import Memory, memory, optimizer_of
from equipoise.plan.fit.setup import BYTES, Serving, Setup, Training

MOST_RANKS = 4096


@dataclass(frozen=True)
class Remedy:
    """One change. cost: in words. setup: with it. memory: of a rank then. fits: alone.

    with_earlier: bytes with this and all earlier ones; enough: whether they fit together.
    """

    what: str
    cost: str
    setup: Setup
    memory: Memory
    fits: bool
    with_earlier: int
    enough: bool

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "what": self.what,
            "cost": self.cost,
            "bytes": self.memory.total,
            "host_bytes": self.memory.host,
            "fits": self.fits,
            "with_earlier": self.with_earlier,
            "enough": self.enough,
            "setup": asdict(self.setup),
        }


Change = Callable[[Architecture, Setup], Setup | None]


def remedies(model: Architecture, setup: Setup, limit: int) -> list[Remedy]:
    """All changes that lower the memory of a rank, alone and with those before them. limit: bytes of a rank."""
    found: list[Remedy] = []
    now, together = memory(model, setup).total, setup
    for what, cost, change in CHANGES:
        alone = change(model, setup)
        if alone is None:
            continue
        size = memory(model, alone)
        if size.total >= now:
            continue
        after = change(model, together)
        if after is not None and memory(model, after).total < memory(model, together).total:
            together = after
        whole = memory(model, together).total
        said = what.format(**_words(alone))
        found.append(Remedy(said, cost, alone, size, size.total <= limit, whole, whole <= limit))
    return found


def _words(setup: Setup) -> dict[str, Any]:
    micro = setup.work.micro_batches if isinstance(setup.work, Training) else 1
    step = setup.work.step_tokens if isinstance(setup.work, Serving) else 0
    mesh = setup.mesh
    return {
        "expert": mesh.expert,
        "data": mesh.data,
        "ranks": mesh.ranks,
        "batch": setup.batch,
        "context": setup.context,
        "micro": micro,
        "step": step,
    }


# ---------------------------------------------------------------------------------------------- without loss


def _shard_optimizer(model: Architecture, setup: Setup) -> Setup | None:
    if not isinstance(setup.work, Training) or setup.mesh.shard != "none" or setup.mesh.ranks == 1:
        return None
    return replace(setup, mesh=replace(setup.mesh, shard="optimizer"))


def _shard_all(model: Architecture, setup: Setup) -> Setup | None:
    if not isinstance(setup.work, Training) or setup.mesh.shard == "all" or setup.mesh.ranks == 1:
        return None
    return replace(setup, mesh=replace(setup.mesh, shard="all"))


def _lean(model: Architecture, setup: Setup) -> Setup | None:
    return _kept(setup, "lean") if _keeps(setup) == "naive" else None


def _checkpoint_experts(model: Architecture, setup: Setup) -> Setup | None:
    return _kept(setup, "checkpoint-experts") if _keeps(setup) in ("lean", "naive") and model.routed else None


def _checkpoint_layers(model: Architecture, setup: Setup) -> Setup | None:
    return _kept(setup, "checkpoint-layers") if _keeps(setup) not in ("", "checkpoint-layers") else None


def _keeps(setup: Setup) -> str:
    return setup.work.activations if isinstance(setup.work, Training) else ""


def _kept(setup: Setup, mode: Any) -> Setup:
    assert isinstance(setup.work, Training)
    return replace(setup, work=replace(setup.work, activations=mode))


def _copies_to_experts(model: Architecture, setup: Setup) -> Setup | None:
    """The same ranks, experts spread further."""
    if model.routed is None:
        return None
    ranks = setup.mesh.ranks
    possible = [n for n in range(1, ranks + 1) if ranks % n == 0 and model.routed.num % n == 0]
    most = max(possible, default=1)
    if most <= setup.mesh.expert:
        return None
    return replace(setup, mesh=replace(setup.mesh, expert=most, data=ranks // most))


def _more_ranks(times: int) -> Change:
    """For the experts if they can be spread so, else for copies if anything is sharded over them."""

    def change(model: Architecture, setup: Setup) -> Setup | None:
        mesh = setup.mesh
        if mesh.ranks * times > MOST_RANKS:
            return None
        if model.routed is not None and model.routed.num % (times * mesh.expert) == 0:
            return replace(setup, mesh=replace(mesh, expert=times * mesh.expert))
        return replace(setup, mesh=replace(mesh, data=times * mesh.data)) if mesh.shard != "none" else None

    return change


def _smaller_steps(model: Architecture, setup: Setup) -> Setup | None:
    if not isinstance(setup.work, Serving) or setup.together <= 512:
        return None
    return replace(setup, work=replace(setup.work, step_tokens=512))


def _micro_batches(model: Architecture, setup: Setup) -> Setup | None:
    if not isinstance(setup.work, Training) or setup.batch == 1:
        return None
    work = replace(setup.work, micro_batches=setup.work.micro_batches * setup.batch)
    return replace(setup, batch=1, work=work)


# ---------------------------------------------------------------------------------------------- with loss


def _batch(model: Architecture, setup: Setup) -> Setup | None:
    return replace(setup, batch=setup.batch // 2) if setup.batch > 1 and isinstance(setup.work, Serving) else None


def _context(model: Architecture, setup: Setup) -> Setup | None:
    return replace(setup, context=setup.context // 2) if setup.context > 1024 else None


def _cache(model: Architecture, setup: Setup) -> Setup | None:
    if not isinstance(setup.work, Serving) or BYTES[setup.work.cache] <= BYTES["fp8"]:
        return None
    return replace(setup, work=replace(setup.work, cache="fp8"))


def _experts(precision: Any) -> Change:
    def change(model: Architecture, setup: Setup) -> Setup | None:
        if isinstance(setup.work, Training) or model.routed is None:
            return None
        return replace(setup, experts=precision) if BYTES[setup.expert_precision] > BYTES[precision] else None

    return change


def _weights(precision: Any) -> Change:
    def change(model: Architecture, setup: Setup) -> Setup | None:
        if isinstance(setup.work, Training) or BYTES[setup.precision] <= BYTES[precision]:
            return None
        experts = setup.experts if setup.experts and BYTES[setup.experts] < BYTES[precision] else None
        return replace(setup, precision=precision, experts=experts)

    return change


def _low_precision(model: Architecture, setup: Setup) -> Setup | None:
    if not isinstance(setup.work, Training) or setup.precision == "bf16":
        return None
    return replace(setup, precision="bf16", work=replace(setup.work, optimizer="adamw-master"))


def _eight_bit(model: Architecture, setup: Setup) -> Setup | None:
    if not isinstance(setup.work, Training) or optimizer_of(setup) in ("adamw-8bit", "sgd"):
        return None
    return replace(setup, work=replace(setup.work, optimizer="adamw-8bit"))


def _offload_state(model: Architecture, setup: Setup) -> Setup | None:
    if not isinstance(setup.work, Training) or setup.offload_state:
        return None
    return replace(setup, offload_state=True)


def _offload(share: float) -> Change:
    def change(model: Architecture, setup: Setup) -> Setup | None:
        if isinstance(setup.work, Training) or model.routed is None or setup.offload >= share:
            return None
        return replace(setup, offload=share)

    return change


EXACT, LESS, ROUNDED = "none: same results", "none, but less at once", "rounding"
CHANGES: tuple[tuple[str, str, Change], ...] = (
    ("experts over {expert} of the ranks there are", f"{EXACT}; more is sent", _copies_to_experts),
    ("shard the optimizer's state", f"{EXACT}; one more gather per step", _shard_optimizer),
    ("lean experts", EXACT, _lean),
    ("compute the experts again in backward", f"{EXACT}; a forward of the experts more", _checkpoint_experts),
    ("{micro} micro-batches of 1 sequence", f"{EXACT}; smaller products", _micro_batches),
    ("compute whole layers again in backward", f"{EXACT}; a forward more", _checkpoint_layers),
    ("steps of at most {step} tokens", f"{EXACT}; longer prefill", _smaller_steps),
    ("shard weights, gradients and state", f"{EXACT}; weights are gathered per layer", _shard_all),
    ("twice the ranks: {ranks}", f"{EXACT}; twice the machines", _more_ranks(2)),
    ("four times the ranks: {ranks}", f"{EXACT}; four times the machines", _more_ranks(4)),
    ("state of the optimizer in host memory", f"{EXACT}; a slow optimizer step", _offload_state),
    ("half the sequences at once: {batch}", LESS, _batch),
    ("half the context: {context}", "long inputs are cut", _context),
    ("KV cache in fp8", f"{ROUNDED}, little", _cache),
    ("bf16 weights with an fp32 master", f"{ROUNDED} of products", _low_precision),
    ("optimizer's state in 8 bits", f"{ROUNDED} of steps; no fp32 master", _eight_bit),
    ("experts in int8", f"{ROUNDED}, little", _experts("int8")),
    ("experts in fp8", f"{ROUNDED}, little", _experts("fp8")),
    ("all weights in fp8", f"{ROUNDED}, little", _weights("fp8")),
    ("experts in int4", f"{ROUNDED}; measure it", _experts("int4")),
    ("all weights in int4", f"{ROUNDED}; measure it", _weights("int4")),
    ("half the experts in host memory", f"{EXACT}; slow: misses wait for the host's link", _offload(0.5)),
    ("all experts in host memory", f"{EXACT}; very slow", _offload(1.0)),
)
