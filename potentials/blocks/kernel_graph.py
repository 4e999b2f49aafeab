"""What the layers of a MACE on the kernels share: sorted atoms and pairs, radial functions. Compiles in TorchScript."""

from typing import List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from mdplug.potentials.blocks.harmonics import real_3j


class Atoms(NamedTuple):
    """Owned atoms sorted by species; does not change while nothing but positions does.

    Attributes:
        n: owned atoms. order: (n,) sorted place -> atom. place: (N,) int32 atom -> sorted place, ghosts as they are.
        species: (N,) int64, in sorted order. kind: (N,) int32, place of the species in `present`.
        own_species32, own_kind: (n,) int32 of the owned atoms, the same tensors at every step (for
            `mdplug.kernels.memo`).
        present: (S',) int64 species that have matrices, on the host; all that occur are among them.
    """

    n: int
    order: Tensor
    place: Tensor
    species: Tensor
    kind: Tensor
    own_species32: Tensor
    own_kind: Tensor
    present: Tensor


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
        atom_head: (n,) int64, sorted. scale, shift: (n,) of the energies, eV.
        embedding: (N, K) of the elements, sorted.
    """

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
    """Radial functions of one layer: a table (see `knots`), or columns (P, b) with their weight (b, blocks, p, C)."""

    table: Tensor
    columns: Tensor
    weight: Tensor
    step: float
    per_kind: int


class Cotangents(NamedTuple):
    """What the adjoint of a layer hands on.

    Attributes:
        features: of the old features. sent: of what neighbours were sent, or empty. harmonics: (P, (l_max+1)^2).
        radial: by r (P,), or by the columns (P, b). rho: (n,) of the density, or empty.
    """

    features: Tensor
    sent: Tensor
    harmonics: Tensor
    radial: Tensor
    rho: Tensor


def sort_atoms(species: Tensor, n_owned: int, present: Optional[Tensor] = None) -> Atoms:
    """Atoms by species.

    Args:
        species: (N,) int64 of all atoms, of which the first n_owned are owned.
        present: see `Atoms`, in rising order; None: those that occur.
    """
    order = torch.argsort(species[:n_owned], stable=True)
    place = torch.arange(species.shape[0], dtype=torch.int32, device=species.device)
    place[order] = torch.arange(n_owned, dtype=torch.int32, device=species.device)
    by_place = torch.cat([species[order], species[n_owned:]])
    if present is None:
        present = torch.unique(species.cpu())
        if present.shape[0] == 0:
            present = torch.zeros(1, dtype=torch.int64)
    kind = torch.searchsorted(present.to(species.device), by_place, out_int32=True)
    own = by_place[:n_owned].to(torch.int32)
    return Atoms(n_owned, order, place, by_place, kind, own, kind[:n_owned], present)


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
