"""From a frame of a simulation to a structure that a quantum method can label."""

from __future__ import annotations

import numpy as np
from ase import Atoms

from mdplug.errors import InputError
from mdplug.workflows._bonds import bonds_of
from mdplug.workflows.clusters import carve

SHRINK = 0.8  # next try, where a cluster would meet its own image
FEWEST = 2  # atoms left when tries end


def with_molecules(atoms: Atoms) -> Atoms:
    """A copy with the arrays ``mol_id`` and, where they can be known, ``mol_charge`` (e, of the atom's molecule).

    What the file says is kept; else molecules follow from bonds, and all are neutral where there is but one kind of
    molecule and the whole is neutral.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    out: Atoms = atoms.copy()
    if "mol_id" not in out.arrays:
        index = np.array(bonds_of(atoms), dtype=int).reshape(-1, 2)
        graph = coo_matrix((np.ones(len(index)), (index[:, 0], index[:, 1])), shape=(len(atoms), len(atoms)))
        out.set_array("mol_id", connected_components(graph, directed=False)[1].astype(int))
    if "mol_charge" not in out.arrays:
        total, ids = float(out.info.get("charge", 0.0)), out.arrays["mol_id"]
        kinds = {tuple(sorted(out.numbers[ids == i])) for i in np.unique(ids)}
        n = len(np.unique(ids))
        if n == 1 or (len(kinds) == 1 and total % n == 0):
            out.set_array("mol_charge", np.full(len(out), total / n))
    return out


def to_label(frame: Atoms, atom: int, max_atoms: int) -> Atoms:
    """The structure to label for a frame: itself where it is open and small, else a cluster of whole molecules.

    The cluster is that around the molecule of `atom`, molecules by their distance to it, and has the sum of their
    charges.

    Args:
        frame: with what `with_molecules` adds. max_atoms: largest size.

    Raises:
        InputError: the charges of molecules are unknown, the molecule in the middle is too large, the box too small.
    """
    if not frame.pbc.any() and len(frame) <= max_atoms:
        out = Atoms(frame.numbers, frame.positions - frame.positions.mean(axis=0))
        out.info |= {key: frame.info[key] for key in ("charge", "spin") if key in frame.info}
        return out
    centre = int(frame.arrays["mol_id"][atom])
    if int((frame.arrays["mol_id"] == centre).sum()) > max_atoms:
        raise InputError(
            f"the molecule around atom {atom} has more than {max_atoms} atoms; raise cluster_atoms to label it"
        )
    if "mol_charge" not in frame.arrays:
        raise InputError(
            "the charges of the molecules are unknown, so those of clusters are; take a box that `mdplug build` made, "
            "or add the array mol_charge (e, of each atom's molecule)"
        )
    size = max_atoms
    while True:
        try:
            return carve(frame, centre, size)
        except InputError:
            size = int(SHRINK * size)
            if size < FEWEST:
                raise
