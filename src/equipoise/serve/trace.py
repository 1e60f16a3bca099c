"""Which experts the tokens of a forward went to, layer by layer, seen at the taps of MoE layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from equipoise.layer import MoE
from equipoise.monitor.by_token import by_token
from equipoise.types import Decision, Routed


class ExpertTrace:
    """Attached to the layers until `detach`. Sees the forwards inside `watching`; others use the model too."""

    def __init__(self, layers: Mapping[str, MoE]) -> None:
        self._seen: list[Decision] | None = None
        self._handles = [layer.tap.register_forward_hook(self._see) for layer in layers.values()]

    @contextmanager
    def watching(self) -> Iterator[list[Decision]]:
        """A list that gets one decision per MoE layer as the forward inside goes on."""
        self._seen = seen = list[Decision]()
        try:
            yield seen
        finally:
            self._seen = None

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _see(self, module: nn.Module, args: tuple[Routed], routed: Routed) -> None:
        if self._seen is not None:
            self._seen.append(routed.decision)


def experts_of(decisions: Sequence[Decision], num_tokens: int) -> np.ndarray:
    """int16 (L, T, K): the experts of each token in each layer; -1 fills up where it has fewer than others."""
    if not decisions:
        return np.empty((0, num_tokens, 0), dtype=np.int16)
    top_k = decisions[0].top_k
    if top_k is None or any(each.top_k != top_k for each in decisions):
        return experts_of_any(decisions)
    ids_LN = torch.stack([each.expert_ids_N for each in decisions]).to("cpu", torch.int16)
    return ids_LN.view(len(decisions), num_tokens, top_k).numpy()


def experts_of_any(decisions: Sequence[Decision]) -> np.ndarray:
    """The slow twin of `experts_of`, for routers that give tokens different numbers of experts."""
    layers = [_experts(each) for each in decisions]
    width = max(each.shape[1] for each in layers)
    return np.stack([_widened(each, width) for each in layers])


def joined(pieces: Sequence[np.ndarray]) -> np.ndarray:
    """int16 (L, T, K) of all pieces of a sequence. K is the most that any of its own tokens has."""
    if not pieces:
        return np.empty((0, 0, 0), dtype=np.int16)
    width = max(each.shape[2] for each in pieces)
    experts_LTK = np.concatenate([_widened(each, width) for each in pieces], axis=1)
    return experts_LTK[:, :, : int((experts_LTK >= 0).sum(axis=2).max(initial=0))]


def num_distinct(experts_LTK: np.ndarray, num_experts: int) -> tuple[int, ...]:
    """How many experts each layer's tokens went to."""
    touched_LE = np.zeros((len(experts_LTK), num_experts + 1), dtype=bool)
    touched_LE[np.arange(len(experts_LTK))[:, None, None], experts_LTK] = True  # -1 is the last column
    return tuple(touched_LE[:, :-1].sum(axis=1).tolist())


def as_bits(experts_LTK: np.ndarray, num_experts: int) -> list[int]:
    """Per token the experts of all layers, each a bit of one number."""
    L, T, _ = experts_LTK.shape
    touched_TLE = np.zeros((T, L, num_experts + 1), dtype=bool)
    touched_TLE[np.arange(T)[:, None], np.arange(L)[:, None, None], experts_LTK] = True
    packed = np.packbits(touched_TLE[:, :, :-1].reshape(T, -1), axis=1)
    return [int.from_bytes(row.tobytes(), "big") for row in packed]


def _experts(decision: Decision) -> np.ndarray:
    """int16 (T, K) of one layer."""
    ids_N = decision.expert_ids_N.to("cpu", torch.int16).numpy()
    return by_token(decision.token_ids_N.cpu().numpy(), ids_N, decision.num_tokens)


def _widened(experts: np.ndarray, width: int) -> np.ndarray:
    """The last axis filled up with -1."""
    missing = width - experts.shape[-1]
    return np.pad(experts, [(0, 0)] * (experts.ndim - 1) + [(0, missing)], constant_values=-1) if missing else experts
