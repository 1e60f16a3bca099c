"""What rows look like on the wire: as they are, rounded to bfloat16, or quantised row by row.

A receiver gets back the type that was sent from. Gradients of quantised rows travel in bfloat16: rounding is taken for
the identity (straight through).
"""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

PayloadName = Literal["as_is", "bf16", "int8", "fp8"]
_SCALE_BYTES = 4


class Payload(Protocol):
    """Rows to what travels, and back; `dtype` is the rows' own."""

    def pack(self, x: Tensor) -> Tensor: ...  # noqa: D102 - described by the class

    def unpack(self, packed: Tensor, dtype: torch.dtype) -> Tensor: ...  # noqa: D102 - described by the class

    def pack_gradient(self, x: Tensor) -> Tensor: ...  # noqa: D102 - described by the class

    def unpack_gradient(self, packed: Tensor, dtype: torch.dtype) -> Tensor: ...  # noqa: D102 - described by the class


class Cast:
    """Rows and gradients in one floating type; None leaves them as they are."""

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype

    def pack(self, x: Tensor) -> Tensor:
        """Rounded."""
        return x if self.dtype is None else x.to(self.dtype)

    def unpack(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """In the rows' own type again."""
        return packed.to(dtype)

    pack_gradient, unpack_gradient = pack, unpack


class Quantised:
    """Rows in 8 bits with one fp32 scale per row, D + 4 bytes each; gradients in bfloat16.

    int8: the row's largest magnitude is 127; an error of at most 1/254 of it. fp8 (e4m3): it is 448; an error of at
    most 1/16 of each value. A row of zeros stays zero.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self._most = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max

    def pack(self, x: Tensor) -> Tensor:
        """uint8 (R, D + 4)."""
        scale_R1 = (x.float().abs().amax(-1, keepdim=True) / self._most).clamp_min(torch.finfo(torch.float32).tiny)
        scaled = x.float() / scale_R1
        if self.dtype == torch.int8:
            scaled = scaled.round()
        return torch.cat((scaled.to(self.dtype).view(torch.uint8), scale_R1.view(torch.uint8)), dim=1)

    def unpack(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """Values times scales."""
        values, scale = packed[:, :-_SCALE_BYTES], packed[:, -_SCALE_BYTES:].contiguous()
        return (values.contiguous().view(self.dtype).float() * scale.view(torch.float32)).to(dtype)

    def pack_gradient(self, x: Tensor) -> Tensor:
        """bfloat16."""
        return x.to(torch.bfloat16)

    def unpack_gradient(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """In the rows' own type again."""
        return packed.to(dtype)


AS_IS = Cast(None)


def payloads(name: PayloadName) -> tuple[Payload, Payload]:
    """(of dispatch, of combine) by name. What is quantised on its way to the experts comes home in bfloat16: it is a
    sum, and errors of its terms would add up. Raises ValueError for another name.
    """
    rounded = Cast(torch.bfloat16)
    known: dict[str, tuple[Payload, Payload]] = {
        "as_is": (AS_IS, AS_IS),
        "bf16": (rounded, rounded),
        "int8": (Quantised(torch.int8), rounded),
        "fp8": (Quantised(torch.float8_e4m3fn), rounded),
    }
    if name not in known:
        raise ValueError(f"payload: expected {', '.join(get_args(PayloadName))}, got {name!r}")
    return known[name]
