"""What the routing tests share: a way to see a layer's decision. The routers themselves are in cases.py."""

import pytest
from torch import Tensor

from equipoise.layer import MoE
from equipoise.types import Routed


@pytest.fixture
def routed_by():
    """(output, what observers saw) of one forward of a layer."""

    def forward_and_see(layer: MoE, *args, **kwargs) -> tuple[Tensor, Routed]:
        seen: list[Routed] = []
        handle = layer.tap.register_forward_hook(lambda module, args, routed: seen.append(routed))
        try:
            return layer(*args, **kwargs), seen[0]
        finally:
            handle.remove()

    return forward_and_see
