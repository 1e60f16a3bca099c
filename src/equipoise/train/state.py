"""Everything that a run needs to go on exactly where it stopped, as checkpoint tensors and JSON, and back."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from equipoise.disk.checkpoint import JSON, CheckpointError
from equipoise.models.decoder import Decoder
from equipoise.monitor.watch import Watch
from equipoise.train.absent import NoRepairs, NoTuning
from equipoise.train.data import Loader
from equipoise.train.finetune.tuning import Tuning
from equipoise.train.repair import Repairs
from equipoise.train.snapshot import pack_optimizer, rng_state
from equipoise.train.spread import Spread


def run_state(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    watch: Watch,
    repairs: Repairs | NoRepairs,
    tuning: Tuning | NoTuning,
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
    if isinstance(tuning, Tuning):
        state["tuning"] = tuning.state_dict()
        if held := tuning.tensors():
            tensors["tuning"] = held
    return tensors, state


def restore_run(
    path: Path,
    spread: Spread,
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    loader: Loader,
    watch: Watch,
    repairs: Repairs | NoRepairs,
    tuning: Tuning | NoTuning,
) -> int:
    """Take everything over from a checkpoint, which is verified first; returns its step.

    Raises CheckpointError when it is damaged, or of another model, data set or optimizer.
    """
    try:
        step, state = spread.restore(path, model, optimizer, watch.recorder)
        repairs.forget_after(step)  # the run takes another way from here
        loader.load_state_dict(state["loader"])
        watch.load_state_dict(state["watch"])
        repairs.load_state_dict(state["repairs"])
        if isinstance(tuning, Tuning):
            tuning.restore(path, state["tuning"])
        spread.set_rng(state)
    except CheckpointError:
        raise
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {path} does not fit this run: {error}. Resume with the configuration and the "
            "corpus it was made with, or start a new run with another --out"
        ) from error
    return step
