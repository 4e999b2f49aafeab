"""mdplug.force and create_system against `evaluate`, on random triclinic boxes with unwrapped atoms."""

import copy
import subprocess
import sys
import threading
from collections import deque

import numpy as np
import openmm
import pytest
import torch
from ase import Atoms
from in_openmm import argon, context_of, in_openmm, lennard_jones, read, silicon
from openmm import app

import mdplug
from mdplug.deployed import evaluate
from mdplug.engines.openmm import check_ensemble, create_system, errors_of, force, plug_of, plugs_of
from mdplug.engines.openmm.topology import box_A_of, reduced_box, topology_from_ase
from mdplug.errors import InputError, ModelFileError
from mdplug.potentials.stillinger_weber import StillingerWeber
from mdplug.system import AtomicSystem
from mdplug.units import KJ_MOL_PER_EV, NM


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("platform", "tolerance"), [("Reference", 1e-8), ("CPU", 1e-4)])
def test_same_energy_and_forces_as_evaluate(seed, platform, tolerance):
    atoms = silicon(seed, edge=9.0 if seed < 3 else 5.5)  # the last: a box far below the cutoff
    potential = StillingerWeber.new()
    expected = evaluate(potential, AtomicSystem.from_ase(atoms))
    energy, forces = read(*in_openmm(atoms, potential, platform))
    assert abs(energy - float(expected.interaction_energy)) < 10 * tolerance
    assert np.abs(forces - expected.forces.numpy()).max() < tolerance * max(1.0, float(expected.forces.abs().max()))
    assert float(expected.forces.abs().max()) > 0.1


def test_open_system():
    atoms = silicon(1, pbc=False)
    expected = evaluate(StillingerWeber.new(), AtomicSystem.from_ase(atoms))
    context, _ = in_openmm(atoms, StillingerWeber.new())
    energy, forces = read(context)
    assert abs(energy - float(expected.interaction_energy)) < 1e-9
    assert np.abs(forces - expected.forces.numpy()).max() < 1e-8
    assert not context.getSystem().usesPeriodicBoundaryConditions()


def test_forces_are_minus_the_gradient_openmm_sees():
    atoms = silicon(2)
    context, _ = in_openmm(atoms, StillingerWeber.new())
    _, forces = read(context)
    start = context.getState(getPositions=True).getPositions(asNumpy=True)._value
    h = 1e-5  # nm
    for atom, axis in ((0, 0), (7, 1), (19, 2)):
        values = []
        for sign in (1, -1):
            moved = start.copy()
            moved[atom, axis] += sign * h
            context.setPositions(moved)
            values.append(read(context)[0])
        assert abs(-(values[0] - values[1]) / (2 * h * NM) - forces[atom, axis]) < 1e-5


def test_lattice_translations_of_single_atoms_change_nothing():
    atoms = silicon(3)
    one, forces = read(*in_openmm(atoms, StillingerWeber.new()))
    atoms.positions += np.random.default_rng(0).integers(-5, 6, size=(len(atoms), 3)) @ atoms.cell.array
    other, moved = read(*in_openmm(atoms, StillingerWeber.new()))
    assert abs(one - other) < 1e-9
    assert np.abs(forces - moved).max() < 1e-9


def test_float32_model_far_from_the_origin():
    atoms = silicon(3)
    potential = StillingerWeber.new().float()
    one, forces = read(*in_openmm(atoms, potential))
    atoms.positions += 1000 * atoms.cell.array[0]
    other, moved = read(*in_openmm(atoms, potential))
    assert abs(one - other) < 1e-5
    assert np.abs(forces - moved).max() < 1e-5


def test_interaction_energy_has_no_atomic_reference_energies():
    from dataclasses import replace

    atoms = silicon(0)
    potential = StillingerWeber.new()
    plain, _ = read(*in_openmm(atoms, potential))
    potential.spec = replace(potential.spec, atomic_energies={"default": {"Si": -7900.0}})
    assert read(*in_openmm(atoms, potential))[0] == plain
    assert float(evaluate(potential, AtomicSystem.from_ase(atoms)).energy) < -1e5


def test_subset_of_atoms():
    atoms = silicon(0)
    chosen = [3, 1, 8, 20, 11]
    expected = evaluate(StillingerWeber.new(), AtomicSystem.from_ase(atoms[chosen]))
    symbols = atoms.get_chemical_symbols()
    symbols[0] = "Au"  # the potential does not know it, and need not
    atoms.set_chemical_symbols(symbols)
    topology = topology_from_ase(atoms)
    system = openmm.System()
    for _ in atoms:
        system.addParticle(28.0)
    system.setDefaultPeriodicBoxVectors(*topology.getPeriodicBoxVectors())
    system.addForce(force(topology, StillingerWeber.new(), atoms=iter(chosen)))
    energy, forces = read(*context_of(system, atoms))
    assert abs(energy - float(expected.interaction_energy)) < 1e-9
    assert np.abs(forces[chosen] - expected.forces.numpy()).max() < 1e-8
    assert np.abs(np.delete(forces, chosen, axis=0)).max() == 0.0
    with pytest.raises(InputError, match="atom 0 is Au"):
        force(topology, StillingerWeber.new())
    with pytest.raises(InputError, match="different indices"):
        force(topology, StillingerWeber.new(), atoms=[1, 1])
    with pytest.raises(InputError, match="must be periodic too"):
        force(topology, StillingerWeber.new(), atoms=[1, 2], periodic=False)


def test_memo_saves_a_third_of_barostat_evaluations_and_changes_nothing():
    def trajectory(memo):
        atoms = argon()
        system = create_system(topology_from_ase(atoms), lennard_jones())
        barostat = openmm.MonteCarloBarostat(100.0, 120.0, 1)
        barostat.setRandomNumberSeed(7)
        system.addForce(barostat)
        integrator = openmm.LangevinMiddleIntegrator(120.0, 1.0, 0.002)
        integrator.setRandomNumberSeed(5)
        context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
        context.setPositions(atoms.positions / NM)
        context.setVelocitiesToTemperature(120.0, 3)
        plug = plug_of(context)
        plug._memo = deque(maxlen=memo)
        integrator.step(60)
        steps = plug.evaluations
        context.getState(getEnergy=True, getForces=True)
        state = context.getState(getPositions=True)
        return steps, plug.evaluations, state.getPositions(asNumpy=True)._value

    asked, _, plain = trajectory(memo=0)
    run, after, remembered = trajectory(memo=2)
    assert 180 <= asked <= 181
    assert run <= 122
    assert after <= run + 1
    assert np.array_equal(plain, remembered)


def barostat(kind):
    membrane = openmm.MonteCarloMembraneBarostat
    return {
        "isotropic": lambda: openmm.MonteCarloBarostat(500.0, 90.0, 1),
        "anisotropic": lambda: openmm.MonteCarloAnisotropicBarostat((500.0,) * 3, 90.0, True, True, True, 1),
        "membrane": lambda: membrane(500.0, 0.0, 90.0, membrane.XYAnisotropic, membrane.ZFree, 1),
        "flexible": lambda: openmm.MonteCarloFlexibleBarostat(500.0, 90.0, 1),
    }[kind]()


@pytest.mark.parametrize("kind", ["isotropic", "anisotropic", "membrane", "flexible"])
def test_every_barostat_gets_the_energy_of_the_box_it_proposes(kind):
    """Also where the flexible one reduces the box anew and so changes which images are which."""
    atoms = argon()
    if kind == "flexible":
        atoms.set_cell(atoms.cell.array @ np.array([[1, 0, 0], [0.45, 1, 0], [-0.4, 0.45, 1]]), scale_atoms=True)
    system = create_system(topology_from_ase(atoms), lennard_jones(), remove_cm=False)
    moves = barostat(kind)
    moves.setRandomNumberSeed(3)
    system.addForce(moves)
    check_ensemble(system, openmm.LangevinMiddleIntegrator(90.0, 1.0, 0.002))
    integrator = openmm.LangevinMiddleIntegrator(90.0, 1.0, 0.002)
    integrator.setRandomNumberSeed(4)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(atoms.positions @ reduced_box(atoms.cell.array)[1] / NM)
    boxes = []
    for _ in range(12):
        integrator.step(3)
        state = context.getState(getPositions=True, getEnergy=True)
        boxes.append(box_A_of(state))
        now = Atoms(atoms.numbers, state.getPositions(asNumpy=True)._value * NM, cell=boxes[-1], pbc=True)
        expected = float(evaluate(lennard_jones(), AtomicSystem.from_ase(now)).interaction_energy)
        assert abs(state.getPotentialEnergy()._value / KJ_MOL_PER_EV - expected) < 1e-9
    assert np.abs(boxes[-1] - boxes[0]).max() > 0.01


def test_pair_lists_survive_trial_boxes():
    from mdplug.engines.openmm.plug import LISTS

    atoms = argon()
    context, _ = in_openmm(atoms, lennard_jones())
    plug = plug_of(context)
    box = context.getState().getPeriodicBoxVectors()
    for _ in range(5):
        context.setPeriodicBoxVectors(*box * 1.01)
        read(context)
        context.setPeriodicBoxVectors(*box)
        context.getIntegrator().step(1)
        read(context)
    assert len(plug._lists) <= LISTS
    assert sum(one.builds for one in plug._lists) == 2


def test_energy_only_skips_the_forces():
    context, _ = in_openmm(silicon(0), StillingerWeber.new())
    plug = plug_of(context)
    with plug.energy_only():
        bare = context.getState(getEnergy=True).getPotentialEnergy()
        assert plug.last["forces"] is None
    state = context.getState(getEnergy=True, getForces=True)
    assert abs((state.getPotentialEnergy() - bare)._value) < 1e-9
    assert np.abs(state.getForces(asNumpy=True)._value).max() > 1.0
    assert plug.evaluations == 2


def test_two_contexts_in_two_threads_share_one_callable():
    systems = [silicon(seed) for seed in (0, 0)]
    systems[1].positions += 0.1 * np.random.default_rng(1).normal(size=(len(systems[1]), 3))
    potential = StillingerWeber.new()
    shared = create_system(topology_from_ase(systems[0]), potential, remove_cm=False)

    def run(atoms, out):
        with torch.no_grad():  # grad mode belongs to a thread
            context, _ = context_of(shared, atoms, dt_ps=0.001)
            context.getIntegrator().step(30)
            out.append(context.getState(getPositions=True).getPositions(asNumpy=True)._value)

    alone = [[], []]
    for atoms, out in zip(systems, alone, strict=True):
        run(atoms, out)
    together = [[], []]
    threads = [threading.Thread(target=run, args=both) for both in zip(systems, together, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for one, other in zip(alone, together, strict=True):
        assert np.abs(one[0] - other[0]).max() < 1e-9


def test_hostile_default_dtype_and_no_global_left_changed():
    torch.set_default_dtype(torch.float16)
    try:
        energy, _ = read(*in_openmm(silicon(0), StillingerWeber.new()))
        assert torch.get_default_dtype() == torch.float16
    finally:
        torch.set_default_dtype(torch.float32)
    assert energy == read(*in_openmm(silicon(0), StillingerWeber.new()))[0]
    assert torch.is_grad_enabled()


def test_xml_and_deepcopy_find_the_same_callable_in_this_process():
    atoms = silicon(0)
    system = create_system(topology_from_ase(atoms), StillingerWeber.new(), remove_cm=False)
    expected = read(*context_of(system, atoms))
    for again in (copy.deepcopy(system), openmm.XmlSerializer.deserialize(openmm.XmlSerializer.serialize(system))):
        assert plug_of(again) is plug_of(system)
        energy, forces = read(*context_of(again, atoms))
        assert energy == expected[0]
        assert np.array_equal(forces, expected[1])


def test_forces_of_one_file_share_weights_and_nothing_else(tmp_path):
    topology = topology_from_ase(silicon(0))
    path = mdplug.save(StillingerWeber.new(), tmp_path / "sw.safetensors")
    forces = [force(topology, path), force(topology, mdplug.load(path), charge=1.0), force(topology, path)]
    plugs = [plug_of(one) for one in forces]
    assert len({id(plug) for plug in plugs}) == 3
    assert len({id(one.potential.parameters_) for one in (plugs[0], plugs[2])}) == 1
    written = openmm.XmlSerializer.serialize(forces[0])
    del plugs, forces
    assert openmm.XmlSerializer.serialize(force(topology, path)) == written


def test_custom_cv_force_scales_and_differentiates():
    atoms = silicon(0)
    topology = topology_from_ase(atoms)
    one = force(topology, StillingerWeber.new())
    whole = openmm.CustomCVForce("scale*plug")
    whole.addGlobalParameter("scale", 0.25)
    whole.addEnergyParameterDerivative("scale")
    whole.addCollectiveVariable("plug", copy.deepcopy(one))
    system = openmm.System()
    for _ in atoms:
        system.addParticle(28.0)
    system.setDefaultPeriodicBoxVectors(*topology.getPeriodicBoxVectors())
    system.addForce(whole)
    assert len(plugs_of(system)) == 1
    context, rotation = context_of(system, atoms)
    expected = evaluate(StillingerWeber.new(), AtomicSystem.from_ase(atoms))
    energy, forces = read(context, rotation)
    assert abs(energy - 0.25 * float(expected.interaction_energy)) < 1e-8
    assert np.abs(forces - 0.25 * expected.forces.numpy()).max() < 1e-8
    slope = context.getState(getParameterDerivatives=True).getEnergyParameterDerivatives()["scale"]
    assert abs(slope / KJ_MOL_PER_EV - float(expected.interaction_energy)) < 1e-8


def test_checkpoint_restarts_bit_for_bit(tmp_path):
    atoms = argon()

    def simulation():
        system = create_system(topology_from_ase(atoms), lennard_jones())
        integrator = openmm.LangevinMiddleIntegrator(120.0, 1.0, 0.002)
        integrator.setRandomNumberSeed(5)
        made = app.Simulation(
            topology_from_ase(atoms), system, integrator, openmm.Platform.getPlatformByName("Reference")
        )
        made.context.setPositions(atoms.positions / NM)
        return made

    first = simulation()
    first.context.setVelocitiesToTemperature(120.0, 1)
    first.step(20)
    first.saveCheckpoint(str(tmp_path / "half.chk"))
    first.step(20)
    second = simulation()
    second.loadCheckpoint(str(tmp_path / "half.chk"))
    second.step(20)
    states = [s.context.getState(getPositions=True, getVelocities=True) for s in (first, second)]
    assert np.array_equal(*[s.getPositions(asNumpy=True)._value for s in states])
    assert np.array_equal(*[s.getVelocities(asNumpy=True)._value for s in states])


ELSEWHERE = """
import sys, openmm, numpy as np
system = openmm.XmlSerializer.deserialize(open(sys.argv[1] + "/system.xml").read())
context = openmm.Context(system, openmm.VerletIntegrator(0.001), openmm.Platform.getPlatformByName("Reference"))
context.setPositions(np.load(sys.argv[1] + "/x.npy"))
print(repr(context.getState(getEnergy=True).getPotentialEnergy()._value))
"""


def elsewhere(system, atoms, folder):
    """Energy (eV) of a written system in a new process, or the last line of its complaint."""
    (folder / "system.xml").write_text(openmm.XmlSerializer.serialize(system))
    np.save(folder / "x.npy", atoms.positions @ reduced_box(atoms.cell.array)[1] / NM)
    command = [sys.executable, "-c", ELSEWHERE, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    return float(done.stdout) / KJ_MOL_PER_EV if done.returncode == 0 else done.stderr.splitlines()[-1]


def test_a_written_system_runs_in_another_process_by_path_and_hash(tmp_path):
    atoms = silicon(0)
    path = mdplug.save(StillingerWeber.new(), tmp_path / "sw.safetensors")
    system = create_system(topology_from_ase(atoms), mdplug.load(path), remove_cm=False)
    assert len(openmm.XmlSerializer.serialize(system)) < 6000
    assert abs(elsewhere(system, atoms, tmp_path) - read(*context_of(system, atoms))[0]) < 1e-9
    mdplug.save(StillingerWeber.new(lam=20.0), path)
    assert "has changed since this system was written" in elsewhere(system, atoms, tmp_path)


def test_weights_changed_after_loading_are_the_ones_that_run_and_are_written(tmp_path):
    atoms = silicon(0)
    path = mdplug.save(StillingerWeber.new(), tmp_path / "sw.safetensors")
    changed = mdplug.load(path)
    changed.parameters_[3] = 0.0  # no three-body energy
    system = create_system(topology_from_ase(atoms), changed, remove_cm=False)
    expected = float(evaluate(StillingerWeber.new(lam=0.0), AtomicSystem.from_ase(atoms)).interaction_energy)
    assert abs(read(*context_of(system, atoms))[0] - expected) < 1e-9
    path.unlink()
    assert abs(elsewhere(system, atoms, tmp_path) - expected) < 1e-9


def test_one_atom_and_no_neighbours():
    for pbc in (False, True):
        atoms = Atoms("Si", [[1.0, 2.0, 3.0]], cell=[20.0] * 3 if pbc else None, pbc=pbc)
        energy, forces = read(*in_openmm(atoms, StillingerWeber.new()))
        assert energy == 0.0
        assert not forces.any()


def test_bad_arguments(tmp_path):
    topology = topology_from_ase(silicon(0))
    with pytest.raises(InputError, match="must be a Potential or a model file"):
        force(topology, 3.0)
    with pytest.raises(InputError, match="no model file"):
        force(topology, "nothing.safetensors")
    with pytest.raises(InputError, match="at least one"):
        force(app.Topology(), StillingerWeber.new())
    with pytest.raises(InputError, match="periodic must be"):
        force(topology, StillingerWeber.new(), periodic="yes")
    with pytest.raises(InputError, match="found 0 mdplug forces"):
        plug_of(openmm.System())
    (tmp_path / "cut.safetensors").write_bytes(b"\x20\x00\x00")
    with pytest.raises(ModelFileError):
        force(topology, tmp_path / "cut.safetensors")
    next(topology.atoms()).element = None
    with pytest.raises(InputError, match="no element"):
        force(topology, StillingerWeber.new())
    with errors_of(openmm.System()):
        pass
