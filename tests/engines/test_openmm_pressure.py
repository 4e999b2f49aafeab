"""The pressure tensor against OpenMM's own finite differences, by atoms and by molecules."""

import numpy as np
import openmm
import pytest
from ase import Atoms
from in_openmm import water
from openmm import unit

from mdplug.engines.openmm import create_system, plug_of, pressure_tensor_bar
from mdplug.engines.openmm.topology import guess_bonds, reduced_box, topology_from_ase
from mdplug.errors import InputError
from mdplug.potentials.pair import LennardJones
from mdplug.potentials.stillinger_weber import StillingerWeber
from mdplug.units import NM


def moving(atoms, potential, barostat, temperature_K=300.0, **options):
    """A context with velocities whose barostat measures but never moves."""
    system = create_system(topology_from_ase(atoms, guess_bonds(atoms)), potential, remove_cm=False, **options)
    barostat.setFrequency(0)
    system.addForce(barostat)
    integrator = openmm.VerletIntegrator(1e-9)  # at once: velocities are those of the positions
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(atoms.positions @ reduced_box(atoms.cell.array)[1] / NM)
    context.setVelocitiesToTemperature(temperature_K, 4)
    return context


def soft():
    return LennardJones.new(epsilon=0.001, sigma=1.0, cutoff=4.0)


def test_trace_of_atoms():
    rng = np.random.default_rng(2)
    atoms = Atoms("Ar27", np.array(np.meshgrid(*[range(3)] * 3)).reshape(3, -1).T * 4.0, cell=[12.0] * 3, pbc=True)
    atoms.positions += rng.normal(scale=0.2, size=(27, 3))
    barostat = openmm.MonteCarloBarostat(1.0, 300.0)
    context = moving(atoms, LennardJones.new(epsilon=0.0103, sigma=3.4, cutoff=8.0), barostat, molecules=None)
    expected = barostat.computeCurrentPressure(context).value_in_unit(unit.bar)
    tensor = pressure_tensor_bar(context)
    assert abs(np.trace(tensor) / 3 - expected) < 1e-3 * abs(expected)
    assert abs(expected) > 50


def test_trace_of_molecules_and_that_it_differs_from_the_atomic_one():
    barostat = openmm.MonteCarloBarostat(1.0, 300.0)
    context = moving(water(8), soft(), barostat)
    assert len(context.getMolecules()) == 8
    expected = barostat.computeCurrentPressure(context).value_in_unit(unit.bar)
    molecular = np.trace(pressure_tensor_bar(context, molecular=True)) / 3
    assert abs(molecular - expected) < 1e-3 * abs(expected)
    assert abs(np.trace(pressure_tensor_bar(context)) / 3 - expected) > 0.1 * abs(expected)


def test_diagonal_against_the_anisotropic_barostat():
    rng = np.random.default_rng(5)
    grid = np.array(np.meshgrid(*[range(3)] * 3)).reshape(3, -1).T * [2.5, 2.7, 3.0]
    atoms = Atoms("Si27", grid + rng.normal(scale=0.1, size=(27, 3)), cell=[7.5, 8.1, 9.0], pbc=True)
    barostat = openmm.MonteCarloAnisotropicBarostat((1, 1, 1), 300.0)
    context = moving(atoms, StillingerWeber.new(), barostat, molecules=None)
    expected = np.array(barostat.computeCurrentPressure(context).value_in_unit(unit.bar))
    assert np.abs(np.diag(pressure_tensor_bar(context)) - expected).max() < 1e-3 * np.abs(expected).max()
    assert np.ptp(expected) > 100


def test_logging_costs_no_evaluation_and_a_tensor_is_symmetric():
    context = moving(water(8), soft(), openmm.MonteCarloBarostat(1.0, 300.0))
    context.getIntegrator().step(3)
    before = plug_of(context).evaluations
    tensor = pressure_tensor_bar(context)
    # Verlet ends a step with new positions whose forces are not known yet: that evaluation is the next step's.
    context.getIntegrator().step(1)
    assert plug_of(context).evaluations == before + 1
    assert np.array_equal(tensor, tensor.T)


def test_what_it_cannot_know_is_refused():
    atoms = water(8)
    context = moving(atoms, soft(), openmm.MonteCarloBarostat(1.0, 300.0))
    system = context.getSystem()
    wall = openmm.CustomExternalForce("x")
    wall.setName("wall")
    system.addForce(wall)
    with pytest.raises(InputError, match="wall has no virial"):
        pressure_tensor_bar(context)
    atoms.pbc = False
    system = create_system(topology_from_ase(atoms), soft())
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(atoms.positions / NM)
    with pytest.raises(InputError, match="periodic"):
        pressure_tensor_bar(context)
