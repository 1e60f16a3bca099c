"""Which code computes each MoE layer of a model under `experts_implementation="equipoise"`, and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from equipoise.hf.layout import MARKS, flag, layout_of


@dataclass(frozen=True)
class LayerPath:
    """One experts module. computed_by: "ops", "custom ops" or "transformers". reason: one sentence."""

    name: str
    experts: str
    computed_by: str
    reason: str


def explain(model: nn.Module) -> tuple[LayerPath, ...]:
    """A `LayerPath` per experts module, in the model's order.

    Raises ValueError, naming the model type, if no module of the model uses transformers' experts interface: then
    `experts_implementation` has no effect, and transformers does not say so.
    """
    paths = tuple(
        _path(name, module) for name, module in model.named_modules() if all(hasattr(module, mark) for mark in MARKS)
    )
    if not paths:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        raise ValueError(
            f"{kind}: expected experts modules that use transformers' experts interface, got none; "
            "experts_implementation has no effect on this model"
        )
    return paths


def _path(name: str, experts: nn.Module) -> LayerPath:
    layout = layout_of(experts)
    if layout.missing is not None:
        return LayerPath(name, type(experts).__name__, "transformers", f"it has {layout.missing}")
    if layout.plain:
        return LayerPath(name, type(experts).__name__, "ops", "SwiGLU without biases, gate first")
    differs = [
        what
        for what, is_so in {
            "biases": experts.has_bias,
            "transposed weights": experts.is_transposed,
            "no gate": not flag(experts, "has_gate"),
            "gate and up interleaved": not flag(experts, "is_concatenated"),
        }.items()
        if is_so
    ]
    return LayerPath(name, type(experts).__name__, "custom ops", ", ".join(differs) or "an activation of its own")
