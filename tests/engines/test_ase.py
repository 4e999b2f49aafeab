"""The ASE calculator: ASE's expectations of a calculator, and physics."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.lj import LennardJones as AseLennardJones
from ase.calculators.test import gradient_test
from ase.filters import FrechetCellFilter
from ase.io import Trajectory
from ase.md.verlet import VelocityVerlet
from ase.optimize import LBFGS

import mdplug
from mdplug import Calculator
from mdplug.deployed import deploy
from mdplug.engines import ase as engine
from mdplug.errors import InputError
from mdplug.potentials.pair import LennardJones
from mdplug.potentials.stillinger_weber import StillingerWeber
from mdplug.spec import Spec

EPSILON, SIGMA, CUTOFF = 0.0104, 3.4, 8.5


def argon(seed: int = 0, repeat: int = 3, rattle: float = 0.2) -> Atoms:
    atoms = bulk("Ar", "fcc", a=5.4, cubic=True) * (repeat, repeat, repeat)
    atoms.rattle(rattle, seed=seed)
    return atoms


@pytest.fixture
def lj() -> LennardJones:
    return LennardJones.new(EPSILON, SIGMA, CUTOFF)


class _Charged(LennardJones):
    """A potential with charges and reference energies, to see where they go."""

    def __init__(self, spec: Spec):
        super().__init__(spec)

    def local(self, numbers, pairs, vectors, n_owned, system_index, total_charge, total_spin, head):
        out = super().local(numbers, pairs, vectors, n_owned, system_index, total_charge, total_spin, head)
        out["atom_energy"] = out["atom_energy"] + total_charge[system_index[:n_owned]]
        out["charge"] = 0.1 * numbers[:n_owned].to(vectors.dtype)
        return out


def charged() -> _Charged:
    base = LennardJones.new(EPSILON, SIGMA, CUTOFF).spec
    return _Charged(
        replace(base, outputs=("atom_energy", "charge"), atomic_energies={"default": {"Ar": -14.0, "Ne": -3.5}})
    )


def test_equals_ases_own_lennard_jones_below_the_switch():
    # A dimer and a trimer well inside the switching distance: both codes are then plain Lennard-Jones.
    ours = Calculator(LennardJones.new(EPSILON, SIGMA, 20.0, switch=19.0))
    theirs = AseLennardJones(epsilon=EPSILON, sigma=SIGMA, rc=1e4)
    theirs.parameters.ro = 1e4
    for positions in ([[0, 0, 0], [3.7, 0, 0]], [[0, 0, 0], [3.6, 0.3, 0], [1.0, 3.9, 0.7]]):
        atoms = Atoms(f"Ar{len(positions)}", positions)
        atoms.calc = theirs
        energy, forces = atoms.get_potential_energy(), atoms.get_forces()
        atoms.calc = ours
        assert atoms.get_potential_energy() == pytest.approx(energy, abs=1e-12)
        np.testing.assert_allclose(atoms.get_forces(), forces, atol=1e-12)


def test_forces_and_stress_are_slopes_of_the_energy(lj):
    atoms = argon(repeat=2)
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.03 * np.tri(3)), scale_atoms=True)
    atoms.calc = Calculator(lj)
    analytic, numeric = gradient_test(atoms, indices=[0, 3])
    np.testing.assert_allclose(analytic, numeric, atol=1e-6)
    stress = atoms.get_stress()
    numerical = np.empty(6)
    for k, (i, j) in enumerate([(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]):
        energy = []
        for sign in (1, -1):
            strain = np.zeros((3, 3))
            strain[i, j] += sign * 0.5e-5
            strain[j, i] += sign * 0.5e-5
            moved = atoms.copy()
            moved.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
            moved.calc = Calculator(lj)
            energy.append(moved.get_potential_energy())
        numerical[k] = (energy[0] - energy[1]) / 2e-5 / atoms.get_volume()
    np.testing.assert_allclose(stress, numerical, atol=1e-8)


def test_properties_and_totals():
    potential = charged()
    atoms = Atoms("ArNe", [[0, 0, 0], [3.5, 0, 0]], cell=[12] * 3, pbc=True)
    atoms.calc = Calculator(potential)
    interaction = mdplug.evaluate(potential, mdplug.AtomicSystem.from_ase(atoms)).interaction_energy
    assert atoms.get_potential_energy() == pytest.approx(float(interaction[0]) - 17.5, abs=1e-12)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()
    assert atoms.get_potential_energies().sum() == pytest.approx(atoms.get_potential_energy(), abs=1e-12)
    assert atoms.get_potential_energies()[0] < -13 < -4 < atoms.get_potential_energies()[1]
    np.testing.assert_allclose(atoms.get_charges(), [1.8, 1.0])
    assert atoms.get_stress().shape == (6,)
    assert atoms.get_stress(voigt=False).shape == (3, 3)
    assert atoms.calc.get_property("energy", atoms) == atoms.get_potential_energy()


def test_no_stress_without_three_periods_and_no_charges_without_charges(lj):
    atoms = Atoms("Ar2", [[0, 0, 0], [3.5, 0, 0]])
    atoms.calc = Calculator(lj)
    assert atoms.get_potential_energy() < 0
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_stress()
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_charges()


def test_every_change_is_noticed():
    """One calculator, handed one thing after another, equals fresh calculators."""
    potential = charged()
    shared = Calculator(potential)
    first = argon(repeat=2)
    atoms = first.copy()
    atoms.calc = shared

    def check():
        fresh = atoms.copy()
        fresh.calc = Calculator(potential)
        assert atoms.get_potential_energy() == fresh.get_potential_energy()
        np.testing.assert_array_equal(atoms.get_forces(), fresh.get_forces())
        return atoms.get_potential_energy()

    seen = [check()]
    atoms.positions[3] += 0.3
    seen.append(check())
    atoms.set_cell(atoms.cell * 1.05, scale_atoms=True)
    seen.append(check())
    atoms.numbers[5] = 10
    seen.append(check())
    atoms.pbc = (True, True, False)
    seen.append(check())
    atoms.info["charge"] = 1.0
    seen.append(check())
    del atoms[7]
    seen.append(check())
    atoms += Atoms("Ne", [[1.0, 1.5, 2.9]])
    seen.append(check())
    atoms.pbc = False
    seen.append(check())
    assert len({round(e, 9) for e in seen}) == len(seen)  # every change did something


def test_nothing_stale_after_a_refused_step():
    base = charged().spec
    potential = _Charged(replace(base, species=(10, 18)))
    atoms = argon(repeat=2)
    atoms.calc = Calculator(potential)
    energy, x = atoms.get_potential_energy(), atoms.get_positions()
    for _ in range(2):
        atoms.positions[4, 1] = np.nan
        with pytest.raises(InputError, match=r"atom 4 .*not finite"):
            atoms.get_forces()
    atoms.set_positions(x)
    assert atoms.get_potential_energy() == energy
    atoms.numbers[3] = 1
    for _ in range(2):
        with pytest.raises(InputError, match="atom 3 is H"):
            atoms.get_forces()
        atoms.positions[0] += 0.1
    atoms.numbers[3] = 10
    fresh = atoms.copy()
    fresh.calc = Calculator(potential)
    assert atoms.get_potential_energy() == fresh.get_potential_energy() != energy
    np.testing.assert_array_equal(atoms.get_stress(), fresh.get_stress())


def test_no_call_without_a_change_and_results_are_the_callers(lj, monkeypatch):
    calls = []
    real = engine.call
    monkeypatch.setattr(engine, "call", lambda *a, **k: calls.append(1) or real(*a, **k))
    atoms = argon(repeat=2)
    atoms.calc = Calculator(lj)
    atoms.get_forces()[:] = 0.0
    assert np.abs(atoms.get_forces()).max() > 0
    atoms.get_potential_energy(), atoms.get_stress(), atoms.get_potential_energies()
    assert len(calls) == 1


def test_calculate_on_a_copy_leaves_the_atoms_alone(lj):
    atoms = argon(repeat=1)
    atoms.calc = Calculator(lj)
    energy = atoms.get_potential_energy()
    other = atoms.copy()
    other.positions *= 1.01
    atoms.calc.calculate(other, ["energy"], ["positions"])
    assert atoms.get_potential_energy() == energy


def test_nve_conserves_and_reuses_the_pair_list(lj):
    atoms = argon(repeat=2, rattle=0.05)
    atoms.calc = Calculator(lj)
    normal = np.random.default_rng(1).normal(size=(len(atoms), 3))
    atoms.set_momenta(np.sqrt(atoms.get_masses() * 60 * units.kB)[:, None] * normal)

    def drift(dt_fs: float) -> float:
        start = atoms.copy()
        start.calc = Calculator(lj)
        total = []
        dynamics = VelocityVerlet(start, dt_fs * units.fs)
        dynamics.attach(lambda: total.append(start.get_total_energy()))
        dynamics.run(int(400 / dt_fs))
        assert start.calc._pairs.builds < len(total) / 5
        return float(np.std(total))

    fine, coarse = drift(2.0), drift(4.0)
    assert fine < 1e-5
    assert coarse / fine == pytest.approx(4.0, rel=0.35)  # second order in dt: the forces are the energy's slope


def test_trajectory_round_trip(lj, tmp_path):
    atoms = argon(repeat=1)
    atoms.calc = Calculator(lj)
    energy, stress = atoms.get_potential_energy(), atoms.get_stress()
    with Trajectory(tmp_path / "x.traj", "w", atoms) as file:
        file.write()
    with Trajectory(tmp_path / "x.traj") as file:
        back = file[0]
    assert back.get_potential_energy() == energy
    np.testing.assert_array_equal(back.get_stress(), stress)


def test_cell_relaxation_finds_the_crystal(lj):
    atoms = bulk("Ar", "fcc", a=5.8)
    atoms.calc = Calculator(LennardJones.new(1.0, 1.0, 8.0, switch=7.8))
    atoms.set_cell(atoms.cell * (1.6 / 5.8), scale_atoms=True)
    LBFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=1e-6, steps=100)
    # fcc Lennard-Jones: a = 2^(1/2) (L12/L6)^(1/6) sigma = 1.5424, E = -8.6102 epsilon (infinite cutoff)
    assert atoms.cell.lengths()[0] * np.sqrt(2) == pytest.approx(1.5424, abs=2e-3)
    assert atoms.get_potential_energy() == pytest.approx(-8.610, abs=0.03)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_from_file_in_both_widths(lj, tmp_path, dtype):
    path = mdplug.save(lj, tmp_path / "lj.safetensors")
    atoms = argon(repeat=2)
    atoms.calc = Calculator(lj)
    energy, forces = atoms.get_potential_energy(), atoms.get_forces()
    atoms.calc = Calculator(mdplug.load(path, dtype=dtype))
    tolerance = 1e-12 if dtype == "float64" else 1e-4
    assert atoms.get_potential_energy() == pytest.approx(energy, abs=tolerance)
    np.testing.assert_allclose(atoms.get_forces(), forces, atol=tolerance)
    assert atoms.get_forces().dtype == np.float64
    atoms.calc = Calculator(str(path))
    assert atoms.get_potential_energy() == energy
    atoms.calc = Calculator(deploy(lj))
    assert atoms.get_potential_energy() == energy


def test_hostile_default_dtype(lj):
    atoms = argon(repeat=1)
    atoms.calc = Calculator(lj)
    energy = atoms.get_potential_energy()
    torch.set_default_dtype(torch.float16)
    try:
        atoms.calc = Calculator(lj)
        assert atoms.get_potential_energy() == energy
    finally:
        torch.set_default_dtype(torch.float32)


def test_bad_input_is_one_line(lj):
    silicon = bulk("Si")
    silicon.calc = Calculator(StillingerWeber.new())
    assert silicon.get_potential_energy() == pytest.approx(2 * -4.3363, abs=1e-3)
    silicon.numbers[1] = 32
    with pytest.raises(InputError, match="atom 1 is Ge"):
        silicon.get_potential_energy()
    atoms = argon(repeat=1)
    atoms.calc = Calculator(lj)
    atoms.get_potential_energy()
    atoms.positions[2, 1] = np.nan
    for _ in range(2):  # the error does not leave a stale result behind
        with pytest.raises(InputError, match="atom 2 has a position that is not finite"):
            atoms.get_potential_energy()
    with pytest.raises(InputError, match="no cell along a periodic direction"):
        Calculator(lj).calculate(Atoms("Ar", pbc=True))


def test_a_model_that_is_not_conservative_says_so(lj):
    with pytest.warns(UserWarning, match="not conservative"):
        Calculator(LennardJones(replace(lj.spec, conservative=False)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Calculator(lj)


def test_single_atom(lj):
    atoms = Atoms("Ar")
    atoms.calc = Calculator(lj)
    assert atoms.get_potential_energy() == 0.0
    np.testing.assert_array_equal(atoms.get_forces(), np.zeros((1, 3)))
