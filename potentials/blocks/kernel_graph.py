"""What the layers of a MACE on the kernels share: sorted atoms and pairs, radial functions, cotangents of the pairs."""

from typing import Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from mdplug.potentials.blocks.harmonics import real_3j


class Atoms(NamedTuple):
    """Owned atoms sorted by species; does not change while nothing but positions does.

    Attributes:
        n: owned atoms. order: (n,) sorted place -> atom. place: (N,) int32 atom -> sorted place, ghosts as they are.
        species: (N,) int64, in sorted order. kind: (N,) int32, place of the species in `present`.
        own_species32, own_kind: (n,) of the owned atoms, the same tensors at every step: see `mdplug.kernels.memo`.
        present: species that occur among all atoms. groups: (species, begin, end) of the owned atoms.
    """

    n: int
    order: Tensor
    place: Tensor
    species: Tensor
    species32: Tensor
    kind: Tensor
    own_species32: Tensor
    own_kind: Tensor
    present: Tuple[int, ...]
    groups: Tuple[Tuple[int, int, int], ...]


class Kept:
    """A tensor as it once was given; another is compared with it, on a device without waiting where it is the same."""

    def __init__(self, given: Tensor):
        self.given, self.version, self.values = given, _version(given), given.clone()

    def equals(self, tensor: Tensor) -> bool:
        """Whether a tensor has these values."""
        # On the CPU others, numpy for one, may write to the memory of a tensor behind its back.
        if tensor is self.given and tensor.device.type != "cpu" and 0 <= self.version == _version(tensor):
            return True
        return torch.equal(tensor, self.values)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


class Levels(NamedTuple):
    """What atoms have of their structure's level of theory; does not change while nothing but positions does.

    Attributes:
        system_index, head: as they were given. atom_head: (n,) int64, sorted. scale, shift: (n,) of the energies, eV.
        embedding: (N, K) of the elements, sorted.
    """

    system_index: Kept
    head: Kept
    atom_head: Tensor
    scale: Tensor
    shift: Tensor
    embedding: Tensor


class Graph(NamedTuple):
    """Pairs inside the cutoff, sorted by receiver; what the operator `graph` returns, and harmonics.

    Attributes:
        r: (P,) A. receiver, sender: (P,) int32 sorted places. first: (n + 1,) int32. harmonics: (P, (l_max+1)^2).
        sender_kind: (P,) int32, see `Atoms.kind`. table_kind: (P,) int32 or empty.
    """

    r: Tensor
    receiver: Tensor
    sender: Tensor
    first: Tensor
    harmonics: Tensor
    sender_kind: Tensor
    table_kind: Tensor


class LayerRadial(NamedTuple):
    """Radial functions of one layer: a table (see `knots`), or columns (P, b) with their weight (b, P, k)."""

    table: Tensor
    columns: Tensor
    weight: Tensor
    step: float
    per_kind: int


class Gradients:
    """Cotangents of what pairs hold, summed over the layers.

    Attributes:
        harmonics, r, columns: see `Graph` and `LayerRadial`, columns by layer. density: (n,) by layer.
    """

    def __init__(self, graph: Graph):
        self.graph = graph
        self.harmonics: Optional[Tensor] = None
        self.r: Optional[Tensor] = None
        self.columns: Dict[int, Tensor] = {}
        self.density: Dict[int, Tensor] = {}

    def add(self, t: int, first: int, d_harmonics: Tensor, d_radial: Tensor) -> None:
        """What layer t gave the pairs from `first` on; d_radial: by r (p,), or by columns (p, b)."""
        self.harmonics = _added(self.harmonics, self.graph.harmonics, first, d_harmonics)
        if d_radial.dim() == 1:
            self.r = _added(self.r, self.graph.r, first, d_radial)
        else:
            like = d_radial.new_empty(len(self.graph.r), d_radial.shape[1])
            self.columns[t] = _added(self.columns.get(t), like, first, d_radial)


def _added(total: Optional[Tensor], like: Tensor, first: int, part: Tensor) -> Tensor:
    if total is None:
        if len(part) == len(like):
            return part
        total = torch.zeros_like(like)
    total.narrow(0, first, len(part)).add_(part)
    return total


def sort_atoms(species: Tensor, n_owned: int) -> Atoms:
    """Atoms by species.

    Args:
        species: (N,) int64 of all atoms, of which the first n_owned are owned.
    """
    device, species = species.device, species.cpu()  # once for many steps: counts and groups are wanted on the host
    order = torch.argsort(species[:n_owned], stable=True)
    place = torch.arange(len(species), dtype=torch.int32)
    place[order] = torch.arange(n_owned, dtype=torch.int32)
    by_place = torch.cat([species[order], species[n_owned:]])
    present = tuple(torch.unique(species).tolist())
    kind_of = torch.zeros(max(present, default=0) + 1, dtype=torch.int32)
    kind_of[list(present)] = torch.arange(len(present), dtype=torch.int32)
    groups, begin = [], 0
    for z in present:
        count = int((by_place[:n_owned] == z).sum())
        if count:
            groups.append((z, begin, begin + count))
            begin += count
    if not groups:
        groups.append((present[0] if present else 0, 0, 0))
        present = present or (0,)
    by_place, kind = by_place.to(device), kind_of[by_place].to(device)
    species32 = by_place.to(torch.int32)
    return Atoms(
        n_owned, order.to(device), place.to(device), by_place, species32, kind, species32[:n_owned], kind[:n_owned],
        present, tuple(groups),
    )  # fmt: skip


def coupling(paths: List[Tuple[int, int, int]]) -> Tuple[np.ndarray, np.ndarray]:
    """Clebsch-Gordan terms of all paths, by output component.

    Returns:
        (n, 2) int32: outer component (path, m1, m2) and output component (path, m3); (n,) float64 coefficients.
    """
    index, value, outer, out = [], [], 0, 0
    for l1, l2, l3 in paths:
        block = np.sqrt(2 * l3 + 1) * real_3j(l1, l2, l3)
        for m3 in range(2 * l3 + 1):
            for m1, m2 in zip(*np.nonzero(np.abs(block[:, :, m3]) > 1e-12), strict=True):
                index.append((outer + m1 * (2 * l2 + 1) + m2, out + m3))
                value.append(block[m1, m2, m3])
        outer += (2 * l1 + 1) * (2 * l2 + 1)
        out += 2 * l3 + 1
    return np.array(index, dtype=np.int32), np.array(value)
