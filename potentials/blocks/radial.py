"""Functions of the pair distance: cutoff, distance transforms, bases, and the nets on top of them.

Sources: polynomial cutoff of Gasteiger et al. (arXiv 2003.03123); Agnesi transform of Witt et al. (J. Chem. Phys. 159,
164101, 2023); screened repulsion of Ziegler, Biersack and Littmark (1985) as MACE writes it.
"""

import math
from itertools import pairwise
from typing import Any, Dict, Final, List, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from mdplug.errors import InputError
from mdplug.potentials.blocks.activations import ACTIVATION_NORM
from mdplug.potentials.blocks.harmonics import Constants


def polynomial_cutoff(r: Tensor, cutoff: Tensor, p: int) -> Tensor:
    """1 at r=0, 0 from r=cutoff on, twice continuously differentiable there.

    Args:
        r: (E, 1) A. cutoff: A, broadcast against r. p: exponent.
    """
    # 1 - (p+1)(p+2)/2 t^p + p(p+2) t^(p+1) - p(p+1)/2 t^(p+2), with its triple root taken out: no cancellation near t=1
    t = r / cutoff
    u = torch.clamp(1.0 - t, min=0.0)
    total = torch.full_like(t, 0.5 * p * (p + 1))
    for k in range(p - 2, -1, -1):
        total = total * t + 0.5 * (k + 1) * (k + 2)
    return u * u * u * total


class Bessel(nn.Module):
    """sqrt(2/c) sin(n pi x/c)/x, n = 1..count."""

    frequencies: Tensor
    prefactor: Tensor

    def __init__(self, count: int, cutoff: float, dtype: torch.dtype):
        super().__init__()
        order = torch.arange(1, count + 1, dtype=torch.float64)
        self.register_buffer("frequencies", (order * math.pi / cutoff).to(dtype))
        self.register_buffer("prefactor", torch.tensor(math.sqrt(2.0 / cutoff), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(E, 1) -> (E, count)."""
        return self.prefactor * torch.sin(self.frequencies * x) / x


class Gaussian(nn.Module):
    """Gaussians of one width on a grid from 0 to the cutoff."""

    centres: Tensor
    width: Tensor

    def __init__(self, count: int, cutoff: float, dtype: torch.dtype):
        super().__init__()
        self.register_buffer("centres", torch.linspace(0.0, cutoff, count, dtype=torch.float64).to(dtype))
        self.register_buffer("width", torch.tensor(cutoff / (count - 1), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(E, 1) -> (E, count)."""
        return torch.exp(-0.5 * ((x - self.centres) / self.width) ** 2)


class Chebyshev(nn.Module):
    """Chebyshev polynomials T_1..T_count of x itself (meant for a transformed x in 0..1)."""

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        """(E, 1) -> (E, count)."""
        before = torch.ones_like(x)
        last = x
        polynomials = [x]
        for _ in range(self.count - 1):
            following = 2.0 * x * last - before
            before, last = last, following
            polynomials.append(following)
        return torch.cat(polynomials, dim=1)


def make_basis(kind: str, count: int, cutoff: float, dtype: torch.dtype) -> nn.Module:
    """A basis by name.

    Raises:
        InputError: unknown name.
    """
    if kind == "bessel":
        return Bessel(count, cutoff, dtype)
    if kind == "gaussian":
        return Gaussian(count, cutoff, dtype)
    if kind == "chebyshev":
        return Chebyshev(count)
    raise InputError(f"radial basis {kind!r} is not known; use bessel, gaussian or chebyshev")


class NoTransform(nn.Module):
    """The distance itself."""

    def forward(self, r: Tensor, receiver: Tensor, sender: Tensor) -> Tensor:
        """(E, 1) A -> the same."""
        return r


class Agnesi(nn.Module):
    """Dimensionless distance, 1 at contact and 0 far away, by covalent radii (S,) in A."""

    a: Tensor
    q: Tensor
    p: Tensor
    radii: Tensor

    def __init__(self, radii: Sequence[float], dtype: torch.dtype):
        super().__init__()
        for name, value in (("a", 1.0805), ("q", 0.9183), ("p", 4.5791)):
            self.register_buffer(name, torch.tensor(value, dtype=dtype))
        self.register_buffer("radii", torch.tensor(radii, dtype=dtype))

    def forward(self, r: Tensor, receiver: Tensor, sender: Tensor) -> Tensor:
        """(E, 1) A, species of both atoms (E,) -> (E, 1)."""
        t = r / (0.5 * (self.radii[receiver] + self.radii[sender]).unsqueeze(1))
        # a t^q / (1 + t^(q-p)), written so that nothing overflows at small t
        tp, tq = t**self.p, t**self.q
        return 1.0 / (1.0 + self.a * tp * tq / (tp + tq))


class Soft(nn.Module):
    """Distance in A, held constant below contact, by covalent radii (S,) in A."""

    alpha: Tensor
    radii: Tensor

    def __init__(self, radii: Sequence[float], dtype: torch.dtype):
        super().__init__()
        self.register_buffer("alpha", torch.tensor(4.0, dtype=dtype))
        self.register_buffer("radii", torch.tensor(radii, dtype=dtype))

    def forward(self, r: Tensor, receiver: Tensor, sender: Tensor) -> Tensor:
        """(E, 1) A, species of both atoms (E,) -> (E, 1) A."""
        touching = (self.radii[receiver] + self.radii[sender]).unsqueeze(1)
        low, high = 0.75 * touching, touching / 0.75
        switch = torch.tanh(self.alpha * (r - 0.5 * (low + high)) / (high - low))
        return low + 0.5 * (r - low) * (1.0 + switch)


def make_transform(kind: str, radii: Sequence[float], dtype: torch.dtype) -> nn.Module:
    """A distance transform by name.

    Raises:
        InputError: unknown name.
    """
    if kind == "none":
        return NoTransform()
    if kind == "agnesi":
        return Agnesi(radii, dtype)
    if kind == "soft":
        return Soft(radii, dtype)
    raise InputError(f"distance transform {kind!r} is not known; use none, agnesi or soft")


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
            parts += [nn.LayerNorm(a, eps=1e-5, dtype=dtype), nn.SiLU(), nn.Linear(a, b, dtype=dtype)]
        parts += [nn.LayerNorm(widths[-1], eps=1e-5, dtype=dtype), nn.SiLU()]
        self.rest = nn.Sequential(*parts)
        self.density_first = nn.Linear(width, 64, dtype=dtype)
        self.density_norm = nn.LayerNorm(64, eps=1e-5, dtype=dtype)
        self.density_last = nn.Linear(64, 1, dtype=dtype)

    def enter(self, weight: Tensor, bias: Tensor, basis: Tensor, receiver: Tensor, sender: Tensor) -> Tensor:
        """First linear layer on [basis, source table of the sender, target table of the receiver]."""
        sizes = [self.n_basis, self.n_table, self.n_table]
        on_basis, on_source, on_target = torch.split(weight, sizes, dim=1)
        of_sender = torch.mm(self.source, on_source.t())
        of_receiver = torch.mm(self.target, on_target.t()) + bias
        return torch.mm(basis, on_basis.t()) + of_sender[sender] + of_receiver[receiver]

    def forward(self, basis: Tensor, receiver: Tensor, sender: Tensor, envelope: Tensor) -> Tensor:
        """(E, n_features + 1): features and a column of ones, times envelope, then the density column."""
        x = self.rest(self.enter(self.first.weight, self.first.bias, basis, receiver, sender))
        rho = self.enter(self.density_first.weight, self.density_first.bias, basis, receiver, sender)
        rho = torch.tanh(self.density_last(functional.silu(self.density_norm(rho))) ** 2)
        return torch.cat([x, torch.ones_like(envelope), rho], dim=1) * envelope

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


class Radial(nn.Module):
    """Everything of the pair distance that the layers need: one tensor of columns per layer.

    Args:
        config: the model's "radial" record: basis, n_basis, p, transform, apply_cutoff, detached.
        cutoff: A. radii: (S,) A. nets: one per layer.
    """

    apply_cutoff: Final[bool]
    detached: Final[bool]
    p: Final[int]
    cutoff: Tensor

    def __init__(
        self,
        config: Dict[str, Any],
        cutoff: float,
        radii: Sequence[float],
        nets: List[nn.Module],
        dtype: torch.dtype,
    ):
        super().__init__()
        self.p = int(config["p"])
        self.apply_cutoff = bool(config["apply_cutoff"])
        self.detached = bool(config["detached"])
        self.basis = make_basis(config["basis"], int(config["n_basis"]), cutoff, dtype)
        self.transform = make_transform(config["transform"], radii, dtype)
        self.nets = nn.ModuleList(nets)
        self.register_buffer("cutoff", torch.tensor(cutoff, dtype=dtype), persistent=False)

    def forward(self, r: Tensor, receiver: Tensor, sender: Tensor) -> List[Tensor]:
        """Columns of each layer.

        Args:
            r: (E, 1) A. receiver, sender: (E,) species.
        """
        envelope = polynomial_cutoff(r, self.cutoff, self.p)
        basis = self.basis(self.transform(r, receiver, sender))
        if self.detached:
            basis = basis.detach()
        if self.apply_cutoff:
            basis = basis * envelope
            envelope = torch.ones_like(envelope)
        columns: List[Tensor] = []
        for net in self.nets:
            columns.append(net(basis, receiver, sender, envelope))
        return columns


class Repulsion(Constants):
    """Screened nuclear repulsion, switched off at the sum of covalent radii; credited to the receiver.

    Args:
        numbers: (S,) atomic numbers. radii: (S,) A. p: exponent of the switch.
    """

    p: Final[int]
    coefficients: Tensor
    exponent: Tensor
    prefactor: Tensor
    radii: Tensor
    charges: Tensor
    decay: Tensor
    rounded: Tensor

    def __init__(self, numbers: Sequence[int], radii: Sequence[float], p: int, dtype: torch.dtype):
        super().__init__()
        self.p = p
        self.register_buffer("coefficients", torch.tensor([0.1818, 0.5099, 0.2802, 0.02817], dtype=dtype))
        self.register_buffer("exponent", torch.tensor(0.3, dtype=dtype))
        self.register_buffer("prefactor", torch.tensor(0.4543, dtype=dtype))
        self.register_buffer("radii", torch.tensor(radii, dtype=dtype))
        self.add_constant("charges", np.array(numbers), dtype)
        self.add_constant("decay", np.array([3.2, 0.9423, 0.4028, 0.2016]), dtype)
        # Bohr radius (A) and e^2/(4 pi eps0) (eV A) as rounded by upstream: the weights were trained around them.
        self.add_constant("rounded", np.array([0.529, 14.3996]), dtype)

    def forward(self, r: Tensor, receiver: Tensor, sender: Tensor) -> Tensor:
        """(E, 1) A, species of both atoms (E,) -> (E,) eV, half of the pair energy."""
        power = self.charges**self.exponent
        length = self.prefactor * self.rounded[0] / (power[receiver] + power[sender])
        screening = torch.mv(torch.exp(-(r / length.unsqueeze(1)) * self.decay), self.coefficients)
        product = self.charges[receiver] * self.charges[sender]
        bare = 0.5 * self.rounded[1] * product / r.squeeze(1)
        reach = (self.radii[receiver] + self.radii[sender]).unsqueeze(1)
        return bare * screening * polynomial_cutoff(r, reach, self.p).squeeze(1)
