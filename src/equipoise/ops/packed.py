"""One weight (O, I) as it is kept in memory, and the product with it: as it is, in int8, or in int4.

int8: one scale per output channel, w = q * scale, q in -127..127. int4: a scale and a zero per `group` of weights of
an output channel, w = (q - 8) * scale + zero, q in 0..15. The products are torch's CPU kernels, `_weight_int8pack_mm`
and `_weight_int4pack_mm_for_cpu`, which read the few bits. They are made for activations in bfloat16: in float32 they
take 10 to 40 times as long as a plain product, so that type is there for comparisons. The slow twins are `unpack` and
`dequantised`. For inference: no gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

Parts: TypeAlias = tuple[Tensor, ...]
Described: TypeAlias = tuple[torch.dtype, tuple[int, ...]]

GROUPS = (32, 64, 128)  # that the int4 kernel takes
_CHANNELS = 16  # int4: the kernel packs so many output channels together
_STEP = 16  # int8: in bfloat16 the kernel reads so many inputs at a time, also past the end of a row
_MANY = 32  # rows: from here on unpacking the weight takes less time than it saves
_TYPES = (torch.float32, torch.bfloat16)


class WeightFormat(Protocol):
    """How weights are kept. dtype: of products, and of scales. part_names: of what `pack` makes of a weight."""

    @property
    def name(self) -> str:
        """As it is asked for: "full", "int8", "int4-64"."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """That products are computed in."""
        ...

    @property
    def part_names(self) -> tuple[str, ...]:
        """What the tensors of `pack` are called."""
        ...

    @property
    def rounds_rows(self) -> bool:
        """Whether a product is compiled anew for each number of rows, see `ops.lean_experts.segments`."""
        ...

    def describe(self, out_dim: int, in_dim: int) -> tuple[Described, ...]:
        """(type, shape) of each part. Raises ValueError for sizes that this format can't take."""
        ...

    def pack(self, weight_OI: Tensor) -> Parts:
        """Keep a weight. Raises ValueError for one that is not finite, or of sizes that this format can't take."""
        ...

    def unpack(self, parts: Parts) -> Tensor:
        """(O, I) fp32: the weight that `product` multiplies with."""
        ...

    def product(self, x_nI: Tensor, parts: Parts) -> Tensor:
        """(n, O) in x's type: x times the transposed weight, computed in `dtype`."""
        ...


@dataclass(frozen=True)
class Full:
    """The weight itself, in `dtype`."""

    dtype: torch.dtype = torch.float32

    name = "full"
    part_names = ("weight",)

    @property
    def rounds_rows(self) -> bool:
        """Low precision goes through a library that compiles."""
        return self.dtype in (torch.bfloat16, torch.float16)

    def describe(self, out_dim: int, in_dim: int) -> tuple[Described, ...]:
        """One part."""
        return ((self.dtype, (out_dim, in_dim)),)

    def pack(self, weight_OI: Tensor) -> Parts:
        """A cast; what is not finite stays so."""
        return (weight_OI.detach().to(self.dtype).contiguous(),)

    def unpack(self, parts: Parts) -> Tensor:
        """A copy, in fp32: the part may be overwritten."""
        return parts[0].to(torch.float32, copy=True)

    def product(self, x_nI: Tensor, parts: Parts) -> Tensor:
        """An ordinary one."""
        return x_nI.to(self.dtype).mm(parts[0].t()).to(x_nI.dtype)


@dataclass(frozen=True)
class Int8:
    """One byte per weight, and a scale per output channel. The error of a weight is at most half its scale.

    Many rows are multiplied with a weight that is unpacked for them: the kernel reads it anew for every few.
    """

    dtype: torch.dtype = torch.bfloat16

    name = "int8"
    part_names = ("values", "scales")
    rounds_rows = True

    def __post_init__(self) -> None:
        _check_type(self.name, self.dtype)

    def describe(self, out_dim: int, in_dim: int) -> tuple[Described, ...]:
        """(O, I) and (O,)."""
        if in_dim % _STEP:
            raise ValueError(
                f"{self.name}: expected inputs in multiples of {_STEP}, got {in_dim}: torch's kernel would read past "
                "the weights; keep these experts in full"
            )
        return (torch.int8, (out_dim, in_dim)), (self.dtype, (out_dim,))

    def pack(self, weight_OI: Tensor) -> Parts:
        """Round to the nearest step."""
        self.describe(*weight_OI.shape)
        weight_OI = _finite(self.name, weight_OI)
        scale_O = (weight_OI.abs().amax(1) / 127).to(self.dtype)
        scale_O = torch.where(scale_O > 0, scale_O, torch.ones_like(scale_O))  # all zeros: any scale will do
        values_OI = (weight_OI / scale_O.float()[:, None]).round_().clamp_(-127, 127)
        return values_OI.to(torch.int8), scale_O

    def unpack(self, parts: Parts) -> Tensor:
        """q * scale."""
        values_OI, scale_O = parts
        return values_OI.float() * scale_O.float()[:, None]

    def product(self, x_nI: Tensor, parts: Parts) -> Tensor:
        """By torch's kernel, or with the weight unpacked in `dtype`."""
        x_n, (values_OI, scale_O) = x_nI.to(self.dtype), parts
        if x_n.shape[0] >= _MANY:
            return x_n.mm((values_OI * scale_O[:, None]).t()).to(x_nI.dtype)
        return torch._weight_int8pack_mm(x_n, values_OI, scale_O).to(x_nI.dtype)


@dataclass(frozen=True)
class Int4:
    """Half a byte per weight, and a scale and a zero per group. The error of a weight is at most half its scale.

    In bfloat16 a zero is rounded too, by at most |zero| / 256, which adds to it. Values are kept in the kernel's own
    order, which depends on the processor: they are for this machine.
    """

    group: int = 64
    dtype: torch.dtype = torch.bfloat16

    part_names = ("values", "scales_and_zeros")
    rounds_rows = False

    def __post_init__(self) -> None:
        _check_type(self.name, self.dtype)
        if self.group not in GROUPS:
            raise ValueError(f"int4: expected groups of {', '.join(map(str, GROUPS))} weights, got {self.group}")

    @property
    def name(self) -> str:
        """With its group."""
        return f"int4-{self.group}"

    def describe(self, out_dim: int, in_dim: int) -> tuple[Described, ...]:
        """(O, I / 2) and (I / group, O, 2)."""
        if in_dim % self.group or out_dim % _CHANNELS:
            smaller = [group for group in GROUPS if in_dim % group == 0 and out_dim % _CHANNELS == 0]
            instead = f"take groups of {smaller[-1]}" if smaller else "take int8"
            raise ValueError(
                f"{self.name}: expected inputs in multiples of {self.group} and outputs in multiples of {_CHANNELS}, "
                f"got a weight of {out_dim} by {in_dim}; {instead}"
            )
        return (torch.uint8, (out_dim, in_dim // 2)), (self.dtype, (in_dim // self.group, out_dim, 2))

    def pack(self, weight_OI: Tensor) -> Parts:
        """Round to the nearest step, and put the values in the kernel's order."""
        self.describe(*weight_OI.shape)
        values_OI, scales_and_zeros = self.quantised(weight_OI)
        packed: Tensor = torch._convert_weight_to_int4pack_for_cpu(values_OI, 1)
        return packed, scales_and_zeros

    def quantised(self, weight_OI: Tensor) -> tuple[Tensor, Tensor]:
        """(int32 (O, I) in 0..15, scales and zeros (I / group, O, 2) in `dtype`)."""
        weight_OGg = _finite(self.name, weight_OI).view(weight_OI.shape[0], -1, self.group)
        low_OG, high_OG = weight_OGg.amin(2), weight_OGg.amax(2)
        scale_OG = ((high_OG - low_OG) / 15).to(self.dtype)
        scale_OG = torch.where(scale_OG > 0, scale_OG, torch.ones_like(scale_OG))  # all equal: the zero has it all
        zero_OG = torch.where(high_OG > low_OG, low_OG + 8 * scale_OG.float(), low_OG).to(self.dtype)
        steps_OGg = (weight_OGg - zero_OG.float()[..., None]) / scale_OG.float()[..., None]
        values_OI = (steps_OGg + 8).round_().clamp_(0, 15).to(torch.int32).flatten(1)
        return values_OI, torch.stack([scale_OG, zero_OG], dim=-1).transpose(0, 1).contiguous()

    def dequantised(self, values_OI: Tensor, scales_and_zeros: Tensor) -> Tensor:
        """(O, I) fp32 of what `quantised` gave: (q - 8) * scale + zero, without the kernel."""
        scale_OG, zero_OG = scales_and_zeros.float().transpose(0, 1).unbind(-1)
        steps_OGg = values_OI.view(values_OI.shape[0], -1, self.group) - 8
        return (steps_OGg * scale_OG[..., None] + zero_OG[..., None]).flatten(1)

    def unpack(self, parts: Parts) -> Tensor:
        """Through the kernel, as only it knows its order: the product with the identity."""
        values, scales_and_zeros = parts
        identity_II = torch.eye(2 * values.shape[1])
        y_IO: Tensor = torch._weight_int4pack_mm_for_cpu(identity_II, values, self.group, scales_and_zeros.float())
        return y_IO.t().contiguous()

    def product(self, x_nI: Tensor, parts: Parts) -> Tensor:
        """By torch's kernel."""
        y_nO = torch._weight_int4pack_mm_for_cpu(x_nI.to(self.dtype), parts[0], self.group, parts[1])
        return y_nO.to(x_nI.dtype)


def num_bytes(described: Sequence[Described]) -> int:
    """Of parts as `describe` has them."""
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in described)


def _check_type(name: str, dtype: torch.dtype) -> None:
    if dtype not in _TYPES:
        raise ValueError(f"{name}: expected products in float32 or bfloat16, got {dtype}; take bfloat16")


def _finite(name: str, weight_OI: Tensor) -> Tensor:
    """fp32, on the CPU."""
    if weight_OI.device.type != "cpu":
        raise ValueError(f"{name}: expected weights on the CPU, got {weight_OI.device}; its kernels are for processors")
    if not bool(torch.isfinite(weight_OI).all()):
        raise ValueError(f"{name}: a weight is not finite and has no nearest step; load a checkpoint that is whole")
    return weight_OI.detach().float().contiguous()
