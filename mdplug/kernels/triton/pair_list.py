"""The MD loop on a device: candidates of a skin list compacted to the cutoff, and sums over pairs and atoms.

One number of a step comes to the host: how many pairs there are (with it, whether the list holds). Sums go atom by
atom in a fixed order, without atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mdplug.kernels.triton.source import contiguous, launch

BLOCK = 32  # pairs of an atom, or atoms of a structure, at a time; a program is one warp


def pair_list(
    positions: Tensor, reference: Tensor, index: Tensor, shifts: Tensor, translations: Tensor, cutoff: float,
    least: float, most: float,
) -> tuple[Tensor, Tensor, Tensor, int, int]:  # fmt: skip
    """The candidates closer than `cutoff` (A), in their order.

    Args:
        positions, reference: (N, 3) float64 A, now and when the candidates were found. index: (2, E). shifts: (E, 3).
        translations: (E, 3) float64 A. least: A, closer than this is an overlap. most: A.

    Returns:
        index (2, P), shifts (P, 3) and vectors (P, 3) A; the first candidate that overlaps, or -1; whether no atom
        has moved by `most`: else there are no pairs.
    """
    e, square_most = index.shape[1], most * most
    if e == 0:
        still = bool((positions - reference).square().sum(dim=1).max() < square_most)
        return index, shifts, translations, -1, int(still)
    vectors = positions.index_select(0, index[1]) - positions.index_select(0, index[0]) + translations
    square = vectors.square().sum(dim=1)
    inside = square < cutoff * cutoff
    place = inside.cumsum(dim=0)
    candidates = torch.arange(e, device=index.device)
    # Compaction to a length not known yet: those outside all go to one place after the others.
    kept = candidates.new_empty(e + 1).scatter_(0, torch.where(inside, place - 1, e), candidates)
    overlap = torch.where(square < least * least, candidates, e).min()
    holds = (positions - reference).square().sum(dim=1).max() < square_most
    count, first, fits = torch.stack([place[-1], overlap, holds.to(place.dtype)]).tolist()  # the one wait
    if not fits:
        return index[:, :0], shifts[:0], vectors[:0], -1, 0
    kept = kept[:count]
    found = index.index_select(1, kept), shifts.index_select(0, kept), vectors.index_select(0, kept)
    return *found, first if first < e else -1, 1


@triton.jit(do_not_specialize=["n_pairs"])
def _sum_pairs(vectors, gradient, order, first, of_atom, n_pairs, N: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(first + i), tl.load(first + i + 1)
    f0, f1, f2 = tl.zeros((N,), tl.float64), tl.zeros((N,), tl.float64), tl.zeros((N,), tl.float64)
    v0, v1, v2, v3, v4, v5 = f0, f0, f0, f0, f0, f0
    for at in range(start, stop, N):
        inside = at + tl.arange(0, N) < stop
        entry = tl.load(order + at + tl.arange(0, N), inside, 0)
        received = entry < n_pairs
        e = tl.where(received, entry, entry - n_pairs)
        sign = tl.where(received, 1.0, -1.0).to(tl.float64)
        g0 = tl.load(gradient + 3 * e, inside, 0.0).to(tl.float64) * sign
        g1 = tl.load(gradient + 3 * e + 1, inside, 0.0).to(tl.float64) * sign
        g2 = tl.load(gradient + 3 * e + 2, inside, 0.0).to(tl.float64) * sign
        f0 += g0
        f1 += g1
        f2 += g2
        mine = inside & received  # the virial takes each pair once
        x0 = tl.load(vectors + 3 * e, mine, 0.0)
        x1 = tl.load(vectors + 3 * e + 1, mine, 0.0)
        x2 = tl.load(vectors + 3 * e + 2, mine, 0.0)
        v0 += x0 * g0
        v1 += x1 * g1
        v2 += x2 * g2
        v3 += x0 * g1 + x1 * g0
        v4 += x0 * g2 + x2 * g0
        v5 += x1 * g2 + x2 * g1
    to = of_atom + 9 * i
    tl.store(to, tl.sum(f0, axis=0))
    tl.store(to + 1, tl.sum(f1, axis=0))
    tl.store(to + 2, tl.sum(f2, axis=0))
    tl.store(to + 3, tl.sum(v0, axis=0))
    tl.store(to + 4, tl.sum(v1, axis=0))
    tl.store(to + 5, tl.sum(v2, axis=0))
    tl.store(to + 6, tl.sum(v3, axis=0))
    tl.store(to + 7, tl.sum(v4, axis=0))
    tl.store(to + 8, tl.sum(v5, axis=0))


@triton.jit
def _sum_atoms(values, first, out, columns, N: tl.constexpr):
    s, column = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start, stop = tl.load(first + s), tl.load(first + s + 1)
    total = tl.zeros((N,), tl.float64)
    for at in range(start, stop, N):
        i = at + tl.arange(0, N).to(tl.int64)
        total += tl.load(values + i * columns + column, i < stop, 0.0).to(tl.float64)
    tl.store(out + s * columns + column, tl.sum(total, axis=0))


def _starts(ordered: Tensor, count: int) -> Tensor:
    """(count + 1,) int64 where each of 0..count-1 begins in a sorted list."""
    marks = torch.arange(count + 1, dtype=ordered.dtype, device=ordered.device)
    return torch.searchsorted(ordered, marks)


def _by_structure(values: Tensor, system: Tensor, systems: int) -> Tensor:
    """(systems, C) float64 sums of (N, C) over the atoms of each structure, which follow one another."""
    if systems == 1:
        return values.sum(dim=0, dtype=torch.float64).unsqueeze(0)
    out = values.new_empty(systems, values.shape[1], dtype=torch.float64)
    arguments = (values, _starts(system, systems), out, values.shape[1])
    launch(_sum_atoms, (systems, values.shape[1]), arguments, {"N": BLOCK})
    return out


def sum_atoms(atom_energy: Tensor, system_index: Tensor, systems: int) -> Tensor:
    """(systems,) float64 eV: energies (N,) summed over each structure."""
    contiguous(atom_energy.dtype, atom_energy=atom_energy)
    return _by_structure(atom_energy.unsqueeze(1), system_index, systems).squeeze(1)


def sum_pairs(
    vectors: Tensor, gradient: Tensor, pairs: Tensor, atom_energy: Tensor, system_index: Tensor, systems: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Energies (S,), forces (N, 3) and virial (S, 3, 3), float64; arguments as `mdplug.deployed.totals` has them."""
    contiguous(torch.float64, vectors=vectors)
    contiguous(gradient.dtype, gradient=gradient)
    n, e = system_index.shape[0], pairs.shape[1]
    ordered, order = torch.sort(pairs.flatten().to(torch.int32), stable=True)  # an atom's pairs, received and sent
    of_atom = vectors.new_empty(n, 9)
    launch(_sum_pairs, (n,), (vectors, gradient, order, _starts(ordered, n), of_atom, e), {"N": BLOCK})
    v = -_by_structure(of_atom, system_index, systems)[:, 3:]
    half = 0.5 * v[:, 3:]
    rows = [v[:, 0], half[:, 0], half[:, 1], half[:, 0], v[:, 1], half[:, 2], half[:, 1], half[:, 2], v[:, 2]]
    virial = torch.stack(rows, dim=1).view(-1, 3, 3)
    return sum_atoms(atom_energy, system_index, systems), of_atom[:, :3].contiguous(), virial
