"""Symmetric contraction: invariant or covariant polynomials of an atom's own features, element by element.

B_L[n, M, k] = sum over degrees nu and couplings eta of W_nu[z_n, eta, k] U_nu[M, m1..m_nu, eta] prod_q A[m_q, n, k].
U is symmetric in effect, so only its few non-zero sorted monomials are kept (94 for L=0, l_max 3, nu_max 3, against
4368 dense entries). Each monomial is a prefix of nu_max - 1 factors times one more; few prefixes cover all of them, so
that the polynomial is: products of the prefixes, one batched matrix product with the coefficients, one sum.

Source of the recursion: Batatia et al., MACE, NeurIPS 2022 (arXiv 2206.07697), equations 10 and 11.
"""

from collections import Counter
from functools import cache
from typing import List, Optional, Sequence, Set, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from mdplug.potentials.blocks.harmonics import Constants, real_3j

FOLD_BELOW = 8 * 2**20  # numbers; larger tables of coefficients are made for the species at hand

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
    product = np.tensordot(symbol, left, (1, 0))  # (c, b, ...)
    tensor[..., ell * ell : (ell + 1) ** 2] = np.moveaxis(product, 1, -1)
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


@cache
def factorise(l_max: int, l_out: int, degree: int) -> Tuple[np.ndarray, Tuple[np.ndarray, ...]]:
    """Prefixes that cover all monomials of all outputs 0..l_out and powers 1..degree.

    Features are numbered from 0, and (l_max+1)^2 stands for the constant 1.

    Returns:
        prefixes (max(degree - 1, 1), n_prefixes);
        for each (L, power), L outermost: place of each of its terms in a flat (components, n_prefixes, features + 1).
    """
    one = (l_max + 1) ** 2
    length = max(degree, 2)
    blocks = [symmetric_basis(l_max, ell, nu) for ell in range(l_out + 1) for nu in range(1, degree + 1)]
    padded = [[(*term, *[one] * (length - len(term))) for term in index.T.tolist()] for index, _, _ in blocks]
    left: Set[Tuple[int, ...]] = {term for terms in padded for term in terms}
    chosen: List[Tuple[int, ...]] = []
    split: dict[Tuple[int, ...], Tuple[int, int]] = {}  # monomial -> prefix, remaining feature
    while left:
        votes = Counter(prefix for term in sorted(left) for prefix in {_without(term, q) for q in range(length)})
        best = max(sorted(votes), key=lambda prefix: votes[prefix])
        for term in list(left):
            for q in range(length):
                if _without(term, q) == best:
                    split[term] = (len(chosen), term[q])
                    left.discard(term)
        chosen.append(best)
    places = []
    for number, ((_, _, sizes), terms) in enumerate(zip(blocks, padded, strict=True)):
        first = (number // degree) ** 2
        rows = np.repeat(np.arange(first, first + len(sizes)), sizes)
        at = np.array([split[term] for term in terms], dtype=np.int64).reshape(-1, 2)
        places.append((rows * len(chosen) + at[:, 0]) * (one + 1) + at[:, 1])
    return np.array(chosen).T, tuple(places)


def _without(term: Sequence[int], q: int) -> Tuple[int, ...]:
    return (*term[:q], *term[q + 1 :])


class Power(Constants):
    """One degree of one output: its weights (S or 1, P, K)."""

    basis: Tensor

    def __init__(self, basis: np.ndarray, n_species: int, channels: int, dtype: torch.dtype):
        super().__init__()
        self.add_constant("basis", basis, dtype)
        self.weight = nn.Parameter(torch.zeros(n_species, basis.shape[1], channels, dtype=dtype))

    def forward(self, present: Optional[Tensor]) -> Tensor:
        """(S' or 1, terms, K): coefficient of each monomial, for the species in `present` only; None: all rows."""
        weight = self.weight if present is None else self.weight.index_select(0, present)
        return torch.matmul(self.basis, weight)


class Output(nn.Module):
    """All degrees of one output irrep."""

    def __init__(self, l_max: int, l_out: int, degree: int, n_species: int, channels: int, dtype: torch.dtype):
        super().__init__()
        bases = [symmetric_basis(l_max, l_out, nu)[1] for nu in range(1, degree + 1)]
        self.powers = nn.ModuleList([Power(basis, n_species, channels, dtype) for basis in bases])

    def forward(self, present: Optional[Tensor]) -> List[Tensor]:
        """Coefficients of each degree; see `Power`."""
        return [power(present) for power in self.powers]


class SymmetricContraction(nn.Module):
    """All outputs 0..l_out, over chunks of atoms of one species each.

    Args:
        l_max: of the input features. l_out: highest output. degree: highest power.
        n_species: rows of the weights (1 where the product does not look at the element).
    """

    prefixes: Tensor
    places: Tensor
    dense: Tensor

    def __init__(self, l_max: int, l_out: int, degree: int, n_species: int, channels: int, dtype: torch.dtype):
        super().__init__()
        self.agnostic, self.n_species, self.channels = n_species == 1, n_species, channels
        self.l_max = l_max
        self.n_components = (l_out + 1) ** 2
        self.outputs = nn.ModuleList(
            [Output(l_max, ell, degree, n_species, channels, dtype) for ell in range(l_out + 1)]
        )
        prefixes, places = factorise(l_max, l_out, degree)
        self.n_prefixes = prefixes.shape[1]
        self.n_factors = (l_max + 1) ** 2 + 1
        self.folded = False
        self.register_buffer("prefixes", torch.from_numpy(prefixes.astype(np.int64)), persistent=False)
        self.register_buffer("places", torch.from_numpy(np.concatenate(places)), persistent=False)
        self.register_buffer("dense", torch.zeros(0, dtype=dtype), persistent=False)

    def fold(self) -> None:
        """Keep the coefficients of all species, where they are small (inference)."""
        size = self.n_species * self.channels * self.n_components * self.n_prefixes * self.n_factors
        if not self.folded and size <= FOLD_BELOW:
            with torch.no_grad():
                self.dense = self.coefficients(None)
            self.folded = True

    def coefficients(self, present: Optional[Tensor]) -> Tensor:
        """(S' or 1, K, components * prefixes, features + 1), for the species in `present`; None: all."""
        parts: List[Tensor] = []
        for output in self.outputs:
            parts.extend(output(present))
        terms = torch.cat(parts, dim=1)
        size = self.n_components * self.n_prefixes * self.n_factors
        dense = terms.new_zeros(terms.shape[0], size, terms.shape[2]).index_copy(1, self.places, terms)
        return dense.transpose(1, 2).reshape(terms.shape[0], terms.shape[2], -1, self.n_factors)

    def forward(self, features: Tensor, present: Tensor, sizes: List[int], kinds: List[int]) -> Tensor:
        """Contract.

        Args:
            features: ((l_max+1)^2, n, K), atoms sorted by species.
            present: (S',) species that occur.
            sizes, kinds: chunks of atoms, and the place of their species in `present`.

        Returns:
            ((l_out+1)^2, n, K)
        """
        if self.folded:
            coefficients = self.dense if self.agnostic else self.dense.index_select(0, present)
        else:
            coefficients = self.coefficients(None if self.agnostic else present)
        parts: List[Tensor] = []
        for c, chunk in enumerate(torch.split(features, sizes, dim=1)):
            factors = torch.cat([chunk, torch.ones_like(chunk[:1])], dim=0).permute(2, 0, 1).contiguous()
            prefix = factors.index_select(1, self.prefixes[0])
            for q in range(1, self.prefixes.shape[0]):
                prefix = prefix * factors.index_select(1, self.prefixes[q])
            rest = torch.bmm(coefficients[0 if self.agnostic else kinds[c]], factors)
            n_channels, n = factors.shape[0], factors.shape[2]
            product = rest.view(n_channels, self.n_components, self.n_prefixes, n) * prefix.unsqueeze(1)
            parts.append(product.sum(2).permute(1, 2, 0))
        return torch.cat(parts, dim=1)


@cache
def sparse_structure(l_max: int, l_out: int, degree: int) -> Tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The polynomial as a list of products, for kernels that walk it.

    Entries are the features 0..(l_max+1)^2 - 1, then the nodes, each the product of two earlier entries.

    Returns:
        nodes (n, 2) int32; term (T,) int32: the entry that each coefficient multiplies, terms of one output component
        together; starts (components + 1) int32; order (T,) int64: the rows of the powers' coefficients, one power after
        another, that they are.
    """
    blocks = []  # (component of the output, monomial) of every row of coefficients
    for ell in range(l_out + 1):
        for nu in range(1, degree + 1):
            index, _, sizes = symmetric_basis(l_max, ell, nu)
            rows = np.repeat(np.arange(ell * ell, (ell + 1) ** 2), sizes)
            blocks += [(int(row), tuple(term)) for row, term in zip(rows, index.T.tolist(), strict=True)]
    order = sorted(range(len(blocks)), key=lambda row: blocks[row][0])
    counts = np.bincount([row for row, _ in blocks], minlength=(l_out + 1) ** 2)
    entry = _products({term for _, term in blocks}, (l_max + 1) ** 2)
    term = np.array([entry[blocks[row][1]][0] for row in order], dtype=np.int32)
    made = sorted((place, left, right) for place, left, right in entry.values() if left >= 0)
    nodes = np.array([(left, right) for _, left, right in made], dtype=np.int32).reshape(-1, 2)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return nodes, term, starts, np.array(order, dtype=np.int64)


def sparse_polynomial(
    contraction: SymmetricContraction, present: Optional[Tensor] = None
) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
    """Nodes, term and starts of `sparse_structure`, and coefficients (S' or 1, T, K), functions of the weights.

    Args:
        present: (S',) species whose coefficients are wanted; None: all.
    """
    powers = [power for output in contraction.outputs for power in output.powers]  # type: ignore[union-attr]
    degree = len(powers) // len(contraction.outputs)
    nodes, term, starts, order = sparse_structure(contraction.l_max, len(contraction.outputs) - 1, degree)
    rows = torch.cat([power(None if contraction.agnostic else present) for power in powers], dim=1)
    coefficients = rows.index_select(1, torch.from_numpy(order).to(rows.device))
    return torch.from_numpy(nodes), torch.from_numpy(term), torch.from_numpy(starts), coefficients


def _products(wanted: Set[Tuple[int, ...]], n_inputs: int) -> dict[Tuple[int, ...], Tuple[int, int, int]]:
    """{monomial: (its place, places of its two factors; -1 for inputs)}, with few monomials besides those wanted."""
    needed = set(wanted)
    split: dict[Tuple[int, ...], Tuple[Tuple[int, ...], int]] = {}
    for degree in range(max((len(term) for term in wanted), default=1), 1, -1):
        left = {term for term in needed if len(term) == degree}
        while left:
            votes = Counter(part for term in sorted(left) for part in {_without(term, q) for q in range(degree)})
            known = [part for part in votes if part in needed or degree == 2]
            best = max(sorted(known or votes), key=lambda part: votes[part])
            for term in list(left):
                for q in range(degree):
                    if _without(term, q) == best:
                        split[term] = (best, term[q])
                        left.discard(term)
            needed.add(best)
    found: dict[Tuple[int, ...], Tuple[int, int, int]] = {(m,): (m, -1, -1) for m in range(n_inputs)}
    for term in sorted(split, key=lambda t: (len(t), t)):
        part, factor = split[term]
        found[term] = (len(found), found[part][0], factor)
    return found
