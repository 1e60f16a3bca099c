"""Tables that give each token id its experts, for hash routing (arXiv 2106.04426 section 3): random, or balanced.

Built once, on the CPU, before training. A table is balanced over token ids: a token id that is more frequent than an
expert's fair share overloads its experts in any table. Tables of n-grams or of clusters are not made here.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

_CHUNK = 2**22  # random numbers at a time: a table of 200k ids and 256 experts needs 16 MB, not 200


def random_table(vocab_size: int, num_experts: int, k: int, seed: int) -> Tensor:
    """int64 (V, k): k distinct experts for each token id, drawn evenly, in random order; the same for the same seed.

    Raises ValueError unless vocab_size is at least 0 and k in [1, num_experts].
    """
    if vocab_size < 0:
        raise ValueError(f"vocab_size: expected at least 0, got {vocab_size}; pass the number of token ids")
    _check_k(num_experts, k)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    ids = [torch.empty(0, k, dtype=torch.int64, device="cpu")]
    rows = max(1, _CHUNK // num_experts)
    for start in range(0, vocab_size, rows):
        shape = (min(rows, vocab_size - start), num_experts)
        ids.append(torch.rand(shape, generator=generator, device="cpu").topk(k).indices)
    return torch.cat(ids)


def balanced_table(frequencies_V: Tensor, num_experts: int, k: int) -> Tensor:
    """int64 (V, k) on the CPU: from the most frequent token id down, each to the k experts with the least load so far.

    An id adds its frequency to the load of each of its experts. Equal loads go to the lower expert id, equal
    frequencies to the lower token id first. Ids that were never seen (frequency 0) are dealt in turn, starting at the
    expert with the least load: by their load of 0 they would all go to the same experts.
    frequencies_V: counts or shares of token ids, any real dtype. About 1 s for 200,000 ids; O(V k log E).
    Raises ValueError for frequencies that are not finite and at least 0, or not one per id, and k not in
    [1, num_experts].
    """
    _check_k(num_experts, k)
    frequencies_V = frequencies_V.detach().cpu()
    if frequencies_V.dim() != 1:
        raise ValueError(f"frequencies_V: expected one number per token id, got shape {tuple(frequencies_V.shape)}")
    bad = frequencies_V[~((frequencies_V >= 0) & frequencies_V.isfinite())]
    if len(bad):
        raise ValueError(
            f"frequencies_V: expected finite numbers of at least 0, got {bad[0].item()}; pass counts of token ids"
        )

    order_V = frequencies_V.argsort(descending=True, stable=True)
    num_seen = int((frequencies_V > 0).sum())
    heap: list[tuple[float, int]] = [(0, expert) for expert in range(num_experts)]  # sorted, so already a heap
    seen = [_take(heap, k, frequency) for frequency in frequencies_V[order_V[:num_seen]].tolist()]
    by_load_E = torch.tensor([expert for _, expert in sorted(heap)], device="cpu")
    turns = torch.arange((len(order_V) - num_seen) * k, device="cpu").view(-1, k)

    table_VK = torch.empty(len(order_V), k, dtype=torch.int64, device="cpu")
    table_VK[order_V[:num_seen]] = torch.tensor(seen, dtype=torch.int64, device="cpu").view(num_seen, k)
    table_VK[order_V[num_seen:]] = by_load_E[turns % num_experts]
    return table_VK


def _take(heap: list[tuple[float, int]], k: int, frequency: float) -> list[int]:
    """The k experts with the least load, lightest first; the frequency is added to their loads in the heap."""
    taken = [heapq.heappop(heap) for _ in range(k)]
    for load, expert in taken:
        heapq.heappush(heap, (load + frequency, expert))
    return [expert for _, expert in taken]


def _check_k(num_experts: int, k: int) -> None:
    if not 1 <= k <= num_experts:
        raise ValueError(
            f"k: expected 1 to num_experts={num_experts} distinct experts per token id, got {k}; lower k or add experts"
        )
