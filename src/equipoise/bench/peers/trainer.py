"""transformers' Mixtral in transformers' Trainer: what most people train an MoE with on one machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from equipoise.bench.problem import LeftOutError
from equipoise.train.config import TrainConfig
from equipoise.train.data import Loader

SIDES = {  # name: (experts implementation, with its balancing loss)
    "transformers Trainer, grouped_mm": ("grouped_mm", True),
    "transformers Trainer, eager": ("eager", True),
    "transformers Trainer, grouped_mm, no balancing loss": ("grouped_mm", False),
}


def check() -> None:
    """Raise LeftOutError where it can't be imported."""
    try:
        import_module("accelerate")
        import_module("transformers")
    except ImportError as error:
        raise LeftOutError(f"{error.name} is not installed; pip install 'equipoise[bench]'") from None


class _Rows:
    """The loader's sequences, one after the other, for the Trainer's data loader: each batch is one of the loader's."""

    def __init__(self, loader: Loader, rows: int) -> None:
        self._loader, self._rows = loader, rows
        self._waiting: list[Tensor] = []

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not self._waiting:
            batch = self._loader.next_batch()
            self._waiting = [*batch.tokens_BS]
        tokens_S = self._waiting.pop(0)
        return {"input_ids": tokens_S, "labels": tokens_S}


def steps_of(
    mixtral: Any, implementation: str, balanced: bool, config: TrainConfig, loader: Loader, folder: Path
) -> Callable[[int], float]:
    """A function from a number of steps to the seconds of one, taken between the ends of steps."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    mixtral.set_experts_implementation(implementation)
    mixtral.config.output_router_logits = balanced
    mixtral.train()
    ends: list[float] = []

    class Clock(TrainerCallback):
        """Notes when each step has ended."""

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            """Now."""
            ends.append(time.perf_counter())

    def run(steps: int) -> float:
        ends.clear()
        optim = config.optim
        arguments = TrainingArguments(
            output_dir=str(folder / "trainer"), max_steps=steps + 1, per_device_train_batch_size=config.batch_size,
            learning_rate=optim.lr, lr_scheduler_type="constant", weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1, adam_beta2=optim.beta2, max_grad_norm=optim.clip, bf16=config.bf16, use_cpu=True,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_num_workers=0,
        )  # fmt: skip
        rows = _Rows(loader, (steps + 1) * config.batch_size)
        trainer = Trainer(mixtral, arguments, train_dataset=rows, callbacks=[Clock()])
        trainer.remove_callback(PrinterCallback)  # our stdout may be JSON
        trainer.train()
        return (ends[-1] - ends[0]) / steps  # the first step warms up and is not counted

    return run
