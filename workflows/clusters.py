"""Geometry of molecular clusters: dense aggregates, distortions, close contacts, carving out of a liquid.

Every function returns new Atoms with ``info["charge"]`` and the array ``mol_id``; randomness comes from the given
generator alone. Lengths in A.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.data import vdw_radii

from mdplug.errors import InputError
from mdplug.units import BOLTZMANN

# Effective contact radii of the small ions in salts; Bondi's radii for the rest (ase.data).
_ION_RADII = {3: 0.90, 11: 1.20, 19: 1.60}


def contact_radii(numbers: np.ndarray) -> np.ndarray:
    """(n,) radii in A whose sums are typical non-bonded contact distances."""
    radii = np.array([_ION_RADII.get(int(z), vdw_radii[int(z)]) for z in numbers])
    return np.where(np.isfinite(radii), radii, 1.8)


def random_rotation(rng: np.random.Generator) -> np.ndarray:
    """Uniform rotation matrix (3, 3) from a uniform unit quaternion."""
    w, x, y, z = _unit(rng.normal(size=4))
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.sqrt((vector**2).sum())


def slide_distance(moving: np.ndarray, direction: np.ndarray, fixed: np.ndarray, contact: np.ndarray) -> float:
    """How far along ``direction`` a rigid body stops that comes in from infinity.

    Args:
        moving: (m, 3) its positions at distance zero.
        direction: (3,) unit vector.
        fixed: (n, 3) what is there.
        contact: (m, n) smallest allowed distances.

    Returns:
        The largest t where some pair of ``moving + t direction`` and ``fixed`` is at its contact distance;
        minus infinity where nothing is in the way.
    """
    apart = moving[:, None, :] - fixed[None, :, :]
    along = apart @ direction
    discriminant = along**2 - (apart**2).sum(-1) + contact**2
    hit = discriminant > 0
    return float((np.sqrt(discriminant[hit]) - along[hit]).max()) if hit.any() else -np.inf


def aggregate(molecules: Sequence[Atoms], rng: np.random.Generator, *, scale: float = 0.85, trials: int = 24) -> Atoms:
    """A dense cluster: each molecule slides in from outside, and of ``trials`` ways the one ending innermost stays.

    Args:
        molecules: in the order of placing; each keeps its geometry.
        rng: source of orientations and directions.
        scale: contacts are at this fraction of the sum of the contact radii.
        trials: orientations and directions tried for each molecule.
    """
    if not molecules:
        raise InputError("a cluster needs at least one molecule")
    placed: list[np.ndarray] = []
    numbers = np.concatenate([m.numbers for m in molecules])
    radii = contact_radii(numbers)
    start = 0
    for molecule in molecules:
        n = len(molecule)
        body = molecule.positions - molecule.get_center_of_mass()
        if not placed:
            placed.append(body @ random_rotation(rng).T)
        else:
            fixed = np.concatenate(placed)
            contact = scale * (radii[start : start + n, None] + radii[None, :start])
            options = []
            for _ in range(trials):
                rotated, direction = body @ random_rotation(rng).T, _unit(rng.normal(size=3))
                distance = max(slide_distance(rotated, direction, fixed, contact), 0.0)
                options.append((distance, rotated + distance * direction))
            placed.append(min(options, key=lambda option: option[0])[1])
        start += n
        everything = np.concatenate(placed)
        centre = everything.mean(axis=0)
        placed = [part - centre for part in placed]
    return _cluster(
        numbers, np.concatenate(placed), sum(m.info["charge"] for m in molecules), [len(m) for m in molecules]
    )


def _cluster(numbers: np.ndarray, positions: np.ndarray, charge: float, sizes: Sequence[int]) -> Atoms:
    atoms = Atoms(numbers, positions, info={"charge": round(charge), "spin": 1})
    atoms.set_array("mol_id", np.repeat(np.arange(len(sizes)), sizes))
    return atoms


def molecule_groups(atoms: Atoms) -> list[np.ndarray]:
    """Atom indices of each molecule, by the array ``mol_id``."""
    if "mol_id" not in atoms.arrays:
        raise InputError(f"{atoms.get_chemical_formula()} has no mol_id array: which atoms make a molecule is unknown")
    ids = atoms.arrays["mol_id"]
    return [np.flatnonzero(ids == i) for i in np.unique(ids)]


def scale_centres(atoms: Atoms, factor: float) -> Atoms:
    """Whole molecules moved so that their centres of mass are ``factor`` times as far apart."""
    out = atoms.copy()
    middle = atoms.get_center_of_mass()
    for group in molecule_groups(atoms):
        out.positions[group] += (factor - 1.0) * (atoms[group].get_center_of_mass() - middle)
    return out


def rattle(atoms: Atoms, sigma: float, rng: np.random.Generator) -> Atoms:
    """Every coordinate displaced by a normal deviate of ``sigma``."""
    out = atoms.copy()
    out.positions += sigma * rng.normal(size=out.positions.shape)
    return out


def nudge(atoms: Atoms, shift: float, angle_deg: float, rng: np.random.Generator) -> Atoms:
    """Each molecule shifted (normal, per coordinate) and turned about a random axis (normal), rigidly."""
    out = atoms.copy()
    for group in molecule_groups(atoms):
        centre = atoms[group].get_center_of_mass()
        turned = _turn(_unit(rng.normal(size=3)), np.deg2rad(angle_deg) * rng.normal())
        out.positions[group] = (atoms.positions[group] - centre) @ turned.T + centre + shift * rng.normal(size=3)
    return out


def _turn(axis: np.ndarray, angle: float) -> np.ndarray:
    k = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * (k @ k)


def close_contact(
    first: Atoms, second: Atoms, i: int, j: int, distance: float, rng: np.random.Generator, trials: int = 40
) -> Atoms:
    """Two molecules with atom ``i`` of the first and ``j`` of the second ``distance`` apart, the rest out of the way.

    Of ``trials`` orientations the one whose other atoms are furthest from touching stays.
    """
    best, best_gap = np.zeros((0, 3)), -np.inf
    radii = contact_radii(first.numbers)[:, None] + contact_radii(second.numbers)[None, :]
    for _ in range(trials):
        a = (first.positions - first.positions[i]) @ random_rotation(rng).T
        b = (second.positions - second.positions[j]) @ random_rotation(rng).T + distance * _unit(rng.normal(size=3))
        gaps = np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)) / radii
        gaps[i, j] = np.inf
        if gaps.size == 1 or gaps.min() > best_gap:
            best, best_gap = np.concatenate([a, b]), gaps.min()
    charge = first.info["charge"] + second.info["charge"]
    return _cluster(np.concatenate([first.numbers, second.numbers]), best, charge, [len(first), len(second)])


def stretch_bond(atoms: Atoms, bonds: Sequence[tuple[int, int]], bond: tuple[int, int], factor: float) -> Atoms:
    """One bond of a molecule ``factor`` times as long.

    The two sides move apart along the bond by half each; in a ring, where both sides hang together, the displacement
    halves with every bond further away from the one that is stretched.
    """
    i, j = bond
    others = [b for b in bonds if tuple(sorted(b)) != tuple(sorted(bond))]
    from_i, from_j = _graph_distances(len(atoms), others, i), _graph_distances(len(atoms), others, j)
    ring = np.isfinite(from_i[j])
    weight_i = np.where(from_i < from_j, 0.5**from_i if ring else 1.0, 0.0)
    weight_j = np.where(from_j < from_i, 0.5**from_j if ring else 1.0, 0.0)
    out = atoms.copy()
    vector = (factor - 1.0) * (atoms.positions[j] - atoms.positions[i])
    out.positions += 0.5 * (weight_j - weight_i)[:, None] * vector
    return out


def _graph_distances(n: int, bonds: Sequence[tuple[int, int]], start: int) -> np.ndarray:
    distance = np.full(n, np.inf)
    distance[start] = 0
    frontier = [start]
    while frontier:
        reached = []
        for a, b in bonds:
            for here, there in ((a, b), (b, a)):
                if here in frontier and not np.isfinite(distance[there]):
                    distance[there] = distance[here] + 1
                    reached.append(there)
        frontier = reached
    return distance


@dataclass(frozen=True)
class Modes:
    """Harmonic modes of one molecule at a minimum.

    Attributes:
        atoms: the minimum.
        curvature: (k,) eigenvalues of the mass-weighted Hessian, eV/(A^2 amu), soft ones raised to a floor.
        vectors: (3n, k) Cartesian displacement of each mode, A sqrt(amu).
    """

    atoms: Atoms
    curvature: np.ndarray
    vectors: np.ndarray

    def sample(self, temperature_K: float, rng: np.random.Generator) -> Atoms:
        """Geometry drawn from the classical harmonic distribution."""
        out = self.atoms.copy()
        if len(self.curvature):
            amplitude = np.sqrt(BOLTZMANN * temperature_K / self.curvature) * rng.normal(size=len(self.curvature))
            out.positions += (self.vectors @ amplitude).reshape(-1, 3)
        return out

    def resample_in_place(self, positions: np.ndarray, temperature_K: float, rng: np.random.Generator) -> np.ndarray:
        """A new thermal geometry laid over ``positions`` (n, 3), same place and orientation."""
        new = self.sample(temperature_K, rng).positions
        if len(new) == 1:
            return positions.copy()
        centre_new, centre_old = self.atoms.positions.mean(axis=0), positions.mean(axis=0)
        # Kabsch: the rotation of the minimum onto the present geometry.
        u, _, vt = np.linalg.svd((self.atoms.positions - centre_new).T @ (positions - centre_old))
        flip = np.diag([1.0, 1.0, np.sign(np.linalg.det(u @ vt))])
        return (new - centre_new) @ (u @ flip @ vt) + centre_old


# 0.08 eV/(A^2 amu) is about 150 cm^-1: below it (torsions, methyl rotors) straight displacements are no motion.
_SOFTEST = 0.08


def harmonic_modes(atoms: Atoms, forces: Callable[[Atoms], np.ndarray], step: float = 0.01) -> Modes:
    """Modes from central differences of ``forces`` (eV/A) at a minimum."""
    n = len(atoms)
    if n == 1:
        return Modes(atoms.copy(), np.zeros(0), np.zeros((3, 0)))
    hessian = np.zeros((3 * n, 3 * n))
    for k in range(3 * n):
        moved = []
        for sign in (1.0, -1.0):
            probe = atoms.copy()
            probe.positions[k // 3, k % 3] += sign * step
            moved.append(forces(probe).ravel())
        hessian[k] = (moved[1] - moved[0]) / (2 * step)
    root = np.repeat(np.sqrt(atoms.get_masses()), 3)
    curvature, vectors = np.linalg.eigh(0.5 * (hessian + hessian.T) / np.outer(root, root))
    # Five external modes for a straight molecule, six otherwise.
    moments = atoms.get_moments_of_inertia()
    external = 5 if moments[0] < 1e-3 * moments[2] else 6
    inner = np.argsort(np.abs(curvature))[external:]
    return Modes(atoms.copy(), np.maximum(curvature[inner], _SOFTEST), vectors[:, inner] / root[:, None])


def carve(atoms: Atoms, centre: int, n_atoms: int) -> Atoms:
    """A cluster of whole molecules around one molecule of a periodic box.

    Molecules are made whole, taken by the distance of their nearest atom to the central molecule's atoms, and added
    until the next one would exceed ``n_atoms``.

    Args:
        atoms: a box with ``mol_id`` and ``mol_charge`` (e, of the atom's molecule) arrays.
        centre: ``mol_id`` of the molecule in the middle.
        n_atoms: largest size.

    Raises:
        InputError: the molecule charges are unknown, or the box is too small for the cluster.
    """
    if "mol_charge" not in atoms.arrays:
        raise InputError(f"{atoms.get_chemical_formula()} has no mol_charge array: the cluster's charge is unknown")
    groups = {int(atoms.arrays["mol_id"][g[0]]): g for g in molecule_groups(atoms)}
    if centre not in groups:
        raise InputError(f"molecule {centre} is not in the box")
    whole = {k: _made_whole(atoms, g) for k, g in groups.items()}
    cell = np.asarray(atoms.cell)
    found = []
    middle = whole[centre]
    for k, group in groups.items():
        if k == centre:
            continue
        shift = np.round(np.linalg.solve(cell.T, middle.mean(0) - whole[k].mean(0))) * atoms.pbc
        for extra in np.ndindex(3, 3, 3):
            image = whole[k] + (shift + (np.array(extra) - 1) * atoms.pbc) @ cell
            found.append((np.sqrt(((image[:, None] - middle[None]) ** 2).sum(-1)).min(), k, image, group))
            if not atoms.pbc.any():
                break
    found.sort(key=lambda item: item[0])
    chosen, taken, size = [(centre, middle, groups[centre])], {centre}, len(middle)
    for _, k, image, group in found:
        if size + len(group) > n_atoms:
            break
        if k in taken:
            raise InputError(f"the box is too small for a cluster of {n_atoms} atoms: molecule {k} meets its image")
        chosen.append((k, image, group))
        taken.add(k)
        size += len(group)
    numbers = np.concatenate([atoms.numbers[g] for _, _, g in chosen])
    charge = sum(float(atoms.arrays["mol_charge"][g[0]]) for _, _, g in chosen)
    positions = np.concatenate([image for _, image, _ in chosen])
    return _cluster(numbers, positions - positions.mean(0), charge, [len(g) for _, _, g in chosen])


def _made_whole(atoms: Atoms, group: np.ndarray) -> np.ndarray:
    """Positions of a molecule, each atom in the image nearest to the one before it along a growing tree."""
    from ase.geometry import find_mic

    positions = atoms.positions[group].copy()
    todo = set(range(1, len(group)))
    done = [0]
    while todo:
        rest = np.array(sorted(todo))
        vectors = (positions[rest][:, None] - positions[done][None]).reshape(-1, 3)
        vectors, lengths = find_mic(vectors, atoms.cell, atoms.pbc)
        a, b = divmod(int(lengths.argmin()), len(done))
        positions[rest[a]] = positions[done[b]] + vectors.reshape(len(rest), len(done), 3)[a, b]
        done.append(int(rest[a]))
        todo.discard(int(rest[a]))
    return positions
