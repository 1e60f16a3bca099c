"""The decoder language model: token embedding, pre-norm blocks of attention and MoE or dense feed-forward, logits.

It knows neither the training loop nor the serving engine: both call `Decoder.forward`. Names in the state dict
follow Hugging Face's Llama family, so that checkpoints map one to one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that torch's own documentation uses
from torch.utils.checkpoint import checkpoint

from equipoise.layer import MoE
from equipoise.layer.choice import Choice, routed_layers
from equipoise.models.attend import attention_mask, token_positions
from equipoise.models.block import BatchView, Block, norm_of
from equipoise.models.cache import KVCache
from equipoise.models.config import DecoderConfig
from equipoise.models.parameters import parameter_counts
from equipoise.models.rope import rotary_tables
from equipoise.models.shortcut import units
from equipoise.ops.few_linear import linears, projections
from equipoise.types import BatchScope

IGNORE = -100  # a target that is none, as in torch's own cross-entropy


class Decoder(nn.Module):
    """A causal language model. Builds on the CPU or on `meta`, with fresh weights (`init_weights`).

    After `to_empty` of a model built on `meta`, call `init_weights` or load a state dict. Neither sets the counts that
    a balancer gathers between steps: build a model that will be trained with one on its device.
    Raises RuntimeError when the parameters differ in number from what `parameter_counts` says.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.embed_positions = nn.Embedding(config.max_seq_len, config.dim) if config.style == "gpt2" else None
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = norm_of(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.dim, config.vocab_size, bias=False)
        check_parameter_count(self, config)
        self.init_weights()

    @property
    def moe_layers(self) -> dict[str, MoE]:
        """The MoE layers in order, by their name among the model's modules ("layers.3.mlp")."""
        return {f"layers.{i}.mlp": block.mlp for i, block in enumerate(self._blocks()) if isinstance(block.mlp, MoE)}

    @property
    def routed_layers(self) -> dict[str, MoE | Choice]:
        """All that routes, by name: the MoE layers, and what chooses attention experts ("layers.3.self_attn.heads")."""
        return routed_layers(self)

    def forward(
        self,
        tokens_BS: Tensor,
        *,
        cache: KVCache | None = None,
        padding_mask: Tensor | None = None,
        scope: BatchScope | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """Logits for the token after each of the S new tokens: (B, S, V).

        tokens_BS: int64 (B, S), the tokens after those in the cache. padding_mask: bool (B, cache.length + S),
        True = padding, on either side; it covers the cached tokens too. scope: what balancing losses know of the
        global batch. Outputs at padding are meaningless but finite. logits_at: int64 (N,), which of the B * S tokens
        in a row to give logits for, (N, V); None is all.
        Raises ValueError for tokens of a wrong dtype, shape or (on the CPU) range, for more than max_seq_len tokens,
        and for a padding mask of a wrong shape or dtype.
        """
        view = replace(self._view(tokens_BS, padding_mask, cache), scope=scope)
        x_BSD = self.embed_tokens(tokens_BS)
        if self.embed_positions is not None:
            x_BSD = x_BSD + self.embed_positions(view.positions_BS)
        moe_index = 0
        for unit in units(self._blocks(), self.config):
            x_BSD = unit(x_BSD, view, scope.layer(moe_index) if scope is not None and unit.has_moe else None)
            moe_index += unit.has_moe
        if cache is not None:
            cache.advance(tokens_BS.shape[1])
        if logits_at is not None:
            return self._logits(self.norm(x_BSD.flatten(0, 1)[logits_at]))
        return self._logits(self.norm(x_BSD))

    def _logits(self, x_BSD: Tensor) -> Tensor:
        if self.lm_head is None:
            return linears(x_BSD, [self.embed_tokens.weight])[0]
        return projections(x_BSD, [self.lm_head])[0]

    def _view(self, tokens_BS: Tensor, padding_BK: Tensor | None, cache: KVCache | None) -> BatchView:
        _check_inputs(self.config, tokens_BS, padding_BK, cache)
        length, device = tokens_BS.shape[1], tokens_BS.device
        if cache is None:
            positions_BS = token_positions(length, 0, padding_BK, device)
            mask = attention_mask(length, 0, padding_BK, device)
        else:
            positions_BS, mask = cache.place(length, padding_BK, device)
        rotary = None
        if self.config.style == "modern":
            rotary = rotary_tables(positions_BS, self.config.rope_dim, self.config.rope_theta, self.config.rope_scaling)
        padding_BS = None if padding_BK is None else padding_BK[:, padding_BK.shape[1] - length :]
        return BatchView(tokens_BS, positions_BS, rotary, mask, padding_BS, cache)

    def init_weights(self) -> None:
        """Draw every weight afresh: normal(0, init_std), projections into the residual stream smaller.

        The 2 * num_layers projections that add to the residual stream get init_std / sqrt(2 * num_layers), so that
        its variance does not grow with depth (GPT-2, section 2.3).
        """
        std = self.config.init_std
        output_std = std / math.sqrt(2 * self.config.num_layers)
        for linear in (self.embed_tokens, self.embed_positions, self.lm_head):
            if linear is not None:
                nn.init.normal_(linear.weight, std=std)
        self.norm.reset_parameters()
        for block in self._blocks():
            block.init_weights(std, output_std)

    def _blocks(self) -> Iterator[Block]:
        return iter(cast("Iterable[Block]", self.layers))


def check_parameter_count(model: Decoder, config: DecoderConfig) -> None:
    """Raise RuntimeError when the model's parameters differ in number from what `parameter_counts` says."""
    actual, expected = sum(p.numel() for p in model.parameters()), parameter_counts(config).total
    if actual != expected:
        raise RuntimeError(
            f"Decoder: the arithmetic of parameter_counts gives {expected:,} parameters, the modules have {actual:,}. "
            "A layer has changed its parameters: bring parameter_counts in line with it."
        )


def cross_entropy_sum(logits: Tensor, targets: Tensor, *, max_chunk_elements: int = 2**25) -> tuple[Tensor, Tensor]:
    """Sum of -log p(target) in nats (fp32 scalar) and the number of targets it is over (int64 scalar).

    logits: (..., V), any float dtype; the softmax is fp32. targets: int64 (...), -100 where there is none.
    Divide the sums, not the means, when a batch is split. More logits than max_chunk_elements (128 MiB in fp32) go
    through in chunks of rows, recomputed in backward, so that no fp32 copy of all of them exists.
    Raises ValueError when the shapes do not match.
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets: expected shape {tuple(logits.shape[:-1])} for logits of shape {tuple(logits.shape)}, "
            f"got {tuple(targets.shape)}. Give one target per row of logits, -100 where there is none."
        )
    rows_per_chunk = max(1, max_chunk_elements // logits.shape[-1])
    logits_chunks = torch.split(logits.reshape(-1, logits.shape[-1]), rows_per_chunk)
    target_chunks = torch.split(targets.reshape(-1), rows_per_chunk)
    if len(logits_chunks) == 1:
        total = _chunk_cross_entropy(logits_chunks[0], target_chunks[0])
    else:
        sums = (
            checkpoint(_chunk_cross_entropy, *chunk, use_reentrant=False)
            for chunk in zip(logits_chunks, target_chunks, strict=True)
        )
        total = torch.stack(list(sums)).sum()
    return total, (targets != IGNORE).sum()


def _chunk_cross_entropy(logits_TV: Tensor, targets_T: Tensor) -> Tensor:
    return F.cross_entropy(logits_TV.float(), targets_T, ignore_index=IGNORE, reduction="sum")


def _check_inputs(config: DecoderConfig, tokens_BS: Tensor, padding_BK: Tensor | None, cache: KVCache | None) -> None:
    if tokens_BS.dtype not in (torch.int64, torch.int32) or tokens_BS.dim() != 2:
        raise ValueError(
            f"tokens_BS: expected int64 tokens of shape (batch, sequence), got {tokens_BS.dtype} of shape "
            f"{tuple(tokens_BS.shape)}. Pass token ids, not embeddings or logits; one sequence needs tokens[None]."
        )
    batch, num_new = tokens_BS.shape
    total = num_new if cache is None else cache.longest(num_new)
    if total > config.max_seq_len:
        raise ValueError(
            f"tokens_BS: expected at most max_seq_len={config.max_seq_len} tokens per sequence, got {total} "
            f"({total - num_new} of them cached). Shorten the sequence, or build the model with max_seq_len >= {total}."
        )
    if padding_BK is not None and (padding_BK.dtype != torch.bool or padding_BK.shape != (batch, total)):
        raise ValueError(
            f"padding_mask: expected bool of shape {(batch, total)} (cached tokens included), got "
            f"{padding_BK.dtype} of shape {tuple(padding_BK.shape)}. True marks padding."
        )
    if tokens_BS.device.type == "cpu" and tokens_BS.numel() and not torch.compiler.is_compiling():
        low, high = (int(bound) for bound in tokens_BS.aminmax())
        if low < 0 or high >= config.vocab_size:
            raise ValueError(
                f"tokens_BS: expected ids in [0, vocab_size={config.vocab_size}), got [{low}, {high}]. "
                "Use the tokenizer that the model was made for, or build the model with its vocabulary size."
            )
