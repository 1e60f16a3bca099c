"""A specimen of defects: an MoE layer and its helpers as a widely read listing has them, mistakes included.

Written anew from a description of what that listing does, for `test_seed_defects.py` to run beside ours. B-numbers
mark the defects where they sit. Nothing here is to be used, and nothing of the package imports it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


class ListingMoE(nn.Module):
    """Softmax top-k layer with a capacity. Its defects are the point; `tokens_dropped` is what it would report."""

    def __init__(
        self,
        dim: int,
        num_experts: int = 8,
        top_k: int = 2,
        capacity_factor: float = 1.5,
        temperature: float = 0.3,  # B9: the default for training too
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k  # B18: k > E is found by the first forward
        self.capacity_factor, self.temperature = capacity_factor, temperature
        self.expert_capacity: int | None = None  # B14: state that each forward writes
        self.tokens_dropped = 0
        self.router = nn.Linear(dim, num_experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))  # B16
            for _ in range(num_experts)
        )  # B11: not stacked

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        num_tokens = x_BSD.shape[0] * x_BSD.shape[1]
        p_BSE = (self.router(x_BSD) / self.temperature).softmax(-1)  # B8: in whatever dtype autocast picks
        best_BSK, ids_BSK = p_BSE.topk(self.top_k)
        best_BSK = best_BSK / best_BSK.sum(-1, keepdim=True)  # B2: computed, and never read again
        self.expert_capacity = int(num_tokens * self.top_k / self.num_experts * self.capacity_factor)  # B3
        y_BSD, self.tokens_dropped = torch.zeros_like(x_BSD), 0  # B17: sums are rounded to x's dtype
        for e, expert in enumerate(self.experts):
            where = (ids_BSK == e).any(-1).nonzero()  # B11: the host waits for the device, once per expert
            if len(where) == 0:
                continue  # B10: such an expert gets no gradient at all
            if len(where) > self.expert_capacity:  # B4: in eval as well. B15: padding counts
                keep = torch.randperm(len(where))[: self.expert_capacity]  # B5: CPU generator. B6: blind to gates
                where = where[keep]
                self.tokens_dropped += len(where) - self.expert_capacity  # B1: what is left of it is the capacity
            b, s = where.unbind(1)
            y_BSD[b, s] += expert(x_BSD[b, s]) * p_BSE[b, s, e, None]  # B2: the raw probability. B13
        if self.tokens_dropped > 0:
            share = percent_dropped(self.tokens_dropped, num_tokens)
            print(f"Warning: {self.tokens_dropped} tokens dropped ({share:.2f}%)")  # B14
        return y_BSD  # B7: no balancing loss, no statistics


def percent_dropped(num_assignments_dropped: int, num_tokens: int) -> float:
    """B12: dropped assignments over tokens, not over assignments."""
    return 100 * num_assignments_dropped / num_tokens


# ---------------------------------------------------------------------------------------------------------- losses


def variation_loss(ids_TK: Tensor, num_experts: int) -> Tensor:
    """The coefficient of variation of the utilisation, offered as a loss. Counts have no gradient.

    Its standard deviation is torch's default, the unbiased one.
    """
    counts_E = torch.bincount(ids_TK.flatten(), minlength=num_experts).float()
    return counts_E.std() / counts_E.mean()


def summed_z_loss(logits_TE: Tensor) -> Tensor:
    """The router z-loss with a sum over tokens where the paper has a mean."""
    return logits_TE.logsumexp(-1).square().sum()


def next_token_loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """B23: every position is a target, filling at the end of a text as well."""
    flat = logits_BSV[:, :-1].reshape(-1, logits_BSV.shape[-1])
    return nn.functional.cross_entropy(flat, labels_BS[:, 1:].reshape(-1))


def chunks(tokens: list[int], length: int) -> list[list[int]]:
    """B24: the range ends before the last full chunk."""
    return [tokens[start : start + length] for start in range(0, len(tokens) - length, length)]


# ---------------------------------------------------------------------------------------------------------- monitor


def utilisation_alarm(p_BSE: Tensor, num_experts: int, log_every: int = 100) -> tuple[Tensor, list[int]]:
    """(utilisation (E,), experts below 5 %).

    B37: the argmax of the probabilities, whatever k, bias and drops made of them. B39: an absolute threshold, on one
    batch of any size. B40: log_every is not used.
    """
    counts_E = torch.bincount(p_BSE.argmax(-1).flatten(), minlength=num_experts).float()
    share_E = counts_E / counts_E.sum()
    return share_E, (share_E < 0.05).nonzero().flatten().tolist()


def soft_mass_health(p_TE: Tensor, num_experts: int, capacity_factor: float = 1.25) -> dict[str, float]:
    """Hot and cold experts by the sum of their probabilities.

    B44: any shape is taken for (T, E). B45: probability mass is not load. B46: the limit leaves out k.
    """
    mass_E = p_TE.sum(0)
    fair = p_TE.shape[0] / num_experts
    return {
        "variance": mass_E.var(unbiased=False).item(),
        "hot": (mass_E > fair * capacity_factor).sum().item(),
        "cold": (mass_E < 0.1 * fair).sum().item(),
    }


# ---------------------------------------------------------------------------------------------------------- parallel


def exchange(
    x_BSD: Tensor, ids_BSK: Tensor, num_experts: int, world: int, rank: int | None = None
) -> tuple[Tensor, list[list[Tensor]]]:
    """(what this rank computes on, its outbound buckets by rank), as one process would run it.

    B29: without `rank`, asks a process group that nobody has made. B30: the rank goes on with its own outbound bucket,
    nothing is received. B31: an empty bucket cannot be concatenated. B32: rows carry no position, expert or weight.
    B33: experts beyond world * (E // world) have no rank. B34: one copy per choice, also for two experts of one rank,
    in a loop that asks the host for each. B35 and B36, sleeping for the network and a list of experts that is never
    used, are left out.
    """
    experts_per_rank = num_experts // world
    buckets: list[list[Tensor]] = [[] for _ in range(world)]
    for x_SD, ids_SK in zip(x_BSD, ids_BSK, strict=True):
        for x_D, ids_K in zip(x_SD, ids_SK, strict=True):
            for expert in ids_K:
                buckets[expert.item() // experts_per_rank].append(x_D.unsqueeze(0))
    received = buckets[dist.get_rank() if rank is None else rank]
    return torch.cat(received), buckets
