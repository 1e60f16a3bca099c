"""What a run folder needs so that its model can be served anywhere: its tokenizer, and text it was not trained on."""

from __future__ import annotations

from pathlib import Path

import torch

from equipoise.models.run_files import write_held_out
from equipoise.train.config import TrainConfig
from equipoise.train.data import TokenData, eval_batches


def keep_with_run(out: Path, config: TrainConfig, data: TokenData) -> None:
    """Write the tokenizer, and the windows of the validation text by which repairs are judged. Again is the same."""
    data.tokenizer.save(out)
    batches = list(eval_batches(data.val, config.batch_size, config.data.seq_len, config.canary_batches))
    rows = [torch.cat((batch.tokens_BS, batch.targets_BS[:, -1:]), dim=1) for batch in batches]
    write_held_out(out, torch.cat(rows))
