"""Registers "equipoise" with transformers' experts interface."""

from __future__ import annotations

from typing import Any

from equipoise.hf.forward import equipoise_experts_forward

NAME = "equipoise"


def register() -> None:
    """Make `experts_implementation="equipoise"` known. Calling it again changes nothing.

    Raises ModuleNotFoundError if transformers is missing, or has no experts interface (before 5).
    """
    try:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise ModuleNotFoundError(
            f"equipoise.hf: expected transformers 5 with its experts interface, got none ({error}); "
            "pip install 'equipoise[hf]'"
        ) from error
    ALL_EXPERTS_FUNCTIONS.register(NAME, equipoise_experts_forward)
    fp8_experts = _fp8_experts()
    if fp8_experts is not None:
        fp8_experts.register(NAME, _refuse_fp8)


def _fp8_experts() -> Any:
    """The table of FP8 experts; None in the first releases of 5, which have none, or need triton to import it."""
    try:
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    except ImportError:
        return None
    return ALL_FP8_EXPERTS_FUNCTIONS


def _refuse_fp8(self: Any, *args: Any, **kwargs: Any) -> None:
    """transformers looks FP8 experts up in a table of their own, and would only say that the name isn't in it."""
    raise NotImplementedError(
        f'experts_implementation="{NAME}": expected floating weights, got {type(self).__name__} in FP8, which '
        'equipoise does not compute; use experts_implementation="grouped_mm" for this model'
    )
