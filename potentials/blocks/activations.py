"""Activations by name, their slopes and their norms."""

import torch
from torch import Tensor
from torch.nn import functional

# 1/sqrt(<f(z)^2>) over a standard normal z, as upstream estimates it by seeded sampling; part of the weights' meaning.
ACTIVATION_NORM = {
    "silu": 1.6791767923989418,
    "sigmoid": 1.8467055342154763,
    "tanh": 1.5937334472592695,
    "abs": 1.001110600838467,
    "identity": 1.0,
}


def activate(x: Tensor, name: str) -> Tensor:
    """One of the named activations, without normalisation."""
    if name == "silu":
        return functional.silu(x)
    if name == "tanh":
        return torch.tanh(x)
    if name == "abs":
        return torch.abs(x)
    return x


def activate_slope(x: Tensor, name: str) -> Tensor:
    """Derivative of `activate`."""
    if name == "silu":
        s = torch.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
    if name == "tanh":
        return 1.0 - torch.tanh(x).square()
    if name == "abs":
        return torch.sign(x)
    return torch.ones_like(x)
