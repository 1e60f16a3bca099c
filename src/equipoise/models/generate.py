"""Sampling text from a decoder: greedy, temperature, top-k and nucleus (top-p), with a cache or without.

Without the cache every step runs the whole sequence again: slow, obvious, and the same tokens.
It doesn't batch prompts of different lengths; a serving engine does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from equipoise.models.cache import ContiguousCache
from equipoise.models.decoder import Decoder
from equipoise.models.in_eval import in_eval


@torch.inference_mode()
def generate(  # noqa: PLR0913 - one verb for a person at a prompt: each option is one word at the call
    model: Decoder,
    tokens_BS: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    eos_id: int | None = None,
    use_cache: bool = True,
) -> Tensor:
    """Continue each prompt: int64 (B, S + n), the prompt first, n <= max_new_tokens.

    temperature 0 takes the likeliest token. top_k keeps the k likeliest, top_p the fewest whose probability reaches
    p (arXiv 1904.09751, section 3.1). seed makes the draw repeatable on one device. A row that has produced eos_id
    is filled up with it; generation ends early when every row has.
    Raises ValueError for options out of range, an empty prompt and a sequence longer than max_seq_len.
    """
    _check(model, tokens_BS, max_new_tokens, temperature, top_k, top_p)
    with in_eval(model):
        rng = None if seed is None else torch.Generator(tokens_BS.device).manual_seed(seed)
        cache = _make_cache(model, tokens_BS, max_new_tokens) if use_cache else None
        finished_B1 = torch.zeros_like(tokens_BS[:, :1], dtype=torch.bool)
        fresh_BS = tokens_BS
        for _ in range(max_new_tokens):
            logits_BV = model(fresh_BS if use_cache else tokens_BS, cache=cache)[:, -1]
            fresh_BS = sample(logits_BV, temperature=temperature, top_k=top_k, top_p=top_p, rng=rng)
            if eos_id is not None:
                fresh_BS = fresh_BS.masked_fill(finished_B1, eos_id)
                finished_B1 = finished_B1 | (fresh_BS == eos_id)
            tokens_BS = torch.cat((tokens_BS, fresh_BS), dim=1)
            if eos_id is not None and bool(finished_B1.all()):
                break
    return tokens_BS


def sample(
    logits_BV: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    rng: torch.Generator | None = None,
) -> Tensor:
    """One token per row: int64 (B, 1). top_k is applied before top_p; ties with the k-th logit are all kept."""
    if temperature == 0:
        return logits_BV.argmax(dim=-1, keepdim=True)
    logits_BV = logits_BV.float() / temperature
    if top_k is not None and top_k < logits_BV.shape[-1]:
        smallest_kept_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_kept_B1, float("-inf"))
    if top_p is not None:
        logits_BV = _keep_nucleus(logits_BV, top_p)
    return torch.multinomial(logits_BV.softmax(dim=-1), 1, generator=rng)


def _keep_nucleus(logits_BV: Tensor, top_p: float) -> Tensor:
    """Mask all but the likeliest tokens whose probabilities reach top_p together; the likeliest always stays."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    probs_BV = sorted_BV.softmax(dim=-1)
    outside_BV = probs_BV.cumsum(dim=-1) - probs_BV >= top_p
    return logits_BV.masked_fill(outside_BV.scatter(1, order_BV, outside_BV), float("-inf"))


def _make_cache(model: Decoder, tokens_BS: Tensor, max_new_tokens: int) -> ContiguousCache:
    device = tokens_BS.device
    dtype = model.embed_tokens.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    max_len = tokens_BS.shape[1] + max_new_tokens
    return ContiguousCache(model.config, tokens_BS.shape[0], max_len, dtype, device)


def _check(
    model: Decoder,
    tokens_BS: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if tokens_BS.dim() != 2 or tokens_BS.shape[1] == 0:
        raise ValueError(
            f"tokens_BS: expected prompts of shape (batch, at least 1), got {tuple(tokens_BS.shape)}. "
            "Start an empty prompt with the end-of-text token."
        )
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: expected 0 or more, got {max_new_tokens}. Pass how many tokens to add.")
    total, limit = tokens_BS.shape[1] + max_new_tokens, model.config.max_seq_len
    if total > limit:
        raise ValueError(
            f"max_new_tokens: prompt of {tokens_BS.shape[1]} and {max_new_tokens} new tokens make {total}, expected "
            f"at most max_seq_len={limit}. Shorten the prompt or ask for fewer tokens."
        )
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: expected 0 (greedy) or a positive number, got {temperature}. Try 0.8.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}. Pass None to keep every token.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p: expected a probability in (0, 1], got {top_p}. Pass None to keep every token.")
