"""Sums over neighbours as batched matrix products on a padded neighbour table.

The message of path (l1, l2, l3) to atom i is sum_j w(r_ij) C[l1,l2,l3] h_j Y(r_ij). The Clebsch-Gordan tensor is
contracted with the channel-free harmonics once per pair; what remains per atom is one matrix product per path.
"""

import math
from typing import List, NamedTuple, Tuple

import numpy as np
import torch
from torch import Tensor

from mdplug.potentials.blocks.harmonics import Constants, real_3j

Path = Tuple[int, int, int]
CACHED = 2**19  # numbers per chunk of neighbour features, so that a core's cache holds them


def paths(l_in: int, l_max: int) -> List[Path]:
    """(l1, l2, l3) of every message, l1 <= l_in from the sender, l2 of the harmonics; sorted by l3, stable."""
    found = [
        (l1, l2, l3)
        for l1 in range(l_in + 1)
        for l2 in range(l_max + 1)
        for l3 in range(abs(l1 - l2), min(l1 + l2, l_max) + 1)
        if (l1 + l2 + l3) % 2 == 0
    ]
    return sorted(found, key=lambda path: path[2])


class Graph(NamedTuple):
    """Owned atoms sorted by species, and their pairs in a table of n x width slots.

    Attributes:
        n: owned atoms. width: slots per atom. slot: (E,) place of each pair in the table.
        receiver: (E,) sorted place of the receiver. senders: (n * width,) atom each slot gathers (0 where empty).
        harmonics: (n * width, (l_max+1)^2), zero in empty slots.
        order: (n,) sorted place -> atom; place: (n,) atom -> sorted place.
        present: (S',) species that occur among the atoms. sender_kind: (E,) place of the sender's species in `present`.
        sizes, kinds: chunks of atoms of one species, and its place in `present`.
    """

    n: int
    width: int
    slot: Tensor
    receiver: Tensor
    senders: Tensor
    harmonics: Tensor
    order: Tensor
    place: Tensor
    present: Tensor
    sender_kind: Tensor
    sizes: List[int]
    kinds: List[int]


def pad(values: Tensor, graph_slot: Tensor, n_slots: int) -> Tensor:
    """(E, C) values of pairs -> (n_slots, C), zero in empty slots."""
    return values.new_zeros(n_slots, values.shape[1]).index_copy(0, graph_slot, values)


def neighbour_sum(columns: Tensor, graph: Graph) -> Tensor:
    """(E,) -> (n,), summed over the pairs that each atom receives."""
    return columns.new_zeros(graph.n).index_add(0, graph.receiver, columns)


def build_graph(
    harmonics: Tensor, receiver: Tensor, sender: Tensor, species: Tensor, n_owned: int, chunk: int
) -> Graph:
    """Lay out pairs and atoms.

    Args:
        harmonics: (E, M). receiver, sender: (E,) atoms, sorted by receiver. species: (N,) of all atoms.
        n_owned: receivers are below it. chunk: atoms per chunk at most.
    """
    owned = species[:n_owned]
    order = torch.argsort(owned, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(n_owned, device=order.device)
    counts = torch.bincount(receiver, minlength=n_owned)
    first = torch.cumsum(counts, 0) - counts
    width = max(int(counts.max()), 1) if n_owned > 0 else 1
    sorted_receiver = place[receiver]
    position = torch.arange(receiver.shape[0], device=receiver.device) - first[receiver]
    slot = sorted_receiver * width + position
    senders = torch.zeros(n_owned * width, dtype=torch.int64, device=receiver.device)
    senders[slot] = sender
    present, kind = torch.unique(species, return_inverse=True)
    owned_counts: List[int] = torch.bincount(kind[:n_owned], minlength=present.shape[0]).tolist()
    sizes: List[int] = []
    kinds: List[int] = []
    for k, left in enumerate(owned_counts):
        while left > 0:
            sizes.append(min(left, chunk))
            kinds.append(k)
            left -= chunk
    if n_owned == 0:  # a domain may be empty; it still takes part in every exchange
        sizes.append(0)
        kinds.append(0)
        present = torch.zeros(1, dtype=torch.int64, device=species.device) if species.shape[0] == 0 else present
    table = pad(harmonics, slot, n_owned * width)
    return Graph(
        n_owned, width, slot, sorted_receiver, senders, table, order, place, present, kind[sender], sizes, kinds
    )


def per_species(features: Tensor, weight: Tensor, graph: Graph) -> Tensor:
    """A matrix per irrep and species: ((L+1)^2, n, K) x (L'+1, S, K, K') -> ((L'+1)^2, n, K'), L' <= L."""
    parts: List[Tensor] = []
    for c, chunk in enumerate(torch.split(features, graph.sizes, dim=1)):
        matrices = weight.index_select(1, graph.present[graph.kinds[c]].unsqueeze(0)).squeeze(1)
        parts.append(per_irrep(chunk, matrices))
    return torch.cat(parts, dim=1)


def per_irrep(features: Tensor, weight: Tensor) -> Tensor:
    """A matrix per irrep: ((L+1)^2, n, K) x (L'+1, K, K') -> ((L'+1)^2, n, K'), L' <= L."""
    if weight.shape[0] == 1:
        return torch.matmul(features[:1], weight[0])
    parts: List[Tensor] = []
    for ell, part in enumerate(split_irreps(features, 0)):
        if ell < weight.shape[0]:
            parts.append(torch.matmul(part, weight[ell]))
    return torch.cat(parts, dim=0)


def split_irreps(features: Tensor, dim: int) -> List[Tensor]:
    """The blocks of 2 l + 1 components along a dimension of (L+1)^2; one copy in the backward pass."""
    sizes: List[int] = []
    size = 1
    while sum(sizes) < features.shape[dim]:
        sizes.append(size)
        size += 2
    return list(torch.split(features, sizes, dim=dim))


class Messages(Constants):
    """Messages of all paths from features of the senders.

    Args:
        l_in: highest degree of the senders' features. l_max: of the harmonics and of the messages.
    """

    coupling: Tensor

    def __init__(self, l_in: int, l_max: int, dtype: torch.dtype):
        super().__init__()
        self.l_in = l_in
        self.paths: List[Path] = paths(l_in, l_max)
        self.cached = CACHED
        self.fan_in = [sum(1 for p in self.paths if p[2] == ell) for ell in range(l_max + 1)]
        self.sizes: List[int] = []  # columns of each path in the coupled harmonics
        columns = []
        for l1, l2, l3 in self.paths:
            block = np.zeros(((l_max + 1) ** 2, 2 * l1 + 1, 2 * l3 + 1))
            block[l2 * l2 : (l2 + 1) ** 2] = math.sqrt(2 * l3 + 1) * real_3j(l1, l2, l3).transpose(1, 0, 2)
            columns.append(block.reshape(block.shape[0], -1))
            self.sizes.append(columns[-1].shape[1])
        self.add_constant("coupling", np.concatenate(columns, axis=1), dtype)

    def forward(self, features: Tensor, radial: Tensor, weight: Tensor, graph: Graph) -> List[Tensor]:
        """Sum over neighbours.

        Args:
            features: (N, (l_in+1)^2, k) of all atoms that send.
            radial: (n * width, b) padded radial features.
            weight: (b, P, k) last radial layer.

        Returns:
            (n, 2 l3 + 1, k) for each path.
        """
        width, k = graph.width, features.shape[2]
        atoms = max(graph.n, 1)
        if not (self.training or features.is_cuda):
            atoms = max(self.cached // (width * features.shape[1] * k), 4)
        senders = torch.split(graph.senders, atoms * width)
        harmonics = torch.split(graph.harmonics, atoms * width)
        radials = torch.split(radial, atoms * width)
        sums: List[List[Tensor]] = [[] for _ in self.paths]
        for c in range(len(senders)):
            gathered = split_irreps(features.index_select(0, senders[c]), 1)
            angular = torch.split(torch.mm(harmonics[c], self.coupling), self.sizes, dim=1)
            n = senders[c].shape[0] // width
            for p, (l1, _, l3) in enumerate(self.paths):
                m1, m3 = 2 * l1 + 1, 2 * l3 + 1
                weighted = torch.mm(radials[c], weight[:, p]).unsqueeze(1) * gathered[l1]
                left = angular[p].reshape(n, width * m1, m3)
                sums[p].append(torch.bmm(left.transpose(1, 2), weighted.reshape(n, width * m1, k)))
        return [torch.cat(pieces, dim=0) for pieces in sums]


def density_trick(harmonics: Tensor, radial: Tensor, weights: List[Tensor], graph: Graph) -> Tensor:
    """Messages of a layer whose sender features depend on the element alone, through the neighbour density.

    Args:
        harmonics: (E, M) of the pairs. radial: (n * width, b) padded radial features.
        weights: per l, (S' * b, K): last radial layer x sender feature x following linear map.

    Returns:
        (M, n, K)
    """
    n, width, b = graph.n, graph.width, radial.shape[1]
    n_kinds, m = graph.present.shape[0], harmonics.shape[1]
    kinds = torch.arange(n_kinds, device=harmonics.device)
    mask = (graph.sender_kind.unsqueeze(1) == kinds).to(harmonics.dtype)
    split = pad((mask.unsqueeze(2) * harmonics.unsqueeze(1)).reshape(-1, n_kinds * m), graph.slot, n * width)
    density = torch.bmm(split.view(n, width, n_kinds * m).transpose(1, 2), radial.view(n, width, b))
    density = density.view(n, n_kinds, m, b).permute(2, 0, 1, 3).reshape(m, n, n_kinds * b)
    parts: List[Tensor] = []
    for ell, part in enumerate(split_irreps(density, 0)):
        parts.append(torch.matmul(part, weights[ell]))
    return torch.cat(parts, dim=0)
