"""Disagreement of members in ASE and OpenMM: what it is of, what it costs, that looking changes nothing."""

import numpy as np
import openmm
import pytest
from ase import Atoms
from contract import liquid
from in_openmm import context_of, in_openmm
from member_models import ensemble, shared
from openmm import unit

import mdplug
from mdplug import Calculator, kernels
from mdplug.biased import Biased
from mdplug.deployed import evaluate
from mdplug.engines.openmm import create_system, plug_of
from mdplug.engines.openmm.topology import box_A_of, topology_from_ase
from mdplug.errors import InputError
from mdplug.export import export
from mdplug.pairs import pairs
from mdplug.potentials.pair import LennardJones
from mdplug.system import AtomicSystem
from mdplug.uncertainty import uncertainty
from mdplug.units import KJ_MOL_PER_EV, NM

NAMES = {"energy_sigma", "energies_sigma", "energy_members"}


def atoms_of(seed=0):
    return liquid([1, 8], n=20, edge=7.5, seed=seed)


def fast(model):
    return model.with_kernels(True) if kernels.available() else model


MODELS = {"shared": lambda: fast(shared()), "deep": lambda: fast(ensemble(3))}


@pytest.mark.parametrize("kind", MODELS)
def test_ase_gives_sigma_with_every_energy(kind):
    model, atoms = MODELS[kind](), atoms_of()
    atoms.calc = Calculator(model)
    atoms.get_potential_energy()
    results = dict(atoms.calc.results)
    assert set(results) >= NAMES
    assert "forces_sigma" not in results  # it is not free
    system = AtomicSystem.from_ase(atoms)
    found = uncertainty(model, system, pairs(system, model.cutoff))
    assert results["energy_sigma"] == pytest.approx(float(found.energy), rel=1e-12)
    np.testing.assert_allclose(results["energies_sigma"], found.atom_energy, rtol=1e-12)
    assert results["energy_members"].mean() == pytest.approx(results["energy"], abs=1e-9)
    assert results["energy_members"].std(ddof=1) == pytest.approx(results["energy_sigma"], rel=1e-9)
    sigma = atoms.calc.get_property("forces_sigma", atoms)
    np.testing.assert_allclose(sigma, found.forces, rtol=1e-9)
    for key in ("energy", "forces", "stress", "energies"):  # looking changed no bit
        assert np.array_equal(results[key], atoms.calc.results[key]), key
    atoms.rattle(0.01)
    assert not np.array_equal(atoms.calc.get_property("forces_sigma", atoms), sigma)


def test_ase_members_are_totals_with_reference_energies():
    atoms, model = atoms_of(), ensemble(3)
    object.__setattr__(model.spec, "atomic_energies", {"default": {"H": -13.6, "O": -432.1}})
    atoms.calc = Calculator(model)
    total = atoms.get_potential_energy()
    alone = []
    for part in model.parts:
        alone.append(float(evaluate(part, AtomicSystem.from_ase(atoms)).interaction_energy))
    reference = sum({"H": -13.6, "O": -432.1}[one] for one in atoms.get_chemical_symbols())
    np.testing.assert_allclose(atoms.calc.results["energy_members"], np.array(alone) + reference, atol=1e-9)
    assert total == pytest.approx(np.mean(alone) + reference, abs=1e-9)


def test_ase_probes_are_of_the_block_they_were_asked_in():
    atoms, calc = atoms_of(), Calculator(fast(shared()))
    atoms.calc = calc
    with calc.probing(2, seed=1):
        one = calc.get_property("forces_sigma", atoms)
        assert np.array_equal(one, calc.get_property("forces_sigma", atoms))
    with calc.probing(2, seed=2):
        other = calc.get_property("forces_sigma", atoms)
    assert not np.allclose(one, other, rtol=1e-3)
    with calc.probing(None):
        exact = calc.get_property("forces_sigma", atoms)
    assert np.abs(one / exact - 1).max() < 2
    atoms.rattle(0.01)
    atoms.get_potential_energy()
    assert "forces_sigma" not in calc.results


def test_what_has_no_members_has_no_sigma(tmp_path):
    calc = Calculator(LennardJones.new(0.01, 2.2, 5.0))
    assert not set(calc.implemented_properties) & (NAMES | {"forces_sigma"})
    context, _ = in_openmm(atoms_of(), LennardJones.new(0.01, 2.2, 5.0))
    context.getState(getEnergy=True)
    assert plug_of(context).uncertainty() is None
    # An exported file has energies of members, and no way back from them to forces.
    file = export(mdplug.save(shared(), tmp_path / "m.safetensors"), tmp_path / "m.pt")
    atoms = atoms_of()
    atoms.calc = Calculator(mdplug.load(file))
    atoms.get_potential_energy()
    assert set(atoms.calc.results) >= NAMES
    with pytest.raises(InputError, match="safetensors"):
        atoms.calc.get_property("forces_sigma", atoms)


# --- OpenMM


def here(context):
    """The positions that OpenMM reports, as ASE atoms, without an evaluation."""
    state = context.getState(getPositions=True)
    numbers = plug_of(context).numbers
    return Atoms(numbers, state.getPositions(asNumpy=True)._value * NM, cell=box_A_of(state), pbc=True)


@pytest.mark.parametrize("kind", MODELS)
def test_openmm_sigma_belongs_to_the_reported_positions(kind):
    model = MODELS[kind]()
    context, _ = in_openmm(atoms_of(), model, dt_ps=0.0002)
    plug = plug_of(context)
    for _ in range(3):
        context.getIntegrator().step(2)
        with plug.probing(None):
            energy = context.getState(getEnergy=True).getPotentialEnergy()
        at, found = here(context), plug.uncertainty()
        assert np.array_equal(plug.last["positions"], at.positions)
        system = AtomicSystem.from_ase(at)
        expected = uncertainty(model, system, pairs(system, model.cutoff))
        np.testing.assert_allclose(found.forces, expected.forces, rtol=1e-6)
        assert float(found.energy) == pytest.approx(float(expected.energy), rel=1e-6)
        mean = float(found.member_energy.mean()) * KJ_MOL_PER_EV
        assert energy.value_in_unit(unit.kilojoule_per_mole) == pytest.approx(mean, abs=1e-6)
    # A step later they belong to what was evaluated last, and say so.
    context.getIntegrator().step(1)
    assert np.array_equal(plug.last["positions"], at.positions)
    assert not np.array_equal(plug.last["positions"], here(context).positions)
    assert np.array_equal(plug.uncertainty().forces, found.forces)
    context.getIntegrator().step(1)
    assert plug.uncertainty().forces is None  # nobody asked for it there


@pytest.mark.parametrize("npt", [False, True])
@pytest.mark.parametrize("kind", [*MODELS, "biased"])
def test_looking_in_openmm_costs_no_evaluation_and_changes_no_bit(kind, npt):
    model = Biased.of(fast(shared()), 0.5) if kind == "biased" else MODELS[kind]()

    def trajectory(watched):
        atoms = atoms_of()
        system = create_system(topology_from_ase(atoms), model, remove_cm=False)
        if npt:
            barostat = openmm.MonteCarloBarostat(1.0, 300.0, 4)
            barostat.setRandomNumberSeed(3)
            system.addForce(barostat)
        context, _ = context_of(system, atoms, dt_ps=0.0002)
        context.setVelocitiesToTemperature(300.0, 1)
        plug, places, sigmas = plug_of(context), [], []
        for k in range(6):
            context.getIntegrator().step(2)
            if watched:
                with plug.probing(2, seed=k):
                    context.getState(getEnergy=True)
                sigmas.append(plug.uncertainty().forces)
            places.append(here(context).positions)
        context.getIntegrator().step(1)  # the evaluation that the last look was
        return np.array(places), plug.evaluations, sigmas

    plain, asked, _ = trajectory(False)
    watched, run, sigmas = trajectory(True)
    assert np.array_equal(plain, watched)
    assert run == asked
    assert min(float(one.min()) for one in sigmas) > 0
