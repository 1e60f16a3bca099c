"""Which experts are chosen together: pairs counted on a sample of the tokens of each forward, in buffers made once.

Of T real tokens a forward samples every ceil(T / S)-th, the first one included: at most S, evenly spaced, and exactly
those are counted. It takes 8 (E^2 + 1) bytes per layer, 32 MB for 61 layers of 256 experts, and never waits for the
device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.ops.count import accumulate, accumulate_pairs, accumulate_ragged_pairs
from equipoise.types import CoSelection, Decision, Observable

MOST_EXPERTS = 1024  # of more the pairs are not counted: 8 MB per layer, and a picture of them that nobody could read


@dataclass(frozen=True, eq=False)
class _Layer:
    """Views into the block: int64 scalar, the tokens sampled; int64 (E, E), those that chose both."""

    num_tokens: Tensor
    counts_EE: Tensor


class PairCounts:
    """The pairs of all layers since the last `take`. words: int64, one block, which ranks may sum.

    tokens: S, the most that a forward samples in each layer. Layers of more than `MOST_EXPERTS` are left out. Raises
    ValueError for tokens below 1.
    """

    def __init__(self, layers: Mapping[str, Observable], tokens: int, device: torch.device) -> None:
        if tokens < 1:
            raise ValueError(
                f"tokens: expected at least 1 per forward to count pairs of experts, got {tokens}; 256 are enough"
            )
        self._tokens = tokens
        layers = {name: layer for name, layer in layers.items() if layer.num_experts <= MOST_EXPERTS}
        sizes = [layer.num_experts for layer in layers.values()]
        self.words = torch.zeros(sum(1 + E * E for E in sizes), dtype=torch.int64, device=device)
        parts = torch.split(self.words, [size for E in sizes for size in (1, E * E)])
        self._layers = {
            name: _Layer(parts[2 * i][0], parts[2 * i + 1].view(E, E))
            for i, (name, E) in enumerate(zip(layers, sizes, strict=True))
        }

    def add(self, name: str, decision: Decision) -> None:
        """Count the pairs of one forward of one layer."""
        layer, T = self._layers.get(name), decision.num_tokens
        if layer is None or T == 0:
            return
        stride = -(-T // self._tokens)
        ids_N = decision.expert_ids_N.to(layer.counts_EE.device)
        if decision.top_k is not None:
            accumulate_pairs(layer.counts_EE, ids_N.view(T, decision.top_k)[::stride])
        else:
            accumulate_ragged_pairs(layer.counts_EE, decision.token_ids_N.to(ids_N.device), ids_N, T, stride)
        accumulate(layer.num_tokens, layer.num_tokens.new_zeros(()) + -(-T // stride))

    def take(self, step: int) -> list[CoSelection]:
        """A record per layer, on the host, in one copy; and a fresh start."""
        words, taken, at = self.words.cpu().numpy().copy(), [], 0
        for name, layer in self._layers.items():
            E = layer.counts_EE.shape[0]
            taken.append(CoSelection(name, step, int(words[at]), words[at + 1 : at + 1 + E * E].reshape(E, E)))
            at += 1 + E * E
        self.words.zero_()
        return taken
