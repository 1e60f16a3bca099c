"""Which experts the tokens of a forward went to, layer by layer: seen at the taps of MoE layers, kept till taken."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from equipoise.layer import MoE
from equipoise.types import Routed, RoutingDecision


class ExpertTrace:
    """Attached to the layers until `detach`. Holds one forward at a time."""

    def __init__(self, layers: Mapping[str, MoE]) -> None:
        self._decisions: list[RoutingDecision] = []
        self._handles = [layer.tap.register_forward_hook(self._see) for layer in layers.values()]

    def _see(self, module: nn.Module, args: tuple[Routed], routed: Routed) -> None:
        self._decisions.append(routed.decision)

    def clear(self) -> None:
        """Forget what was seen: a forward begins."""
        self._decisions.clear()

    def take(self) -> list[np.ndarray]:
        """Per layer int16 (T, K): the experts of each token; -1 fills up where a token has fewer than others."""
        seen = [_experts(decision) for decision in self._decisions]
        self.clear()
        return seen

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()


def _experts(decision: RoutingDecision) -> np.ndarray:
    ids_N = decision.expert_ids_N.to("cpu", torch.int16).numpy()
    if decision.top_k is not None:
        return ids_N.reshape(-1, decision.top_k)
    tokens_N = decision.token_ids_N.cpu().numpy()
    order_N = np.argsort(tokens_N, kind="stable")
    tokens_N, ids_N = tokens_N[order_N], ids_N[order_N]
    counts_T = np.bincount(tokens_N, minlength=decision.num_tokens)
    places_N = np.arange(len(tokens_N)) - np.repeat(np.cumsum(counts_T) - counts_T, counts_T)
    ids_TK = np.full((decision.num_tokens, int(counts_T.max(initial=0))), -1, dtype=np.int16)
    ids_TK[tokens_N, places_N] = ids_N
    return ids_TK


def stack(layers: list[np.ndarray]) -> np.ndarray:
    """int16 (L, T, K) of layers whose K may differ."""
    width = max((each.shape[1] for each in layers), default=0)
    return np.stack([np.pad(each, ((0, 0), (0, width - each.shape[1])), constant_values=-1) for each in layers])
