"""A fault of the data: a batch in which one domain is too frequent. A pure function; it knows no loader."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.faults.injection import check_seed


@dataclass(frozen=True)
class SkewedInput:
    """Sequences of other domains are replaced by copies of sequences of one domain of the batch.

    Imitates a shard or a user that floods the stream: the experts of that domain get more than their share. domain: its
    number. intensity: the share of the other domains' sequences that is replaced; 1 leaves that domain alone. seed: of
    which.
    """

    domain: int
    intensity: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.intensity <= 1:
            raise ValueError(f"SkewedInput.intensity: expected a share in (0, 1], got {self.intensity}")
        check_seed("SkewedInput", self.seed)


def skewed_rows(fault: SkewedInput, domains: Tensor) -> Tensor:
    """int64 (B,): which row of the batch to put in each place; most stay where they are.

    domains: int64 (B,), or (B, S), of which the first token's counts. For example tokens_BS[rows] and targets_BS[rows].
    The number of replaced rows is rounded to the nearest, and at least 1 where there is another domain. Raises
    ValueError when the batch has no sequence of the domain.
    """
    domains_B = (domains[:, 0] if domains.ndim == 2 else domains).cpu().long()
    of_it = (domains_B == fault.domain).nonzero()[:, 0]
    others = (domains_B != fault.domain).nonzero()[:, 0]
    if not len(of_it):
        there = sorted({int(domain) for domain in domains_B})
        raise ValueError(f"SkewedInput.domain: expected a domain of the batch, one of {there}, got {fault.domain}")
    generator = torch.Generator().manual_seed(fault.seed)
    number = min(len(others), max(1, round(fault.intensity * len(others))))
    replaced = others[torch.randperm(len(others), generator=generator)[:number]]
    rows_B = torch.arange(len(domains_B))
    rows_B[replaced] = of_it[torch.randint(len(of_it), (number,), generator=generator)]
    return rows_B.to(domains.device)
