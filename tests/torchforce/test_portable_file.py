"""One portable file through TorchForce and through PythonForce: MACE, LJ and Stillinger-Weber, small skewed cells."""

import warnings

import numpy as np
import pytest
import torch
from ase import Atoms
from contract import liquid
from in_openmm import context_of, read

import mdplug
from mdplug.engines.openmm import create_system
from mdplug.engines.openmm.topology import topology_from_ase
from mdplug.engines.openmm.torchforce import torch_force
from mdplug.export import export
from mdplug.potentials.mace import MACE, describe
from mdplug.potentials.pair import LennardJones
from mdplug.potentials.stillinger_weber import StillingerWeber

pytestmark = pytest.mark.torchforce


def mace():
    spec = describe(
        "random", {"channels": 8, "l_hidden": 1, "l_max": 3, "neighbours": [12.0, 12.0]}, 4.0, (1, 8), dtype="float64"
    )
    return MACE.from_spec(spec).initialise(torch.Generator().manual_seed(4))


CASES = {
    "lj": (lambda: LennardJones.new(0.0103, 3.0, 7.0), [18]),
    "stillinger-weber": (StillingerWeber.new, [14]),
    "mace": (mace, [1, 8]),
}


def tiny(species):
    """A skewed cell with heights below the cutoff: atoms see several images of each other and of themselves."""
    cell = np.array([[3.1, 0, 0], [0.9, 3.0, 0], [-0.7, 0.4, 3.3]])
    return Atoms([species[0], species[-1]], [[0.1, 0.2, 0.3], [101.6, -50.9, 1.9]], cell=cell, pbc=True)


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    make, species = CASES[request.param]
    return export(make(), tmp_path / "model.pt"), species


def both(path, atoms, platform="Reference"):
    """Energy (eV) and forces (eV/A) of the TorchForce and of the PythonForce of one file."""
    topology = topology_from_ase(atoms)
    plain = create_system(topology, path, remove_cm=False)
    scripted = create_system(topology, path, remove_cm=False)
    for k in reversed(range(scripted.getNumForces())):
        scripted.removeForce(k)
    scripted.addForce(torch_force(topology, path))
    return [read(*context_of(system, atoms, platform)) for system in (scripted, plain)]


@pytest.mark.parametrize("platform", ["Reference", "CPU"])
@pytest.mark.parametrize("shape", ["liquid", "tiny", "cluster"])
def test_energy_and_forces(case, shape, platform):
    path, species = case
    atoms = {
        "liquid": lambda: liquid(species, min_distance=1.8),
        "tiny": lambda: tiny(species),
        "cluster": lambda: liquid(species, n=7, edge=6.0, seed=1, pbc=False, min_distance=1.8),
    }[shape]()
    (energy, forces), (expected, theirs) = both(path, atoms, platform)
    scale = max(1.0, np.abs(theirs).max())
    assert abs(energy - expected) < 1e-8 * scale
    assert np.abs(forces - theirs).max() < (1e-8 if platform == "Reference" else 2e-6) * scale


def test_file_loads_and_evaluates_under_this_torch_without_warnings(case):
    path, species = case
    atoms = liquid(species, min_distance=1.8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        atoms.calc = mdplug.Calculator(mdplug.load(path))
        assert np.isfinite(atoms.get_forces()).all()
