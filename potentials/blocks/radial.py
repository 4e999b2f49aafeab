"""Functions of the pair distance: cutoff, distance transforms, bases, and what the layers make of them.

`with_slope` of each part gives the derivative, too, so that forces need no tape.

Sources: polynomial cutoff of Gasteiger et al. (arXiv 2003.03123); Agnesi transform of Witt et al. (J. Chem. Phys. 159,
164101, 2023).
"""

import math
from typing import Any, Dict, Final, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from mdplug.errors import InputError


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


def cutoff_with_slope(r: Tensor, cutoff: Tensor, p: int) -> Tuple[Tensor, Tensor]:
    """`polynomial_cutoff` and its derivative by r, 1/A."""
    t = r / cutoff
    u = torch.clamp(1.0 - t, min=0.0)
    slope = (-0.5 * p * (p + 1) * (p + 2)) * t ** (p - 1) * (u * u) / cutoff
    return polynomial_cutoff(r, cutoff, p), slope


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

    def with_slope(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Values and derivatives by x, (E, count) each."""
        y = self.forward(x)
        return y, (self.prefactor * self.frequencies * torch.cos(self.frequencies * x) - y) / x


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

    def with_slope(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """As `Bessel.with_slope`."""
        y = self.forward(x)
        return y, y * (self.centres - x) / (self.width * self.width)


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

    def with_slope(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """As `Bessel.with_slope`: d(T_n)/dx = n U_(n-1), polynomials of the second kind."""
        before, last = torch.zeros_like(x), torch.ones_like(x)
        slopes = [last]
        for n in range(2, self.count + 1):
            before, last = last, 2.0 * x * last - before
            slopes.append(n * last)
        return self.forward(x), torch.cat(slopes, dim=1)


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

    def with_slope(self, r: Tensor, receiver: Tensor, sender: Tensor) -> Tuple[Tensor, Tensor]:
        """What `forward` gives, and its derivative by r; (E, 1) each."""
        return r, torch.ones_like(r)


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

    def with_slope(self, r: Tensor, receiver: Tensor, sender: Tensor) -> Tuple[Tensor, Tensor]:
        """As `NoTransform.with_slope`."""
        t = r / (0.5 * (self.radii[receiver] + self.radii[sender]).unsqueeze(1))
        tp, tq = t**self.p, t**self.q
        both = tp + tq
        g = self.a * tp * tq / both
        y = 1.0 / (1.0 + g)
        return y, -y * y * g * (self.q * tp + self.p * tq) / (both * r)


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

    def with_slope(self, r: Tensor, receiver: Tensor, sender: Tensor) -> Tuple[Tensor, Tensor]:
        """As `NoTransform.with_slope`."""
        touching = (self.radii[receiver] + self.radii[sender]).unsqueeze(1)
        low, high = 0.75 * touching, touching / 0.75
        rate = self.alpha / (high - low)
        switch = torch.tanh(rate * (r - 0.5 * (low + high)))
        slope = 0.5 * (1.0 + switch) + 0.5 * (r - low) * (1.0 - switch * switch) * rate
        return low + 0.5 * (r - low) * (1.0 + switch), slope


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
        self.basis: Any = make_basis(config["basis"], int(config["n_basis"]), cutoff, dtype)
        self.transform: Any = make_transform(config["transform"], radii, dtype)
        self.nets: Any = nn.ModuleList(nets)
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

    def with_slopes(self, r: Tensor, receiver: Tensor, sender: Tensor) -> Tuple[List[Tensor], List[Tensor]]:
        """What `forward` gives, and its derivatives by r."""
        envelope, d_envelope = cutoff_with_slope(r, self.cutoff, self.p)
        x, dx = self.transform.with_slope(r, receiver, sender)
        basis, d_basis = self.basis.with_slope(x)
        d_basis = torch.zeros_like(basis) if self.detached else d_basis * dx
        if self.apply_cutoff:
            d_basis = d_basis * envelope + basis * d_envelope
            basis = basis * envelope
        columns: List[Tensor] = []
        slopes: List[Tensor] = []
        for net in self.nets:
            values, derivatives = net.with_slope(basis, d_basis, receiver, sender)
            if not self.apply_cutoff:
                derivatives = derivatives * envelope + values * d_envelope
                values = values * envelope
            columns.append(values)
            slopes.append(derivatives)
        return columns, slopes
