"""Bonds of a structure: read or guessed, molecules made whole, bonds that broke."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from mdplug.errors import InputError

if TYPE_CHECKING:
    from ase import Atoms

BROKEN = 1.6  # times its length at the start

Bonds = list[tuple[int, int]]


def bonds_of(atoms: Atoms) -> Bonds:
    """The bonds of `info["bonds"]`, as `build` writes them; else a guess from distances.

    A guessed network without end (a metal, an ionic or covalent crystal) is no molecule and has no bonds here.

    Raises:
        InputError: bonds that are no pairs of atoms.
    """
    given = atoms.info.get("bonds")
    if given is None:
        from mdplug.engines.openmm.topology import guess_bonds

        return _finite(atoms, guess_bonds(atoms))
    try:
        if isinstance(given, str):
            given = json.loads(given.removeprefix("_JSON "))
        bonds = np.asarray(given, dtype=int).reshape(-1, 2)
    except (ValueError, TypeError) as error:
        raise InputError(f"the bonds of the structure file are no list of pairs ({error}); build it again") from error
    if bonds.size and (bonds.min() < 0 or bonds.max() >= len(atoms) or (bonds[:, 0] == bonds[:, 1]).any()):
        raise InputError(f"the bonds of the structure file name atoms beyond its {len(atoms)}; build it again")
    return [(int(i), int(j)) for i, j in bonds]


def bond_vectors(positions: np.ndarray, cell: np.ndarray | None, pbc: np.ndarray, bonds: Bonds) -> np.ndarray:
    """(n, 3) A, the nearest image of each bond.

    Bonds are short beside the cell, so rounding fractional coordinates finds it.
    """
    index = np.array(bonds, dtype=int).reshape(-1, 2)
    vectors: np.ndarray = positions[index[:, 1]] - positions[index[:, 0]]
    if cell is None or not pbc.any():
        return vectors
    fractional = np.round(vectors @ np.linalg.pinv(cell)) * pbc
    return vectors - fractional @ cell


def _tree(n_atoms: int, bonds: Bonds) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Molecule of each atom; atoms in an order in which the predecessor of each comes before it; the predecessors."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import breadth_first_order, connected_components

    index = np.array(bonds, dtype=int).reshape(-1, 2)
    graph = coo_matrix((np.ones(len(index)), (index[:, 0], index[:, 1])), shape=(n_atoms, n_atoms)).tocsr()
    label = connected_components(graph, directed=False)[1]
    order, before = [], np.full(n_atoms, -1)
    for root in np.unique(label, return_index=True)[1]:
        nodes, parents = breadth_first_order(graph, root, directed=False)
        order.append(nodes)
        before[nodes[1:]] = parents[nodes[1:]]
    return label, np.concatenate(order), before


def made_whole(atoms: Atoms, bonds: Bonds) -> Atoms:
    """A copy in which no molecule is cut by the cell's border."""
    out: Atoms = atoms.copy()
    if not bonds or not atoms.pbc.any():
        return out
    _, order, before = _tree(len(atoms), bonds)
    positions = atoms.get_positions()
    child = order[before[order] >= 0]
    pairs = [(int(before[a]), int(a)) for a in child]
    for (parent, a), vector in zip(pairs, bond_vectors(positions, atoms.cell.array, atoms.pbc, pairs), strict=True):
        positions[a] = positions[parent] + vector
    out.set_positions(positions)
    return out


def _finite(atoms: Atoms, bonds: Bonds) -> Bonds:
    """Without the bonds of molecules that meet their own periodic image."""
    if not bonds or not atoms.pbc.any():
        return bonds
    whole = made_whole(atoms, bonds).positions
    nearest = bond_vectors(whole, atoms.cell.array, atoms.pbc, bonds)
    index = np.array(bonds)
    mismatch = np.abs(whole[index[:, 1]] - whole[index[:, 0]] - nearest).max(axis=1) > 1e-3
    label = _tree(len(atoms), bonds)[0]
    endless = set(label[index[mismatch, 0]])
    return [pair for pair in bonds if label[pair[0]] not in endless]


def bond_lengths(atoms: Atoms, bonds: Bonds) -> np.ndarray:
    """(n,) A."""
    return np.linalg.norm(bond_vectors(atoms.get_positions(), atoms.cell.array, atoms.pbc, bonds), axis=1)


def broken_bonds(
    positions: np.ndarray, box: np.ndarray | None, bonds: Bonds, reference: np.ndarray, factor: float = BROKEN
) -> np.ndarray:
    """Indices of the bonds longer than `factor` times their reference length."""
    pbc = np.full(3, box is not None)
    lengths = np.linalg.norm(bond_vectors(positions, box, pbc, bonds), axis=1)
    return np.flatnonzero(lengths > factor * reference)
