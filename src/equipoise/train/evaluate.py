"""Validation: perplexity and bits per byte, over all and by domain, and a sample of text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as fn

from equipoise.models.decoder import Decoder
from equipoise.models.generate import generate
from equipoise.models.in_eval import in_eval
from equipoise.train.data import IGNORE, TokenData, TokenStream, eval_batches
from equipoise.train.step import autocast

if TYPE_CHECKING:
    from equipoise.train.spread import Spread


@dataclass(frozen=True)
class Evaluation:
    """Of the validation text.

    loss: mean nats per token. perplexity: its exponential. bits_per_byte: loss over the bytes that the tokens stand
    for, comparable between tokenizers. by_domain: bits per byte of each domain.
    """

    loss: float
    perplexity: float
    bits_per_byte: float
    by_domain: dict[str, float]

    def scalars(self) -> dict[str, float]:
        """As named numbers for the run store."""
        named = {f"val_bits_per_byte.{domain}": value for domain, value in self.by_domain.items()}
        return {"val_perplexity": self.perplexity, "val_bits_per_byte": self.bits_per_byte} | named


@torch.no_grad()
def evaluate(
    model: Decoder,
    stream: TokenStream,
    batch_size: int,
    seq_len: int,
    max_batches: int,
    bf16: bool,
    spread: Spread | None = None,
) -> Evaluation:
    """Evaluate on windows spread evenly over the stream. The model's mode is put back after.

    spread: the processes of the run, each of which takes its rows of each batch; the result is that of all, in each.
    """
    device = next(model.parameters()).device
    num_domains = len(stream.domains)
    nats_D = torch.zeros(num_domains, dtype=torch.float64)
    targets_D = torch.zeros(num_domains, dtype=torch.float64)
    with in_eval(model):
        for whole in eval_batches(stream, batch_size, seq_len, max_batches):
            batch = whole if spread is None else spread.share(whole)
            with autocast(bf16, device):
                logits_BSV = model(batch.tokens_BS.to(device))
            targets_T, domains_T = batch.targets_BS.reshape(-1), batch.domains_BS.reshape(-1)
            nats_T = fn.cross_entropy(
                logits_BSV.float().flatten(0, 1).cpu(), targets_T, ignore_index=IGNORE, reduction="none"
            )
            nats_D.index_add_(0, domains_T, nats_T.double())
            targets_D.index_add_(0, domains_T, (targets_T != IGNORE).double())
    if spread is not None:
        spread.team.sum(nats_D)
        spread.team.sum(targets_D)
    bytes_D = targets_D * torch.from_numpy(stream.bytes_per_token_D)
    loss = float(nats_D.sum() / targets_D.sum())
    bits_D = nats_D / math.log(2) / bytes_D.clamp_min(1)
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=float(nats_D.sum() / math.log(2) / bytes_D.sum().clamp_min(1)),
        by_domain={name: float(bits_D[d]) for d, name in enumerate(stream.domains) if targets_D[d] > 0},
    )


def sample_text(model: Decoder, data: TokenData, prompt: str, num_tokens: int = 60, seed: int = 0) -> str:
    """The prompt and what the model makes of it: temperature 0.8, nucleus 0.95."""
    device = next(model.parameters()).device
    prompt_S = torch.tensor(data.tokenizer.encode(prompt).astype("int64"), device=device)
    num_tokens = min(num_tokens, model.config.max_seq_len - len(prompt_S))
    tokens_BS = generate(model, prompt_S[None], num_tokens, temperature=0.8, top_p=0.95, seed=seed)
    return data.tokenizer.decode(tokens_BS[0].tolist())
