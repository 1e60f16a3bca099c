"""Attention over keys that are there: positions of new tokens, who may see whom, and the product itself.

No weights, no cache. torch's scaled_dot_product_attention chooses the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, eq=False)
class Sight:
    """What a layer's queries see, beside what the mask says.

    window: of the keys the last so many, the query's own included; None is all. sinks_H: a learned logit per query
    head that takes part in the softmax and brings nothing (gpt-oss); None is none.
    """

    window: int | None = None
    sinks_H: Tensor | None = None


WHOLE = Sight()


def attend(q_BHSD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, mask: Tensor | None, sight: Sight = WHOLE) -> Tensor:
    """What the S queries see in the K keys and values: (B, H, S, D). Several query heads may share a key/value head.

    mask: as `attention_mask` makes it; None is causal over equal lengths, or one query that sees every key. With a
    window the queries are the last of the keys.
    """
    S, K = q_BHSD.shape[2], k_BHKD.shape[2]
    if sight.window is not None and sight.window < K:
        mask = _in_window(sight.window, S, K, mask, q_BHSD.device)
    if sight.sinks_H is not None:
        return attend_with_sinks(q_BHSD, k_BHKD, v_BHKD, mask, sight.sinks_H[None, :, None, None])
    shares_heads = q_BHSD.shape[1] != k_BHKD.shape[1]
    causal = True if mask is None and S > 1 else False  # noqa: SIM210 - to a compiler S > 1 is a symbol, and no bool
    return F.scaled_dot_product_attention(
        q_BHSD, k_BHKD, v_BHKD, attn_mask=mask, is_causal=causal, enable_gqa=shares_heads
    )


def attend_with_sinks(q_BHSD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, mask: Tensor | None, sinks: Tensor) -> Tensor:
    """As `attend`, with a logit more in each softmax. sinks: broadcastable to (B, H, S, 1).

    A key of zeros whose mask is the sink, and a value of zeros: the product itself need not know.
    """
    (B, H, S, _), K = q_BHSD.shape, k_BHKD.shape[2]
    seen = torch.zeros(1, 1, S, K, dtype=q_BHSD.dtype, device=q_BHSD.device)
    if mask is None and S > 1:
        mask = torch.ones(S, K, dtype=torch.bool, device=q_BHSD.device).tril()
    if mask is not None:
        seen = seen.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else seen + mask
    bias = torch.cat((seen.expand(B, H, S, K), sinks.to(q_BHSD.dtype).expand(B, H, S, 1)), dim=-1)
    k, v = (F.pad(each, (0, 0, 0, 1)) for each in (k_BHKD, v_BHKD))
    return F.scaled_dot_product_attention(q_BHSD, k, v, attn_mask=bias, enable_gqa=k_BHKD.shape[1] != H)


def _in_window(window: int, S: int, K: int, mask: Tensor | None, device: torch.device) -> Tensor:
    query_S1 = torch.arange(K - S, K, device=device)[:, None]
    key_K = torch.arange(K, device=device)
    near = ((key_K <= query_S1) & (key_K > query_S1 - window))[None, None]
    return near if mask is None else mask & near
