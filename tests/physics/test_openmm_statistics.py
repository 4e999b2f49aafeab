"""What statistical mechanics knows exactly, sampled through the plug; each with a control that must fail.

Averages are compared within their own block errors; the errors themselves are bounded, so that a noisy run cannot pass
by being noisy.
"""

import numpy as np
import openmm
import pytest
import torch
from ase import Atoms
from in_openmm import context_of, lennard_jones, read
from openmm import unit

from mdplug.deployed import Deployed, evaluate
from mdplug.engines.openmm import create_system, force, plug_of
from mdplug.engines.openmm.topology import reduced_box, topology_from_ase
from mdplug.potential import Potential
from mdplug.potentials.pair import LennardJones
from mdplug.spec import Spec
from mdplug.system import AtomicSystem
from mdplug.units import BAR, BOLTZMANN, KJ_MOL_PER_EV, NM


def mean_and_error(samples, blocks=16):
    """Mean and its standard error from block averages."""
    samples = np.asarray(samples)[len(samples) % blocks :]
    averages = samples.reshape(blocks, -1).mean(axis=1)
    return averages.mean(), averages.std(ddof=1) / np.sqrt(blocks)


def simulation(atoms, potential, temperature_K, dt_ps=0.001, friction_per_ps=5.0, seed=11):
    """A Reference context under Langevin dynamics."""
    system = create_system(topology_from_ase(atoms), potential, remove_cm=False)
    integrator = openmm.LangevinMiddleIntegrator(temperature_K, friction_per_ps, dt_ps)
    integrator.setRandomNumberSeed(seed)
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    turn = reduced_box(atoms.cell.array)[1] if atoms.pbc.all() else np.eye(3)
    context.setPositions(atoms.positions @ turn / NM)
    context.setVelocitiesToTemperature(temperature_K, seed + 2)
    return context, integrator


def volumes_A3(atoms, potential, barostat, moves, skip, molecules=None):
    """Volume after each move of the barostat, A^3, the first `skip` left out; atoms move with the box only."""
    system = create_system(topology_from_ase(atoms), potential, remove_cm=False, molecules=molecules)
    barostat.setRandomNumberSeed(12)
    system.addForce(barostat)
    integrator = openmm.CustomIntegrator(0.001)
    integrator.addUpdateContextState()
    context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
    context.setPositions(atoms.positions @ reduced_box(atoms.cell.array)[1] / NM)
    found = np.empty(moves)
    for k in range(moves):
        integrator.step(1)
        found[k] = context.getState().getPeriodicBoxVolume().value_in_unit(unit.nanometer**3) * NM**3
    return context, found[skip:]


class NoForce(Potential):
    """An ideal gas."""

    def __init__(self):
        super().__init__(Spec(name="nothing", architecture="test:NoForce", config={}, cutoff=0.5))

    def local(self, numbers, pairs, vectors, n_owned, system_index, total_charge, total_spin, head):
        return {"atom_energy": vectors.new_zeros(n_owned) + 0.0 * vectors.sum()}


IDEAL_K, IDEAL_BAR, IDEAL_N = 300.0, 50.0, 30


def ideal_barostat(kind):
    if kind == "anisotropic":
        return openmm.MonteCarloAnisotropicBarostat((IDEAL_BAR,) * 3, IDEAL_K, True, True, True, 1)
    if kind == "membrane":
        membrane = openmm.MonteCarloMembraneBarostat
        return membrane(IDEAL_BAR, 0.0, IDEAL_K, membrane.XYIsotropic, membrane.ZFree, 1)
    return openmm.MonteCarloBarostat(IDEAL_BAR, IDEAL_K, 1)


@pytest.mark.parametrize("kind", ["atoms", "molecules", "anisotropic", "membrane"])
def test_ideal_gas_volume(kind):
    """p(V) ~ V^N exp(-PV/kT): <V> = (N+1) kT/P and its variance (N+1) (kT/P)^2, N the number of molecules."""
    unit_volume = BOLTZMANN * IDEAL_K / (IDEAL_BAR * BAR)
    expected = (IDEAL_N + 1) * unit_volume
    rng = np.random.default_rng(3)
    edge = expected ** (1 / 3)
    centres = rng.random((IDEAL_N, 3)) * edge
    positions = np.repeat(centres, 2, axis=0) if kind == "molecules" else centres
    positions = positions + rng.normal(scale=0.5, size=positions.shape)
    atoms = Atoms(["Ar"] * len(positions), positions, cell=[edge] * 3, pbc=True)
    bonds = [(2 * k, 2 * k + 1) for k in range(IDEAL_N)] if kind == "molecules" else None
    context, volumes = volumes_A3(atoms, NoForce(), ideal_barostat(kind), 1700, 100, bonds)
    assert len(context.getMolecules()) == IDEAL_N
    mean, error = mean_and_error(volumes)
    assert error < 0.04 * expected
    assert abs(mean - expected) < 4 * error
    # Controls: another pressure or another number of molecules would be seen.
    assert abs(mean - 1.25 * expected) > 4 * error
    assert abs(mean - (2 * IDEAL_N + 1) * unit_volume) > 10 * error


class StaleBox(Deployed):
    """A control: an engine that forgot to hand over the box it has now."""

    stale = None

    def forward(self, numbers, positions, cell, *rest):
        if self.stale is None:
            self.stale = cell.clone()
        return super().forward(numbers, positions, self.stale, *rest)


CRYSTAL_K, CRYSTAL_BAR = 90.0, 4000.0


def one_atom_crystal():
    """Argon, fcc, one atom in a primitive cell far below the cutoff."""
    return Atoms("Ar", [[0.3, 0.2, 0.1]], cell=5.2 * (1 - np.eye(3)) / 2, pbc=True)


def exact_volume():
    """<V> of that crystal by quadrature over p(V) ~ V exp(-(E(V) + PV)/kT), A^3."""
    atoms = one_atom_crystal()
    scale = np.linspace(0.88, 1.4, 260)
    energies, volumes = [], []
    for s in scale:
        scaled = atoms.copy()
        scaled.set_cell(atoms.cell.array * s, scale_atoms=True)
        system = AtomicSystem.from_ase(scaled)
        energies.append(float(evaluate(lennard_jones(), system, forces=False).interaction_energy))
        volumes.append(scaled.get_volume())
    v, e = np.array(volumes), np.array(energies)
    log_p = np.log(v) - (e + CRYSTAL_BAR * BAR * v) / (BOLTZMANN * CRYSTAL_K)
    p = np.exp(log_p - log_p.max())
    assert p[-1] < 1e-6
    return np.trapezoid(v * p, v) / np.trapezoid(p, v)


class WrongBox(Deployed):
    """A control: a box whose edges are 3 % too long."""

    def forward(self, numbers, positions, cell, *rest):
        return super().forward(numbers, positions, 1.03 * cell, *rest)


@pytest.mark.parametrize("control", [False, True])
def test_crystal_of_one_atom_against_quadrature(control):
    """The energy depends on the box alone, through periodic images many cells away."""
    potential = WrongBox(lennard_jones()) if control else lennard_jones()
    barostat = openmm.MonteCarloBarostat(CRYSTAL_BAR, CRYSTAL_K, 1)
    volumes = volumes_A3(one_atom_crystal(), potential, barostat, 2500, 100)[1]
    mean, error = mean_and_error(volumes)
    expected = exact_volume()
    assert 30.0 < expected < 40.0
    assert error < 0.015 * expected
    assert (abs(mean - expected) < 4 * error) is not control


class Springs(Potential):
    """Harmonic pairs: E = k/2 r^2 within a cutoff that nothing reaches."""

    k = 1.0  # eV/A^2

    def __init__(self):
        super().__init__(Spec(name="springs", architecture="test:Springs", config={}, cutoff=8.0))

    def local(self, numbers, pairs, vectors, n_owned, system_index, total_charge, total_spin, head):
        energy = 0.25 * self.k * vectors.square().sum(dim=1)
        return {"atom_energy": vectors.new_zeros(n_owned).index_add(0, pairs[0], energy)}


class Slipped(Deployed):
    """A control: forces with a unit slip of a fifth."""

    def forward(self, *arguments):
        out = super().forward(*arguments)
        return {key: 0.8 * value if key == "forces" else value for key, value in out.items()}


@pytest.mark.parametrize("slipped", [False, True])
def test_harmonic_wells_at_constant_temperature(slipped):
    """Dimers on springs: <U> = 3/2 kT and Var U = 3/2 (kT)^2 each, <K> = 3 kT each."""
    n, temperature_K = 32, 300.0
    rng = np.random.default_rng(1)
    centres = np.array(np.meshgrid(*[range(4)] * 3)).reshape(3, -1).T[:n] * 40.0
    positions = np.concatenate([centres, centres], axis=1).reshape(-1, 3) + rng.normal(scale=0.15, size=(2 * n, 3))
    atoms = Atoms(["C"] * (2 * n), positions)
    potential = Slipped(Springs()) if slipped else Springs()
    context, integrator = simulation(atoms, potential, temperature_K, dt_ps=0.002, friction_per_ps=20.0)
    integrator.step(200)
    kt = BOLTZMANN * temperature_K * KJ_MOL_PER_EV
    potential_energy, kinetic_energy = [], []
    for _ in range(320):
        integrator.step(5)
        state = context.getState(getEnergy=True)
        potential_energy.append(state.getPotentialEnergy()._value / n / kt)
        kinetic_energy.append(state.getKineticEnergy()._value / n / kt)
    mean, error = mean_and_error(potential_energy)
    assert error < 0.04
    if slipped:
        assert abs(mean - 1.5) > 4 * error
        return
    assert abs(mean - 1.5) < 4 * error
    warmth, its = mean_and_error(kinetic_energy)
    assert abs(warmth - 3.0) < 4 * its
    spread, its = mean_and_error(n * (np.array(potential_energy) - 1.5) ** 2)
    assert abs(spread - 1.5) < 4 * its


class HardCutoff(LennardJones):
    """A control: the same well cut off without a switch."""

    def local(self, numbers, pairs, vectors, n_owned, system_index, total_charge, total_spin, head):
        r = torch.linalg.vector_norm(vectors, dim=1)
        energy = 0.5 * self.pair_energy(r, numbers[pairs[0]], numbers[pairs[1]])
        return {"atom_energy": vectors.new_zeros(n_owned).index_add(0, pairs[0], energy)}


def warm_argon(n=4, edge=4.05, seed=2):
    rng = np.random.default_rng(seed)
    grid = np.array(np.meshgrid(*[range(n)] * 3)).reshape(3, -1).T * edge
    return Atoms(["Ar"] * n**3, grid + rng.normal(scale=0.1, size=grid.shape), cell=[n * edge] * 3, pbc=True)


def nve(potential, dt_fs, time_fs=4000.0):
    """Total energy along NVE: rms about its own line (meV/atom) and drift (meV/atom/ps)."""
    atoms = warm_argon(3)
    system = create_system(topology_from_ase(atoms), potential, remove_cm=False)
    context, _ = context_of(system, atoms, dt_ps=dt_fs * 1e-3)
    context.setVelocitiesToTemperature(90.0, 8)
    stride = round(40.0 / dt_fs)
    energies = []
    for _ in range(round(time_fs / 40.0)):
        context.getIntegrator().step(stride)
        state = context.getState(getEnergy=True)
        energies.append((state.getPotentialEnergy() + state.getKineticEnergy())._value)
    energies = np.array(energies[10:]) / KJ_MOL_PER_EV * 1e3 / len(atoms)
    time_ps = 0.04 * np.arange(len(energies))
    slope, offset = np.polyfit(time_ps, energies, 1)
    return np.std(energies - slope * time_ps - offset), slope


def test_energy_is_conserved_to_the_second_order_of_the_time_step():
    rms, drift = nve(lennard_jones(), 4.0)
    coarse, _ = nve(lennard_jones(), 8.0)
    assert abs(drift) < 0.003
    assert 2.8 < coarse / rms < 5.6
    # Control: without a switch each crossing of the cutoff is a step that no time step cures.
    config = {"epsilon": 0.0103, "sigma": 3.4, "cutoff": 8.0, "switch": 7.0}
    hard = HardCutoff(Spec(name="hard", architecture="test:HardCutoff", config=config, cutoff=8.0))
    broken, _ = nve(hard, 4.0)
    assert broken > 5 * rms


NATIVE_A = {"epsilon": 0.0103, "sigma": 3.4, "cutoff": 8.0, "switch": 7.0}


def native_argon(atoms):
    """The same Lennard-Jones system by OpenMM's own NonbondedForce."""
    system = openmm.System()
    nonbonded = openmm.NonbondedForce()
    nonbonded.setNonbondedMethod(openmm.NonbondedForce.CutoffPeriodic)
    nonbonded.setCutoffDistance(NATIVE_A["cutoff"] / NM)
    nonbonded.setUseSwitchingFunction(True)
    nonbonded.setSwitchingDistance(NATIVE_A["switch"] / NM)
    nonbonded.setUseDispersionCorrection(False)
    for mass in topology_masses(atoms):
        system.addParticle(mass)
        nonbonded.addParticle(0.0, NATIVE_A["sigma"] / NM, NATIVE_A["epsilon"] * KJ_MOL_PER_EV)
    system.setDefaultPeriodicBoxVectors(*topology_from_ase(atoms).getPeriodicBoxVectors())
    system.addForce(nonbonded)
    return system


def topology_masses(atoms):
    return [atom.element.mass for atom in topology_from_ase(atoms).atoms()]


def test_energy_forces_and_pressure_of_openmm_s_own_lennard_jones():
    atoms = warm_argon()
    results = []
    for system in (create_system(topology_from_ase(atoms), lennard_jones(), remove_cm=False), native_argon(atoms)):
        barostat = openmm.MonteCarloBarostat(1.0, 90.0, 0)
        system.addForce(barostat)
        context, _ = context_of(system, atoms)
        context.setVelocitiesToTemperature(90.0, 1)
        results.append((*read(context), barostat.computeCurrentPressure(context)._value))
    (energy, forces, pressure), (expected, theirs, same) = results
    assert abs(energy - expected) < 1e-9 * abs(expected)
    assert np.abs(forces - theirs).max() < 1e-9 * np.abs(theirs).max()
    assert abs(pressure - same) < 1e-6 * abs(same)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_density_of_openmm_s_own_lennard_jones():
    """125 argon atoms, 95 K, 300 bar: the plug and NonbondedForce give one density; a stale box does not."""
    atoms = warm_argon(5, 3.75)

    def density(system, picoseconds=40.0):
        barostat = openmm.MonteCarloBarostat(300.0, 95.0, 10)
        barostat.setRandomNumberSeed(4)
        system.addForce(barostat)
        integrator = openmm.LangevinMiddleIntegrator(95.0, 1.0, 0.005)
        integrator.setRandomNumberSeed(6)
        context = openmm.Context(system, integrator, openmm.Platform.getPlatformByName("Reference"))
        context.setPositions(atoms.positions / NM)
        context.setVelocitiesToTemperature(95.0, 7)
        integrator.step(1600)
        found = []
        for _ in range(round(picoseconds / 0.1)):
            integrator.step(20)
            found.append(context.getState().getPeriodicBoxVolume().value_in_unit(unit.nanometer**3))
        return mean_and_error(len(atoms) / np.array(found), blocks=10)

    topology = topology_from_ase(atoms)
    ours, our_error = density(create_system(topology, lennard_jones(), remove_cm=False))
    theirs, their_error = density(native_argon(atoms), picoseconds=100.0)
    together = np.hypot(our_error, their_error)
    assert together < 0.01 * theirs
    assert abs(ours - theirs) < 4 * together
    print(f"density, 1/nm^3: plug {ours:.3f} +- {our_error:.3f}, native {theirs:.3f} +- {their_error:.3f}")
    stale, stale_error = density(create_system(topology, StaleBox(lennard_jones()), remove_cm=False), picoseconds=6.0)
    assert abs(stale - theirs) > 4 * np.hypot(stale_error, their_error)


def test_a_run_is_the_same_run_again():
    """Two plugs, one seed: bit for bit on the Reference platform."""
    ends = []
    for _ in range(2):
        context, integrator = simulation(warm_argon(3), lennard_jones(), 90.0)
        integrator.step(30)
        ends.append(context.getState(getPositions=True).getPositions(asNumpy=True)._value)
        assert plug_of(context).evaluations >= 30
    assert np.array_equal(*ends)
    assert force(topology_from_ase(warm_argon(3)), lennard_jones()).usesPeriodicBoundaryConditions()
