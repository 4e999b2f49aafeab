"""A MACE model in OpenMM: parity with ASE in double and single precision, files, tables, charge and spin, ML/MM."""

import numpy as np
import openmm
import pytest
import torch
from in_openmm import context_of, in_openmm, read, water

import mdplug
from mdplug import kernels
from mdplug.engines.ase import Calculator
from mdplug.engines.openmm import create_system, plug_of
from mdplug.engines.openmm.topology import topology_from_ase
from mdplug.export import export
from mdplug.potentials.mace import MACE, describe

CHARGE = {"name": "total_charge", "kind": "categorical", "classes": 9, "offset": 4, "width": 8}
SPIN = {"name": "total_spin", "kind": "continuous", "width": 5}
NATIVE = pytest.mark.skipif(not kernels.available(), reason="the native library is not there")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A file with random weights; forces of some eV/A."""
    config = {
        "channels": 8, "neighbours": [6.0, 6.0], "l_hidden": 1, "kinds": ["A", "R"], "repulsion": True,
        "embedding": [CHARGE, SPIN], "embedding_readout": True,
    }  # fmt: skip
    spec = describe("random", config, 4.0, (1, 8))
    made = MACE.from_spec(spec).initialise(torch.Generator().manual_seed(0))
    made.scale.fill_(8.0)
    return mdplug.save(made, tmp_path_factory.mktemp("model") / "random.safetensors")


def tilted_water(seed=0):
    """8 molecules in a left-handed triclinic cell below twice the cutoff, each moved by lattice vectors."""
    atoms = water(8, edge=3.6, seed=seed)
    shear = np.array([[1.0, 0.0, 0.0], [0.1, 1.0, 0.0], [-0.1, 0.15, 1.0]])
    atoms.set_cell(atoms.cell.array @ shear, scale_atoms=False)
    atoms.rotate(40, (1, 2, 3), rotate_cell=True)
    shifts = np.random.default_rng(seed).integers(-2, 3, size=(8, 3))
    atoms.positions += np.repeat(shifts, 3, axis=0) @ atoms.cell.array
    return atoms


@pytest.mark.parametrize(
    ("dtype", "platform", "tolerance"),
    [
        ("float64", "Reference", 1e-8),
        ("float64", "CPU", 1e-4),
        ("float32", "Reference", 1e-4),
        ("float32", "CPU", 1e-4),
    ],
)
def test_parity_with_ase(model, dtype, platform, tolerance):
    """The reference is always ASE in float64 with exact radials: single precision and tables are within 1e-4 of it."""
    atoms = tilted_water()
    atoms.calc = Calculator(mdplug.load(model))
    system = create_system(topology_from_ase(atoms), mdplug.load(model, dtype=dtype), remove_cm=False)
    energy, forces = read(*context_of(system, atoms, platform))
    assert np.abs(atoms.get_forces()).max() > 0.5
    assert np.abs(forces - atoms.get_forces()).max() < tolerance
    assert abs(energy - atoms.get_potential_energy()) < 10 * tolerance


@pytest.mark.parametrize("target", ["portable", pytest.param("native", marks=NATIVE)])
def test_exported_file(target, model, tmp_path):
    atoms = tilted_water(1)
    path = export(model, tmp_path / "random.pt", target)
    expected, theirs = read(*in_openmm(atoms, model))
    system = create_system(topology_from_ase(atoms), path, remove_cm=False)
    again = openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))
    energy, forces = read(*context_of(again, atoms))
    assert abs(energy - expected) < 1e-9
    assert np.abs(forces - theirs).max() < 1e-9


def test_charge_and_spin_arrive(model):
    atoms = tilted_water(2)
    energies = []
    for charge, spin in ((0, 1), (1, 1), (1, 2)):
        energy, _ = read(*in_openmm(atoms, model, charge=charge, spin=spin))
        atoms.info.update(charge=charge, spin=spin)
        atoms.calc = Calculator(mdplug.load(model))
        assert abs(energy - atoms.get_potential_energy()) < 1e-8
        energies.append(energy)
    assert len({round(e, 6) for e in energies}) == 3


def test_tables_in_memory_are_written_whole(model):
    """A model with tables, changed after loading, cannot be said by its file."""
    atoms = tilted_water()
    changed = mdplug.load(model, dtype="float32")
    changed.definition.scale.fill_(2.0)
    system = create_system(topology_from_ase(atoms), changed, remove_cm=False)
    expected, _ = read(*context_of(system, atoms))
    xml = openmm.XmlSerializer.serialize(system)
    assert len(xml) > 50_000
    del system
    again = openmm.XmlSerializer.deserialize(xml)
    assert plug_of(again).potential is not changed
    assert abs(read(*context_of(again, atoms))[0] - expected) < 1e-5


def test_mixed_system(model):
    openmmml = pytest.importorskip("openmmml")
    from openmm import app

    from mdplug.engines.openmm.topology import guess_bonds

    atoms = water(27, edge=3.4)
    topology = topology_from_ase(atoms, guess_bonds(atoms), names=["HOH"] * len(atoms))
    classical = app.ForceField("amber14/tip3pfb.xml").createSystem(
        topology, nonbondedMethod=app.PME, nonbondedCutoff=0.5, rigidWater=False
    )
    chosen = [3, 4, 5, 30, 31, 32]
    mixed = openmmml.MLPotential("mdplug", modelPath=str(model)).createMixedSystem(topology, classical, chosen)
    context, _ = context_of(mixed, atoms)
    read(context)
    part = atoms[chosen]
    part.calc = Calculator(mdplug.load(model))
    assert np.abs(plug_of(mixed).last["forces"] - part.get_forces()).max() < 1e-8
