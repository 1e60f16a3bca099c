"""Which experts the next layer will want: counted from what followed what, layer by layer.

For each pair of consecutive layers, how often a token that went to expert i of the one went to expert j of the other.
The first layer follows the last one of the forward before. What was counted fades quickly: a text goes on as it was
lately, which tells more than how texts are. Memory is L x E x E numbers, whatever is observed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HISTORY = 32  # forwards of a layer after which what was counted so far counts half
LIKELY = 0.5  # tokens: what is read ahead makes others go, so it should be wanted more often than not


@dataclass(frozen=True, eq=False)
class Choices:
    """Where the tokens of one layer's forward went. token_N, expert_N: int64, one per assignment."""

    num_tokens: int
    token_N: Tensor
    expert_N: Tensor


class Transitions:
    """The counts, and predictions from them. One thread at a time."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        with torch.inference_mode(False):  # forwards inside and outside of it add to them
            self._counts_LEE = torch.zeros(num_layers, num_experts, num_experts)
        self._forwards = [0] * num_layers

    @torch.no_grad()
    def observe(self, layer: int, before: Choices, now: Choices) -> None:
        """now: of `layer`. before: of the layer before it; of other tokens, by their number, it says nothing."""
        if before.num_tokens != now.num_tokens:
            return
        self._counts_LEE[layer].addmm_(self._members(before).t(), self._members(now))
        self._forwards[layer] += 1
        if self._forwards[layer] % HISTORY == 0:
            self._counts_LEE[layer] /= 2

    @torch.no_grad()
    def predict(self, layer: int, before: Choices, number: int) -> list[int]:
        """At most `number` experts of `layer` that LIKELY tokens or more are expected to go to, likeliest first.

        The expectation of a token is the mean over its experts in `before`.
        """
        seen_NE = self._counts_LEE[layer].index_select(0, before.expert_N)
        expected_E = (seen_NE / seen_NE.sum(1, keepdim=True).clamp_min(1.0)).sum(0)
        values, experts = expected_E.sort(descending=True, stable=True)
        likeliest = zip(experts[:number].tolist(), values[:number].tolist(), strict=True)
        return [expert for expert, value in likeliest if value >= LIKELY]

    def _members(self, choices: Choices) -> Tensor:
        """fp32 (T, E): 1 where a token went to an expert."""
        members_TE = torch.zeros(choices.num_tokens, self._counts_LEE.shape[1])
        members_TE[choices.token_N, choices.expert_N] = 1.0
        return members_TE
