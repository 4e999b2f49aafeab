"""Boxes, bonds and molecules at OpenMM's border.

OpenMM wants reduced boxes: a along x, b in the xy plane, off-diagonals at most half the diagonal. Cells from elsewhere
are turned there and back.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import openmm
from openmm import app, unit

from mdplug.errors import InputError
from mdplug.units import NM

if TYPE_CHECKING:
    import ase

MOLECULES = "mdplug-molecules"  # name of the force that tells OpenMM which atoms belong together
BOND_FACTOR = 1.2  # times the sum of covalent radii
# Elements that make ions in liquids, never bonds that a molecule should be followed by.
IONIC = (3, 11, 12, 19, 20, 30, 37, 38, 55, 56)


def reduced_box(cell_A: Any) -> tuple[np.ndarray, np.ndarray]:
    """A cell as OpenMM wants it.

    Args:
        cell_A: (3, 3) rows a, b, c in A, any orientation and handedness.

    Returns:
        box (3, 3) in A, reduced, spanning the same lattice turned, and the proper rotation (3, 3):
        x_openmm = x @ rotation, x = x_openmm @ rotation.T.

    Raises:
        InputError: a flat cell.
    """
    cell = np.array(cell_A, dtype=np.float64)
    if cell.shape != (3, 3) or not np.isfinite(cell).all():
        raise InputError(f"a box must be three finite lattice vectors, got shape {cell.shape}")
    lengths = np.linalg.norm(cell, axis=1)
    if abs(np.linalg.det(cell)) <= 1e-6 * lengths.prod():
        raise InputError("the cell is flat (linearly dependent lattice vectors); give three independent ones")
    if np.linalg.det(cell) < 0:  # the same lattice, right-handed: molecules keep their handedness
        cell[2] *= -1
    # cell = L Q with L lower triangular: QR of the transpose.
    q, r = np.linalg.qr(cell.T)
    signs = np.sign(np.diag(r))
    rotation, box = q * signs, (r * signs[:, None]).T
    box[np.triu_indices(3, 1)] = 0.0
    if np.array_equal(box, cell):
        rotation = np.eye(3)
    box[2] -= box[1] * np.round(box[2, 1] / box[1, 1])
    box[2] -= box[0] * np.round(box[2, 0] / box[0, 0])
    box[1] -= box[0] * np.round(box[1, 0] / box[0, 0])
    return box, rotation


def box_A_of(thing: openmm.Context | openmm.State | app.Topology) -> np.ndarray | None:
    """(3, 3) box vectors in A; None for a topology without box."""
    state = thing.getState() if isinstance(thing, openmm.Context) else thing
    vectors = state.getPeriodicBoxVectors()
    return None if vectors is None else np.array(vectors.value_in_unit(unit.nanometer)) * NM


def guess_bonds(atoms: "ase.Atoms") -> list[tuple[int, int]]:
    """Bonds by distance: closer than 1.2 times the sum of covalent radii, periodic images included.

    Alkali and alkaline-earth ions and zinc are never bonded; neither are two hydrogens of one heavier molecule.
    """
    from ase.data import covalent_radii
    from ase.neighborlist import neighbor_list

    numbers = atoms.get_atomic_numbers()
    radii = covalent_radii[numbers] * BOND_FACTOR
    i, j = neighbor_list("ij", atoms, list(radii))
    free = ~np.isin(numbers, IONIC)
    keep = (i < j) & free[i] & free[j]
    bonds = sorted({(int(a), int(b)) for a, b in zip(i[keep], j[keep], strict=True)})
    heavy = {a for pair in bonds for a, b in (pair, pair[::-1]) if numbers[b] != 1}
    return [(a, b) for a, b in bonds if not (numbers[a] == numbers[b] == 1 and (a in heavy or b in heavy))]


def molecules_of(n_atoms: int, bonds: list[tuple[int, int]]) -> list[list[int]]:
    """Connected atoms, each molecule sorted, molecules ordered by their first atom."""
    least = list(range(n_atoms))  # towards the first atom of its molecule; scipy's own takes 0.3 s to import

    def first(atom: int) -> int:
        while least[atom] != atom:
            least[atom] = least[least[atom]]
            atom = least[atom]
        return atom

    for i, j in bonds:
        a, b = sorted((first(int(i)), first(int(j))))
        least[b] = a
    groups: dict[int, list[int]] = {}
    for atom in range(n_atoms):
        groups.setdefault(first(atom), []).append(atom)
    return list(groups.values())


def topology_from_ase(
    atoms: "ase.Atoms", bonds: list[tuple[int, int]] | None = None, names: list[str] | None = None
) -> app.Topology:
    """An OpenMM topology of the same atoms in the same order.

    Args:
        atoms: open, or periodic in all directions; its positions go to OpenMM turned by `reduced_box`.
        bonds: index pairs; None: none.
        names: a residue name for each atom; None: the first three letters of the molecule's formula.

    Raises:
        InputError: periodic in some directions only, which OpenMM has no box for.
    """
    if atoms.pbc.any() and not atoms.pbc.all():
        raise InputError("OpenMM knows open and fully periodic systems only; set pbc to all True or all False")
    bonds = [] if bonds is None else bonds
    group = {a: k for k, members in enumerate(molecules_of(len(atoms), bonds)) for a in members}
    formula: dict[int, list[int]] = {}
    for a, k in group.items():
        formula.setdefault(k, []).append(a)
    topology = app.Topology()
    chain = topology.addChain()
    made: list[app.topology.Atom] = []
    residue, current = None, None
    count: dict[str, int] = {}
    for a, z in enumerate(atoms.get_atomic_numbers()):
        # A residue must be contiguous in a topology, a molecule need not be.
        if group[a] != current:
            current, count = group[a], {}
            name = names[a] if names else atoms[formula[current]].get_chemical_formula()[:3].upper()
            residue = topology.addResidue(name, chain)
        element = app.Element.getByAtomicNumber(int(z))
        count[element.symbol] = count.get(element.symbol, 0) + 1
        made.append(topology.addAtom(f"{element.symbol}{count[element.symbol]}", element, residue))
    for i, j in bonds:
        topology.addBond(made[i], made[j])
    if atoms.pbc.all():
        topology.setPeriodicBoxVectors(reduced_box(atoms.cell.array)[0] / NM * unit.nanometer)
    return topology


def molecules_force(bonds: list[tuple[int, int]], periodic: bool) -> openmm.HarmonicBondForce:
    """Bonds of no strength: they tell OpenMM its molecules (barostat moves, whole molecules in reporters)."""
    force = openmm.HarmonicBondForce()
    force.setName(MOLECULES)
    force.setUsesPeriodicBoundaryConditions(periodic)
    for i, j in bonds:
        force.addBond(int(i), int(j), 0.1, 0.0)
    return force
