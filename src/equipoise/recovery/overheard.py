"""What a layer's experts are given and return, heard where the tokens are at home, on one process or over ranks.

A dispatcher is put around the layer's own while it is listened to. It changes nothing that passes through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equipoise.layer import MoE
from equipoise.layer.dispatch import Dispatched, Dispatcher, UnderWay
from equipoise.layer.overflow import Fitted
from equipoise.ops.ragged import RaggedPlan

Hear = Callable[[Tensor, Tensor, Tensor], None]
"""Takes x_TD, the weight that each token's computed experts have together, fp32 (T,), and the experts' sums y_TD."""


@contextmanager
def overheard(layers: Mapping[str, MoE], hear: Mapping[str, Hear]) -> Iterator[None]:
    """Inside, `hear` of each layer is told of each of its forwards, when all of it is home."""
    before = {name: layer.dispatcher for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            layer.dispatcher = _Listening(before[name], hear[name])
        yield
    finally:
        for name, layer in layers.items():
            layer.dispatcher = before[name]


@dataclass(frozen=True, eq=False)
class _Listening:
    inner: Dispatcher
    hear: Hear

    def dispatch(self, x_TD: Tensor, fitted: Fitted) -> Sequence[UnderWay[Dispatched]]:
        """As the inner one."""
        sent = self.inner.dispatch(x_TD, fitted)
        forward = _Forward(x_TD, _weights(fitted, len(x_TD)), self.hear, len(sent))
        return [_Sent(each, forward) for each in sent]


@dataclass(eq=False)
class _Forward:
    """One forward of a layer: what was given, and the chunks that have come home."""

    x_TD: Tensor
    weight_T: Tensor
    hear: Hear
    num_chunks: int
    home: list[Tensor] = field(default_factory=list)

    def came(self, y_TD: Tensor) -> Tensor:
        """One more; with the last one it is told."""
        self.home.append(y_TD)
        if len(self.home) == self.num_chunks:
            self.hear(self.x_TD, self.weight_T, torch.cat(self.home))
        return y_TD


@dataclass(frozen=True, eq=False)
class _Sent:
    """Tokens under way to their experts."""

    inner: UnderWay[Dispatched]
    forward: _Forward

    def wait(self) -> Dispatched:
        """What this rank's experts have to do."""
        return _There(self.inner.wait(), self.forward)


@dataclass(frozen=True, eq=False)
class _There:
    """See `Dispatched`."""

    inner: Dispatched
    forward: _Forward

    @property
    def rows(self) -> Tensor:
        return self.inner.rows

    @property
    def plan(self) -> RaggedPlan:
        return self.inner.plan

    def combine(self, y: Tensor) -> UnderWay[Tensor]:
        """On the way home."""
        return _Home(self.inner.combine(y), self.forward)


@dataclass(frozen=True, eq=False)
class _Home:
    """Sums under way home."""

    inner: UnderWay[Tensor]
    forward: _Forward

    def wait(self) -> Tensor:
        """y_TD."""
        return self.forward.came(self.inner.wait())


def _weights(fitted: Fitted, num_tokens: int) -> Tensor:
    """fp32 (T,): of what is computed, the combine weights by token."""
    decision, keep_N = fitted.decision, fitted.keep_N
    weights_N = decision.weights_N.detach().float()
    if keep_N is not None:
        weights_N = weights_N.masked_fill(~keep_N, 0.0)
    return torch.zeros(num_tokens, device=weights_N.device).index_add_(0, decision.token_ids_N, weights_N)
