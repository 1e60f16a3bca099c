"""What is planned for a model: ranks, precisions, and the work: training steps, or answers to requests.

A setup is one frozen record, so that whatever would make it fit is a `replace` of some of its fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Literal, get_args

Precision = Literal["fp32", "bf16", "fp8", "int8", "int4", "mxfp4"]
Shard = Literal["none", "dense", "optimizer", "all"]
Optimizer = Literal["adamw", "adamw-master", "adamw-8bit", "sgd"]
Kept = Literal["lean", "naive", "checkpoint-experts", "checkpoint-layers"]
Device = Literal["gpu", "cpu"]

# Bytes per parameter, scales included. fp8: one fp32 scale per 128 x 128 block (DeepSeek-V3, arXiv 2412.19437). int8:
# 16 bits per 128. int4: 16 bits per 32, as GGUF's Q4_0. mxfp4: 8 bits per 32 (OCP Microscaling; gpt-oss' experts).
BYTES: dict[Precision, float] = {
    "fp32": 4.0,
    "bf16": 2.0,
    "fp8": 1.0 + 4 / 128**2,
    "int8": 1.0 + 2 / 128,
    "int4": 0.5 + 2 / 32,
    "mxfp4": 0.5 + 1 / 32,
}


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """expert: ranks that share the experts of each layer. data: copies of that.

    The dense part is on all ranks, each of which computes its own sequences.
    shard: "dense" spreads all but the experts over all ranks (FSDP, as `--parallel.shard`); "optimizer" spreads the
    optimizer's state, the experts' over the copies (ZeRO-1); "all" weights, gradients and state.
    """

    expert: int = 1
    data: int = 1
    shard: Shard = "none"

    def __post_init__(self) -> None:
        for name in ("expert", "data"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1 rank, got {getattr(self, name)}")
        _one_of("shard", self.shard, get_args(Shard))

    @property
    def ranks(self) -> int:
        """All of them."""
        return self.expert * self.data


@dataclass(frozen=True, kw_only=True)
class Training:
    """One optimizer step and all that it keeps.

    optimizer: "adamw" has two states in the weights' precision, as torch; "adamw-master" adds fp32 weights and has fp32
    states; "adamw-8bit" one byte each; "sgd" none. None: adamw for fp32, adamw-master for bf16.
    activations: "lean" is what equipoise's lean experts keep; "naive" is plain autograd, as in its grouped backend, the
    default on a GPU: gathered rows and activations too; "checkpoint-experts" computes MoE layers again in backward,
    "checkpoint-layers" whole layers.
    micro_batches: of a step; with more than 1, gradients are kept in fp32 from one to the next.
    """

    optimizer: Optimizer | None = None
    activations: Kept = "lean"
    micro_batches: int = 1

    def __post_init__(self) -> None:
        _one_of("activations", self.activations, get_args(Kept))
        if self.optimizer is not None:
            _one_of("optimizer", self.optimizer, get_args(Optimizer))
        if self.micro_batches < 1:
            raise ValueError(f"micro_batches: expected at least 1, got {self.micro_batches}")


@dataclass(frozen=True, kw_only=True)
class Serving:
    """cache: precision of keys and values. step_tokens: at most so many tokens of a rank are computed together."""

    cache: Precision = "bf16"
    step_tokens: int = 2048

    def __post_init__(self) -> None:
        _one_of("cache", self.cache, get_args(Precision))
        if self.step_tokens < 1:
            raise ValueError(f"step_tokens: expected at least 1, got {self.step_tokens}")


@dataclass(frozen=True, kw_only=True)
class Setup:
    """batch: sequences per rank, of a micro-batch or at the same time. context: tokens of each.

    precision: of weights. experts: of the routed experts' weights, where it is another. Embedding, head, norms and
    routers are never in less than bf16.
    imbalance: MaxVio of ranks to leave room for, (busiest - mean) / mean; None: see `imbalance.py`.
    offload: share of the routed experts' weights in host memory, and of the optimizer's state where `offload_state`.
    device: "gpu" has fused norms and a fused optimizer; "cpu" what torch does there, which keeps more.
    """

    mesh: Mesh = field(default_factory=Mesh)
    work: Training | Serving = field(default_factory=Serving)
    batch: int = 1
    context: int = 4096
    precision: Precision = "bf16"
    experts: Precision | None = None
    imbalance: float | None = None
    offload: float = 0.0
    offload_state: bool = False
    device: Device = "gpu"

    def __post_init__(self) -> None:
        for name in ("batch", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name, value in (("precision", self.precision), ("experts", self.experts or self.precision)):
            _one_of(name, value, get_args(Precision))
            if isinstance(self.work, Training) and value not in ("fp32", "bf16"):
                raise ValueError(f"{name}: expected fp32 or bf16 in training, got {value}; weights that learn need it")
        if self.imbalance is not None and not 0 <= self.imbalance < inf:
            raise ValueError(f"imbalance: expected a MaxVio of at least 0, got {self.imbalance}")
        if not 0 <= self.offload <= 1:
            raise ValueError(f"offload: expected a share of 0 to 1, got {self.offload}")

    @property
    def tokens(self) -> int:
        """Of a rank, in a micro-batch or cached."""
        return self.batch * self.context

    @property
    def together(self) -> int:
        """Tokens of a rank that go through a layer at the same time."""
        return min(self.tokens, self.work.step_tokens) if isinstance(self.work, Serving) else self.tokens

    @property
    def expert_precision(self) -> Precision:
        """Of the routed experts' weights."""
        return self.experts or self.precision

    @property
    def small_bytes(self) -> int:
        """Per element of activations, embedding, head, norms and routers."""
        return 4 if self.precision == "fp32" else 2


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
