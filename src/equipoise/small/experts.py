"""Experts whose weights are kept in any format and any place: in memory, or in a file with some of them in memory.

It stands where `layer.Experts` stands, and computes the same, one expert after the other. For inference: it refuses
to train. Where weights are is the source's business, how they are multiplied the format's (`ops/packed.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor, nn

from equipoise.layer import Experts, MoE
from equipoise.layer.probed_experts import ExpertProbe
from equipoise.ops import reference
from equipoise.ops.activation import Activation, activate, check_activation, is_gated, pre_activation_dim
from equipoise.ops.lean_experts import scales, segments
from equipoise.ops.native.few import few_experts, is_few, rows_of_expert, stacked_of, sum_of_rows, unsupported_format
from equipoise.ops.packed import Parts, WeightFormat, num_bytes
from equipoise.ops.ragged import RaggedPlan, sum_rows

Packed: TypeAlias = tuple[Parts, Parts]  # of one expert: up (H, D) and down (D, F)
PackedOf: TypeAlias = Callable[[int], Packed]


@dataclass(frozen=True)
class Sizes:
    """Of the experts of one layer. dim: D. hidden_dim: F."""

    num_experts: int
    dim: int
    hidden_dim: int
    activation: Activation

    @property
    def up_shape(self) -> tuple[int, int]:
        """(H, D)."""
        return pre_activation_dim(self.hidden_dim, self.activation), self.dim

    @property
    def up_name(self) -> str:
        """As `layer.Experts` calls it."""
        return "gate_up_proj" if is_gated(self.activation) else "up_proj"

    def described(self, format: WeightFormat) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name, type and shape of the parts of one expert. Raises ValueError for sizes that the format can't take."""
        both = (("up", format.describe(*self.up_shape)), ("down", format.describe(self.dim, self.hidden_dim)))
        return {
            f"{which}_{part}": each
            for which, parts in both
            for part, each in zip(format.part_names, parts, strict=True)
        }

    def expert_bytes(self, format: WeightFormat) -> int:
        """One expert in this format."""
        return num_bytes(list(self.described(format).values()))


def experts_of(layer: MoE) -> Experts | StoredExperts:
    """What is in its place for experts. Raises ValueError for neither of the two."""
    experts = layer.get_submodule("experts")
    if not isinstance(experts, Experts | StoredExperts):
        raise ValueError(f"experts: expected equipoise's, got {type(experts).__name__}")
    return experts


def sizes_of(layer: MoE) -> Sizes:
    """Of a layer's experts. Raises ValueError for experts with biases, which no format keeps."""
    experts = experts_of(layer)
    if experts.biases is not None:
        raise ValueError("experts: expected none with biases (as gpt-oss has); those can't be quantised or offloaded")
    return Sizes(experts.num_experts, experts.dim, experts.hidden_dim, check_activation(experts.activation))


def packing(format: WeightFormat, weights_of: Callable[[int], tuple[Tensor, Tensor]]) -> PackedOf:
    """Experts in a format, of a function that has their weights (up (H, D), down (D, F))."""

    def packed_of(expert: int) -> Packed:
        up, down = weights_of(expert)
        return format.pack(up), format.pack(down)

    return packed_of


class Source(Protocol):
    """Where the experts of one layer are."""

    def order(self, plan: RaggedPlan, num_tokens: int, busy: Sequence[int]) -> Sequence[int]:
        """Before a forward: the busy experts in the order in which to take them."""
        ...

    def take(self, expert: int) -> Packed:
        """Its weights, in memory until `give_back`."""
        ...

    def all(self) -> Packed | None:
        """The weights of all, stacked, where they are in memory side by side."""
        ...

    def give_back(self, expert: int) -> None:
        """They are not needed any more."""
        ...

    def replaced(self, plain: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights as `layer.Experts` names them, in this source's own names and form, for a swap.

        Raises ValueError where it can't take others.
        """
        ...


class Resident(nn.Module):
    """All of them in memory, stacked by part, in buffers: (E, ...) each, in the state dict."""

    def __init__(self, sizes: Sizes, format: WeightFormat, packed_of: PackedOf) -> None:
        super().__init__()
        self.sizes, self.format = sizes, format
        for name, stacked in self._stacked(packed_of).items():
            self.register_buffer(name, stacked)
        self._names = tuple(sizes.described(format))

    def order(self, plan: RaggedPlan, num_tokens: int, busy: Sequence[int]) -> Sequence[int]:
        """As they come."""
        return busy

    def take(self, expert: int) -> Packed:
        """Views."""
        up, down = self.all()
        return tuple(part[expert] for part in up), tuple(part[expert] for part in down)

    def all(self) -> Packed:
        """The buffers."""
        parts = tuple(getattr(self, name) for name in self._names)
        return parts[: len(parts) // 2], parts[len(parts) // 2 :]

    def give_back(self, expert: int) -> None:
        """Nothing to do."""

    def replaced(self, plain: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Packed in the same format."""
        up_eHD, down_eDF = plain[self.sizes.up_name], plain["down_proj"]
        return self._stacked(packing(self.format, lambda expert: (up_eHD[expert], down_eDF[expert])))

    def _stacked(self, packed_of: PackedOf) -> dict[str, Tensor]:
        """One expert after the other: there is never more than one in another form."""
        described = self.sizes.described(self.format)
        stacked = {
            name: torch.empty(self.sizes.num_experts, *shape, dtype=dtype) for name, (dtype, shape) in described.items()
        }
        for expert in range(self.sizes.num_experts):
            up, down = packed_of(expert)
            for name, part in zip(described, (*up, *down), strict=True):
                stacked[name][expert].copy_(part)
        return stacked


class StoredExperts(nn.Module):
    """E feed-forward networks in a source. Each row's weighted sum over its experts, as `layer.Experts` computes it.

    dtype: of the model around them; all but the products is computed in it. probes: see `layer.Experts`. Outputs are
    those of the lean backend with the weights that the format unpacks to; in the format "full" with the same bits.
    """

    probes: tuple[ExpertProbe, ...] = ()
    biases: None = None  # as `layer.Experts` has them; there are none here

    def __init__(self, sizes: Sizes, format: WeightFormat, source: Source, dtype: torch.dtype) -> None:
        super().__init__()
        self.sizes, self.format, self.source = sizes, format, source
        self.num_experts, self.dim, self.hidden_dim = sizes.num_experts, sizes.dim, sizes.hidden_dim
        self.activation, self.dtype, self.device = sizes.activation, dtype, torch.device("cpu")

    def forward(self, x: Tensor, plan: RaggedPlan) -> Tensor:
        """(T, D) in x's dtype. Raises RuntimeError where it would be trained."""
        self._check_use(x)
        if is_few(len(plan.token_ids_R), self.num_experts) and not self.not_native:
            return self._few(x.to(self.dtype), plan).to(x.dtype)
        x_TD, start = x.to(self.dtype), 0
        rounded = self.format.dtype if self.format.rounds_rows else torch.float32
        rows = {expert: (own, tiled) for expert, own, tiled in segments(plan.counts_e, len(plan.token_ids_R), rounded)}
        y_RD = x_TD.new_empty(len(plan.token_ids_R), x_TD.shape[1])
        for expert in self.source.order(plan, x_TD.shape[0], list(rows)):
            own, tiled = rows[expert]
            with self._probed(expert, own):
                y_RD[own] = self._one(expert, x_TD, plan, own, tiled)
            start = max(start, own.stop)
        y_RD[start:].zero_()  # dropped rows
        return sum_rows(y_RD, plan.token_ids_R, plan.rows_TK, x_TD.shape[0]).to(x.dtype)

    @property
    def not_native(self) -> str:
        """Why the experts of few rows are not computed by native code; "" if they are."""
        if self.dtype not in (torch.float32, torch.bfloat16):
            return f"no native code for a model in {self.dtype}"
        return unsupported_format(self.format, self.dim, self.hidden_dim, self.activation)

    def _few(self, x_TD: Tensor, plan: RaggedPlan) -> Tensor:
        """By native code: in one call where all experts are in memory and nobody observes them, else one by one.

        Both give the same bits.
        """
        everything = None if self.probes else self.source.all()
        if everything is not None:
            return few_experts(x_TD, plan, stacked_of(self.format, *everything))
        rows, start = {}, 0
        for expert, count in enumerate(plan.counts_e.tolist()):
            if count:
                rows[expert] = slice(start, start + count)
            start += count
        y_RD = torch.empty(start, x_TD.shape[1])
        for expert in self.source.order(plan, x_TD.shape[0], list(rows)):
            own = rows[expert]
            with self._probed(expert, own):
                up, down = self.source.take(expert)
                try:
                    weights = stacked_of(self.format, up, down)
                    rows_of_expert(x_TD, plan.token_ids_R[own], plan.weights_R[own], weights, y_RD[own])
                finally:
                    self.source.give_back(expert)
        return sum_of_rows(y_RD, plan.token_ids_R, x_TD)

    @contextmanager
    def _probed(self, expert: int, own: slice) -> Iterator[None]:
        """The observers are told of what is computed in between."""
        for probe in self.probes:
            probe.begin(expert, own.stop - own.start)
        yield
        for probe in reversed(self.probes):
            probe.end(expert)

    def _one(self, expert: int, x_TD: Tensor, plan: RaggedPlan, own: slice, tiled: slice) -> Tensor:
        """The rows of one expert, which is held only as long as that takes."""
        x_n = x_TD.index_select(0, plan.token_ids_R[tiled])
        up, down = self.source.take(expert)
        try:
            a_n = activate(self.format.product(x_n, up), self.activation)
            a_n.mul_(scales(plan.weights_R, own, tiled, x_TD.dtype))
            return self.format.product(a_n, down)[: own.stop - own.start]
        finally:
            self.source.give_back(expert)

    def weights_of(self, expert: int) -> tuple[Tensor, Tensor]:
        """fp32 (up (H, D), down (D, F)) of one expert, unpacked: for whoever looks at weights."""
        up, down = self.source.take(expert)
        try:
            return self.format.unpack(up), self.format.unpack(down)
        finally:
            self.source.give_back(expert)

    def from_plain(self, plain: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights as a checkpoint has them, in the names and form of this module's state dict: what a swap takes.

        Raises ValueError where these experts can't be replaced, or the weights don't fit.
        """
        wanted = {self.sizes.up_name: (self.num_experts, *self.sizes.up_shape)}
        wanted["down_proj"] = (self.num_experts, self.dim, self.hidden_dim)
        shapes = {name: tuple(tensor.shape) for name, tensor in plain.items()}
        if shapes != wanted:
            raise ValueError(f"experts: expected weights {wanted}, got {shapes}; load weights of this very model")
        return {f"source.{name}": tensor for name, tensor in self.source.replaced(plain).items()}

    def extra_repr(self) -> str:
        """Sizes, and how they are kept."""
        return (
            f"num_experts={self.num_experts}, dim={self.dim}, hidden_dim={self.hidden_dim}, "
            f"activation={self.activation}, format={self.format.name} in {self.format.dtype}"
        )

    def _check_use(self, x: Tensor) -> None:
        if self.training or (torch.is_grad_enabled() and x.requires_grad):
            what = "the model is in training mode" if self.training else "a gradient is asked for"
            raise RuntimeError(
                f"experts in {self.format.name} are for inference, and {what}: call eval(), and compute under "
                "torch.inference_mode(); to train, load the model without quantisation or offloading"
            )


def reference_stored(experts: StoredExperts, x: Tensor, plan: RaggedPlan) -> Tensor:
    """The slow twin of `StoredExperts`: all weights unpacked to fp32, then one assignment at a time."""
    ups, downs = zip(*(experts.weights_of(expert) for expert in range(experts.num_experts)), strict=True)
    num_rows = int(plan.counts_e.sum())
    expert_ids_R = torch.repeat_interleave(torch.arange(experts.num_experts), plan.counts_e)
    args = (plan.token_ids_R[:num_rows], expert_ids_R, plan.weights_R[:num_rows], torch.stack(ups), torch.stack(downs))
    return reference.experts(x.float(), *args, experts.activation).to(x.dtype)
