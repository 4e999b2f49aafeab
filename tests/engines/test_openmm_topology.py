"""Boxes turned into OpenMM's form and back, bonds, molecules, masses, and refused ensembles."""

import numpy as np
import openmm
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from in_openmm import water
from openmm import unit

from mdplug.engines.openmm import check_ensemble, create_system
from mdplug.engines.openmm.topology import guess_bonds, molecules_of, reduced_box, topology_from_ase
from mdplug.errors import InputError
from mdplug.potentials.pair import LennardJones
from mdplug.units import NM


def potential():
    return LennardJones.new(epsilon=0.001, sigma=1.0, cutoff=4.0)


@pytest.mark.parametrize("seed", range(20))
def test_reduced_box_is_the_same_lattice_turned(seed):
    rng = np.random.default_rng(seed)
    cell = rng.normal(size=(3, 3)) * 8.0
    box, rotation = reduced_box(cell)
    assert np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
    assert np.linalg.det(rotation) > 0.99
    turns = np.linalg.solve(box.T, (cell @ rotation).T).T  # cell vectors in units of box vectors
    assert np.allclose(turns, np.round(turns), atol=1e-9)
    assert round(abs(np.linalg.det(turns))) == 1
    assert box[0, 1] == box[0, 2] == box[1, 2] == 0.0
    assert (np.diag(box) > 0).all()
    # OpenMM itself agrees that it is reduced.
    system = openmm.System()
    system.addParticle(1.0)
    system.setDefaultPeriodicBoxVectors(*(box / NM))
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    back = np.array(context.getState().getPeriodicBoxVectors().value_in_unit(unit.nanometer)) * NM
    assert np.allclose(back, box, atol=1e-12)


def test_reduced_box_leaves_a_reduced_one_alone():
    cell = np.array([[10.0, 0, 0], [2.0, 9.0, 0], [-1.0, 3.0, 11.0]])
    box, rotation = reduced_box(cell)
    assert np.array_equal(box, cell)
    assert np.array_equal(rotation, np.eye(3))


def test_bad_boxes():
    with pytest.raises(InputError, match="flat"):
        reduced_box([[1, 0, 0], [2, 0, 0], [0, 0, 1]])
    with pytest.raises(InputError, match="finite"):
        reduced_box([[1, 0, 0], [0, np.nan, 0], [0, 0, 1]])
    with pytest.raises(InputError, match="fully periodic"):
        topology_from_ase(Atoms("Ar", cell=[5.0] * 3, pbc=[True, True, False]))


def test_guessed_bonds_make_the_right_molecules():
    atoms = water(27)
    atoms += Atoms("Li", [[0.9, 0.9, 0.9]])  # near oxygens, never bonded
    atoms.wrap()  # molecules broken over the faces
    bonds = guess_bonds(atoms)
    assert len(bonds) == 2 * 27
    sizes = sorted(len(m) for m in molecules_of(len(atoms), bonds))
    assert sizes == [1] + [3] * 27
    assert guess_bonds(molecule("H2")) == [(0, 1)]
    assert len(guess_bonds(molecule("C2H6"))) == 7
    hexafluoride = Atoms("PF6", [[0, 0, 0], *(1.6 * np.vstack([np.eye(3), -np.eye(3)]))])
    assert len(guess_bonds(hexafluoride)) == 6


def test_topology_keeps_order_bonds_and_residues():
    atoms = water(8)
    topology = topology_from_ase(atoms, guess_bonds(atoms))
    assert [a.element.atomic_number for a in topology.atoms()] == list(atoms.numbers)
    assert topology.getNumResidues() == 8
    assert topology.getNumBonds() == 16
    assert {r.name for r in topology.residues()} == {"H2O"}
    assert np.allclose(topology.getUnitCellDimensions()._value, 0.72)


def test_molecules_by_bonds_without_strength():
    atoms = water(8)
    topology = topology_from_ase(atoms, guess_bonds(atoms))

    def molecules(**options):
        system = create_system(topology, potential(), **options)
        context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
        context.setPositions(atoms.positions / NM)
        energy = context.getState(getEnergy=True).getPotentialEnergy()._value
        return len(context.getMolecules()), energy, [f.getName() for f in system.getForces()]

    whole, energy, names = molecules()
    assert whole == 8
    assert "mdplug-molecules" in names
    assert molecules(molecules=None)[:2] == (24, energy)
    assert molecules(molecules=[(0, 1)])[:2] == (23, energy)
    for bad in ("guess", [(0, 0)], [(0, 99)]):
        with pytest.raises(InputError):
            create_system(topology, potential(), molecules=bad)


def test_hydrogen_mass_comes_from_its_neighbour():
    atoms = water(8)
    topology = topology_from_ase(atoms, guess_bonds(atoms))
    light, heavy = (create_system(topology, potential(), hydrogen_mass_amu=m) for m in (None, 3.0))
    masses = [[s.getParticleMass(k)._value for k in range(24)] for s in (light, heavy)]
    assert abs(sum(masses[0]) - sum(masses[1])) < 1e-9
    assert masses[1][1] == masses[1][2] == 3.0
    assert abs(masses[1][0] - (15.99943 - 2 * (3.0 - 1.007947))) < 1e-4
    with pytest.raises(InputError, match="take a smaller one"):
        create_system(topology, potential(), hydrogen_mass_amu=9.5)


def with_barostat(barostat, atoms=None):
    atoms = water(8) if atoms is None else atoms
    system = create_system(topology_from_ase(atoms), potential())
    system.addForce(barostat)
    return system


def test_ensembles_that_would_be_wrong_are_refused():
    from dataclasses import replace

    langevin, verlet = openmm.LangevinMiddleIntegrator(300, 1, 0.001), openmm.VerletIntegrator(0.001)
    isotropic = openmm.MonteCarloBarostat(1.0, 300.0)
    check_ensemble(create_system(topology_from_ase(water(8)), potential()), verlet)
    check_ensemble(with_barostat(isotropic), langevin)
    with pytest.raises(InputError, match="needs a thermostat"):
        check_ensemble(with_barostat(openmm.MonteCarloBarostat(1.0, 300.0)), verlet)

    loose = potential()
    loose.spec = replace(loose.spec, conservative=False)
    system = create_system(topology_from_ase(water(8)), loose)
    check_ensemble(system, langevin)
    with pytest.raises(InputError, match="which NVE does not keep"):
        check_ensemble(system, verlet)
    check_ensemble(system, verlet, allow_non_conservative=True)
    system.addForce(openmm.MonteCarloBarostat(1.0, 300.0))
    with pytest.raises(InputError, match="another pressure"):
        check_ensemble(system, langevin)

    tilted = bulk("Ar", "fcc", a=5.3) * (3, 3, 3)
    with pytest.raises(InputError, match="triclinic"):
        check_ensemble(with_barostat(openmm.MonteCarloAnisotropicBarostat((1, 1, 1), 300.0), tilted), langevin)
    membrane = openmm.MonteCarloMembraneBarostat(
        1.0, 0.0, 300.0, openmm.MonteCarloMembraneBarostat.XYIsotropic, openmm.MonteCarloMembraneBarostat.ZFree
    )
    with pytest.raises(InputError, match="normal along z"):
        check_ensemble(with_barostat(membrane, tilted), langevin)
    check_ensemble(with_barostat(openmm.MonteCarloFlexibleBarostat(1.0, 300.0), tilted), langevin)
    system = create_system(topology_from_ase(molecule("H2O")), potential())
    system.addForce(openmm.MonteCarloBarostat(1.0, 300.0))
    with pytest.raises(InputError, match="periodic system"):
        check_ensemble(system, langevin)
