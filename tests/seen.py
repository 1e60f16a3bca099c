"""What observers of a layer see."""

from torch import Tensor

from equipoise.layer import MoE
from equipoise.types import Routed


def forward_and_see(layer: MoE, *args, **kwargs) -> tuple[Tensor, Routed]:
    """(output, what observers saw) of one forward."""
    seen: list[Routed] = []
    handle = layer.tap.register_forward_hook(lambda module, args, routed: seen.append(routed))
    try:
        return layer(*args, **kwargs), seen[0]
    finally:
        handle.remove()
