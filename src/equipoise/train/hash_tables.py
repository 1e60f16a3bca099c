"""Balanced hash tables need to know how often each token id occurs: count the training text, and deal the ids out."""

from __future__ import annotations

import numpy as np
import torch

from equipoise.models.decoder import Decoder
from equipoise.routing.hash_router import HashRouter
from equipoise.train.tokens import TokenStream


def fit_hash_tables(model: Decoder, stream: TokenStream) -> None:
    """Fit every hash router of the model that asks for a balanced table. A checkpoint loaded later brings its own."""
    routers = [layer.router for layer in model.moe_layers.values()]
    for router in routers:
        if isinstance(router, HashRouter) and router.config.table == "balanced":
            counts_V = np.bincount(stream.tokens_N, minlength=router.config.vocab_size)
            router.fit(torch.from_numpy(counts_V))
