"""Nets on top of the radial basis: the last hidden features of each layer, and the edge density of D and NL blocks.

`with_slope(x, dx)` of every part carries a derivative along: dx is d(x)/dr of each pair, and so is what comes back.
"""

import math
from itertools import pairwise
from typing import Any, Dict, Final, List, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from mdplug.potentials.blocks.activations import ACTIVATION_NORM


class Affine(nn.Linear):
    """nn.Linear."""

    def with_slope(self, x: Tensor, dx: Tensor) -> Tuple[Tensor, Tensor]:
        """See the module."""
        return functional.linear(x, self.weight, self.bias), functional.linear(dx, self.weight)


class Silu(nn.SiLU):
    """nn.SiLU."""

    def with_slope(self, x: Tensor, dx: Tensor) -> Tuple[Tensor, Tensor]:
        """See the module."""
        return functional.silu(x), silu_slope(x, dx)


class Norm(nn.LayerNorm):
    """nn.LayerNorm."""

    def with_slope(self, x: Tensor, dx: Tensor) -> Tuple[Tensor, Tensor]:
        """See the module."""
        centred, moved = x - x.mean(1, keepdim=True), dx - dx.mean(1, keepdim=True)
        inverse = torch.rsqrt(centred.square().mean(1, keepdim=True) + self.eps)
        normal = centred * inverse
        slope = inverse * (moved - normal * (normal * moved).mean(1, keepdim=True))
        return self.forward(x), slope * self.weight  # to the last bit what is there without slopes


def silu_slope(x: Tensor, dx: Tensor) -> Tensor:
    """Derivative of silu(x), in one pass over memory."""
    return torch.ops.aten.silu_backward(dx, x)


def tanh_square(x: Tensor, dx: Tensor) -> Tuple[Tensor, Tensor]:
    """tanh(x^2) and its derivative."""
    y = torch.tanh(x**2)
    return y, (1.0 - y * y) * 2.0 * x * dx


class Dense(nn.Module):
    """A matrix (in, out), its normalisation included."""

    def __init__(self, n_in: int, n_out: int, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_in, n_out, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(E, in) -> (E, out)."""
        return torch.mm(x, self.weight)


class PlainNet(nn.Module):
    """Basis -> last hidden features, by silu layers without bias; and, if asked, the edge density of D blocks.

    The last, linear layer of the net belongs to the layer that uses the features.
    """

    has_density: Final[bool]

    def __init__(self, n_basis: int, widths: Sequence[int], density: bool, dtype: torch.dtype):
        super().__init__()
        sizes = [n_basis, *widths]
        self.hidden = nn.ModuleList([Dense(a, b, dtype) for a, b in pairwise(sizes)])
        self.has_density = density
        self.n_features = sizes[-1]
        self.density = nn.Parameter(torch.zeros(n_basis if density else 0, dtype=dtype))

    def forward(self, basis: Tensor, receiver: Tensor, sender: Tensor, envelope: Tensor) -> Tensor:
        """(E, n_features [+ 1]): features times envelope, then the density column where there is one."""
        x = basis
        for dense in self.hidden:
            x = functional.silu(dense(x))
        x = x * envelope
        if self.has_density:
            rho = torch.tanh(torch.mv(basis, self.density) ** 2).unsqueeze(1)
            x = torch.cat([x, rho * envelope], dim=1)
        return x

    def with_slope(self, basis: Tensor, d_basis: Tensor, receiver: Tensor, sender: Tensor) -> Tuple[Tensor, Tensor]:
        """What `forward` gives without the envelope, and its derivative by r; d_basis: that of the basis."""
        x, dx = basis, d_basis
        for dense in self.hidden:
            before, d_before = dense(x), dense(dx)
            x, dx = functional.silu(before), silu_slope(before, d_before)
        if self.has_density:
            rho, d_rho = tanh_square(torch.mv(basis, self.density), torch.mv(d_basis, self.density))
            x, dx = torch.cat([x, rho.unsqueeze(1)], dim=1), torch.cat([dx, d_rho.unsqueeze(1)], dim=1)
        return x, dx

    @torch.jit.unused
    def scales(self) -> Dict[str, float]:
        """Factor between a weight of unit variance and the weight stored here."""
        out: Dict[str, float] = {}
        for k in range(len(self.hidden)):
            carried = 1.0 if k == 0 else ACTIVATION_NORM["silu"]
            out[f"hidden.{k}.weight"] = carried / math.sqrt(len(self.get_parameter(f"hidden.{k}.weight")))
        if self.has_density:
            out["density"] = 1.0 / math.sqrt(self.density.shape[0])
        return out

    @torch.jit.unused
    def initialise(self, generator: torch.Generator) -> None:
        """Random weights of unit gain."""
        for key, scale in self.scales().items():
            parameter = self.get_parameter(key)
            parameter.data.normal_(0.0, scale, generator=generator)


class SpeciesNet(nn.Module):
    """Basis and both elements -> last hidden features plus a constant column, by normalised layers; and the density.

    The element tables enter the first layer as a bias per element, not as a concatenation.
    """

    has_density: Final[bool]
    n_basis: Final[int]
    n_table: Final[int]

    def __init__(self, n_basis: int, n_species: int, n_table: int, widths: Sequence[int], dtype: torch.dtype):
        super().__init__()
        self.has_density, self.n_basis, self.n_table = True, n_basis, n_table
        self.n_features = widths[-1] + 1
        self.source = nn.Parameter(torch.zeros(n_species, n_table, dtype=dtype))
        self.target = nn.Parameter(torch.zeros(n_species, n_table, dtype=dtype))
        width = n_basis + 2 * n_table
        self.first = nn.Linear(width, widths[0], dtype=dtype)
        parts: List[nn.Module] = []
        for a, b in pairwise(widths):
            parts += [Norm(a, eps=1e-5, dtype=dtype), Silu(), Affine(a, b, dtype=dtype)]
        parts += [Norm(widths[-1], eps=1e-5, dtype=dtype), Silu()]
        self.rest: Any = nn.Sequential(*parts)
        self.density_first = nn.Linear(width, 64, dtype=dtype)
        self.density_norm = Norm(64, eps=1e-5, dtype=dtype)
        self.density_last = Affine(64, 1, dtype=dtype)

    def enter(self, weight: Tensor, bias: Tensor, basis: Tensor, receiver: Tensor, sender: Tensor) -> Tensor:
        """First linear layer on [basis, source table of the sender, target table of the receiver]."""
        sizes = [self.n_basis, self.n_table, self.n_table]
        on_basis, on_source, on_target = torch.split(weight, sizes, dim=1)
        of_sender = torch.mm(self.source, on_source.t())
        of_receiver = torch.mm(self.target, on_target.t()) + bias
        return torch.mm(basis, on_basis.t()) + of_sender[sender] + of_receiver[receiver]

    def slope_of_enter(self, weight: Tensor, d_basis: Tensor) -> Tensor:
        """Derivative of what `enter` gives."""
        return torch.mm(d_basis, weight.narrow(1, 0, self.n_basis).t())

    def forward(self, basis: Tensor, receiver: Tensor, sender: Tensor, envelope: Tensor) -> Tensor:
        """(E, n_features + 1): features and a column of ones, times envelope, then the density column."""
        x = self.rest(self.enter(self.first.weight, self.first.bias, basis, receiver, sender))
        rho = self.enter(self.density_first.weight, self.density_first.bias, basis, receiver, sender)
        rho = torch.tanh(self.density_last(functional.silu(self.density_norm(rho))) ** 2)
        return torch.cat([x, torch.ones_like(envelope), rho], dim=1) * envelope

    def with_slope(self, basis: Tensor, d_basis: Tensor, receiver: Tensor, sender: Tensor) -> Tuple[Tensor, Tensor]:
        """As `PlainNet.with_slope`."""
        x = self.enter(self.first.weight, self.first.bias, basis, receiver, sender)
        dx = self.slope_of_enter(self.first.weight, d_basis)
        for part in self.rest:
            x, dx = part.with_slope(x, dx)
        rho = self.enter(self.density_first.weight, self.density_first.bias, basis, receiver, sender)
        rho, d_rho = self.density_norm.with_slope(rho, self.slope_of_enter(self.density_first.weight, d_basis))
        rho, d_rho = functional.silu(rho), silu_slope(rho, d_rho)
        rho, d_rho = self.density_last.with_slope(rho, d_rho)
        rho, d_rho = tanh_square(rho, d_rho)
        ones = torch.ones_like(rho)
        return torch.cat([x, ones, rho], dim=1), torch.cat([dx, torch.zeros_like(ones), d_rho], dim=1)

    @torch.jit.unused
    def scales(self) -> Dict[str, float]:
        """Factor between a weight as upstream stores it and the weight stored here; absent: 1."""
        table = 1.0 / math.sqrt(self.source.shape[0])
        return {"source": table, "target": table}

    @torch.jit.unused
    def initialise(self, generator: torch.Generator) -> None:
        """Random weights: uniform +-1/sqrt(fan-in) in the linear layers, nearly zero element tables."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                bound = 1.0 / math.sqrt(part.in_features)
                part.weight.data.uniform_(-bound, bound, generator=generator)
                part.bias.data.uniform_(-bound, bound, generator=generator)
        for table in (self.source, self.target):
            bound = 1e-3 * self.scales()["source"]
            table.data.uniform_(-bound, bound, generator=generator)
