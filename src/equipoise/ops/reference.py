"""The oracle: routing, dropping and experts as plain loops over tokens, to be read rather than run fast.

Every fast path of the package is compared with these, outputs and gradients, in fp64. Autograd differentiates the
loops; nothing is shared with the fast code but the definition of the activation.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

from equipoise.ops.activation import Activation, activate


def select(scores_TE: Tensor, k: int, num_groups: int = 1, top_groups: int = 1, group_score: str = "top2") -> Tensor:
    """int64 (T, k): the k best experts of each token, best first, out of its best groups. Ties: lower id first.

    A group's score is the sum of its two best scores, or its best one (arXiv 2412.19437 section 2.1.2; "max" is
    DeepSeek-V2's). Experts of other groups can't be chosen whatever their score.
    """
    T, E = scores_TE.shape
    size = E // num_groups
    ids = torch.empty(T, k, dtype=torch.int64)
    for t in range(T):
        scores = scores_TE[t].tolist()
        members = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]

        def worth(group: list[int], scores: list[float] = scores) -> float:
            best = sorted((scores[e] for e in group), reverse=True)
            return sum(best[:2]) if group_score == "top2" else best[0]

        groups = sorted(range(num_groups), key=lambda g: (-worth(members[g]), g))[:top_groups]
        allowed = [e for g in groups for e in members[g]]
        ids[t] = torch.tensor(sorted(allowed, key=lambda e: (-scores[e], e))[:k])
    return ids


def capacity(num_tokens: int, k: int, num_experts: int, factor: float) -> int:
    """Assignments an expert may take: ceil(factor * T * K / E), at least 1, at most T."""
    exact = Fraction(str(factor)) * num_tokens * k / num_experts  # in floats 1.1 * 100 / 10 is more than 11
    return min(max(num_tokens, 1), max(1, math.ceil(exact)))


def keep(expert_ids_N: Tensor, priority_N: Tensor, limit: int) -> Tensor:
    """bool (N,): which assignments fit when each expert takes its `limit` highest priorities; ties: earlier first."""
    kept = torch.zeros(len(expert_ids_N), dtype=torch.bool)
    room: dict[int, int] = {}
    for n in sorted(range(len(expert_ids_N)), key=lambda n: (-float(priority_N[n]), n)):
        expert = int(expert_ids_N[n])
        room[expert] = room.get(expert, limit) - 1
        kept[n] = room[expert] >= 0
    return kept


def next_choice(
    ranking_TE: Tensor, ids_TK: Tensor, keep_TK: Tensor, place_TK: Tensor, limit: int
) -> tuple[Tensor, Tensor]:
    """(ids_TK, keep_TK) after the auction: who found no room asks its token's next experts, one per round and token.

    In a round the places (smaller first) ask for the best-ranked expert of their token that had room when the round
    began, and that the token has not chosen or got; -inf is never asked for. An expert takes what it has room for.
    """
    T, K = ids_TK.shape
    ids, keep = ids_TK.clone(), keep_TK.clone()
    room = [limit - int((ids_TK[keep_TK] == e).sum()) for e in range(ranking_TE.shape[1])]
    used = [set(ids_TK[t].tolist()) for t in range(T)]
    seeking = sorted((int(place_TK[t, k]), t, k) for t in range(T) for k in range(K) if not keep_TK[t, k])
    while seeking:
        open_now = [e for e in range(len(room)) if room[e] > 0]
        asked: set[int] = set()
        again = []
        for place, t, k in seeking:
            choices = [
                (float(ranking_TE[t, e]), -e) for e in open_now if e not in used[t] and ranking_TE[t, e] > float("-inf")
            ]
            best = -max(choices)[1] if choices else None
            if t in asked:
                again.append((place, t, k))
            elif best is not None:
                asked.add(t)
                if room[best] > 0:
                    room[best] -= 1
                    used[t].add(best)
                    ids[t, k], keep[t, k] = best, True
                else:
                    again.append((place, t, k))
        seeking = again
    return ids, keep


def experts(
    x_TD: Tensor,
    token_ids_N: Tensor,
    expert_ids_N: Tensor,
    weights_N: Tensor,
    up_EHD: Tensor,
    down_EDF: Tensor,
    activation: Activation = "swiglu",
    biases: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y_TD = sum over assignments of weight * down(activation(up(x))), one assignment at a time, in the given dtype.

    biases: (E, H) of up and (E, D) of down.
    """
    up_EH, down_ED = biases or (up_EHD.new_zeros(up_EHD.shape[:2]), down_EDF.new_zeros(down_EDF.shape[:2]))
    outputs = [x_TD.new_zeros(x_TD.shape[1]) for _ in range(x_TD.shape[0])]
    inputs = (x_TD, up_EHD, down_EDF, weights_N, up_EH, down_ED)
    touched = 0.0 * torch.stack([each.sum() for each in inputs]).sum()  # zero gradients, not None
    for n in range(len(token_ids_N)):
        t, e = int(token_ids_N[n]), int(expert_ids_N[n])
        a = activate(up_EHD[e] @ x_TD[t] + up_EH[e], activation)
        outputs[t] = outputs[t] + weights_N[n].to(x_TD.dtype) * (down_EDF[e] @ a + down_ED[e])
    return (torch.stack(outputs) if outputs else x_TD.new_zeros(x_TD.shape)) + touched
