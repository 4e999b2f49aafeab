"""Pairs: the full directed neighbour list, i receives and j sends, r_ij = r_j - r_i + shift.

Sorted by (i, j, shift) and compacted to the cutoff at every evaluation, so that a result never depends on when a
skin list was built. On the CPU, native operators find and compact (mdplug/kernels); without them vesin finds and torch
compacts. Other devices (and exported files) find with the torch cell list; nothing but counts leaves a device.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mdplug import kernels
from mdplug.errors import InputError
from mdplug.pairs_torch import torch_pairs
from mdplug.system import AtomicSystem, filled_cell

OVERLAP = 1e-6  # A; closer than this no direction is defined


@dataclass(frozen=True)
class Pairs:
    """E directed pairs.

    Attributes:
        index: (2, E) int64, receiver i and sender j.
        shifts: (E, 3) int64 lattice translations: r_ij = r_j - r_i + shifts @ cell.
        vectors: (E, 3) float64 A.
        system: whose positions the vectors belong to, if known: these vectors are then not computed again.
    """

    index: Tensor
    shifts: Tensor
    vectors: Tensor
    system: AtomicSystem | None = field(default=None, repr=False, compare=False)

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
    index, shifts = _found(system, cutoff)
    return _checked(Pairs(index, shifts, pair_vectors(system, index, shifts), system))


def _found(system: AtomicSystem, cutoff: float) -> tuple[Tensor, Tensor]:
    """Sorted index (2, E) and shifts (E, 3) of the pairs closer than `cutoff`."""
    if not cutoff > 0:
        raise InputError(f"cutoff must be positive, got {cutoff} A")
    find: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = torch_pairs
    if system.positions.device.type == "cpu":
        find = _native_pairs if kernels.serves(system.positions) else _vesin_pairs
    if system.n_systems == 1:
        return find(system.positions, system.cell[0], system.pbc[0], cutoff)
    lists, offset = [], 0
    for s in range(system.n_systems):
        n = int((system.system_index == s).sum())
        rows = slice(offset, offset + n)
        index, shifts = find(system.positions[rows], system.cell[s], system.pbc[s], cutoff)
        lists.append((index + offset, shifts))
        offset += n
    return torch.cat([one[0] for one in lists], dim=1), torch.cat([one[1] for one in lists])


def _checked(found: Pairs) -> Pairs:
    if found.n_pairs:
        distance, k = found.distances.min(dim=0)
        if float(distance) < OVERLAP:
            raise _overlap(found.index[:, int(k)])
    return found


def _overlap(pair: Tensor) -> InputError:
    i, j = pair.tolist()
    return InputError(f"atoms {i} and {j} sit on the same point; move or remove one of them")


def _native_pairs(positions: Tensor, cell: Tensor, pbc: Tensor, cutoff: float) -> tuple[Tensor, Tensor]:
    periodic = sum(1 << k for k, wraps in enumerate(pbc.tolist()) if wraps)
    # The cell of an open system may be anything, a flat one included.
    box = filled_cell(cell.unsqueeze(0))[0] if periodic else torch.eye(3, dtype=torch.float64)
    inverse = torch.linalg.inv(box).contiguous()
    return torch.ops.mdplug.cell_list(positions.contiguous(), box.contiguous(), inverse, periodic, cutoff)


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
    _candidates: tuple[Tensor, Tensor, Tensor] | None = field(default=None, repr=False)

    def update(self, system: AtomicSystem) -> Pairs:
        """The pairs of `system` within the cutoff.

        Raises:
            InputError: two atoms on one point.
        """
        found = self.reuse(system)
        if found is None:
            index, shifts = _found(system, self.cutoff + self.skin)
            self._candidates = (index, shifts, translations(system, index, shifts))
            self._reference = system
            self.builds += 1
            found = within(system, system, *self._candidates, self.cutoff, math.inf)
            assert found is not None
        return found

    def reuse(self, system: AtomicSystem) -> Pairs | None:
        """As `update`, but None where the stored candidates need not contain every pair of `system` any more."""
        old = self._reference
        if self._candidates is None or old is None or self.skin <= 0 or old.numbers.shape != system.numbers.shape:
            return None
        if old.positions.device != system.positions.device or old.cell.shape != system.cell.shape:
            return None
        for name in ("numbers", "cell", "pbc", "system_index"):
            mine, its = getattr(old, name), getattr(system, name)
            if mine is not its and not torch.equal(mine, its):
                return None
        return within(system, old, *self._candidates, self.cutoff, 0.5 * self.skin)


def within(
    system: AtomicSystem,
    reference: AtomicSystem,
    index: Tensor,
    shifts: Tensor,
    translation: Tensor,
    cutoff: float,
    most: float,
) -> Pairs | None:
    """Those of some candidates that are closer than `cutoff` at the positions of `system`, in their order.

    Args:
        reference: the same atoms when the candidates were found. index: (2, E). shifts: (E, 3).
        translation: (E, 3) float64 A, see `translations`. cutoff: A. most: A.

    Returns:
        None where an atom has moved by `most` or more since.

    Raises:
        InputError: two atoms on one point.
    """
    x, start = system.positions, reference.positions
    if kernels.serves(x):
        of = (x.contiguous(), start.contiguous(), index, shifts, translation, cutoff, OVERLAP, most)
        inside, there, vectors, overlap, holds = torch.ops.mdplug.pair_list.default(*of)
        if overlap >= 0:
            raise _overlap(index[:, overlap])
        return Pairs(inside, there, vectors, system) if holds else None
    if not float((x - start).square().sum(dim=1).max()) < most * most:
        return None
    vectors = x.index_select(0, index[1]) - x.index_select(0, index[0]) + translation
    keep = (vectors.square().sum(dim=1) < cutoff * cutoff).nonzero().squeeze(1)
    vectors = vectors.index_select(0, keep)
    return _checked(Pairs(index.index_select(1, keep), shifts.index_select(0, keep), vectors, system))
