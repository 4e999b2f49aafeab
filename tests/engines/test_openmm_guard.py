"""What stops a run comes back whole: the guard's refusals, the model's own exceptions, Ctrl-C."""

import signal
import threading

import numpy as np
import openmm
import pytest
import torch
from ase import Atoms
from ase.io import read
from openmm import app

from mdplug.engines.openmm import Simulation, create_system, errors_of, plug_of
from mdplug.engines.openmm.topology import topology_from_ase
from mdplug.errors import InputError, SimulationError
from mdplug.potential import Potential
from mdplug.spec import Spec
from mdplug.units import NM


class Faulty(Potential):
    """Independent harmonic wells at the origin that go wrong in one chosen way from the third call on."""

    def __init__(self, fault=None):
        super().__init__(Spec(name="faulty", architecture="test:Faulty", config={}, cutoff=3.0))
        self.fault, self.calls = fault, 0

    def local(self, numbers, pairs, vectors, n_owned, system_index, total_charge, total_spin, head):
        self.calls += 1
        r2 = vectors.square().sum(dim=1)
        energy = vectors.new_zeros(n_owned).index_add(0, pairs[0], 0.01 * r2)
        if self.calls < 3:
            return {"atom_energy": energy}
        if isinstance(self.fault, BaseException):
            raise self.fault
        if self.fault == "ctrl-c":
            signal.raise_signal(signal.SIGINT)
        if self.fault == "nan energy":
            return {"atom_energy": energy + float("nan")}
        if self.fault == "nan forces":
            return {"atom_energy": energy + (torch.sqrt(r2 - r2) * 1e-300).sum()}
        if self.fault == "huge forces":
            return {"atom_energy": energy * 1e12}
        return {"atom_energy": energy}


def simulation(fault, made=Simulation, **options):
    atoms = Atoms("SiO2Li", [[0, 0, 0], [1.5, 0, 0], [0, 1.6, 0.1], [0.1, 0, 1.7]], cell=[12.0] * 3, pbc=True)
    topology = topology_from_ase(atoms)
    system = create_system(topology, Faulty(fault), **options)
    result = made(topology, system, openmm.VerletIntegrator(0.0005), openmm.Platform.getPlatformByName("Reference"))
    result.context.setPositions(atoms.positions / NM)
    return result


class BoomError(Exception):
    pass


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        (BoomError("out of memory"), BoomError, "out of memory"),
        (KeyError("weights"), KeyError, "weights"),
        (SystemExit(3), SystemExit, "3"),
        ("ctrl-c", KeyboardInterrupt, None),
        ("nan energy", SimulationError, r"step 2: the model's energy is nan"),
        ("nan forces", SimulationError, r"step 2: force not finite on atom 0 \(Si\), 1 \(O\), 2 \(O\), 3 \(Li\)"),
        ("huge forces", SimulationError, r"step 2: force of .* eV/A, limit 10000, on atom"),
    ],
)
def test_the_original_exception_comes_out(fault, error, text):
    run = simulation(fault)
    with pytest.raises(error, match=text) as caught:
        run.step(10)
    assert any("local" in entry.name or "check_result" in entry.name for entry in caught.traceback)
    if isinstance(fault, BaseException):
        assert caught.value is fault
    assert run.context.getStepCount() == 2
    plain = simulation(fault, made=app.Simulation)
    with pytest.raises(openmm.OpenMMException):
        plain.step(10)
    plug_of(plain).potential.calls = 2
    with pytest.raises(error, match=text), errors_of(plain):
        plain.step(10)


def test_the_context_can_be_used_again():
    run = simulation("nan energy")
    with pytest.raises(SimulationError):
        run.step(10)
    plug_of(run).potential.fault = None
    run.step(10)
    assert plug_of(run).error is None


def test_errors_of_others_are_left_alone():
    run = simulation(None)
    with pytest.raises(openmm.OpenMMException, match="parameter"), errors_of(run):
        run.context.setParameter("nothing", 1.0)
    with pytest.raises(ZeroDivisionError), errors_of(run):
        _ = 1 / 0


def test_positions_that_are_not_finite_name_their_atoms():
    run = simulation(None)
    positions = run.context.getState(getPositions=True).getPositions(asNumpy=True)._value.copy()
    positions[[1, 3], 2] = np.nan
    run.context.setPositions(positions)  # (the Reference platform takes them without a word)
    with pytest.raises(SimulationError, match=r"position not finite for atom 1 \(O\), 3 \(Li\)"), errors_of(run):
        run.context.getState(getEnergy=True)


def test_last_good_and_offending_frame_are_saved(tmp_path):
    run = simulation("huge forces", bad_frame=tmp_path / "bad.xyz", max_force_eV_A=50.0)
    with pytest.raises(SimulationError, match="limit 50"):
        run.step(10)
    good, bad = read(tmp_path / "bad.xyz", index=":")
    assert good.info["mdplug_frame"] == "last good"
    assert bad.info["mdplug_frame"] == "offending"
    assert bad.get_chemical_symbols() == ["Si", "O", "O", "Li"]
    assert 0 < np.abs(good.positions - bad.positions).max() < 0.01
    assert np.allclose(bad.cell.array, np.eye(3) * 12.0)
    assert [p.name for p in tmp_path.iterdir()] == ["bad.xyz"]


def test_a_frame_that_cannot_be_saved_does_not_hide_the_error(tmp_path):
    run = simulation("huge forces", bad_frame=tmp_path / "no folder" / "bad.xyz", max_force_eV_A=50.0)
    with pytest.raises(SimulationError, match="limit 50") as caught:
        run.step(10)
    assert "could not be saved" in caught.value.__notes__[0]


def test_minimisation_too():
    run = simulation(BoomError("x"))
    plug_of(run).potential.calls = 2
    with pytest.raises(BoomError):
        run.minimizeEnergy()


def test_overlapping_atoms_are_named():
    atoms = Atoms("Ar3", [[0, 0, 0], [3, 0, 0], [13.0, 0, 0]], cell=[10.0] * 3, pbc=True)
    system = create_system(topology_from_ase(atoms), Faulty())
    run = app.Simulation(topology_from_ase(atoms), system, openmm.VerletIntegrator(0.0005))
    run.context.setPositions(atoms.positions / NM)
    with pytest.raises(InputError, match="atoms 1 and 2 sit on the same point"), errors_of(run):
        run.context.getState(getEnergy=True)


def test_an_interrupt_between_evaluations_stops_the_run():
    run = simulation(None)
    timer = threading.Timer(0.3, signal.raise_signal, args=(signal.SIGINT,))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        run.step(10**7)
    timer.join()
    assert run.context.getStepCount() > 2
