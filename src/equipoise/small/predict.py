"""Which experts the next layer will want: counted from what followed what, layer by layer.

For each pair of consecutive layers, how often a token that went to expert i of the one went to expert j of the other.
The first layer follows the last one of the forward before. Memory is L x E x E numbers, whatever is observed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

HISTORY = 65_536  # tokens after which what was counted so far counts half
LIKELY = 0.5  # tokens: what is read ahead makes others go, so it should be wanted more often than not


@dataclass(frozen=True, eq=False)
class Choices:
    """Where the tokens of one layer's forward went. token_N, expert_N: int64, one per assignment."""

    num_tokens: int
    token_N: np.ndarray
    expert_N: np.ndarray


class Transitions:
    """The counts, and predictions from them. One thread at a time."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._counts_LEE = np.zeros((num_layers, num_experts, num_experts), dtype=np.float32)
        self._tokens_L = np.zeros(num_layers, dtype=np.int64)

    def observe(self, layer: int, before: Choices, now: Choices) -> None:
        """now: of `layer`. before: of the layer before it; of other tokens, by their number, it says nothing."""
        if before.num_tokens != now.num_tokens:
            return
        self._counts_LEE[layer] += self._members(before).T @ self._members(now)
        self._tokens_L[layer] += now.num_tokens
        if self._tokens_L[layer] > HISTORY:
            self._counts_LEE[layer] /= 2
            self._tokens_L[layer] //= 2

    def predict(self, layer: int, before: Choices, number: int) -> list[int]:
        """At most `number` experts of `layer` that LIKELY tokens or more are expected to go to, likeliest first.

        The expectation of a token is the mean over its experts in `before`.
        """
        rows_E = np.bincount(before.expert_N, minlength=self._counts_LEE.shape[1])
        busy = np.flatnonzero(rows_E)
        seen_bE = self._counts_LEE[layer, busy]
        score_E = rows_E[busy] @ (seen_bE / np.maximum(seen_bE.sum(axis=1, keepdims=True), 1.0))
        likeliest = np.argsort(-score_E, kind="stable")[:number]
        return [int(expert) for expert in likeliest if score_E[expert] >= LIKELY]

    def _members(self, choices: Choices) -> np.ndarray:
        """fp32 (T, E): 1 where a token went to an expert."""
        members_TE = np.zeros((choices.num_tokens, self._counts_LEE.shape[1]), dtype=np.float32)
        members_TE[choices.token_N, choices.expert_N] = 1.0
        return members_TE
