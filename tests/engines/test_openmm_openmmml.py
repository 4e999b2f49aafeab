"""openmm-ml's entry point: createSystem, createMixedSystem, interpolation."""

import subprocess
import sys

import numpy as np
import openmm
import pytest
from ase import Atoms
from ase.build import molecule
from in_openmm import context_of, read, water
from openmm import app, unit

import mdplug
from mdplug.deployed import evaluate
from mdplug.engines.openmm import plug_of, plugs_of
from mdplug.engines.openmm.topology import guess_bonds, topology_from_ase
from mdplug.errors import InputError
from mdplug.potentials.pair import Morse
from mdplug.system import AtomicSystem
from mdplug.units import KJ_MOL_PER_EV, NM

openmmml = pytest.importorskip("openmmml")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A soft Morse potential, any elements, in a file."""
    morse = Morse.new(depth=0.02, a=1.5, r0=1.2, cutoff=5.0)
    return mdplug.save(morse, tmp_path_factory.mktemp("model") / "morse.safetensors")


@pytest.fixture(scope="module")
def mm():
    """27 water molecules in a box, their topology and a TIP3P-FB system with PME."""
    atoms = water(27, edge=3.4)
    topology = topology_from_ase(atoms, guess_bonds(atoms), names=["HOH"] * len(atoms))
    field = app.ForceField("amber14/tip3pfb.xml")
    system = field.createSystem(
        topology, nonbondedMethod=app.PME, nonbondedCutoff=0.5 * unit.nanometer, rigidWater=False
    )
    return atoms, topology, system


def test_importing_openmmml_imports_nothing_heavy_of_ours():
    script = (
        "import sys; import mdplug.engines.openmm.openmmml as entry; entry.MdplugFactory();"
        "assert 'torch' not in sys.modules and 'openmm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_whole_system(model, mm):
    atoms, topology, _ = mm
    system = openmmml.MLPotential("mdplug", modelPath=str(model)).createSystem(topology, charge=0)
    energy, forces = read(*context_of(system, atoms))
    expected = evaluate(mdplug.load(model), AtomicSystem.from_ase(atoms))
    assert abs(energy - float(expected.interaction_energy)) < 1e-9
    assert np.abs(forces - expected.forces.numpy()).max() < 1e-8


def test_charge_and_precision_arrive(model, mm):
    _, topology, _ = mm
    potential = openmmml.MLPotential("mdplug", modelPath=str(model), precision="single")
    plug = plug_of(potential.createSystem(topology, charge=-1, multiplicity=2))
    assert plug.options["charge"] == -1.0
    assert plug.options["spin"] == 2.0
    assert next(plug.potential.parameters()).dtype.itemsize == 4


@pytest.mark.parametrize("as_generator", [False, True])
def test_mixed_system(model, mm, as_generator):
    atoms, topology, system = mm
    chosen = [3, 4, 5, 30, 31, 32]
    potential = openmmml.MLPotential("mdplug", modelPath=str(model))
    mixed = potential.createMixedSystem(topology, system, (a for a in chosen) if as_generator else chosen)
    plug = plug_of(mixed)
    assert plug.options["periodic"]
    context, _ = context_of(mixed, atoms)
    _, forces = read(context)
    energy, ours = plug.last["energy"], plug.last["forces"]
    expected = evaluate(mdplug.load(model), AtomicSystem.from_ase(atoms[chosen]))
    assert abs(energy - float(expected.interaction_energy)) < 1e-9
    assert np.abs(ours - expected.forces.numpy()).max() < 1e-8
    # Moving an ML atom changes what OpenMM reports by minus the force it reports.
    start = context.getState(getPositions=True).getPositions(asNumpy=True)._value
    values = []
    for sign in (1, -1):
        moved = start.copy()
        moved[4, 1] += sign * 1e-5
        context.setPositions(moved)
        values.append(read(context)[0])
    assert abs(-(values[0] - values[1]) / 2e-4 - forces[4, 1]) < 1e-4


def test_interpolation_is_linear_and_ends_in_mm_and_mixed(model, mm):
    atoms, topology, system = mm
    chosen = [3, 4, 5]
    potential = openmmml.MLPotential("mdplug", modelPath=str(model))
    context, _ = context_of(potential.createMixedSystem(topology, system, chosen, interpolate=True), atoms)
    assert len(plugs_of(context)) == 1
    energies = []
    for scale in (0.0, 0.5, 1.0):
        context.setParameter("lambda_interpolate", scale)
        energies.append(read(context)[0])
    classical, _ = read(*context_of(system, atoms))
    mixed, _ = read(*context_of(potential.createMixedSystem(topology, system, chosen), atoms))
    # (PME itself differs by its own error when exceptions are written as bonds.)
    assert abs(energies[0] - classical) < 0.05 / KJ_MOL_PER_EV
    assert abs(energies[2] - mixed) < 0.05 / KJ_MOL_PER_EV
    assert abs(energies[1] - 0.5 * (energies[0] + energies[2])) < 1e-6
    assert abs(energies[2] - energies[0]) > 0.01


def test_mixed_system_survives_xml(model, mm):
    atoms, topology, system = mm
    mixed = openmmml.MLPotential("mdplug", modelPath=str(model)).createMixedSystem(topology, system, [3, 4, 5])
    again = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(mixed))
    assert read(*context_of(again, atoms))[0] == read(*context_of(mixed, atoms))[0]


def test_a_cut_bond_is_capped_by_a_hydrogen(model):
    atoms = molecule("C2H6")
    bonds = guess_bonds(atoms)
    topology = topology_from_ase(atoms, bonds)
    system = openmm.System()
    stretch = openmm.HarmonicBondForce()
    for mass in atoms.get_masses():
        system.addParticle(mass)
    for i, j in bonds:
        stretch.addBond(i, j, atoms.get_distance(i, j) / NM, 1000.0)
    system.addForce(stretch)
    methyl = [0, *(j for i, j in bonds if i == 0 and atoms.numbers[j] == 1)]
    potential = openmmml.MLPotential("mdplug", modelPath=str(model))
    info = potential.createMixedSystem(topology, system, methyl, returnInfo=True)
    plug = plug_of(info["system"])
    assert sorted(plug.numbers) == [1, 1, 1, 1, 6]
    context = openmm.Context(
        info["system"], openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference")
    )
    context.setPositions(np.vstack([atoms.positions, np.zeros((1, 3))]) / NM)
    context.computeVirtualSites()
    capped = context.getState(getPositions=True).getPositions(asNumpy=True)._value * NM
    read(context)
    fragment = Atoms([*atoms.numbers[methyl].tolist(), 1], capped[[*methyl, 8]])
    expected = evaluate(mdplug.load(model), AtomicSystem.from_ase(fragment))
    assert abs(plug.last["energy"] - float(expected.interaction_energy)) < 1e-9
    assert 1.0 < np.linalg.norm(capped[8] - capped[0]) < 1.2


def test_bad_arguments(model):
    with pytest.raises(InputError, match="needs modelPath"):
        openmmml.MLPotential("mdplug")
    with pytest.raises(InputError, match="no argument 'model'"):
        openmmml.MLPotential("mdplug", modelPath=str(model), model="x")
    with pytest.raises(InputError, match="'single' or 'double'"):
        openmmml.MLPotential("mdplug", modelPath=str(model), precision="half")
    with pytest.raises(InputError, match="no model file"):
        openmmml.MLPotential("mdplug", modelPath="nothing.safetensors")
