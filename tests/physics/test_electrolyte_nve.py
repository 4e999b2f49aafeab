"""NVE with the shipped potential: the total energy stays, in both precisions; a hard cutoff does not pass.

The acceptance run is `pytest -m slow tests/physics/test_electrolyte_nve.py -s`; MDPLUG_NVE_PS shortens it.
"""

import os

import numpy as np
import openmm
import pytest
from openmm import unit

import mdplug
from mdplug.engines.openmm import create_system
from mdplug.engines.openmm.topology import reduced_box, topology_from_ase
from mdplug.potential import Potential
from mdplug.spec import Spec
from mdplug.units import KJ_MOL_PER_EV, NM
from mdplug.workflows import build

LENGTH_PS = float(os.environ.get("MDPLUG_NVE_PS", "20"))
LIMIT = {"float64": 0.001, "float32": 0.005}  # meV/atom/ps


class HardCutoff(Potential):
    """The same potential, blind beyond 3.6 A: energies jump when a pair crosses."""

    def __init__(self, inner: Potential):
        super().__init__(
            Spec(name="hard", architecture="tests:HardCutoff", config={}, cutoff=3.6, species=inner.spec.species)
        )
        self.inner = inner

    def local(self, *arguments):
        return self.inner.local(*arguments)


@pytest.fixture(scope="module")
def liquid(tmp_path_factory):
    """A small EC/DMC/LiPF6 box, equilibrated for 1 ps at 300 K."""
    folder = tmp_path_factory.mktemp("nve")
    config = build.Config(composition="EC:3 DMC:3 LiPF6:1", density_g_cm3=1.2, seed=3, output=folder / "box.xyz")
    atoms = build.run(config).atoms
    potential = mdplug.load("electrolyte", dtype="float32")
    context, integrator = started(atoms, potential, openmm.LangevinMiddleIntegrator(300, 20.0, 0.0005))
    context.setVelocitiesToTemperature(300, 1)
    integrator.step(round(1.0 / 0.0005))
    state = context.getState(positions=True, velocities=True)
    return atoms, state.getPositions(asNumpy=True)._value, state.getVelocities(asNumpy=True)._value


def started(atoms, potential, integrator):
    bonds = [tuple(b) for b in atoms.info["bonds"]]
    system = create_system(topology_from_ase(atoms, bonds), potential, remove_cm=False)
    if hasattr(integrator, "setRandomNumberSeed"):
        integrator.setRandomNumberSeed(5)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(atoms.positions @ reduced_box(atoms.cell.array)[1] / NM)
    return context, integrator


def drift(liquid, potential, length_ps, every=4):
    """Slope of the total energy (meV/atom/ps), its error from blocks, and the rms about the line (meV/atom)."""
    atoms, positions, velocities = liquid
    context, integrator = started(atoms, potential, openmm.VerletIntegrator(0.0005))
    context.setPositions(positions)
    context.setVelocities(velocities)
    n = round(length_ps / 0.0005 / every)
    energy = np.empty(n)
    for k in range(n):
        integrator.step(every)
        state = context.getState(energy=True)
        total = state.getPotentialEnergy() + state.getKineticEnergy()
        energy[k] = total.value_in_unit(unit.kilojoule_per_mole) / KJ_MOL_PER_EV / len(atoms) * 1e3
    time = np.arange(n) * every * 0.0005
    slope, start = np.polyfit(time, energy, 1)
    # Error of the slope from the scatter of block averages about the line.
    blocks = 20
    left = (energy - slope * time - start)[n % blocks :].reshape(blocks, -1).mean(axis=1)
    error = left.std(ddof=2) / np.sqrt(((np.linspace(0, length_ps, blocks) - length_ps / 2) ** 2).sum())
    return slope, error, float((energy - slope * time - start).std())


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_energy_is_conserved(liquid, dtype, record_property):
    slope, error, rms = drift(liquid, mdplug.load("electrolyte", dtype=dtype), LENGTH_PS)
    print(f"\nNVE {LENGTH_PS:g} ps, {dtype}: {slope:+.5f} +- {error:.5f} meV/atom/ps, rms {rms:.4f} meV/atom")
    record_property("drift", slope)
    assert abs(slope) <= LIMIT[dtype]
    assert error <= LIMIT[dtype]


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_hard_cutoff_fails(liquid):
    """Negative control."""
    slope, error, rms = drift(liquid, HardCutoff(mdplug.load("electrolyte", dtype="float64")), LENGTH_PS / 10)
    print(f"\nNVE {LENGTH_PS / 10:g} ps, hard cutoff: {slope:+.5f} +- {error:.5f} meV/atom/ps, rms {rms:.4f} meV/atom")
    assert abs(slope) > 10 * LIMIT["float32"]
