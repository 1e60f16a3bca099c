"""A Mamba block: a selective state space in the place of attention.

arXiv 2312.00752, section 3.4 and figure 3; weights are called as in
`state-spaces/mamba:mamba_ssm/modules/mamba_simple.py`. The scan itself is in ops/selective_scan.py. What earlier tokens
leave behind is a state of fixed size, which a cache keeps by layer (`KeepsStates`), instead of keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses

from equipoise.ops.selective_scan import ScanInputs, chunked_scan, plain_scan

ScanName = Literal["chunked", "plain"]


@dataclass(frozen=True, kw_only=True)
class Mamba:
    """The Mamba layers of a decoder; all of them are alike.

    state_dim: N, numbers kept per channel. conv_width: W, of the causal convolution. expand: inner channels I per
    model dim. dt_rank: R, of the step sizes; None is a sixteenth of the model dim, rounded up. dt_min, dt_max: between
    which step sizes begin. scan: "chunked" (`chunk` steps at a time) or "plain", the slow twin; the same function.
    """

    state_dim: int = 16
    conv_width: int = 4
    expand: int = 2
    dt_rank: int | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1
    scan: ScanName = "chunked"
    chunk: int = 32

    def __post_init__(self) -> None:
        for name in ("state_dim", "conv_width", "expand", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"Mamba.{name}: expected at least 1, got {getattr(self, name)}.")
        if self.dt_rank is not None and self.dt_rank < 1:
            raise ValueError(f"Mamba.dt_rank: expected at least 1, or None for dim / 16, got {self.dt_rank}.")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(
                f"Mamba.dt_min, dt_max: expected 0 < dt_min <= dt_max, got {self.dt_min} and {self.dt_max}. "
                "The paper has 0.001 and 0.1."
            )
        if self.scan not in get_args(ScanName):
            raise ValueError(f"Mamba.scan: expected 'chunked' or 'plain', got {self.scan!r}. Both compute the same.")

    def inner(self, dim: int) -> int:
        """I, channels inside a layer of that model dim."""
        return self.expand * dim

    def rank(self, dim: int) -> int:
        """What `dt_rank` comes to."""
        return math.ceil(dim / 16) if self.dt_rank is None else self.dt_rank

    def parameters(self, dim: int) -> int:
        """Of one layer: in 2 D I, conv I (W + 1), to dt, B and C I (R + 2 N), dt I (R + 1), A I N, skip I, out I D."""
        inner, rank = self.inner(dim), self.rank(dim)
        conv, scan = inner * (self.conv_width + 1), inner * (self.state_dim + 1)
        return 3 * dim * inner + conv + inner * (rank + 2 * self.state_dim) + inner * (rank + 1) + scan

    def flops(self, dim: int) -> int:
        """Of one token in one layer, forward, as torch.utils.flop_counter counts: products and convolutions.

        In 4 D I, conv 2 I W, to dt, B and C 2 I (R + 2 N), dt 2 R I, reading the state 2 I N, out 2 I D.
        """
        inner, rank = self.inner(dim), self.rank(dim)
        to_scan = 2 * inner * (rank + 2 * self.state_dim) + 2 * rank * inner
        return 6 * dim * inner + 2 * inner * self.conv_width + to_scan + 2 * inner * self.state_dim

    def elementwise_flops(self, dim: int) -> int:
        """What `flops` leaves out of the scan, 6 I N: decay and what is written, two each, and a multiply-add."""
        return 6 * self.inner(dim) * self.state_dim


@dataclass(frozen=True, eq=False)
class MambaState:
    """What the tokens so far leave behind in one layer: the convolution's last W - 1 inputs, and the scan's state."""

    window_BIW: Tensor
    h_BIN: Tensor


@runtime_checkable
class KeepsStates(Protocol):
    """A cache that keeps states by layer, beside keys and values."""

    def state(self, layer: int) -> MambaState | None:
        """That of the last forward; None at the beginning."""
        ...

    def keep(self, layer: int, state: MambaState) -> None:
        """To be the state once the forward is done (`KVCache.advance`)."""
        ...


@runtime_checkable
class KeepsManyStates(Protocol):
    """A cache whose row of tokens is of many sequences, each with states of its own."""

    def mix(self, layer: int, run: Callable[[Tensor, KeepsStates], Tensor], x_1TD: Tensor) -> Tensor:
        """What `run` makes of each sequence's tokens (B, S, D) and the states before them, back in the row."""
        ...


class MambaMixer(nn.Module):
    """Convolution, selective scan and gate of one layer: x_BSD -> (B, S, D). The scan is fp32 under any autocast."""

    def __init__(self, dim: int, mamba: Mamba, layer: int) -> None:
        super().__init__()
        self.layer, self.mamba = layer, mamba
        inner, N, rank = mamba.inner(dim), mamba.state_dim, mamba.rank(dim)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, mamba.conv_width, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * N, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, N))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.init_weights(0.02, 0.02)

    def init_weights(self, std: float, output_std: float) -> None:
        """A is -1 .. -N in each channel, step sizes are log-uniform in [dt_min, dt_max], projections as elsewhere."""
        for linear in (self.in_proj, self.x_proj, self.out_proj):
            nn.init.normal_(linear.weight, std=output_std if linear is self.out_proj else std)
        self.conv1d.reset_parameters()
        bound = self.dt_proj.in_features**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        low, high = math.log(self.mamba.dt_min), math.log(self.mamba.dt_max)
        with torch.no_grad():
            dt_I = torch.empty_like(self.dt_proj.bias).uniform_(low, high).exp()
            self.dt_proj.bias.copy_(dt_I + torch.log(-torch.expm1(-dt_I)))  # the softplus of it is dt
            self.A_log.copy_(torch.arange(1, self.mamba.state_dim + 1).log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def forward(self, x_BSD: Tensor, padding_BS: Tensor | None = None, states: KeepsStates | None = None) -> Tensor:
        """Mix the S tokens with those before them. padding_BS: True = padding, anywhere; it changes no other token.

        states: holds what earlier tokens left behind, and gets what these leave. Raises ValueError under gradients.
        """
        if x_BSD.shape[1] == 0:
            return x_BSD
        order_BS = None if padding_BS is None else padding_BS.to(torch.int8).argsort(dim=1, stable=True)
        if padding_BS is not None and order_BS is not None:  # real tokens first, so that they follow each other
            x_BSD, padding_BS = _pick(x_BSD, order_BS), padding_BS.gather(1, order_BS)
        x_BSI, gate_BSI = self.in_proj(x_BSD).chunk(2, dim=-1)
        before = self._before(x_BSI, states)
        inputs_BIS = torch.cat((before.window_BIW.to(x_BSI.dtype), x_BSI.transpose(1, 2)), dim=2)
        x_BSI = F.silu(self.conv1d(inputs_BIS)).transpose(1, 2)
        y_BSI, h_BIN = self._scan(x_BSI, padding_BS, before.h_BIN)
        if states is not None:
            states.keep(self.layer, MambaState(self._window(inputs_BIS, padding_BS), h_BIN))
        out_BSD: Tensor = self.out_proj(y_BSI.to(gate_BSI.dtype) * F.silu(gate_BSI))
        return out_BSD if order_BS is None else _pick(out_BSD, order_BS.argsort(dim=1))

    def _scan(self, x_BSI: Tensor, padding_BS: Tensor | None, h_BIN: Tensor) -> tuple[Tensor, Tensor]:
        """(y_BSI, the state after), in fp32, or fp64 where the weights are."""
        N, exact = self.mamba.state_dim, h_BIN.dtype
        dt_BSR, B_BSN, C_BSN = self.x_proj(x_BSI).split((self.dt_proj.in_features, N, N), dim=-1)
        dt_BSI = F.softplus(F.linear(dt_BSR, self.dt_proj.weight).to(exact) + self.dt_proj.bias.to(exact))
        if padding_BS is not None:
            dt_BSI = dt_BSI.masked_fill(padding_BS[..., None], 0.0)  # a step of no length leaves the state as it is
        with torch.autocast(x_BSI.device.type, enabled=False):
            x_BSI, B_BSN, C_BSN = x_BSI.to(exact), B_BSN.to(exact), C_BSN.to(exact)
            inputs = ScanInputs(x_BSI, dt_BSI, -self.A_log.to(exact).exp(), B_BSN, C_BSN, h_BIN)
            y_BSI, after = plain_scan(inputs) if self.mamba.scan == "plain" else chunked_scan(inputs, self.mamba.chunk)
            return y_BSI + self.D.to(exact) * x_BSI, after

    def _before(self, x_BSI: Tensor, states: KeepsStates | None) -> MambaState:
        """What the tokens before left behind, or nothing: zeros."""
        if states is not None and x_BSI.requires_grad:
            raise ValueError(
                "cache: expected a forward without gradients, got one with them. A cache is for inference: wrap the "
                "call in torch.inference_mode(), or train without a cache."
            )
        kept = None if states is None else states.state(self.layer)
        if kept is not None:
            return kept
        batch, inner = x_BSI.shape[0], x_BSI.shape[2]
        exact = torch.promote_types(self.A_log.dtype, torch.float32)
        return MambaState(
            x_BSI.new_zeros(batch, inner, self.mamba.conv_width - 1),
            x_BSI.new_zeros(batch, inner, self.mamba.state_dim, dtype=exact),
        )

    def _window(self, inputs_BIS: Tensor, padding_BS: Tensor | None) -> Tensor:
        """(B, I, W - 1): the convolution's inputs at the last real tokens, which stand before the padding."""
        width = self.mamba.conv_width - 1
        if padding_BS is None:
            return inputs_BIS[:, :, inputs_BIS.shape[2] - width :].clone()
        last_BW = (~padding_BS).sum(1)[:, None] + torch.arange(width, device=inputs_BIS.device)
        return inputs_BIS.gather(2, last_BW[:, None, :].expand(-1, inputs_BIS.shape[1], -1))


def _pick(x_BSD: Tensor, order_BS: Tensor) -> Tensor:
    return x_BSD.gather(1, order_BS[..., None].expand_as(x_BSD))
