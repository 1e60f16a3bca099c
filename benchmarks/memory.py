"""What recomputing the experts in backward saves, and what it costs: python -m benchmarks.memory"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equipoise.bench.harness import Effort, Variant, ratio, time_side_by_side
from equipoise.bench.report import Cell, Report, Table, add_output_arguments, emit
from equipoise.bench.saved import MIB, saved_for_backward
from equipoise.models.config import DecoderConfig
from equipoise.models.decoder import Decoder, cross_entropy_sum
from equipoise.train.config import TrainConfig
from equipoise.train.recipes import RECIPES


def layer_table(config: TrainConfig, effort: Effort) -> Table:
    """The recipe's MoE layer alone, and its whole model, with and without recomputing the experts in backward."""
    tokens_BS = torch.randint(config.model.vocab_size, (config.batch_size, config.data.seq_len))
    x_TD = torch.randn(tokens_BS.numel(), config.model.dim, requires_grad=True)
    layer = next(iter(Decoder(config.model).moe_layers.values()))

    def loss_of_layer(recompute: bool) -> Tensor:
        y_TD: Tensor = checkpoint(layer, x_TD, use_reentrant=False) if recompute else layer(x_TD)
        return y_TD.float().square().mean()

    models = {recompute: Decoder(_with_checkpointing(config.model, recompute)) for recompute in (False, True)}

    def loss_of_model(recompute: bool) -> Tensor:
        logits_BSV = models[recompute](tokens_BS)
        return cross_entropy_sum(logits_BSV, tokens_BS)[0] / tokens_BS.numel()

    rows = (
        _row("MoE layer", loss_of_layer, {False: layer, True: layer}, config.bf16, effort),
        _row("whole model", loss_of_model, models, config.bf16, effort),
    )
    columns = ("", "kept [MiB]", "recomputed [MiB]", "less [%]", "time, recomputed / kept")
    note = f"{tokens_BS.numel()} tokens; under autocast the copies of the weights in bf16 are counted too."
    return Table(f"Held for backward, recipe {config.name}", columns, rows, note)


def _row(
    name: str, loss: Callable[[bool], Tensor], modules: Mapping[bool, nn.Module], bf16: bool, effort: Effort
) -> tuple[Cell, ...]:
    def forward(recompute: bool) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            return loss(recompute)

    def step(recompute: bool) -> None:
        torch.autograd.backward(forward(recompute))

    variants = [Variant(str(on), partial(step, on), modules[on].zero_grad) for on in (False, True)]
    seconds = time_side_by_side(variants, effort)
    kept, less = (saved_for_backward(partial(forward, on), modules[on].parameters()) / MIB for on in (False, True))
    return name, kept, less, 100 * (1 - less / kept), ratio(seconds, "True", "False")


def _with_checkpointing(config: DecoderConfig, on: bool) -> DecoderConfig:
    assert config.moe is not None
    return replace(config, moe=replace(config.moe, checkpoint_experts=on))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--recipe", default="demo", choices=sorted(RECIPES))
    parser.add_argument("--rounds", type=int, default=10)
    add_output_arguments(parser)
    options = parser.parse_args()
    torch.manual_seed(0)
    config, effort = RECIPES[options.recipe](), Effort(options.rounds)
    if options.smoke:
        torch.set_num_threads(1)
        config, effort = replace(RECIPES["tiny"](), batch_size=2), Effort(rounds=2, warmup=1)
    emit(Report({"recipe": config.name, "rounds": effort.rounds}, (layer_table(config, effort),)), options)


if __name__ == "__main__":
    main()
