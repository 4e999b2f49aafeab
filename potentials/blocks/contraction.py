"""Symmetric contraction: invariant or covariant polynomials of an atom's own features, element by element.

B_L[n, M, k] = sum over degrees nu and couplings eta of W_nu[z_n, eta, k] U_nu[M, m1..m_nu, eta] prod_q A[m_q, n, k].
U is symmetric in effect, so only its few non-zero sorted monomials are kept (94 for L=0, l_max 3, nu_max 3, against
4368 dense entries).

Source of the recursion: Batatia et al., MACE, NeurIPS 2022 (arXiv 2206.07697), equations 10 and 11.
"""

from functools import cache
from typing import List, Optional, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from mdplug.potentials.blocks.harmonics import Constants, real_3j

Coupled = Tuple[int, int, np.ndarray]  # l, parity, tensor (2l+1, (l_max+1)^2, ...)


@cache
def _couplings(l_max: int, degree: int, natural: bool) -> Tuple[Coupled, ...]:
    """All ways to couple `degree` copies of the irreps 0..l_max, sorted by (l, parity), each once per history."""
    width = (l_max + 1) ** 2
    if degree == 1:
        unit = np.eye(width)
        return tuple((ell, (-1) ** ell, unit[ell * ell : (ell + 1) ** 2]) for ell in range(l_max + 1))
    coupled: List[Coupled] = []
    for l_left, p_left, left in _couplings(l_max, degree - 1, natural):
        for ell in range(l_max + 1):
            for l_out in range(abs(l_left - ell), l_left + ell + 1):
                parity = p_left * (-1) ** ell
                if natural and (parity != (-1) ** l_out or l_out > 11):
                    continue
                coupled.append((l_out, parity, _couple(left, l_left, ell, l_out, width)))
    return tuple(sorted(coupled, key=lambda entry: entry[:2]))


def _couple(left: np.ndarray, l_left: int, ell: int, l_out: int, width: int) -> np.ndarray:
    tensor = np.zeros((2 * l_out + 1, *left.shape[1:], width))
    symbol = np.sqrt(2 * l_out + 1) * real_3j(l_out, l_left, ell)
    tensor[..., ell * ell : (ell + 1) ** 2] = np.einsum("cab,a...->c...b", symbol, left)
    return tensor


@cache
def symmetric_basis(l_max: int, l_out: int, degree: int) -> Tuple[np.ndarray, np.ndarray, Tuple[int, ...]]:
    """The non-zero monomials of U and their coefficients.

    Args:
        l_max: highest degree of the input features.
        l_out: degree of the output.
        degree: power of the polynomial, 1 to 4.

    Returns:
        index (degree, terms) int64: which feature components each term multiplies, sorted within a term;
        basis (terms, P) float64: coefficient of each term in each of the P couplings, summed over permutations;
        sizes (2 l_out + 1): terms of each output component, which follow one another.
    """
    width = (l_max + 1) ** 2
    natural = degree == 4  # upstream's rule, which fixes P
    shape = (width,) * degree
    sorted_index = np.sort(np.indices(shape).reshape(degree, -1), axis=0)
    flat = np.ravel_multi_index(tuple(sorted_index), shape)
    columns = []
    if degree == 1:
        columns = [t for ell, _, t in _couplings(l_max, 1, natural) if ell == l_out]
    else:
        for l_left, p_left, left in _couplings(l_max, degree - 1, natural):
            for ell in range(l_max + 1):
                if abs(l_left - ell) <= l_out <= l_left + ell and p_left * (-1) ** ell == (-1) ** l_out:
                    columns.append(_couple(left, l_left, ell, l_out, width))
    terms: List[np.ndarray] = []
    rows: List[np.ndarray] = []
    sizes: List[int] = []
    for m in range(2 * l_out + 1):
        summed = np.zeros((width**degree, len(columns)))
        for p, column in enumerate(columns):
            summed[:, p] = np.bincount(flat, weights=column[m].reshape(-1), minlength=width**degree)
        keep = np.flatnonzero(np.abs(summed).max(axis=1, initial=0.0) > 1e-10)
        terms.append(np.stack(np.unravel_index(keep, shape)))
        rows.append(summed[keep])
        sizes.append(len(keep))
    return np.concatenate(terms, axis=1), np.concatenate(rows, axis=0), tuple(sizes)


class Power(Constants):
    """One degree of one output: its weights and its monomials.

    Attributes:
        weight: (S or 1, P, K) as trained; after `fold` (S or 1, terms, K), the couplings summed into it.
    """

    def __init__(self, l_max: int, l_out: int, degree: int, n_species: int, channels: int, dtype: torch.dtype):
        super().__init__()
        index, basis, sizes = symmetric_basis(l_max, l_out, degree)
        self.degree = degree
        self.n_components = 2 * l_out + 1
        self.sizes: List[int] = list(sizes)
        self.folded = False
        self.register_buffer("index", torch.from_numpy(index.astype(np.int64)), persistent=False)
        self.add_constant("basis", basis, dtype)
        self.weight = nn.Parameter(torch.zeros(n_species, basis.shape[1], channels, dtype=dtype))

    def coefficients(self, present: Optional[Tensor]) -> Tensor:
        """(S' or 1, terms, K), for the species in `present` only; None: all rows."""
        weight = self.weight if present is None else self.weight.index_select(0, present)
        return weight if self.folded else torch.matmul(self.basis, weight)

    def fold(self) -> None:
        """Sum the couplings into the weights for good."""
        if not self.folded:
            with torch.no_grad():
                self.weight = nn.Parameter(torch.matmul(self.basis, self.weight), requires_grad=False)
            self.folded = True

    def forward(self, features: Tensor, coefficients: Tensor) -> Tensor:
        """One chunk of atoms of one species.

        Args:
            features: ((l_max+1)^2, n, K).
            coefficients: (terms, K).

        Returns:
            (2 l_out + 1, n, K)
        """
        product = features.index_select(0, self.index[0]) * coefficients.unsqueeze(1)
        for q in range(1, self.degree):
            product = product * features.index_select(0, self.index[q])
        if self.n_components == 1:
            return product.sum(0, keepdim=True)
        parts = [piece.sum(0) for piece in torch.split(product, self.sizes)]
        return torch.stack(parts)


class Output(nn.Module):
    """All degrees of one output irrep."""

    def __init__(self, l_max: int, l_out: int, degree: int, n_species: int, channels: int, dtype: torch.dtype):
        super().__init__()
        self.powers = nn.ModuleList(
            [Power(l_max, l_out, nu, n_species, channels, dtype) for nu in range(1, degree + 1)]
        )

    def coefficients(self, present: Optional[Tensor]) -> List[Tensor]:
        """Of each degree; see `Power.coefficients`."""
        return [power.coefficients(present) for power in self.powers]

    def forward(self, features: Tensor, coefficients: List[Tensor], kind: int) -> Tensor:
        """(2L+1, n, K) for a chunk of atoms of species `kind` (its place in the coefficients)."""
        total = features.new_zeros(0)
        for q, power in enumerate(self.powers):
            part = power(features, coefficients[q][kind])
            total = part if q == 0 else total + part
        return total


class SymmetricContraction(nn.Module):
    """All outputs 0..l_out, over chunks of atoms of one species each.

    Args:
        l_max: of the input features. l_out: highest output. degree: highest power.
        n_species: rows of the weights (1 where the product does not look at the element).
    """

    def __init__(self, l_max: int, l_out: int, degree: int, n_species: int, channels: int, dtype: torch.dtype):
        super().__init__()
        self.agnostic = n_species == 1
        self.outputs = nn.ModuleList(
            [Output(l_max, ell, degree, n_species, channels, dtype) for ell in range(l_out + 1)]
        )

    def fold(self) -> None:
        """Sum the couplings into the weights for good (inference)."""
        for output in self.outputs:
            for power in output.powers:
                power.fold()

    def forward(
        self, features: Tensor, present: Tensor, sizes: List[int], kinds: List[int]
    ) -> List[Tensor]:
        """Contract.

        Args:
            features: ((l_max+1)^2, n, K), atoms sorted by species.
            present: (S',) species that occur.
            sizes, kinds: chunks of atoms, and the place of their species in `present`.

        Returns:
            (2L+1, n, K) for each L.
        """
        chunks = torch.split(features, sizes, dim=1)
        results: List[Tensor] = []
        for output in self.outputs:
            coefficients = output.coefficients(None if self.agnostic else present)
            parts: List[Tensor] = []
            for c, chunk in enumerate(chunks):
                parts.append(output(chunk, coefficients, 0 if self.agnostic else kinds[c]))
            results.append(torch.cat(parts, dim=1))
        return results
