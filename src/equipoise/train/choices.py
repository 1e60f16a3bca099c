"""The experts that a run's model chooses on the run's validation text, layer by layer: what placement is planned on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from equipoise.models.run_files import load
from equipoise.monitor.by_token import by_token
from equipoise.train.loop import load_config
from equipoise.train.run import open_data
from equipoise.train.specialisation import RoutedText, route_text


def choices_of_run(run: Path, max_batches: int) -> tuple[dict[str, np.ndarray], Mapping[str, int]]:
    """Int64 (T, K) by layer, in the order of the text, -1 where a token has fewer experts; and E by layer.

    Takes the newest checkpoint, and so many batches spread over the text. Raises ValueError for a folder without a run
    or a checkpoint, DataError where the text is gone.
    """
    config, data = open_data(load_config(run))
    model = load(run).model
    text = route_text(model, data.val, config.batch_size, config.data.seq_len, max_batches, config.bf16)
    return {layer: choices(text, layer) for layer in text.assignments}, text.num_experts


def choices(text: RoutedText, layer: str) -> np.ndarray:
    """int64 (T, K): a row per token, its experts in the order in which the router named them, then -1."""
    token_ids_N, expert_ids_N = text.assignments[layer]
    return by_token(token_ids_N, expert_ids_N, len(text.positions_T))
