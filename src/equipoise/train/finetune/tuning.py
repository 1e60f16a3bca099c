"""What fine-tuning changes in a run: where the weights begin, what the optimizer holds, what the monitor compares with.

The loop calls `begin` before a step's gradients, `pull` after them, `push` after the optimizer, `compare` before the
monitor judges.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.disk.checkpoint import load_checkpoint
from equipoise.models.decoder import Decoder
from equipoise.models.in_eval import in_eval
from equipoise.monitor.baseline import Baseline
from equipoise.monitor.domain_shift import Shift, ShiftRule
from equipoise.monitor.recorder import Recorder
from equipoise.train.config import OptimConfig, TrainConfig
from equipoise.train.data import TokenData, TokenStream, eval_batches
from equipoise.train.finetune.adapter import write_adapter
from equipoise.train.finetune.base import BaseRouting, adopt, measure_base
from equipoise.train.finetune.config import FinetuneConfig
from equipoise.train.finetune.groups import groups_of, trained_alone
from equipoise.train.finetune.held import Held, LowRank, Rows, Whole
from equipoise.train.finetune.task_experts import TaskExperts, choose, read_choice, used_experts, write_choice
from equipoise.train.optim import decays
from equipoise.train.step import autocast


class Tuning:
    """Of one run. fresh: begin with the base's weights, and measure it; else a checkpoint of the run will be restored.

    rules, baselines: for the monitor. Raises ValueError for a base that can't be used, and DataError for too little
    text, before anything is written.
    """

    def __init__(self, config: TrainConfig, model: Decoder, data: TokenData, out: Path, *, fresh: bool) -> None:
        assert config.finetune is not None
        self._config, self._tune, self._model = config, config.finetune, model
        self.choice: tuple[TaskExperts, ...] = ()
        if fresh:
            self.base = self._begin_with_the_base(data)
            if self._tune.train == "task-experts":
                self.choice = _choose(config, model, data.train)
        else:
            self.base = BaseRouting.load(out)
            if self._tune.train == "task-experts":
                self.choice = read_choice(out)
        self.held = held_weights(model, self._tune, self.choice, config.seed)
        trained_alone(model, frozenset(self.held))
        groups = groups_of(model)
        self._routers = [held for name, held in self.held.items() if groups[name] == "router"]
        self._shifts: list[Shift] = []
        self.rules = (ShiftRule(lambda: self._shifts),)
        self.baselines: Mapping[str, Baseline] | None = self.base.baselines["task"]

    def _begin_with_the_base(self, data: TokenData) -> BaseRouting:
        config, model = self._config, self._model
        rows, length = config.batch_size, config.data.seq_len
        batches = eval_batches(data.val, rows, length, config.canary_batches)
        texts = {"task": torch.cat([torch.cat((b.tokens_BS, b.targets_BS[:, -1:]), 1) for b in batches])}
        own_BS = adopt(model, self._tune).held_out_BS
        if own_BS is not None:
            texts["base"] = own_BS
        for layer in model.moe_layers.values():
            if layer.balancer is not None:
                (layer.balancer.unfreeze if self._tune.move_bias else layer.balancer.freeze)()
        return measure_base(model, texts, rows, config.bf16)

    # ------------------------------------------------------------------------------------------------- a step

    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer holds, in its order within each weight."""
        return [parameter for held in self.held.values() for parameter in held.parameters]

    def optimizer(self, config: OptimConfig) -> torch.optim.AdamW:
        """AdamW over what is trained, a group for each learning rate and decay. Frozen weights are in none of them."""
        groups, weights = groups_of(self._model), dict(self._model.named_parameters())
        sorted_: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, held in self.held.items():
            decay = config.weight_decay if decays(name, weights[name]) else 0.0
            sorted_.setdefault((self._tune.rate_of(groups[name]), decay), []).extend(held.parameters)
        made = [
            {"params": parameters, "weight_decay": decay, "lr_scale": scale}
            for (scale, decay), parameters in sorted_.items()
        ]
        return torch.optim.AdamW(made, lr=config.lr, betas=(config.beta1, config.beta2))

    def begin(self, step: int) -> None:
        """Step number `step`, counted from 1, comes next: are the routers trained in it? It depends on nothing else."""
        for held in self._routers:
            for parameter in held.parameters:
                parameter.requires_grad_(step > self._tune.router_starts)

    def pull(self) -> None:
        """After backward."""
        for held in self.held.values():
            held.pull()

    def push(self) -> None:
        """After the optimizer's step."""
        for held in self.held.values():
            held.push()

    def compare(self, step: int, recorder: Recorder) -> dict[str, float]:
        """Compare the routing with the base's, when it is due; as named numbers for the run store."""
        if step % self._tune.compare_every and step != self._config.steps:
            return {}
        with recorder.paused():
            self._shifts, nats = self.base.compare(self._model, self._config.batch_size, self._config.bf16)
        named = {f"perplexity_on_{text}": float(torch.tensor(value).exp()) for text, value in nats.items()}
        for shift in self._shifts:
            named[f"agreement_on_{shift.text}.{shift.layer}"] = shift.agreement
            named[f"load_distance_on_{shift.text}.{shift.layer}"] = shift.distance
        return named

    # ------------------------------------------------------------------------------------------------- folders

    def keep(self, out: Path) -> list[str]:
        """Write what a resumed run needs into the run folder; returns what a person should know, a line each."""
        self.base.save(out)
        if self.choice:
            write_choice(out, self.choice, self._tune)
        told = [layer.sentence() for layer in self.choice]
        if apart := self.base.domains_apart():
            layer, most = max(apart.items(), key=lambda item: item[1])
            told.append(f"the base routes this text unlike its own: up to {most:.0%} of the load elsewhere ({layer})")
        return told

    def saved(self, out: Path) -> None:
        """A checkpoint was written, with whole weights: keep the adapter beside it too."""
        factors = {name: held for name, held in self.held.items() if isinstance(held, LowRank)}
        if factors:
            write_adapter(out, factors, self._tune)

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint, JSON-able."""
        return {"shifts": [asdict(shift) for shift in self._shifts]}

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint, beside the model and the optimizer; empty where these say all."""
        return {f"{name}/{key}": t for name, held in self.held.items() for key, t in held.tensors().items()}

    def restore(self, path: Path, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint whose weights the model already has. Raises ValueError for another run's."""
        self._shifts = [Shift.from_json(record) for record in state["shifts"]]
        tensors = load_checkpoint(path).tensors.get("tuning", {}) if self.tensors() else {}
        for name, held in self.held.items():
            own = {key.rsplit("/", 1)[1]: t for key, t in tensors.items() if key.rsplit("/", 1)[0] == name}
            held.load(own)


def held_weights(model: Decoder, tune: FinetuneConfig, choice: tuple[TaskExperts, ...], seed: int) -> dict[str, Held]:
    """What is held for each trained weight, by its name, in the model's order."""
    groups, chosen = groups_of(model), {layer.layer: layer.chosen for layer in choice}
    generator = torch.Generator().manual_seed(seed)
    held: dict[str, Held] = {}
    for name, weight in model.named_parameters():
        if groups[name] not in tune.trained:
            continue
        if tune.lora:
            if weight.dim() >= 2:  # not the norms of query and key heads
                held[name] = LowRank(weight, tune.lora, tune.lora_scale, generator)
        elif tune.train == "task-experts":
            held[name] = Rows(weight, chosen[name.split(".experts.")[0]])
        else:
            held[name] = Whole(weight)
    return held


@torch.no_grad()
def _choose(config: TrainConfig, model: Decoder, stream: TokenStream) -> tuple[TaskExperts, ...]:
    """The task's experts, by training text spread evenly over the stream."""
    assert config.finetune is not None
    rows, length = config.batch_size, config.data.seq_len
    num_batches = -(-config.finetune.task_tokens // (rows * length))
    device = next(model.parameters()).device
    with in_eval(model), used_experts(model) as uses, autocast(config.bf16, device):
        for batch in eval_batches(stream, rows, length, num_batches):
            model(batch.tokens_BS.to(device))
    return choose(uses, config.finetune)
