"""OpenMM's GPU code path, run on a CPU by pocl's OpenCL (Debian: pocl-opencl-icd)."""

import numpy as np
import openmm
import pytest
from in_openmm import context_of, in_openmm, read, silicon, water

from mdplug.deployed import evaluate
from mdplug.engines.openmm import create_system, errors_of, force, plug_of, pressure_tensor_bar
from mdplug.engines.openmm.topology import guess_bonds, topology_from_ase
from mdplug.errors import SimulationError
from mdplug.potentials.pair import LennardJones
from mdplug.potentials.stillinger_weber import StillingerWeber
from mdplug.system import AtomicSystem
from mdplug.units import NM

PLATFORMS = [openmm.Platform.getPlatform(k).getName() for k in range(openmm.Platform.getNumPlatforms())]


def has_device():
    """Whether an OpenCL device is really there: the platform may be listed without one."""
    if "OpenCL" not in PLATFORMS:
        return False
    system = openmm.System()
    system.addParticle(1.0)
    try:
        openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("OpenCL"))
    except openmm.OpenMMException:
        return False
    return True


pytestmark = pytest.mark.skipif(not has_device(), reason="no OpenCL device; install pocl-opencl-icd")


@pytest.mark.parametrize(("precision", "tolerance"), [("double", 1e-9), ("mixed", 1e-5), ("single", 1e-3)])
def test_same_energy_and_forces_as_evaluate(precision, tolerance):
    atoms = silicon(1)
    expected = evaluate(StillingerWeber.new(), AtomicSystem.from_ase(atoms))
    context, rotation = in_openmm(atoms, StillingerWeber.new(), "OpenCL", {"Precision": precision})
    energy, forces = read(context, rotation)
    scale = float(expected.forces.abs().max())
    assert abs(energy - float(expected.interaction_energy)) < tolerance * 10
    assert np.abs(forces - expected.forces.numpy()).max() < tolerance * scale


def test_subset_in_a_periodic_system_that_wraps_molecules():
    """Another periodic force lets the platform wrap molecules: the model must not notice."""
    atoms = water(8)
    atoms.positions += np.repeat(np.random.default_rng(0).integers(-2, 3, size=(8, 3)), 3, axis=0) @ atoms.cell.array
    bonds = guess_bonds(atoms)
    topology = topology_from_ase(atoms, bonds)
    chosen = list(range(3, 12))
    potential = LennardJones.new(epsilon=0.001, sigma=1.0, cutoff=3.0)
    system = openmm.System()
    nonbonded = openmm.NonbondedForce()
    nonbonded.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    nonbonded.setCutoffDistance(0.3)
    for mass in atoms.get_masses():
        system.addParticle(mass)
        nonbonded.addParticle(0.0, 0.1, 0.0)
    system.setDefaultPeriodicBoxVectors(*topology.getPeriodicBoxVectors())
    system.addForce(nonbonded)
    system.addForce(force(topology, potential, atoms=chosen))
    context, _ = context_of(system, atoms, "OpenCL", {"Precision": "mixed"})
    context.getIntegrator().step(20)
    energy, forces = read(context)
    state = context.getState(getPositions=True)
    atoms.positions = state.getPositions(asNumpy=True)._value * NM
    expected = evaluate(potential, AtomicSystem.from_ase(atoms[chosen]))
    scale = float(expected.forces.abs().max())
    assert abs(energy - float(expected.interaction_energy)) < 1e-4
    assert np.abs(forces[chosen] - expected.forces.numpy()).max() < 1e-3 * scale


def test_barostat_memo_and_pressure():
    atoms = water(27, edge=3.4)
    topology = topology_from_ase(atoms, guess_bonds(atoms))
    system = create_system(topology, LennardJones.new(epsilon=0.001, sigma=1.0, cutoff=4.0))
    barostat = openmm.MonteCarloBarostat(100.0, 300.0, 1)
    barostat.setRandomNumberSeed(3)
    system.addForce(barostat)
    integrator = openmm.LangevinMiddleIntegrator(300.0, 1.0, 0.0005)
    integrator.setRandomNumberSeed(4)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("OpenCL"), {"Precision": "mixed"})
    context.setPositions(atoms.positions / NM)
    context.setVelocitiesToTemperature(300.0, 5)
    assert len(context.getMolecules()) == 27
    plug = plug_of(context)
    integrator.step(30)
    assert plug.evaluations <= 62
    measured = np.trace(pressure_tensor_bar(context, molecular=True)) / 3
    assert abs(measured - barostat.computeCurrentPressure(context)._value) < 0.02 * abs(measured) + 50


def test_forces_that_are_not_finite_do_not_pass_silently():
    """The platform itself would turn them into -2147483648 kJ/mol/nm."""
    potential = StillingerWeber.new()
    context, _ = in_openmm(silicon(0), potential, "OpenCL", {"Precision": "single"})
    plug_of(context).potential.parameters_.data[0] = float("nan")
    with pytest.raises(SimulationError, match="energy is nan"), errors_of(context):
        context.getIntegrator().step(1)
