"""The md task: physics of what it writes, exact restarts, the guard, bad input."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mdtraj
import numpy as np
import pytest
import yaml
from argon import crystal, crystal_file, model_file
from ase import Atoms, units
from ase.build import bulk
from ase.io import read, write

import mdplug
from mdplug import Calculator
from mdplug.errors import InputError, RunFolderError, SimulationError
from mdplug.potentials.pair import Morse
from mdplug.units import BAR, BOLTZMANN
from mdplug.workflows import md
from mdplug.workflows._bonds import bond_lengths, bonds_of, broken_bonds, made_whole
from mdplug.workflows._common import Stopped
from mdplug.workflows.md_files import read_log

SHORT = {"temperature_K": 80, "timestep_fs": 2, "time_ps": 0.12, "log_ps": 0.01, "frame_ps": 0.02}
SHORT |= {"checkpoint_ps": 0.04, "barostat_steps": 5}
WRITTEN = ("log.csv", "final.extxyz", "topology.pdb")


@pytest.fixture
def config(tmp_path):
    """A factory of configs on rattled argon."""
    base = {"structure": crystal_file(tmp_path), "model": str(model_file(tmp_path)), **SHORT}

    def make(name: str = "run", **options) -> md.Config:
        return md.Config(**{**base, "output": tmp_path / name, **options})

    return make


def same_files(one: Path, other: Path, trajectory: str) -> None:
    for name in (*WRITTEN, trajectory):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


# --- what is written


@pytest.mark.parametrize("engine", ["openmm", "ase"])
@pytest.mark.parametrize("ensemble", ["nve", "nvt", "npt"])
def test_a_run_writes_what_it_promises(config, engine, ensemble):
    seen = []
    result = md.run(config(engine=engine, ensemble=ensemble), progress=lambda *said: seen.append(said))
    assert (result.steps, result.frames, result.bonds_broken, result.continued) == (60, 7, 0, False)
    assert result.ns_per_day > 0
    assert seen[-1][:2] == (60, 60)
    assert "ns/day" in seen[-1][2]
    assert {"config.yaml", "log.csv", "log.png", "summary.yaml", "checkpoint.npz", *WRITTEN} <= set(
        os.listdir(result.folder)
    )
    log = result.log
    np.testing.assert_allclose(log["time_ps"], np.arange(13) * 0.01, atol=1e-9)
    assert (np.ptp(log["volume_A3"]) > 0) == (ensemble == "npt")
    np.testing.assert_allclose(log["total_energy_eV"], log["potential_energy_eV"] + log["kinetic_energy_eV"], atol=2e-8)
    trace = (log["pressure_xx_bar"] + log["pressure_yy_bar"] + log["pressure_zz_bar"]) / 3
    np.testing.assert_allclose(log["pressure_bar"], trace, rtol=1e-4, atol=0.01)
    if ensemble == "nve":
        assert np.std(log["total_energy_eV"]) < 0.03 * np.std(log["potential_energy_eV"])
    # The last line of the log is what the potential itself says about the last structure.
    final = read(result.folder / "final.extxyz")
    final.calc = Calculator(config().model)
    assert final.get_potential_energy() == pytest.approx(log["potential_energy_eV"][-1], abs=1e-6)
    kinetic = 2 * final.get_kinetic_energy() / 3 / final.get_volume()
    expected = (kinetic - final.get_stress()[:3].mean()) / BAR
    assert log["pressure_bar"][-1] == pytest.approx(expected, rel=1e-4, abs=0.5)
    trajectory = mdtraj.load(str(result.trajectory), top=str(result.folder / "topology.pdb"))
    assert trajectory.n_frames == 7
    np.testing.assert_allclose(trajectory.time, np.arange(7) * 0.02, atol=1e-6)
    np.testing.assert_allclose(trajectory.xyz[-1] * 10, final.positions, atol=0.006)
    np.testing.assert_allclose(trajectory.unitcell_lengths[-1] * 10, final.cell.lengths(), atol=1e-4)
    record = yaml.safe_load((result.folder / "summary.yaml").read_text())
    assert record["results"]["restart_exact"]
    assert len(record["inputs_sha256"]) == 2
    assert record["versions"]["mdplug"] == mdplug.__version__


def test_both_engines_start_from_the_same_numbers(config):
    rows = []
    for engine in ("openmm", "ase"):
        log = md.run(config(engine, engine=engine, minimise=False, time_ps=0.01)).log
        kinetic_bar = 2 * log["kinetic_energy_eV"][0] / 3 / log["volume_A3"][0] / BAR
        rows.append((log["potential_energy_eV"][0], log["volume_A3"][0], log["pressure_bar"][0] - kinetic_bar))
        freedom = 3 * 32 - (3 if engine == "openmm" else 0)
        expected = 2 * log["kinetic_energy_eV"][0] / freedom / BOLTZMANN
        assert log["temperature_K"][0] == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-5)


@pytest.mark.parametrize("kind", ["dcd", "extxyz"])
def test_other_trajectory_formats(config, kind):
    result = md.run(config(format=kind))
    final = read(result.folder / "final.extxyz")
    if kind == "dcd":
        trajectory = mdtraj.load(str(result.trajectory), top=str(result.folder / "topology.pdb"))
        assert trajectory.n_frames == 7
        np.testing.assert_allclose(trajectory.xyz[-1] * 10, final.positions, atol=1e-4)
        np.testing.assert_allclose(trajectory.unitcell_lengths[-1] * 10, final.cell.lengths(), atol=1e-4)
    else:
        frames = read(result.trajectory, index=":")
        assert [frame.info["step"] for frame in frames] == list(range(0, 61, 10))
        np.testing.assert_allclose(frames[-1].positions, final.positions, atol=1e-7)
        np.testing.assert_allclose(frames[-1].get_forces(), final.get_forces(), atol=1e-7)


@pytest.mark.parametrize("engine", ["openmm", "ase"])
def test_a_triclinic_cell_comes_back_as_it_was_given(config, tmp_path, engine):
    atoms = bulk("Ar", "fcc", a=5.4) * (3, 3, 3)  # vectors along no axis
    atoms.rattle(0.1, seed=2)
    write(tmp_path / "tilted.xyz", atoms, format="extxyz")
    result = md.run(config(structure=tmp_path / "tilted.xyz", engine=engine, minimise=False, time_ps=0.004))
    final = read(result.folder / "final.extxyz")
    assert np.abs(final.positions - atoms.positions).max() < 0.05  # two steps: no rotation is left
    atoms.calc = Calculator(config().model)
    assert result.log["potential_energy_eV"][0] == pytest.approx(atoms.get_potential_energy(), abs=1e-6)


def test_one_atom_and_an_open_cluster(config, tmp_path):
    write(tmp_path / "one.xyz", Atoms("Ar"), format="extxyz")
    result = md.run(config("one", structure=tmp_path / "one.xyz", time_ps=0.02))
    assert np.isfinite(result.log["temperature_K"]).all()
    assert np.isnan(result.log["volume_A3"]).all()
    write(tmp_path / "two.xyz", Atoms("Ar2", [[0, 0, 0], [3.9, 0, 0]]), format="extxyz")
    for engine in ("openmm", "ase"):
        result = md.run(config(engine, structure=tmp_path / "two.xyz", ensemble="nve", engine=engine, temperature_K=10))
        assert np.std(result.log["total_energy_eV"]) < 1e-5
    with pytest.raises(InputError, match="barostat needs a periodic system"):
        md.run(config("npt", structure=tmp_path / "two.xyz", ensemble="npt"))


# --- restarts


def killed(arguments: list[str], log: Path, rows: int) -> None:
    """Start the command, kill -9 it when its log has so many rows."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mdplug.cli", *arguments], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    for _ in range(6000):
        if log.exists() and log.read_text().count("\n") > rows:
            break
        if process.poll() is not None:
            raise AssertionError("the run ended before it could be killed")
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("engine", "ensemble", "kind"), [("openmm", "npt", "xtc"), ("openmm", "nvt", "dcd"), ("ase", "npt", "extxyz")]
)
def test_killed_and_continued_equals_never_stopped(config, tmp_path, engine, ensemble, kind):
    options = {"engine": engine, "ensemble": ensemble, "format": kind, "time_ps": 0.6, "checkpoint_ps": 0.08}
    whole = md.run(config("whole", **options))
    again = config("again", **options)
    (tmp_path / "again.yaml").write_text(again.to_yaml())
    killed(["md", "--config", str(tmp_path / "again.yaml")], again.output / "log.csv", 20)
    rows = (again.output / "log.csv").read_text().count("\n")
    assert 20 < rows < 62
    result = md.run(again)
    assert result.continued
    assert result.frames == whole.frames
    same_files(whole.folder, result.folder, f"trajectory.{kind}")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize(("engine", "ensemble"), [("openmm", "npt"), ("openmm", "nvt"), ("ase", "nvt")])
def test_a_signal_stops_in_good_order(config, number, engine, ensemble):
    whole = md.run(config("whole", engine=engine, ensemble=ensemble))
    again = config("again", engine=engine, ensemble=ensemble)

    def progress(done: int, total: int, text: str) -> None:
        if 30 <= done < 40:
            os.kill(os.getpid(), number)

    with pytest.raises(Stopped, match=f"stopped by {signal.Signals(number).name} at step") as stopped:
        md.run(again, progress=progress)
    assert stopped.value.exit_code == (130 if number == signal.SIGINT else 75)
    result = md.run(again)
    assert result.continued
    same_files(whole.folder, result.folder, "trajectory.xtc")


def test_the_same_command_after_the_end_does_nothing_and_a_longer_one_goes_on(config):
    first = md.run(config())
    before = {name: (first.folder / name).read_bytes() for name in ("log.csv", "trajectory.xtc")}
    second = md.run(config())
    assert second.continued
    assert np.isnan(second.ns_per_day)
    assert {name: (first.folder / name).read_bytes() for name in before} == before
    third = md.run(config(time_ps=0.2))
    assert (third.steps, third.frames) == (100, 11)
    assert (third.folder / "log.csv").read_bytes().startswith(before["log.csv"])
    whole = md.run(config("whole", time_ps=0.2))
    same_files(whole.folder, third.folder, "trajectory.xtc")  # NVT: exact at any step


def test_another_seed_is_another_run(config):
    one, other = md.run(config("a", time_ps=0.02)), md.run(config("b", time_ps=0.02, seed=2))
    assert (one.folder / "log.csv").read_bytes() != (other.folder / "log.csv").read_bytes()


def test_a_checkpoint_of_another_platform_keeps_the_motion(config):
    import openmm

    names = [openmm.Platform.getPlatform(k).getName() for k in range(openmm.Platform.getNumPlatforms())]
    assert "CPU" in names
    first = md.run(config(ensemble="nve"))
    shutil.copytree(first.folder, first.folder.with_name("moved"))
    text = (first.folder / "config.yaml").read_text().replace("platform: null", "platform: CPU")
    (first.folder.with_name("moved") / "config.yaml").write_text(text)
    moved = md.run(config("moved", ensemble="nve", platform="CPU", time_ps=0.16))
    stayed = md.run(config(ensemble="nve", time_ps=0.16))
    record = yaml.safe_load((moved.folder / "summary.yaml").read_text())
    assert record["results"]["restart_exact"] is False
    np.testing.assert_allclose(moved.log["potential_energy_eV"], stayed.log["potential_energy_eV"], atol=1e-4)


# --- molecules


def dimers(spacing: float = 5.0, number: int = 2) -> Atoms:
    """Molecules of two atoms, some of them cut by the box."""
    places = np.stack(np.meshgrid(*[np.arange(number)] * 3, indexing="ij"), -1).reshape(-1, 3) * spacing
    atoms = Atoms(f"N{2 * len(places)}", np.repeat(places, 2, axis=0), cell=[number * spacing] * 3, pbc=True)
    atoms.positions[1::2, 0] += 1.1
    atoms.positions[:, 0] -= 0.5
    atoms.info["bonds"] = [[2 * k, 2 * k + 1] for k in range(len(places))]
    atoms.wrap()
    return atoms


def test_molecules_stay_whole_and_broken_bonds_are_counted(config, tmp_path):
    atoms = dimers()
    assert np.abs(atoms.positions[0] - atoms.positions[1]).max() > 5  # cut
    write(tmp_path / "n2.xyz", atoms, format="extxyz")
    morse = mdplug.save(Morse.new(9.9, 2.7, 1.1, cutoff=4.0, switch=3.0), tmp_path / "morse.safetensors")
    options = {"structure": tmp_path / "n2.xyz", "model": str(morse), "timestep_fs": 0.5, "temperature_K": 300}
    result = md.run(config(ensemble="npt", time_ps=0.05, **options))
    assert result.bonds_broken == 0
    trajectory = mdtraj.load(str(result.trajectory), top=str(result.folder / "topology.pdb"))
    assert trajectory.n_residues == 8
    assert trajectory.topology.n_bonds == 8
    length = np.linalg.norm(trajectory.xyz[:, 1::2] - trajectory.xyz[:, ::2], axis=2) * 10
    assert 0.9 < length.min() < length.max() < 1.4  # never cut by the box
    assert bonds_of(read(result.folder / "final.extxyz")) == bonds_of(atoms)  # it can be the start of another run
    # The control: a bond too weak for the temperature breaks, and is counted.
    weak = mdplug.save(Morse.new(0.02, 2.7, 1.1, cutoff=4.0, switch=3.0), tmp_path / "weak.safetensors")
    result = md.run(config("weak", **{**options, "model": str(weak), "temperature_K": 1500, "time_ps": 0.15}))
    assert result.bonds_broken >= 3


def test_bonds_are_read_or_guessed(tmp_path):
    atoms = dimers()
    given = bonds_of(atoms)
    del atoms.info["bonds"]
    assert bonds_of(atoms) == given
    whole = made_whole(atoms, given)
    np.testing.assert_allclose(np.linalg.norm(whole.positions[1::2] - whole.positions[::2], axis=1), 1.1)
    np.testing.assert_allclose(bond_lengths(atoms, given), 1.1)
    assert bonds_of(bulk("Si", cubic=True) * (2, 2, 2)) == []  # a network without end is no molecule
    assert bonds_of(bulk("Cu")) == []
    stretched = whole.positions.copy()
    stretched[7, 0] += 1.0
    assert list(broken_bonds(stretched, whole.cell.array, given, np.full(8, 1.1))) == [3]
    atoms.info["bonds"] = [[0, 99]]
    with pytest.raises(InputError, match="name atoms beyond its 16"):
        bonds_of(atoms)


def test_heavier_hydrogens_need_openmm(config):
    with pytest.raises(InputError, match="hydrogen_mass_amu works with engine openmm only"):
        md.run(config(engine="ase", hydrogen_mass_amu=3.0))


# --- the guard


@pytest.mark.parametrize("engine", ["openmm", "ase"])
def test_a_force_over_the_limit_stops_the_run_and_names_atoms(config, engine):
    with pytest.raises(SimulationError, match=r"eV/A, limit 0.05, on atom \d+ \(Ar\).*last good frame") as error:
        md.run(config(engine=engine, max_force_eV_A=0.05, minimise_fmax_eV_A=0.01, temperature_K=300, time_ps=1.0))
    assert "\n" not in str(error.value)
    last = read(config().output / "last_good.extxyz")
    assert np.isfinite(last.positions).all()
    assert len(last) == 32
    # A start that is over the limit already is refused at once; there is no good frame to keep.
    with pytest.raises(SimulationError, match=r"step 0: force of .* relax the structure first"):
        md.run(config("hard", engine=engine, max_force_eV_A=0.001, minimise=False))


@pytest.mark.parametrize("engine", ["openmm", "ase"])
def test_atoms_that_fly_apart_stop_the_run(config, engine):
    with pytest.raises(SimulationError, match=r"step \d+: atoms fly apart: .* eV of kinetic energy on atom \d+ \(Ar\)"):
        md.run(config(engine=engine, max_atom_energy_eV=0.05, temperature_K=300))


def test_finished_output_survives_the_guard(config):
    done = md.run(config())
    before = (done.folder / "log.csv").read_bytes()
    with pytest.raises(RunFolderError, match="another run"):
        md.run(config(max_force_eV_A=0.001))
    with pytest.raises(SimulationError):
        md.run(config("hot", temperature_K=3e5, timestep_fs=10, time_ps=2.0))
    assert (done.folder / "log.csv").read_bytes() == before
    assert read_log(config("hot").output / "log.csv")["step"][0] == 0


# --- bad input


def test_bad_input_is_one_line_before_anything_is_written(config, tmp_path):
    write(tmp_path / "water.xyz", Atoms("OH2", [[0, 0, 0], [0.96, 0, 0], [-0.24, 0.93, 0]]), format="extxyz")
    from mdplug.potentials.stillinger_weber import StillingerWeber

    silicon = mdplug.save(StillingerWeber.new(), tmp_path / "sw.safetensors")
    cases = [
        ({"structure": tmp_path / "nothere.xyz"}, InputError, "no structure file"),
        ({"model": "nomodel"}, InputError, "no model file 'nomodel'"),
        ({"model": str(silicon)}, InputError, "atom 0 is Ar"),
        ({"device": "abacus"}, InputError, "unknown device"),
        ({"platform": "Abacus"}, InputError, "OpenMM has no platform 'Abacus'"),
        ({"head": "mp"}, InputError, "has no head 'mp'"),
    ]
    for options, kind, message in cases:
        with pytest.raises(kind, match=message) as error:
            md.run(config(**options))
        assert "\n" not in str(error.value)
        shutil.rmtree(config().output, ignore_errors=True)


def test_a_full_disk_in_mid_run_is_one_line_and_the_run_goes_on_afterwards(config, tmp_path):
    options = {"time_ps": 0.4, "log_ps": 0.002, "ensemble": "npt"}
    whole = md.run(config("whole", **options))
    again = config("again", **options)
    (tmp_path / "again.yaml").write_text(again.to_yaml())
    limit = (whole.folder / "log.csv").stat().st_size // 2  # room for checkpoints, not for the whole log
    assert (whole.folder / "checkpoint.npz").stat().st_size < limit
    done = subprocess.run(
        [sys.executable, "-m", "mdplug.cli", "md", "--config", str(tmp_path / "again.yaml")],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "mdplug: cannot write" in done.stderr.splitlines()[-1]
    result = md.run(again)
    same_files(whole.folder, result.folder, "trajectory.xtc")


def test_temperature_units_of_ase_and_ours_agree(config):
    """Velocities in final.extxyz give the temperature of the log's last line."""
    result = md.run(config(engine="ase"))
    final = read(result.folder / "final.extxyz")
    kinetic = final.get_kinetic_energy()
    assert result.log["kinetic_energy_eV"][-1] == pytest.approx(kinetic, rel=1e-6)
    assert units.kB == pytest.approx(BOLTZMANN, rel=1e-5)
    assert len(crystal()) == 32
