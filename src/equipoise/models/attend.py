"""Attention over keys that are there: positions of new tokens, who may see whom, and the product itself.

No weights, no cache. torch's scaled_dot_product_attention chooses the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses


def token_positions(num_queries: int, num_past: int, padding_BK: Tensor | None, device: torch.device) -> Tensor:
    """Position of each new token in its own sequence: int64 (B, S), or (1, S) without padding.

    padding_BK: bool (B, num_past + S), True = padding. Counting starts at the first real token, so that a
    left-padded sequence gets the positions it has without padding. Padding itself gets any valid position.
    """
    if padding_BK is None:
        return torch.arange(num_past, num_past + num_queries, device=device)[None]
    return ((~padding_BK).cumsum(dim=1) - 1).clamp(min=0)[:, num_past:]


def attention_mask(num_queries: int, num_past: int, padding_BK: Tensor | None, device: torch.device) -> Tensor | None:
    """Which keys each query may see: bool (B or 1, 1, S, num_past + S), True = visible; None where no mask is needed.

    None means causal over equal lengths (nothing cached), or one query that sees every key. A query always sees
    itself, even where it is padding: a row without any visible key would be NaN.
    """
    if padding_BK is None and (num_past == 0 or num_queries == 1):
        return None
    query_S1 = torch.arange(num_past, num_past + num_queries, device=device)[:, None]
    key_K = torch.arange(num_past + num_queries, device=device)
    visible = (key_K <= query_S1)[None, None]
    if padding_BK is None:
        return visible
    return visible & (~padding_BK[:, None, None, :] | (key_K == query_S1))


def attend(q_BHSD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, mask: Tensor | None) -> Tensor:
    """What the S queries see in the K keys and values: (B, H, S, D). Several query heads may share a key/value head.

    mask: as `attention_mask` makes it; None is causal over equal lengths, or one query that sees every key.
    """
    is_causal = mask is None and q_BHSD.shape[2] > 1
    shares_heads = q_BHSD.shape[1] != k_BHKD.shape[1]
    return F.scaled_dot_product_attention(
        q_BHSD, k_BHKD, v_BHKD, attn_mask=mask, is_causal=is_causal, enable_gqa=shares_heads
    )
