"""Everything that a run needs to go on exactly where it stopped, as checkpoint tensors and JSON, and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from equipoise.disk.checkpoint import JSON, CheckpointError
from equipoise.models.decoder import Decoder
from equipoise.monitor.watch import Watch
from equipoise.train.absent import NoRepairs, NoTuning
from equipoise.train.data import Loader
from equipoise.train.finetune.tuning import Tuning
from equipoise.train.repair import Repairs
from equipoise.train.snapshot import pack_optimizer, rng_state
from equipoise.train.spread import Content, Spread


@dataclass(frozen=True, eq=False)
class RunState:
    """The parts of a run that change while it goes on."""

    model: Decoder
    optimizer: torch.optim.Optimizer
    loader: Loader
    watch: Watch
    repairs: Repairs | NoRepairs
    tuning: Tuning | NoTuning

    def content(self) -> Content:
        """For a checkpoint, of this moment: tensors by group, and plain state."""
        optimizer_tensors, optimizer_json = pack_optimizer(self.optimizer)
        tensors = {
            "model": dict(self.model.state_dict()),
            "optimizer": optimizer_tensors,
            "recorder": self.watch.recorder.state_dict(),
        }
        state: dict[str, JSON] = {
            "optimizer": optimizer_json,
            "loader": dict(self.loader.state_dict()),
            "watch": self.watch.state_dict(),
            "repairs": self.repairs.state_dict(),
            "rng": rng_state(),
        }
        if isinstance(self.tuning, Tuning):
            state["tuning"] = self.tuning.state_dict()
            if held := self.tuning.tensors():
                tensors["tuning"] = held
        return tensors, state

    def restore(self, path: Path, spread: Spread) -> int:
        """Take everything over from a checkpoint, which is verified first; returns its step.

        Raises CheckpointError when it is damaged, or of another model, data set or optimizer.
        """
        try:
            step, state = spread.restore(path, self.model, self.optimizer, self.watch.recorder)
            self.repairs.forget_after(step)  # the run takes another way from here
            self.loader.load_state_dict(state["loader"])
            self.watch.load_state_dict(state["watch"])
            self.repairs.load_state_dict(state["repairs"])
            if isinstance(self.tuning, Tuning):
                self.tuning.restore(path, state["tuning"])
            spread.set_rng(state)
        except CheckpointError:
            raise
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"checkpoint {path} does not fit this run: {error}. Resume with the configuration and the "
                "corpus it was made with, or start a new run with another --out"
            ) from error
        return step
