"""Real spherical harmonics and real 3j symbols in the e3nn convention (polar axis y, component norm).

Sources: Racah's formula for Clebsch-Gordan coefficients; the real basis and the sign of {1, l, l} triples follow
e3nn 0.4 (https://e3nn.org), so that MACE weights keep their meaning.
"""

import math
from functools import cache
from typing import Dict, List, Tuple

import numpy as np
import torch
from torch import Tensor, nn

Polynomial = Dict[Tuple[int, int, int], float]  # exponents of x, y, z -> coefficient


class Constants(nn.Module):
    """A module whose constant tensors stay exact when its dtype goes down and up again.

    They are kept in float64 beside the buffers, are not part of the state dict, and are cast anew at every move.
    """

    def __init__(self) -> None:
        super().__init__()
        self._exact: Dict[str, np.ndarray] = {}

    def add_constant(self, name: str, value: np.ndarray, dtype: torch.dtype) -> None:
        """Register a constant buffer, computed in float64, held in `dtype`."""
        self._exact[name] = np.asarray(value, dtype=np.float64)
        self.register_buffer(name, torch.from_numpy(self._exact[name]).to(dtype), persistent=False)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        for name, exact in self._exact.items():
            held = getattr(self, name)
            if held.device.type != "meta":
                setattr(self, name, torch.from_numpy(exact).to(device=held.device, dtype=held.dtype))
        return self


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    product: Polynomial = {}
    for (i, j, k), u in a.items():
        for (p, q, r), v in b.items():
            key = (i + p, j + q, k + r)
            product[key] = product.get(key, 0.0) + u * v
    return product


def _plus(a: Polynomial, u: float, b: Polynomial, v: float) -> Polynomial:
    total = {key: u * value for key, value in a.items()}
    for key, value in b.items():
        total[key] = total.get(key, 0.0) + v * value
    return total


@cache
def monomials(degree: int) -> Tuple[Tuple[int, int, int], ...]:
    """Exponents (x, y, z) of all monomials of one degree, in the order in which `SphericalHarmonics` makes them."""
    return tuple((i, j, degree - i - j) for i in range(degree, -1, -1) for j in range(degree - i, -1, -1))


@cache
def harmonic_coefficients(ell: int) -> np.ndarray:
    """(monomials of degree l, 2l+1): Y_lm on the unit sphere as homogeneous polynomials, sum_m Y_lm^2 = 2l+1.

    m runs from -l to l; the standard axes (X, Y, Z) are (z, x, y); no Condon-Shortley phase.
    """
    x: Polynomial = {(1, 0, 0): 1.0}
    y: Polynomial = {(0, 1, 0): 1.0}
    z: Polynomial = {(0, 0, 1): 1.0}
    square: Polynomial = {(2, 0, 0): 1.0, (0, 2, 0): 1.0, (0, 0, 2): 1.0}
    column = {exponents: row for row, exponents in enumerate(monomials(ell))}
    table = np.zeros((len(column), 2 * ell + 1))
    real: Polynomial = {(0, 0, 0): 1.0}
    imaginary: Polynomial = {}
    for m in range(ell + 1):
        # Legendre part by the upward recursion in l at fixed m, times r^(l-m).
        below: Polynomial = {}
        legendre: Polynomial = {(0, 0, 0): float(math.prod(range(1, 2 * m, 2)))}
        for k in range(m + 1, ell + 1):
            step = _plus(_times(y, legendre), (2 * k - 1) / (k - m), _times(square, below), -(k + m - 1) / (k - m))
            below, legendre = legendre, step
        norm = math.sqrt((2 * ell + 1) * (1 if m == 0 else 2) * math.factorial(ell - m) / math.factorial(ell + m))
        for exponents, value in _times(legendre, real).items():
            table[column[exponents], ell + m] = norm * value
        if m > 0:
            for exponents, value in _times(legendre, imaginary).items():
                table[column[exponents], ell - m] = norm * value
        real, imaginary = (
            _plus(_times(z, real), 1.0, _times(x, imaginary), -1.0),
            _plus(_times(x, real), 1.0, _times(z, imaginary), 1.0),
        )
    return table


class SphericalHarmonics(Constants):
    """(E, 3) unit vectors -> (E, (l_max+1)^2): monomials by degree, then one matrix product."""

    starts: List[int]
    sizes: List[int]
    left: Tensor
    right: Tensor
    table: Tensor

    def __init__(self, l_max: int, dtype: torch.dtype):
        super().__init__()
        self.l_max = l_max
        rows = sum(len(monomials(ell)) for ell in range(l_max + 1))
        table = np.zeros((rows, (l_max + 1) ** 2))
        row = 0
        left: List[Tensor] = []
        right: List[Tensor] = []
        for ell in range(l_max + 1):
            count = len(monomials(ell))
            table[row : row + count, ell * ell : (ell + 1) ** 2] = harmonic_coefficients(ell)
            row += count
            if ell >= 2:  # each monomial is one of the degree below times one of x, y, z
                index = {exponents: place for place, exponents in enumerate(monomials(ell - 1))}
                pairs = []
                for exponents in monomials(ell):
                    axis = next(a for a in range(3) if exponents[a] > 0)
                    lower = list(exponents)
                    lower[axis] -= 1
                    pairs.append((index[(lower[0], lower[1], lower[2])], axis))
                left.append(torch.tensor([p[0] for p in pairs]))
                right.append(torch.tensor([p[1] for p in pairs]))
        sizes = [len(t) for t in left]
        self.starts = [sum(sizes[:k]) for k in range(len(sizes))]
        self.sizes = sizes
        empty = torch.zeros(0, dtype=torch.int64)
        self.register_buffer("left", torch.cat([*left, empty]), persistent=False)
        self.register_buffer("right", torch.cat([*right, empty]), persistent=False)
        self.add_constant("table", table, dtype)

    def forward(self, unit: Tensor) -> Tensor:
        """Evaluate.

        Args:
            unit: (E, 3) unit vectors.
        """
        degrees = [torch.ones_like(unit[:, :1])]
        if self.l_max > 0:
            degrees.append(unit)
        for k in range(len(self.sizes)):
            low = degrees[-1].index_select(1, self.left.narrow(0, self.starts[k], self.sizes[k]))
            degrees.append(low * unit.index_select(1, self.right.narrow(0, self.starts[k], self.sizes[k])))
        return torch.mm(torch.cat(degrees, dim=1), self.table)

    @torch.jit.unused
    def products(self) -> Tuple[Tensor, Tensor]:
        """(monomials of degree 2 and more,) int32: each is monomial `left` of the whole list times axis `right`."""
        starts = [sum(len(monomials(k)) for k in range(ell)) for ell in range(self.l_max + 1)]
        offset = torch.cat([torch.full((size,), starts[k + 1]) for k, size in enumerate(self.sizes)] + [torch.zeros(0)])
        return (self.left.cpu() + offset).to(torch.int32), self.right.cpu().to(torch.int32)


def _clebsch_gordan(j1: int, m1: int, j2: int, m2: int, j3: int, m3: int) -> float:
    """<j1 m1 j2 m2 | j3 m3> by Racah's formula."""
    if m1 + m2 != m3 or not abs(j1 - j2) <= j3 <= j1 + j2:
        return 0.0
    f = math.factorial
    front = (2 * j3 + 1) * f(j3 + j1 - j2) * f(j3 - j1 + j2) * f(j1 + j2 - j3) / f(j1 + j2 + j3 + 1)
    front *= f(j3 + m3) * f(j3 - m3) * f(j1 - m1) * f(j1 + m1) * f(j2 - m2) * f(j2 + m2)
    total = 0.0
    for k in range(j1 + j2 - j3 + 1):
        terms = (k, j1 + j2 - j3 - k, j1 - m1 - k, j2 + m2 - k, j3 - j2 + m1 + k, j3 - j1 - m2 + k)
        if min(terms) >= 0:
            total += (-1) ** k / math.prod(f(t) for t in terms)
    return math.sqrt(front) * total


def _real_basis(ell: int) -> np.ndarray:
    """(complex m, real m): columns are the real functions, in e3nn's phase (-i)^l."""
    q = np.zeros((2 * ell + 1, 2 * ell + 1), dtype=np.complex128)
    q[ell, ell] = 1.0
    for m in range(1, ell + 1):
        q[ell - m, ell + m] = 1.0 / math.sqrt(2.0)
        q[ell - m, ell - m] = -1.0j / math.sqrt(2.0)
        q[ell + m, ell + m] = (-1) ** m / math.sqrt(2.0)
        q[ell + m, ell - m] = 1.0j * (-1) ** m / math.sqrt(2.0)
    return (-1.0j) ** ell * q


@cache
def real_3j(l1: int, l2: int, l3: int) -> np.ndarray:
    """(2l1+1, 2l2+1, 2l3+1) float64: the invariant tensor of three real irreps, Frobenius norm 1."""
    shape = (2 * l1 + 1, 2 * l2 + 1, 2 * l3 + 1)
    if not abs(l1 - l2) <= l3 <= l1 + l2:
        return np.zeros(shape)
    coupled = np.zeros(shape)
    for i in range(shape[0]):
        for k in range(shape[1]):
            for m in range(shape[2]):
                coupled[i, k, m] = _clebsch_gordan(l1, i - l1, l2, k - l2, l3, m - l3)
    tensor = np.tensordot(_real_basis(l1), coupled, (0, 0))  # (j, k, m)
    tensor = np.tensordot(tensor, _real_basis(l2), (1, 0))  # (j, m, l)
    tensor = np.tensordot(tensor, _real_basis(l3).conj(), (1, 0)).real  # (j, l, n)
    tensor /= np.linalg.norm(tensor)
    low, middle, high = sorted((l1, l2, l3))
    if (l1 + l2 + l3) % 2 == 1 and low == 1 and middle == high and high > 1:
        tensor = -tensor  # e3nn's sign for {1, l, l}
    return tensor
