"""What an experts module of transformers keeps for backward, by implementation: python -m benchmarks.experts_memory.

Bytes of the storages that autograd holds, each once and parameters not at all. Nothing is timed.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from functools import partial

import torch
import transformers
from torch import Tensor, nn

import equipoise.hf  # registers "equipoise"
from equipoise.bench.harness import require_same
from equipoise.bench.report import Cell, Report, Table, add_output_arguments, announce, emit
from equipoise.bench.saved import MIB, saved_for_backward

IMPLEMENTATIONS = (equipoise.hf.NAME, "grouped_mm", "eager", "batched_mm")


@dataclass(frozen=True)
class Case:
    """An experts module of a family: E experts of D x F, and T tokens that each choose K of them."""

    family: str
    num_experts: int
    dim: int
    hidden_dim: int
    num_tokens: int
    top_k: int

    def build(self) -> nn.Module:
        """With random weights."""
        config = getattr(transformers, f"{self.family}Config")(
            hidden_size=self.dim, intermediate_size=self.hidden_dim, moe_intermediate_size=self.hidden_dim,
            num_experts=self.num_experts, num_local_experts=self.num_experts,
        )  # fmt: skip
        modeling = getattr(transformers, f"{self.family}ForCausalLM").__module__
        names = __import__(modeling, fromlist=["_"])
        experts: nn.Module = getattr(names, f"{self.family}Experts")(config)
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=0.05)
        return experts


CASES = (
    Case("Mixtral", 8, 512, 896, 128, 2),
    Case("Olmoe", 64, 512, 256, 128, 8),
    Case("GptOss", 32, 512, 512, 128, 4),
)
SMALL = (Case("Mixtral", 4, 32, 48, 64, 2), Case("GptOss", 4, 32, 32, 64, 2))


def kept(case: Case, dtype: torch.dtype) -> dict[str, int]:
    """Bytes by implementation. Raises ValueError if one of them computes something else."""
    torch.manual_seed(0)
    experts = case.build().to(dtype)
    x_TD = torch.randn(case.num_tokens, case.dim).to(dtype).requires_grad_()
    scores_TK, ids_TK = torch.randn(case.num_tokens, case.num_experts).softmax(-1).topk(case.top_k)
    weights_TK = scores_TK.to(dtype).requires_grad_()
    found, expected = {}, None
    for name in IMPLEMENTATIONS:
        module = copy.deepcopy(experts)
        module.config._experts_implementation = name
        forward = partial(_forward, module, x_TD, ids_TK, weights_TK)
        expected = [forward().detach()] if expected is None else expected
        require_same(name, [forward().detach()], expected, 1e-5 if dtype == torch.float32 else 0.03)
        known = (*module.parameters(), ids_TK)
        found[name] = saved_for_backward(forward, known)
    return found


def _forward(module: nn.Module, *arguments: Tensor) -> Tensor:
    y_TD: Tensor = module(*arguments)
    return y_TD


def table(cases: tuple[Case, ...], dtype: torch.dtype) -> Table:
    """A row per case: MiB of each implementation, and the others as multiples of ours."""
    rows: list[tuple[Cell, ...]] = []
    for case in cases:
        announce(f"{case.family}, {dtype}")
        found = kept(case, dtype)
        ours = found[equipoise.hf.NAME]
        multiples = [f"{found[name] / MIB:.1f} ({found[name] / ours:.1f} x)" for name in IMPLEMENTATIONS[1:]]
        size = f"{case.num_experts} x {case.dim} x {case.hidden_dim}, {case.num_tokens} tokens, top {case.top_k}"
        rows.append((case.family, size, f"{ours / MIB:.1f}", *multiples))
    columns = ("experts of", "E x D x F", *(f"{name} [MiB]" for name in IMPLEMENTATIONS))
    return Table(f"Kept for backward by one experts module, {str(dtype).removeprefix('torch.')}", columns, tuple(rows))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experts_memory", description=__doc__)
    add_output_arguments(parser)
    options = parser.parse_args()
    cases = SMALL if options.smoke else CASES
    tables = tuple(table(cases, dtype) for dtype in (torch.float32, torch.bfloat16))
    emit(Report({"transformers": transformers.__version__}, tables), options)


if __name__ == "__main__":
    main()
