"""Structures for the OpenMM tests, and the way into a Context and back."""

import numpy as np
import openmm
from ase import Atoms
from ase.build import molecule
from openmm import unit

from mdplug.engines.openmm import create_system
from mdplug.engines.openmm.topology import reduced_box, topology_from_ase
from mdplug.potentials.pair import LennardJones
from mdplug.units import KJ_MOL_PER_EV, NM


def silicon(seed=0, n=24, edge=9.0, pbc=True):
    """Random silicon in a random triclinic cell, each atom moved by random lattice vectors."""
    rng = np.random.default_rng(seed)
    cell = edge * (np.eye(3) + 0.25 * rng.normal(size=(3, 3)))
    fractional = (np.array(np.meshgrid(*[range(3)] * 3)).reshape(3, -1).T / 3.0)[:n]
    positions = fractional @ cell + rng.normal(scale=0.15, size=(n, 3))
    if pbc:
        positions += rng.integers(-3, 4, size=(n, 3)) @ cell
    return Atoms([14] * n, positions, cell=cell if pbc else None, pbc=pbc)


def water(n=8, edge=3.6, seed=0):
    """A cubic lattice of n randomly turned water molecules."""
    rng = np.random.default_rng(seed)
    side = round(n ** (1 / 3))
    boxed = Atoms(cell=[side * edge] * 3, pbc=True)
    for k in range(n):
        one = molecule("H2O")
        one.rotate(float(rng.random() * 360), rng.normal(size=3))
        one.translate(np.array([k % side, k // side % side, k // side**2]) * edge - one.get_center_of_mass())
        boxed += one
    return boxed


def argon(n=3, edge=3.9, seed=0):
    rng = np.random.default_rng(seed)
    grid = np.array(np.meshgrid(*[range(n)] * 3)).reshape(3, -1).T * edge
    return Atoms(["Ar"] * n**3, grid + rng.normal(scale=0.05, size=grid.shape), cell=[n * edge] * 3, pbc=True)


def lennard_jones():
    return LennardJones.new(epsilon=0.0103, sigma=3.4, cutoff=8.0, switch=7.0)


def in_openmm(atoms, potential, platform="Reference", properties=None, dt_ps=0.0005, **options):
    """A context holding these atoms, and the rotation into it."""
    system = create_system(topology_from_ase(atoms), potential, remove_cm=False, **options)
    return context_of(system, atoms, platform, properties, dt_ps)


def context_of(system, atoms, platform="Reference", properties=None, dt_ps=0.0005):
    context = openmm.Context(
        system, openmm.VerletIntegrator(dt_ps), openmm.Platform.getPlatformByName(platform), properties or {}
    )
    rotation = reduced_box(atoms.cell.array)[1] if atoms.pbc.all() else np.eye(3)
    context.setPositions(atoms.positions @ rotation / NM)
    return context, rotation


def read(context, rotation=None):
    """Energy in eV and forces in eV/A, turned back."""
    state = context.getState(getEnergy=True, getForces=True)
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole) / KJ_MOL_PER_EV
    forces = state.getForces(asNumpy=True)._value / (KJ_MOL_PER_EV * NM)
    return energy, forces if rotation is None else forces @ rotation.T
