"""The newest tokens that each layer has routed, for repairs that work on recent traffic.

It keeps references to what the routers have computed anyway, and copies nothing. It judges nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from equipoise.layer.choice import RoutedLayer
from equipoise.ops.count import inside_backward
from equipoise.types import Routed

NUM_TOKENS = 4096  # of each layer
_MANY = 64  # pieces: beyond that they are joined, as when single tokens are decoded


class RecentScores:
    """The selection scores of the last `num_tokens` tokens of each layer, (T, E), without gradient.

    Attached to the layers' taps until `detach`; forwards that are run again for their gradients are left out.
    """

    def __init__(self, layers: Mapping[str, RoutedLayer], num_tokens: int = NUM_TOKENS) -> None:
        if num_tokens < 1:
            raise ValueError(f"num_tokens: expected at least 1, got {num_tokens}")
        self._limit, self._paused = num_tokens, False
        self._pieces: dict[str, deque[Tensor]] = {name: deque() for name in layers}
        self._handles = [
            layer.tap.register_forward_hook(self._hook(self._pieces[name])) for name, layer in layers.items()
        ]

    def _hook(self, pieces: deque[Tensor]) -> Callable[[nn.Module, tuple[Routed], Routed], None]:
        def keep(module: nn.Module, args: tuple[Routed], routed: Routed) -> None:
            if self._paused or torch.compiler.is_compiling() or inside_backward():
                return
            pieces.append(routed.decision.selection_TE.detach())
            while len(pieces) > 1 and sum(map(len, pieces)) - len(pieces[0]) >= self._limit:
                pieces.popleft()
            if len(pieces) > _MANY:
                joined = torch.cat(list(pieces))[-self._limit :].clone()  # a slice would keep all of it in memory
                pieces.clear()
                pieces.append(joined)

        return keep

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is kept: for text that is no traffic."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def scores(self, layer: str) -> Tensor:
        """fp32 (T, E), T at most num_tokens, the newest last. Raises ValueError before anything was routed."""
        pieces = self._pieces[layer]
        if not pieces:
            raise ValueError(f"{layer}: no traffic has been seen yet; let the model run on some tokens first")
        return torch.cat(list(pieces))[-self._limit :].float()

    def detach(self) -> None:
        """Remove the hooks, and forget."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for pieces in self._pieces.values():
            pieces.clear()
