"""Everything that a run needs to go on exactly where it stopped, as checkpoint tensors and JSON, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from equipoise.disk.checkpoint import JSON, Checkpoint, CheckpointError
from equipoise.models.decoder import Decoder
from equipoise.monitor.watch import Watch
from equipoise.train.data import Loader
from equipoise.train.repair import Repairs
from equipoise.train.snapshot import pack_optimizer, rng_state, set_rng_state, unpack_optimizer


def run_state(
    model: Decoder, optimizer: torch.optim.Optimizer, loader: Loader, watch: Watch, repairs: Repairs
) -> tuple[dict[str, dict[str, Tensor]], dict[str, JSON]]:
    """(tensors by group, plain state) for `save_checkpoint`."""
    optimizer_tensors, optimizer_json = pack_optimizer(optimizer)
    tensors = {
        "model": dict(model.state_dict()),
        "optimizer": optimizer_tensors,
        "recorder": watch.recorder.state_dict(),
    }
    state: dict[str, JSON] = {
        "optimizer": optimizer_json,
        "loader": dict(loader.state_dict()),
        "watch": watch.state_dict(),
        "repairs": repairs.state_dict(),
        "rng": rng_state(),
    }
    return tensors, state


def restore_run(
    checkpoint: Checkpoint,
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    watch: Watch,
    repairs: Repairs,
) -> None:
    """Take everything over from a verified checkpoint.

    Raises CheckpointError when it is of another model, data set or optimizer.
    """
    state: Mapping[str, Any] = checkpoint.state
    try:
        model.load_state_dict(dict(checkpoint.tensors["model"]))
        unpack_optimizer(optimizer, checkpoint.tensors["optimizer"], state["optimizer"])
        loader.load_state_dict(state["loader"])
        watch.recorder.load_state_dict(checkpoint.tensors["recorder"])
        watch.load_state_dict(state["watch"])
        repairs.load_state_dict(state["repairs"])
        set_rng_state(state["rng"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {checkpoint.path} does not fit this run: {error}. Resume with the configuration and the "
            "corpus it was made with, or start a new run with another --out"
        ) from error
