"""The dense feed-forward block: the same function as one expert. Used in dense layers and as the shared expert."""

from __future__ import annotations

from torch import Tensor, nn

from equipoise.ops.activation import activate, check_activation, is_gated, pre_activation_dim
from equipoise.ops.few_linear import projections


class FeedForward(nn.Module):
    """down(activation(up(x))), without biases. x (..., dim) -> (..., dim).

    up_proj is called gate_up_proj when the activation is gated: its first half is the gate.
    """

    def __init__(self, dim: int, hidden_dim: int, activation: str = "swiglu") -> None:
        super().__init__()
        self.activation = check_activation(activation)
        up_proj = nn.Linear(dim, pre_activation_dim(hidden_dim, self.activation), bias=False)
        if is_gated(self.activation):
            self.gate_up_proj = up_proj
        else:
            self.up_proj = up_proj
        self.down_proj = nn.Linear(hidden_dim, dim, bias=False)

    def init_weights(self, std: float, output_std: float) -> None:
        """Normal values: std for the inner projection, output_std for the one that writes into the residual."""
        nn.init.normal_(self._up.weight, std=std)
        nn.init.normal_(self.down_proj.weight, std=output_std)

    @property
    def _up(self) -> nn.Linear:
        return self.gate_up_proj if is_gated(self.activation) else self.up_proj

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, same shape as x."""
        (inner,) = projections(x, [self._up])
        return projections(activate(inner, self.activation), [self.down_proj])[0]
