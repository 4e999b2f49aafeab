"""Labelled structures for the tests: argon clusters and strained copper, labelled by ASE's own calculators."""

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.lj import LennardJones
from ase.calculators.morse import MorsePotential
from ase.io import write

EPSILON, SIGMA, OFFSET = 0.0104, 3.4, -5.0
MORSE = {"epsilon": 0.5, "r0": 2.6, "rho0": 4.0, "rcut1": 2.5, "rcut2": 2.6}  # cut-offs in units of r0


def argon_frames(n_frames=24, seed=0, split=True):
    """Argon clusters of 4 to 9 atoms; energies hold OFFSET for each atom. ASE's LJ is not smoothed: cut far out."""
    rng = np.random.default_rng(seed)
    frames = []
    for k in range(n_frames):
        n = int(rng.integers(4, 10))
        positions = []
        while len(positions) < n:
            trial = rng.uniform(0, 7.0, 3)
            if all(np.linalg.norm(trial - p) > 3.15 for p in positions):
                positions.append(trial)
        atoms = Atoms(f"Ar{n}", positions)
        atoms.calc = LennardJones(epsilon=EPSILON, sigma=SIGMA, rc=1e6)
        frames.append(labelled(atoms, config_type="small" if n < 6 else "large", group=f"start{k // 2}"))
        if split:
            frames[-1].info["split"] = "valid" if (k // 2) % 4 == 0 else "train"
    return frames


def crystal_frames(n_frames=6, seed=0):
    """Strained, rattled copper by ASE's Morse potential, with stress."""
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(n_frames):
        atoms = bulk("Cu", cubic=True) * (2, 2, 2)
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.02 * rng.normal(size=(3, 3))), scale_atoms=True)
        atoms.positions += 0.05 * rng.normal(size=atoms.positions.shape)
        atoms.calc = MorsePotential(**MORSE)
        frames.append(labelled(atoms, stress=True))
    return frames


def labelled(atoms, stress=False, **info):
    """A copy with REF_ labels from its calculator."""
    out = atoms.copy()
    offset = OFFSET * len(atoms) if (atoms.numbers == 18).all() else 0.0
    out.info |= {"REF_energy": atoms.get_potential_energy() + offset, "charge": 0, "spin": 1} | info
    out.arrays["REF_forces"] = atoms.get_forces()
    if stress:
        out.info["REF_stress"] = atoms.get_stress(voigt=False).reshape(-1)
    return out


def save(path, frames):
    """Write extended XYZ."""
    write(path, frames, format="extxyz", write_results=False)
    return path
