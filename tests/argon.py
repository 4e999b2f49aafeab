"""Argon by Lennard-Jones: a cheap model file and structure files for the tests of tasks."""

from pathlib import Path

from ase import Atoms
from ase.build import bulk
from ase.io import write

import mdplug
from mdplug.potentials.pair import LennardJones

EPSILON, SIGMA, CUTOFF = 0.0104, 3.4, 7.0


def model_file(folder: Path, name: str = "lj.safetensors") -> Path:
    """A Lennard-Jones model file."""
    return mdplug.save(LennardJones.new(EPSILON, SIGMA, CUTOFF), folder / name)


def crystal(repeat: int = 2, rattle_A: float = 0.1, seed: int = 1) -> Atoms:
    """Rattled fcc argon; with `repeat` 2 the box is smaller than twice the cutoff."""
    atoms = bulk("Ar", "fcc", a=5.4, cubic=True) * (repeat, repeat, repeat)
    atoms.rattle(rattle_A, seed=seed)
    return atoms


def crystal_file(folder: Path, **options: float) -> Path:
    """The same as extended XYZ."""
    path = folder / "argon.xyz"
    write(path, crystal(**options), format="extxyz")  # type: ignore[arg-type]
    return path
