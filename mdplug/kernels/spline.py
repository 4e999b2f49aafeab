"""Quintic Hermite interpolation: value, slope and curvature at two knots fix the polynomial between them."""

import torch
from torch import Tensor


def quintic(s: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """(n, 6) weights of value, slope x step and curvature x step^2 at both knots: for the value, and for the slope.

    Args:
        s: (n,) place between the knots, 0 to 1. step: between the knots, A.
    """
    u = 1 - s
    h3 = s**3 * (10 + s * (6 * s - 15))
    value = [
        1 - h3, s + s**3 * (s * (8 - 3 * s) - 6), 0.5 * s**2 * u**3,
        h3, s**3 * (s * (7 - 3 * s) - 4), 0.5 * s**3 * u**2,
    ]  # fmt: skip
    d3 = 30 * s**2 * u**2
    slope = [
        -d3, 1 + s**2 * (s * (32 - 15 * s) - 18), 0.5 * s * (2 + s * (s * (12 - 5 * s) - 9)),
        d3, s**2 * (s * (28 - 15 * s) - 12), 0.5 * s**2 * (3 + s * (5 * s - 8)),
    ]  # fmt: skip
    return torch.stack(value, dim=1), torch.stack(slope, dim=1) / step
