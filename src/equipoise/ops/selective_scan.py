"""The selective scan: h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t . h_t, step by step or in chunks.

arXiv 2312.00752, section 3.2 and algorithm 2 (exact for A, Euler for B, as its authors' code has it). Letters: I inner
channels, N state per channel, C steps of a chunk; B and C are also the paper's names of what writes and reads. All
decays are products of exp(dt A) <= 1, never quotients of them, so that no chunk is too long for fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ScanInputs:
    """What a scan runs over, all of one floating type, fp32 or fp64.

    x_BSI: what comes in. dt_BSI: step sizes, 0 and more; 0 leaves the state as it is. A_IN: negative, the same for all
    steps. B_BSN, C_BSN: what writes to and reads from the state. h_BIN: the state before.
    """

    x_BSI: Tensor
    dt_BSI: Tensor
    A_IN: Tensor
    B_BSN: Tensor
    C_BSN: Tensor
    h_BIN: Tensor


def plain_scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """(y_BSI, the state after). One step after the other, autograd through all of it: the slow twin."""
    h_BIN, outputs = inputs.h_BIN, []
    for t in range(inputs.x_BSI.shape[1]):
        dt_BI1 = inputs.dt_BSI[:, t, :, None]
        written_BIN = dt_BI1 * inputs.x_BSI[:, t, :, None] * inputs.B_BSN[:, t, None, :]
        h_BIN = torch.exp(dt_BI1 * inputs.A_IN) * h_BIN + written_BIN
        outputs.append((h_BIN * inputs.C_BSN[:, t, None, :]).sum(-1))
    return (torch.stack(outputs, dim=1) if outputs else inputs.x_BSI), h_BIN


def chunked_scan(inputs: ScanInputs, chunk: int = 32) -> tuple[Tensor, Tensor]:
    """As `plain_scan`, `chunk` steps at a time, for any number of steps.

    Within a chunk all steps' decays, writes and reads are computed at once; what is left for one step after the other
    is a single multiply-add. Only the states between chunks are kept for backward, which computes the others again.
    It can be differentiated once. Raises ValueError for a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk: expected at least 1 step, got {chunk}. Take 16 to 64.")
    tensors = (inputs.x_BSI, inputs.dt_BSI, inputs.A_IN, inputs.B_BSN, inputs.C_BSN, inputs.h_BIN)
    if torch.compiler.is_compiling():  # one operator: a graph of all steps would grow with the sequence
        y_BSI, h_BIN, _ = scan(*tensors, chunk)
        return y_BSI, h_BIN
    y_BSI, h_BIN = _Chunked.apply(*tensors, chunk)  # type: ignore[no-untyped-call]  # torch's
    return y_BSI, h_BIN


@dataclass(frozen=True, eq=False)
class _Steps:
    """The steps of one chunk, time first so that a step's values lie together: x, dt (C, B, I), B, C (C, B, N)."""

    x: Tensor
    dt: Tensor
    b: Tensor
    c: Tensor

    @staticmethod
    def cut(sequences: tuple[Tensor, ...], start: int, chunk: int) -> _Steps:
        return _Steps(*(each[start : start + chunk] for each in sequences))

    def decays(self, A_IN: Tensor) -> Tensor:
        """(C, B, I, N)."""
        return (self.dt[..., None] * A_IN).exp_()

    def states(self, decay: Tensor, h_BIN: Tensor) -> Tensor:
        """(C, B, I, N): the state after each step."""
        h = (self.dt * self.x)[..., None] * self.b[:, :, None, :]
        h[0].addcmul_(decay[0], h_BIN)
        for t in range(1, len(h)):
            h[t].addcmul_(decay[t], h[t - 1])
        return h


def _forward(
    x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, h: Tensor, chunk: int
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(y, the state after, the state before each chunk)."""
    sequences = _time_first(x, dt, b, c)
    outputs, before = [], []
    for start in range(0, x.shape[1], chunk):
        steps = _Steps.cut(sequences, start, chunk)
        before.append(h)
        states = steps.states(steps.decays(A), h)
        outputs.append((states @ steps.c[..., None]).squeeze(-1))
        h = states[-1].clone()
    y = torch.cat(outputs).transpose(0, 1).contiguous() if outputs else torch.empty_like(x)
    return y, h.clone() if not outputs else h, before


def _backward(
    dy_BSI: Tensor, dh: Tensor, inputs: tuple[Tensor, ...], before: Sequence[Tensor], chunk: int
) -> tuple[Tensor, ...]:
    """Gradients of x, dt, A, B, C and the state before: the recurrence backwards in time, from the last chunk."""
    x, dt, A, b, c = inputs
    sequences = _time_first(x, dt, b, c)
    (dy,) = _time_first(dy_BSI)
    found: list[tuple[Tensor, ...]] = []
    dA = torch.zeros_like(A)
    for number in reversed(range(len(before))):
        start = number * chunk
        steps = _Steps.cut(sequences, start, chunk)
        *of_steps, of_A, dh = _chunk_gradients(steps, A, before[number], dy[start : start + chunk], dh)
        found.append(tuple(of_steps))
        dA += of_A
    if not found:
        return torch.zeros_like(x), torch.zeros_like(dt), dA, torch.zeros_like(b), torch.zeros_like(c), dh
    dx, ddt, db, dc = (torch.cat(parts[::-1]).transpose(0, 1) for parts in zip(*found, strict=True))
    return dx, ddt, dA, db, dc, dh


class _Chunked(torch.autograd.Function):
    """The chunked scan with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, h: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        y, after, before = _forward(x, dt, A, b, c, h, chunk)
        ctx.chunk = chunk
        ctx.save_for_backward(x, dt, A, b, c, *before)
        return y, after

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        dy_BSI, dh = gradients
        inputs, before = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        return *_backward(dy_BSI, dh, inputs, before, ctx.chunk), None


# ------------------------------------------------------------------------------------- as an operator, for compilers


@torch.library.custom_op("equipoise::chunked_scan", mutates_args=())
def scan(
    x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, h: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, the state after, the states before each chunk (P, B, I, N)). Letters as in `ScanInputs`."""
    y, after, before = _forward(x, dt, A, b, c, h, chunk)
    return y, after, torch.stack(before) if before else h.new_empty(0, *h.shape)


@scan.register_fake
def _(x: Tensor, dt: Tensor, A: Tensor, b: Tensor, c: Tensor, h: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), h.new_empty(h.shape), h.new_empty(-(-x.shape[1] // chunk), *h.shape)


@torch.library.custom_op("equipoise::chunked_scan_backward", mutates_args=())
def scan_backward(
    dy: Tensor, dh: Tensor, inputs: Sequence[Tensor], before: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, which are `inputs`, and of the state before. dy, dh: of y and the state after."""
    dx, ddt, dA, db, dc, d_before = _backward(dy, dh, tuple(inputs), before.unbind(), chunk)
    d_before = d_before.clone() if d_before is dh else d_before.contiguous()  # an operator returns no argument
    return dx.contiguous(), ddt.contiguous(), dA, db.contiguous(), dc.contiguous(), d_before


@scan_backward.register_fake
def _(
    dy: Tensor, dh: Tensor, inputs: Sequence[Tensor], before: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_x, of_dt, of_A, of_b, of_c, of_h = (each.new_empty(each.shape) for each in (*inputs, dh))
    return of_x, of_dt, of_A, of_b, of_c, of_h


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, dt, A, b, c, _, ctx.chunk = inputs
    ctx.save_for_backward(x, dt, A, b, c, output[2])


def _of_operator(ctx: Any, dy: Tensor, dh: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *scan_backward(dy, dh, ctx.saved_tensors[:5], ctx.saved_tensors[5], ctx.chunk), None


scan.register_autograd(_of_operator, setup_context=_save)

# ------------------------------------------------------------------------------------------------------------ parts


def _time_first(*sequences: Tensor) -> tuple[Tensor, ...]:
    return tuple(each.transpose(0, 1).contiguous() for each in sequences)


def _chunk_gradients(steps: _Steps, A: Tensor, h_BIN: Tensor, dy: Tensor, dh: Tensor) -> tuple[Tensor, ...]:
    """Gradients to x, dt, B, C of the chunk's steps, to A, and to the state before; dh: to the state after."""
    decay = steps.decays(A)
    states = steps.states(decay, h_BIN)
    dc = (dy[:, :, None, :] @ states).squeeze(2)
    to_state = dy[..., None] * steps.c[:, :, None, :]
    to_state[-1] += dh
    for t in range(len(to_state) - 2, -1, -1):
        to_state[t].addcmul_(decay[t + 1], to_state[t + 1])
    to_before = decay[0] * to_state[0]
    to_written = (to_state @ steps.b[..., None]).squeeze(-1)
    db = ((steps.dt * steps.x)[:, :, None, :] @ to_state).squeeze(2)
    to_exponent = to_state.mul_(decay)
    to_exponent[0] *= h_BIN
    to_exponent[1:] *= states[:-1]
    ddt = (to_exponent * A).sum(-1) + to_written * steps.x
    dA = to_exponent.mul_(steps.dt[..., None]).sum((0, 1))
    return to_written * steps.dt, ddt, db, dc, dA, to_before
