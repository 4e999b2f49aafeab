"""MACE on the kernels with a tape, for training: gradients of energies and forces by the weights themselves.

The same function as `MACE.local`, of the same parameters. Radial functions are those of the nets, not tables; autograd
differentiates the operators once and twice (mdplug.kernels.autograd).
"""

from functools import cache
from math import prod
from typing import Any, Dict, List, NamedTuple, Tuple

import torch
from torch import Tensor

from mdplug import kernels
from mdplug.kernels import autograd
from mdplug.potentials.blocks.contraction import sparse_polynomial
from mdplug.potentials.blocks.convolution import Path, per_irrep, split_irreps
from mdplug.potentials.blocks.kernel_graph import Atoms, coupling, sort_atoms
from mdplug.potentials.blocks.knots import LANES, in_blocks, radial_values
from mdplug.potentials.blocks.radial_nets import SpeciesNet

ops: Any = torch.ops.mdplug
AT_A_TIME = 2**19  # radial functions of one convolution: the allocator then has the memory at hand


class TrainingGraph(NamedTuple):
    """Pairs inside the cutoff, by receiver, atoms by species.

    Attributes:
        r: (U,) A, one of each pair and its reverse. row: (P,) int32, the place in r of every pair.
        receiver: (P,) int64, sender: (P,) int32 sorted places. first: (n + 1,) int32.
        receiving, sending: (U,) species. harmonics: (P, (l_max+1)^2). sender_kind: (P,) int32, see `Atoms.kind`.
        atoms: see there. groups: (species, owned atoms) in their order. none: empty, of the model's dtype.
    """

    r: Tensor
    row: Tensor
    receiver: Tensor
    sender: Tensor
    first: Tensor
    receiving: Tensor
    sending: Tensor
    harmonics: Tensor
    sender_kind: Tensor
    atoms: Atoms
    groups: List[Tuple[int, int]]
    none: Tensor


def usable(mace: Any, vectors: Tensor) -> bool:
    """Whether an evaluation of a MACE that trains can run on the kernels."""
    return not mace.tabulated and vectors.device.type == "cpu" and vectors.dtype in LANES and kernels.available()


def build_graph(mace: Any, species: Tensor, pairs: Tensor, vectors: Tensor, n_owned: int) -> TrainingGraph:
    """Arguments as in `Potential.local`, but for species (N,) int64."""
    autograd.register()
    atoms = sort_atoms(species, n_owned)
    found = ops.graph(pairs.contiguous(), vectors.detach(), atoms.place, n_owned, float(mace.cutoff))
    vec, length, receiver, sender, first, origin = found
    left, right = mace.harmonics.products()
    inside = vectors.index_select(0, origin)
    harmonics = ops.harmonics(inside, length, left, right, mace.harmonics.table, mace.harmonics.l_max)
    chosen, row = torch.arange(len(length)), torch.arange(len(length))
    if not any(isinstance(net, SpeciesNet) for net in mace.radial.nets):  # these see who receives
        chosen, row = share_reverses(vec, length, receiver, sender, len(species))
    r = torch.linalg.vector_norm(inside.index_select(0, chosen), dim=1)
    receiver = receiver.long()
    receiving, sending = atoms.species[receiver[chosen]], atoms.species[sender[chosen]]
    counts = torch.bincount(atoms.kind[:n_owned], minlength=len(atoms.present))
    groups = list(zip(atoms.present.tolist(), counts.tolist(), strict=True))
    kind = atoms.kind.index_select(0, sender)
    return TrainingGraph(
        r, row.to(torch.int32), receiver, sender, first, receiving, sending, harmonics, kind, atoms, groups,
        vectors.new_empty(0),
    )  # fmt: skip


def share_reverses(vectors: Tensor, r: Tensor, receiver: Tensor, sender: Tensor, n_atoms: int) -> Tuple[Tensor, Tensor]:
    """Pairs of which each other one is the exact reverse, or has none: what depends on r alone need be made once.

    Returns:
        (U,) int64 these pairs; (P,) int64 for every pair the place among them.
    """
    low, high = torch.minimum(receiver, sender).long(), torch.maximum(receiver, sender).long()
    by_r = torch.argsort(r, stable=True)
    order = by_r[torch.argsort((low * n_atoms + high)[by_r], stable=True)]
    a, b = order[:-1], order[1:]
    reverse = (receiver[a] == sender[b]) & (sender[a] == receiver[b]) & (vectors[a] == -vectors[b]).all(dim=1)
    starts = torch.cat([torch.ones(min(1, len(r)), dtype=torch.bool), ~reverse])
    row = torch.empty_like(order).index_copy_(0, order, torch.cumsum(starts, 0) - 1)
    return order[starts], row


def neighbour_sum(values: Tensor, graph: TrainingGraph) -> Tensor:
    """(U,) -> (n,), summed over the pairs that each atom receives."""
    return values.new_zeros(graph.atoms.n).index_add(0, graph.receiver, values.index_select(0, graph.row))


def per_species(features: Tensor, weight: Tensor, graph: TrainingGraph) -> Tensor:
    """A matrix per irrep and species: ((L+1)^2, n, K) x (L'+1, S, K, K') -> ((L'+1)^2, n, K'), L' <= L."""
    matrices = weight.unbind(1)
    chunks = torch.split(features, [count for _, count in graph.groups], dim=1)
    parts = [per_irrep(chunk, matrices[z]) for chunk, (z, _) in zip(chunks, graph.groups, strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@cache
def _paths_and_coupling(paths: Tuple[Path, ...]) -> Tuple[Tensor, Tensor, Tensor]:
    index, value = coupling(list(paths))
    return torch.tensor(paths, dtype=torch.int32), torch.from_numpy(index), torch.from_numpy(value)


def convolve(messages: Any, sent: Tensor, columns: Tensor, weight: Tensor, graph: TrainingGraph) -> List[Tensor]:
    """Messages of all paths, per l3 (2 l3 + 1, n, paths to it * k).

    Args:
        messages: a `Messages`. sent: ((l_in+1)^2, N, k). columns: (U, b). weight: (b, paths, k).
    """
    n, lanes = graph.atoms.n, LANES[sent.dtype]
    tables = _paths_and_coupling(tuple(messages.paths))
    at_a_time = max(AT_A_TIME // max(columns.shape[0] * weight.shape[1] * lanes, 1), 1) * lanes
    pieces: List[List[Tensor]] = [[] for _ in messages.fan_in]
    for some, matrices in zip(torch.split(sent, at_a_time, dim=2), torch.split(weight, at_a_time, dim=2), strict=True):
        values = radial_values(columns, in_blocks(matrices, lanes))
        flat = ops.convolution(
            some.contiguous(), graph.harmonics, graph.none, values, graph.none, graph.row, graph.sender,
            graph.first, *tables, 0, n, 0.0, 1.0, 2,
        )  # fmt: skip
        shapes = [(2 * ell + 1, n, count, some.shape[2]) for ell, count in enumerate(messages.fan_in)]
        for piece, part, shape in zip(pieces, torch.split(flat, [prod(s) for s in shapes]), shapes, strict=True):
            piece.append(part.view(shape))
    return [(p[0] if len(p) == 1 else torch.cat(p, dim=3)).flatten(2) for p in pieces]


def density_messages(messenger: Any, table: Tensor, columns: Tensor, graph: TrainingGraph) -> Tensor:
    """((l_max+1)^2, n, K) of a layer whose sender features, table (S', k), depend on the element alone."""
    density = ops.density(
        graph.harmonics, graph.none, columns.index_select(0, graph.row), graph.none, graph.row, graph.sender_kind,
        graph.first, len(graph.atoms.present), 0, graph.atoms.n, 0.0, 1.0, 2,
    )  # fmt: skip
    parts = []
    for ell, part in enumerate(split_irreps(density, 0)):  # path l is (0, l, l)
        on_pair = (table.unsqueeze(1) * messenger.radial_weight[:, ell]).flatten(0, 1)
        parts.append(torch.matmul(part, torch.mm(on_pair, messenger.linear[ell])))
    return torch.cat(parts, dim=0)


def message(messenger: Any, sent: Tensor, table: Tensor, own: Tensor, columns: Tensor, graph: TrainingGraph) -> Tensor:
    """((l_max+1)^2, n, K) features that the product takes; arguments as in `convolve` and `density_messages`.

    Args:
        own: ((l_in+1)^2, n, k) of the receivers. columns: (U, b [+ 1]) radial features and density.
    """
    from mdplug.potentials.blocks.interaction import GatedMessenger

    features = columns[:, : messenger.n_radial]
    rho = neighbour_sum(columns[:, messenger.n_radial], graph) if messenger.has_density else None
    if isinstance(messenger, GatedMessenger):
        assert rho is not None
        k = sent.shape[2]
        by_l = convolve(messenger.messages, sent, features, messenger.radial_weight, graph)
        norm = (1.0 / (messenger.beta * rho + messenger.alpha)).view(1, -1, 1)
        return messenger.combine([part for m in by_l for part in torch.split(m, k, dim=2)], own, norm)
    if messenger.by_species:
        out = density_messages(messenger, table, features, graph)
    else:
        by_l = convolve(messenger.messages, sent, features, messenger.radial_weight, graph)
        linear = torch.split(messenger.linear, messenger.messages.fan_in)
        out = torch.cat([torch.matmul(m, w.flatten(0, 1)) for m, w in zip(by_l, linear, strict=True)], dim=0)
    if rho is not None:
        out = out / (rho + 1.0).view(1, -1, 1)
    return per_species(out, messenger.skip, graph) if messenger.has_skip else out


def contract(product: Any, features: Tensor, graph: TrainingGraph) -> Tensor:
    """((l_max+1)^2, n, K) -> ((l_out+1)^2, n, K): a `SymmetricContraction`."""
    nodes, term, starts, coefficients = sparse_polynomial(product, graph.atoms.present)
    kind = graph.atoms.kind[: graph.atoms.n]
    kind = torch.zeros_like(kind) if product.agnostic else kind
    blocks = in_blocks(coefficients, LANES[features.dtype])
    return ops.polynomial(features.contiguous(), blocks, kind, nodes, term, starts)


def layer_forward(
    layer: Any, features: Tensor, sent: Tensor, table: Tensor, own: Tensor, columns: Tensor, graph: TrainingGraph
) -> Tensor:
    """New features ((l_out+1)^2, n, K) of the owned atoms, sorted; see `Layer.forward`.

    Args:
        sent: ((edge_l+1)^2, N, k) of all atoms, sorted.
    """
    product = contract(layer.product, message(layer.messenger, sent, table, own, columns, graph), graph)
    out = per_irrep(product, layer.mix)
    if not layer.has_skip:
        return out
    skip = per_species(features, layer.skip, graph) if layer.skip_by_species else per_irrep(features, layer.skip)
    if skip.shape[0] < out.shape[0]:  # the first layer has scalars only
        skip = torch.cat([skip, torch.zeros_like(out[skip.shape[0] :])], dim=0)
    return out + skip


def exchange(mace: Any, own: Tensor, graph: TrainingGraph, n_atoms: int) -> Tensor:
    """What neighbours see of all atoms, ((edge_l+1)^2, N, k) sorted, from that of the owned ones."""
    atoms = graph.atoms
    if n_atoms == atoms.n:
        return own
    place = atoms.place.long()
    rows = own.transpose(0, 1).flatten(1)[place[: atoms.n]]  # engines know atoms in their own order
    rows = torch.cat([rows, rows.new_zeros(n_atoms - atoms.n, rows.shape[1])])
    filled = mace.exchange(rows, atoms.n)
    back = torch.cat([atoms.order, torch.arange(atoms.n, n_atoms)])
    return filled[back].view(n_atoms, own.shape[0], own.shape[2]).transpose(0, 1)


def local(
    mace: Any, species: Tensor, pairs: Tensor, vectors: Tensor, n_owned: int, system_index: Tensor,
    total_charge: Tensor, total_spin: Tensor, head: Tensor,
) -> Dict[str, Tensor]:  # fmt: skip
    """See `Potential.local`; species (N,) int64 in place of the numbers."""
    graph = build_graph(mace, species, pairs, vectors, n_owned)
    atoms = graph.atoms
    r = graph.r.unsqueeze(1)
    columns = mace.radial(r, graph.receiving, graph.sending)
    atom_head = head[system_index[atoms.order]]
    energy = torch.zeros_like(mace.shift[atom_head])
    if mace.has_repulsion:
        energy = neighbour_sum(mace.repulsion(r, graph.receiving, graph.sending), graph)
    start = mace.embedding[atoms.species]
    outside = torch.zeros_like(energy)  # what scale does not multiply
    if mace.has_state:
        by_place = torch.cat([system_index[atoms.order], system_index[n_owned:]])
        start = start + mace.state(total_charge, total_spin)[by_place]
        if mace.reads_state:
            outside = mace.state_readout(start[:n_owned], atom_head)
    features = start[:n_owned].unsqueeze(0)
    table = mace.embedding[graph.atoms.present]
    scalars: List[Tensor] = []
    for t, (layer, readout) in enumerate(zip(mace.layers, mace.readouts, strict=True)):
        if t == 0:  # no exchange: ghosts know their own species
            sent = layer.send(start.unsqueeze(0))
            table = layer.send(table.unsqueeze(0)).squeeze(0)
            own = sent[:, :n_owned]
        else:
            own = layer.send(features)
            sent = exchange(mace, own, graph, len(species))
        features = layer_forward(layer, features, sent, table, own, columns[t], graph)
        scalars.append(features[0])
        energy = energy + readout(features[0], atom_head)
    energy = mace.scale[atom_head] * energy + mace.shift[atom_head] + outside
    place = atoms.place[:n_owned].long()
    return {"atom_energy": energy[place], "features": torch.cat(scalars, dim=1)[place]}
