"""How an experts module of transformers lays out its weights, and which of our functions can compute it.

What is read are the flags that transformers' `use_experts_implementation` sets on each experts module, and the module's
parameters. Nothing here computes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from equipoise.ops.custom_experts import ExpertWeights

MARKS = ("has_bias", "is_transposed")  # on every decorated module since transformers 5.0
LATER = {"has_gate": True, "is_concatenated": True, "has_post_expert_norm": False}  # what their absence means
PARAMETERS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
PARAMETRIZED = "parametrizations"  # torch's, e.g. of an adapter: the parameters behind a weight


@dataclass(frozen=True)
class Layout:
    """plain: SwiGLU, gate first, without biases: what all of our expert products take; otherwise `ops.custom_experts`.

    missing: why neither can compute the module, None when one can. Then transformers' own code has to.
    """

    plain: bool
    missing: str | None = None


def layout_of(experts: nn.Module) -> Layout:
    """Read it from a module that transformers' decorator has prepared. Raises TypeError for another one."""
    absent = [mark for mark in MARKS if not hasattr(experts, mark)]
    if absent:
        raise TypeError(
            f"{type(experts).__name__}: expected an experts module that transformers' use_experts_implementation has "
            f"decorated, got one without {', '.join(absent)}; transformers 5 sets them"
        )
    if flag(experts, "has_post_expert_norm"):
        return Layout(plain=False, missing="a norm after each expert, before the combine weight")
    known = (*PARAMETERS, PARAMETRIZED)
    unknown = [name for name, _ in experts.named_parameters() if name.split(".")[0] not in known]
    if unknown:
        return Layout(plain=False, missing=f"the parameters {', '.join(unknown)}")
    weights = stacked_weights(experts)
    if weights.up_eHD.ndim != 3 or not weights.up_eHD.is_floating_point():
        return Layout(plain=False, missing=f"weights of {weights.up_eHD.dtype} and {weights.up_eHD.ndim} dimensions")
    plain = flag(experts, "has_gate") and flag(experts, "is_concatenated")
    return Layout(plain and not experts.has_bias and not experts.is_transposed and _is_swiglu(experts))


def stacked_weights(experts: nn.Module) -> ExpertWeights:
    """The weights as our functions take them; transposed ones as views."""
    name = "gate_up_proj" if flag(experts, "has_gate") else "up_proj"
    up, down = _tensor(experts, name), _tensor(experts, "down_proj")
    if experts.is_transposed:
        up, down = up.transpose(-2, -1), down.transpose(-2, -1)
    if not experts.has_bias:
        return ExpertWeights(up, down)
    return ExpertWeights(up, down, _tensor(experts, f"{name}_bias"), _tensor(experts, "down_proj_bias"))


def flag(experts: nn.Module, name: str) -> bool:
    """A flag of the decorator; releases from before it have modules of one kind only."""
    return bool(getattr(experts, name, LATER[name]))


def _tensor(experts: nn.Module, name: str) -> Tensor:
    value = getattr(experts, name, None)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{type(experts).__name__}: expected a tensor {name}, got {type(value).__name__}; "
            'use experts_implementation="eager" for it'
        )
    return value


def _is_swiglu(experts: nn.Module) -> bool:
    """Whether the module has the interface's own gating, with SiLU."""
    from transformers.activations import SiLUActivation
    from transformers.integrations.moe import _default_apply_gate

    activation = getattr(experts, "act_fn", None)
    silu = isinstance(activation, SiLUActivation | nn.SiLU) or activation is nn.functional.silu
    return silu and getattr(type(experts), "_apply_gate", None) is _default_apply_gate
