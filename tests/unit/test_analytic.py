"""Analytic potentials against closed forms, ASE, OpenMM and published crystal properties."""

import numpy as np
import openmm
import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.lj import LennardJones as AseLennardJones
from contract import liquid

from mdplug import units
from mdplug.deployed import evaluate
from mdplug.errors import InputError
from mdplug.potentials.pair import ZBL, LennardJones, Morse
from mdplug.potentials.stillinger_weber import StillingerWeber
from mdplug.system import AtomicSystem


def dimer(potential, r, z=18):
    return evaluate(potential, AtomicSystem.from_arrays([z, z], [[0, 0, 0], [r, 0, 0]]))


def test_dimers():
    lj, morse = LennardJones.new(0.0104, 3.4, 9.0), Morse.new(0.34, 1.36, 2.87, 9.0)
    minimum = 2 ** (1 / 6) * 3.4
    assert float(dimer(lj, minimum).energy) == pytest.approx(-0.0104, rel=1e-12)
    assert float(dimer(lj, minimum).forces.abs().max()) < 1e-12
    assert float(dimer(morse, 2.87).energy) == pytest.approx(-0.34, rel=1e-12)
    assert float(dimer(morse, 1.5).energy) == pytest.approx(0.34 * ((1 - np.exp(-1.36 * (1.5 - 2.87))) ** 2 - 1))


def test_zbl_is_coulomb_at_contact_and_screened_outside():
    zbl = ZBL.new(3.0, 2.0)
    bare = units.COULOMB * 14 * 14 / 0.001
    assert float(dimer(zbl, 0.001, 14).energy) == pytest.approx(bare, rel=0.01)
    # Si-Si at 1 A: a = 0.8854 * 0.529177 / (2 * 14^0.23) = 0.12767 A, x = 7.8327
    x = 1.0 / (0.8854 * units.BOHR / (2 * 14**0.23))
    phi = 0.18175 * np.exp(-3.1998 * x) + 0.50986 * np.exp(-0.94229 * x)
    phi += 0.28022 * np.exp(-0.4029 * x) + 0.02817 * np.exp(-0.20162 * x)
    assert float(dimer(zbl, 1.0, 14).energy) == pytest.approx(units.COULOMB * 196 * phi, rel=1e-5)


def test_lj_equals_ase_on_a_crystal():
    """Below the switch the two forms agree up to ASE's shift, which forces do not see."""
    atoms = bulk("Ar", "fcc", a=5.26, cubic=True) * (3, 3, 3)
    atoms.rattle(0.05, seed=2)
    atoms.calc = AseLennardJones(sigma=3.4, epsilon=0.0104, rc=6.9)
    ours = LennardJones.new(0.0104, 3.4, 6.9, 6.9 - 1e-9)
    p = evaluate(ours, AtomicSystem.from_ase(atoms))
    np.testing.assert_allclose(p.forces.numpy(), atoms.get_forces(), atol=1e-12)
    np.testing.assert_allclose(p.stress[0].numpy(), atoms.get_stress(voigt=False), atol=1e-13)


def test_lj_equals_openmm_native():
    """NonbondedForce with its switching function."""
    atoms = liquid([18], n=60, edge=19.0, min_distance=3.0)
    cell = np.diag(np.diag(atoms.cell.array))
    atoms.set_cell(cell)
    atoms.wrap()
    force = openmm.NonbondedForce()
    force.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    force.setCutoffDistance(0.8)
    force.setUseSwitchingFunction(True)
    force.setSwitchingDistance(0.7)
    force.setUseDispersionCorrection(False)
    system = openmm.System()
    system.setDefaultPeriodicBoxVectors(*(cell / units.NM))
    for _ in atoms:
        system.addParticle(39.9)
        force.addParticle(0.0, 0.34, 0.0104 * units.KJ_MOL_PER_EV)
    system.addForce(force)
    context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(atoms.positions / units.NM)
    state = context.getState(energy=True, forces=True)
    p = evaluate(LennardJones.new(0.0104, 3.4, 8.0, 7.0), AtomicSystem.from_ase(atoms))
    assert float(p.energy) == pytest.approx(state.getPotentialEnergy()._value * units.KJ_MOL, rel=1e-10)
    theirs = state.getForces(asNumpy=True)._value * units.KJ_MOL / units.NM
    np.testing.assert_allclose(p.forces.numpy(), theirs, atol=1e-9 * np.abs(theirs).max())


def test_silicon():
    """Stillinger-Weber silicon: E = -4.3363 eV/atom at 5.431 A, B = 101.4 GPa (Balamane et al., PRB 46, 2250, 1992)."""
    sw = StillingerWeber.new()

    def energy(a):
        return evaluate(sw, AtomicSystem.from_ase(bulk("Si", a=a)))

    p = energy(5.431)
    assert float(p.energy) / 2 == pytest.approx(-4.3363, abs=5e-4)
    assert float(p.stress.abs().max()) < 1e-4
    h, v = 1e-3, 5.431**3 / 4
    stresses = [float(energy(5.431 * (1 + s * h)).stress[0].diagonal().mean()) for s in (-1, 1)]
    assert (stresses[1] - stresses[0]) / (6 * h) / units.GPA == pytest.approx(101.4, rel=0.01)
    assert float(p.stress.abs().max()) * v < 1e-2


def test_three_body_term_against_a_loop():
    """The factorised sum over angles equals the plain triple loop of the paper."""
    atoms = bulk("Si", a=5.431) * (2, 2, 2)
    atoms.rattle(0.15, seed=3)
    sw = StillingerWeber.new(A=1e-12)  # two-body part off
    from ase.neighborlist import neighbor_list

    i, j, d, r = neighbor_list("ijDd", atoms, sw.cutoff)
    c = sw.spec.config
    total = 0.0
    for k in range(len(atoms)):
        mine = np.nonzero(i == k)[0]
        for a in mine:
            for b in mine:
                if a < b:
                    cos = d[a] @ d[b] / r[a] / r[b]
                    g = np.exp(sum(c["gamma"] / (r[x] / c["sigma"] - c["a"]) for x in (a, b)))
                    total += c["epsilon"] * c["lam"] * g * (cos + 1 / 3) ** 2
    assert len(j)
    assert float(evaluate(sw, AtomicSystem.from_ase(atoms)).energy) == pytest.approx(total, rel=1e-9)


def test_bad_switch():
    with pytest.raises(InputError, match="switch must lie"):
        LennardJones.new(0.01, 3.0, 5.0, 6.0)


def test_single_atom_has_no_force():
    p = evaluate(LennardJones.new(0.01, 3.0, 5.0), AtomicSystem.from_ase(Atoms("Ar")))
    assert torch.equal(p.forces, torch.zeros(1, 3, dtype=torch.float64))
