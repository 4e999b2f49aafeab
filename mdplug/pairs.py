"""Pairs: the full directed neighbour list, i receives and j sends, r_ij = r_j - r_i + shift.

Sorted by (i, j, shift) and compacted to the cutoff at every evaluation, so that a result never depends on when a
skin list was built. CPU lists come from vesin; other devices (and exported files) use the torch cell list.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mdplug.errors import InputError
from mdplug.pairs_torch import torch_pairs
from mdplug.system import AtomicSystem

OVERLAP = 1e-6  # A; closer than this no direction is defined


@dataclass(frozen=True)
class Pairs:
    """E directed pairs.

    Attributes:
        index: (2, E) int64, receiver i and sender j.
        shifts: (E, 3) int64 lattice translations: r_ij = r_j - r_i + shifts @ cell.
        vectors: (E, 3) float64 A.
    """

    index: Tensor
    shifts: Tensor
    vectors: Tensor

    @property
    def n_pairs(self) -> int:
        """E, directed pairs."""
        return int(self.index.shape[1])

    @property
    def distances(self) -> Tensor:
        """(E,) A."""
        return torch.linalg.vector_norm(self.vectors, dim=1)


def translations(system: AtomicSystem, index: Tensor, shifts: Tensor) -> Tensor:
    """(E, 3) float64 lattice vectors of given pairs, A."""
    if system.n_systems == 1:  # a gather of one cell per pair would cost more than the rest of the list
        return shifts.to(system.cell.dtype) @ system.cell[0]
    cell = system.cell[system.system_index[index[0]]]
    return torch.bmm(shifts.to(cell.dtype).unsqueeze(1), cell).squeeze(1)


def pair_vectors(system: AtomicSystem, index: Tensor, shifts: Tensor) -> Tensor:
    """(E, 3) float64 vectors r_j - r_i + shift of given pairs, A."""
    x = system.positions
    return x.index_select(0, index[1]) - x.index_select(0, index[0]) + translations(system, index, shifts)


def pairs(system: AtomicSystem, cutoff: float) -> Pairs:
    """All pairs closer than `cutoff` (A), periodic images included, however small the cell.

    Raises:
        InputError: `cutoff` is not positive, or two atoms sit on one point (both are named).
    """
    if not cutoff > 0:
        raise InputError(f"cutoff must be positive, got {cutoff} A")
    lists, offset = [], 0
    for s in range(system.n_systems):
        n = int((system.system_index == s).sum())
        rows = slice(offset, offset + n)
        find = _vesin_pairs if system.positions.device.type == "cpu" else torch_pairs
        index, shifts = find(system.positions[rows], system.cell[s], system.pbc[s], cutoff)
        lists.append((index + offset, shifts))
        offset += n
    index, shifts = torch.cat([one[0] for one in lists], dim=1), torch.cat([one[1] for one in lists])
    return _checked(system, Pairs(index, shifts, pair_vectors(system, index, shifts)))


def _checked(system: AtomicSystem, found: Pairs) -> Pairs:
    if found.n_pairs:
        distance, k = found.distances.min(dim=0)
        if float(distance) < OVERLAP:
            i, j = (int(x) for x in found.index[:, int(k)])
            raise InputError(f"atoms {i} and {j} sit on the same point; move or remove one of them")
    return found


def _vesin_pairs(positions: Tensor, cell: Tensor, pbc: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    from vesin import NeighborList

    finder = NeighborList(cutoff=cutoff, full_list=True)
    i, j, s = finder.compute(
        points=positions.numpy(), box=cell.numpy(), periodic=pbc.numpy(), quantities="ijS", copy=True
    )
    i, j, s = i.astype(np.int64), j.astype(np.int64), s.astype(np.int64).reshape(-1, 3)
    order = np.lexsort((s[:, 2], s[:, 1], s[:, 0], j, i))
    return torch.from_numpy(np.stack((i[order], j[order]))), torch.from_numpy(s[order])


@dataclass
class PairList:
    """Pairs of a moving system: rebuilt only when an atom has moved half the skin, or anything else changed.

    Attributes:
        cutoff: A.
        skin: A, extra range of the stored candidates; 0 rebuilds always.
        builds: how often a list has been built.
    """

    cutoff: float
    skin: float = 1.0
    builds: int = 0
    _reference: AtomicSystem | None = field(default=None, repr=False)
    _candidates: Pairs | None = field(default=None, repr=False)
    _translations: Tensor | None = field(default=None, repr=False)

    def update(self, system: AtomicSystem) -> Pairs:
        """The pairs of `system` within the cutoff."""
        if self._candidates is None or self._translations is None or not self.holds(system):
            self._candidates = pairs(system, self.cutoff + self.skin)
            self._translations = translations(system, self._candidates.index, self._candidates.shifts)
            self._reference = system
            self.builds += 1
        index, shifts, x = self._candidates.index, self._candidates.shifts, system.positions
        vectors = x.index_select(0, index[1]) - x.index_select(0, index[0]) + self._translations
        keep = (vectors.square().sum(dim=1) < self.cutoff * self.cutoff).nonzero().squeeze(1)
        found = Pairs(index.index_select(1, keep), shifts.index_select(0, keep), vectors.index_select(0, keep))
        return _checked(system, found)

    def holds(self, system: AtomicSystem) -> bool:
        """Whether the stored candidates still contain every pair of `system`."""
        old = self._reference
        if old is None or self.skin <= 0 or old.numbers.shape != system.numbers.shape:
            return False
        if old.positions.device != system.positions.device or old.cell.shape != system.cell.shape:
            return False
        same = (
            torch.equal(old.numbers, system.numbers)
            and torch.equal(old.cell, system.cell)
            and torch.equal(old.pbc, system.pbc)
            and torch.equal(old.system_index, system.system_index)
        )
        if not same:
            return False
        moved = (system.positions - old.positions).square().sum(dim=1).max()
        return float(moved) < (0.5 * self.skin) ** 2
