"""TorchForce = PythonForce, in the one environment where openmmtorch works; its refusal everywhere else."""

import copy
from importlib.metadata import version

import numpy as np
import openmm
import pytest
import torch
from in_openmm import argon, context_of, lennard_jones, read, silicon, water
from openmm import unit

import mdplug
from mdplug.deployed import evaluate
from mdplug.engines.openmm import create_system
from mdplug.engines.openmm.topology import topology_from_ase
from mdplug.engines.openmm.torchforce import torch_force, versions_that_work
from mdplug.errors import InputError, MdplugError
from mdplug.potentials.mace import MACE, describe
from mdplug.potentials.stillinger_weber import StillingerWeber
from mdplug.system import AtomicSystem
from mdplug.units import KJ_MOL_PER_EV, NM


@pytest.mark.parametrize(
    ("torch_version", "openmm_version", "reason"),
    [
        ("2.9.1+cu128", "8.5.1", None),
        ("2.9.0", "8.4.0", None),
        ("2.10.0", "8.5.1", "another ABI"),
        ("2.13.0+cpu", "8.5.1", "another ABI"),
        ("2.9.1", "8.6.1", "crashes on XML"),
        ("2.9.1", "8.3.1", "another ABI"),
    ],
)
def test_pairs_of_versions(torch_version, openmm_version, reason):
    said = versions_that_work(torch_version, openmm_version)
    assert said is None if reason is None else reason in said


def works_here():
    return versions_that_work(torch.__version__, version("openmm")) is None


@pytest.mark.skipif(works_here(), reason="here it works")
def test_refused_with_the_reason_where_it_would_crash():
    with pytest.raises(MdplugError, match=r"works with torch 2\.9\.x and OpenMM 8\.4-8\.5\.x only"):
        torch_force(topology_from_ase(silicon(0)), StillingerWeber.new())


def bare(atoms, mass=28.0):
    system = openmm.System()
    for _ in atoms:
        system.addParticle(mass)
    if atoms.pbc.all():
        system.setDefaultPeriodicBoxVectors(*topology_from_ase(atoms).getPeriodicBoxVectors())
    return system


def with_torch(atoms, potential, mass=28.0, only=None):
    system = bare(atoms, mass)
    system.addForce(torch_force(topology_from_ase(atoms), potential, atoms=only))
    return system


@pytest.mark.torchforce
@pytest.mark.parametrize("platform", ["Reference", "CPU"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_python_force(platform, seed):
    atoms = silicon(seed, edge=9.0 if seed else 5.5)
    potential = StillingerWeber.new()
    energy, forces = read(*context_of(with_torch(atoms, potential), atoms, platform))
    plain = create_system(topology_from_ase(atoms), potential, remove_cm=False)
    expected, theirs = read(*context_of(plain, atoms, platform))
    scale = np.abs(theirs).max()
    assert abs(energy - expected) < 1e-8 * max(1.0, abs(expected))
    assert np.abs(forces - theirs).max() < (1e-9 if platform == "Reference" else 1e-5) * scale


@pytest.mark.torchforce
def test_open_system_and_subset():
    atoms = silicon(0, pbc=False)
    chosen = [5, 2, 9, 14]
    energy, forces = read(*context_of(with_torch(atoms, StillingerWeber.new(), only=chosen), atoms))
    expected = evaluate(StillingerWeber.new(), AtomicSystem.from_ase(atoms[chosen]))
    assert abs(energy - float(expected.interaction_energy)) < 1e-9
    assert np.abs(forces[chosen] - expected.forces.numpy()).max() < 1e-9
    assert not np.delete(forces, chosen, axis=0).any()
    with pytest.raises(InputError, match="different indices"):
        torch_force(topology_from_ase(atoms), StillingerWeber.new(), atoms=[0, 0])


@pytest.mark.torchforce
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_mace_file_equals_python_force(dtype, tmp_path):
    atoms = water(8)
    atoms.positions += 3.0 * atoms.cell.array[1] - 2.0 * atoms.cell.array[0]
    spec = describe("random", {"channels": 8, "neighbours": [6.0, 6.0], "l_hidden": 1}, 4.0, (1, 8))
    made = MACE.from_spec(spec).initialise(torch.Generator().manual_seed(0))
    made.scale.fill_(8.0)
    model = mdplug.load(mdplug.save(made, tmp_path / "random.safetensors"), dtype=dtype)
    energy, forces = read(*context_of(with_torch(atoms, model), atoms))
    plain = create_system(topology_from_ase(atoms), model, remove_cm=False)
    expected, theirs = read(*context_of(plain, atoms))
    assert np.abs(theirs).max() > 1.0
    assert abs(energy - expected) < (1e-8 if dtype == "float64" else 1e-4)
    assert np.abs(forces - theirs).max() < (1e-8 if dtype == "float64" else 1e-5) * np.abs(theirs).max()


@pytest.mark.torchforce
def test_xml_deepcopy_and_custom_cv():
    atoms = silicon(1)
    system = with_torch(atoms, StillingerWeber.new())
    expected, forces = read(*context_of(system, atoms))
    for again in (copy.deepcopy(system), openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))):
        energy, same = read(*context_of(again, atoms))
        assert abs(energy - expected) < 1e-9
        assert np.abs(forces - same).max() < 1e-9
    half = openmm.CustomCVForce("scale*e")
    half.addGlobalParameter("scale", 0.5)
    half.addEnergyParameterDerivative("scale")
    half.addCollectiveVariable("e", torch_force(topology_from_ase(atoms), StillingerWeber.new()))
    system = bare(atoms)
    system.addForce(half)
    context, _ = context_of(system, atoms)
    assert abs(read(context)[0] - 0.5 * expected) < 1e-8
    slope = context.getState(getParameterDerivatives=True).getEnergyParameterDerivatives()["scale"]
    assert abs(slope / KJ_MOL_PER_EV - expected) < 1e-8


@pytest.mark.torchforce
def test_same_dynamics_with_a_barostat():
    atoms = argon()

    def run(system):
        barostat = openmm.MonteCarloBarostat(100.0, 120.0, 5)
        barostat.setRandomNumberSeed(7)
        system.addForce(barostat)
        integrator = openmm.LangevinMiddleIntegrator(120.0, 1.0, 0.002)
        integrator.setRandomNumberSeed(5)
        context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
        context.setPositions(atoms.positions / NM)
        context.setVelocitiesToTemperature(120.0, 3)
        integrator.step(100)
        state = context.getState(getPositions=True)
        return state.getPositions(asNumpy=True)._value, state.getPeriodicBoxVolume().value_in_unit(unit.nanometer**3)

    plain = create_system(topology_from_ase(atoms), lennard_jones(), remove_cm=False)
    mass = plain.getParticleMass(0).value_in_unit(unit.dalton)
    positions, volume = run(plain)
    same, its = run(with_torch(atoms, lennard_jones(), mass))
    assert np.abs(positions - same).max() < 1e-6
    assert abs(volume - its) < 1e-6
