"""What a model is, bit for bit."""

from torch import Tensor, nn


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every tensor of its state dict, by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
