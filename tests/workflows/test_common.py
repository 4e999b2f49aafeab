"""Configs, run folders, structure checks, signals: what tasks share."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.build import bulk, molecule
from ase.io import write

from mdplug.errors import InputError, RunFolderError
from mdplug.workflows._common import (
    Config,
    RunFolder,
    Stopped,
    catch_signals,
    disk_errors,
    live,
    read_config,
    replacing,
    torch_threads,
    write_atomic,
)
from mdplug.workflows._structures import check_structure, read_structures


class Options(Config):
    temperature_K: float = 300.0
    steps: int = 10
    name: str | None = None


# --- configs


def test_given_values_win_over_the_file(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("temperature_K: 350\nsteps: 5\n")
    config = read_config(Options, file, {"steps": 7})
    assert (config.temperature_K, config.steps) == (350.0, 7)
    again = tmp_path / "again.yaml"
    again.write_text(config.to_yaml())
    assert Options.read(again) == config


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        ("temprature_K: 3\n", {}, r"x.yaml: unknown option 'temprature_K'; did you mean temperature_K\?"),
        ("steps: many\n", {}, "x.yaml: steps: .*integer.*'many'"),
        ("a: [1\n", {}, "x.yaml is not YAML"),
        ("- 1\n", {}, "must hold 'key: value' lines, got list"),
        ("", {"steps": 1.5}, "steps: .*integer.*1.5"),
    ],
)
def test_a_wrong_config_is_one_line(tmp_path, text, given, message):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        read_config(Options, file, given)
    assert "\n" not in str(error.value)


def test_a_missing_config_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"nothere\.yaml cannot be read"):
        read_config(Options, tmp_path / "nothere.yaml", {})


# --- run folders


def test_a_run_folder_continues_its_own_run_only(tmp_path):
    given = tmp_path / "input.xyz"
    given.write_text("1\n")
    folder = tmp_path / "run"
    with RunFolder(folder, "md", Options(steps=3), inputs=[given], may_change=["steps"]) as first:
        assert not first.continues
        first.summary(answer=np.float64(1.5), path=given)
    assert yaml.safe_load((folder / "summary.yaml").read_text())["results"] == {"answer": 1.5, "path": str(given)}
    with RunFolder(folder, "md", Options(steps=4), inputs=[given], may_change=["steps"]) as second:
        assert second.continues
    with pytest.raises(RunFolderError, match=r"another run: temperature_K was 300.0, now 310.0"):
        RunFolder(folder, "md", Options(temperature_K=310), inputs=[given], may_change=["steps"])
    with pytest.raises(RunFolderError, match="holds a run of 'mdplug md'"):
        RunFolder(folder, "relax", Options(), inputs=[given], may_change=["steps"])
    given.write_text("2\n")
    with pytest.raises(RunFolderError, match=r"input.xyz has changed since"):
        RunFolder(folder, "md", Options(), inputs=[given], may_change=["steps"])


def test_a_folder_with_other_things_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunFolderError, match="is not empty and holds no mdplug run"):
        RunFolder(tmp_path, "md", Options())
    assert [one.name for one in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_run_folder_is_refused(tmp_path):
    RunFolder(tmp_path, "md", Options()).close()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunFolderError, match="holds a damaged run"):
        RunFolder(tmp_path, "md", Options())


def test_two_processes_do_not_share_a_folder(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from mdplug.workflows._common import Config, RunFolder\n"
        "folder = RunFolder(Path(sys.argv[1]), 'md', Config()); print('have it', flush=True); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "have it\n"
        with pytest.raises(RunFolderError, match="in use by another process"):
            RunFolder(tmp_path / "run", "md", Config())
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    RunFolder(tmp_path / "run", "md", Config()).close()  # the lock died with its process


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "x.txt"
    write_atomic(path, "old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("ne")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line(tmp_path):
    with (
        pytest.raises(RunFolderError, match=r"cannot write .*x: No space left on device; make room"),
        disk_errors(tmp_path / "x"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_really_full_device_is_one_line():
    with pytest.raises(RunFolderError, match="No space left on device"), disk_errors(Path("/dev/full")):
        Path("/dev/full").write_text("x" * 100_000)


def test_a_folder_that_cannot_be_made_is_one_line():
    with pytest.raises(RunFolderError, match="cannot write /proc/nobody/run"):
        RunFolder(Path("/proc/nobody/run"), "md", Options())


# --- structures


def write_xyz(folder: Path, atoms: Atoms) -> Path:
    path = folder / "x.xyz"
    write(path, atoms, format="extxyz")
    return path


def refused(folder: Path, atoms: Atoms) -> str:
    with pytest.raises(InputError) as error:
        read_structures(write_xyz(folder, atoms))
    assert "x.xyz" in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_good_structures_pass(tmp_path):
    water = molecule("H2O")
    crystal = bulk("Si")
    for atoms in (water, crystal, molecule("H2"), Atoms("Ar"), bulk("Ar", "fcc", a=5.4)):
        assert len(read_structures(write_xyz(tmp_path, atoms))) == 1
    path = tmp_path / "two.xyz"
    write(path, [water, crystal], format="extxyz")
    assert [len(one) for one in read_structures(path)] == [3, 2]


def test_bad_structures_are_named(tmp_path):
    water = molecule("H2O")
    lost = water.copy()
    lost.positions[2, 0] = np.nan
    assert "atom 2 has a position that is not finite" in refused(tmp_path, lost)
    assert "no cell along a periodic direction" in refused(tmp_path, Atoms("Ar", pbc=True))
    overlap = water + Atoms("Li", [water.positions[1] + [0.1, 0, 0]])
    assert "atoms 1 and 3 overlap, 0.100 A apart" in refused(tmp_path, overlap)
    assert "sit on the same point" in refused(tmp_path, water + Atoms("Li", water.positions[1:2]))
    dummy = Atoms("XAr", [[0, 0, 0], [4, 0, 0]])
    assert "atom 0 has atomic number 0" in refused(tmp_path, dummy)


def test_positions_in_nanometres_are_recognised(tmp_path):
    for atoms in (molecule("C6H6"), bulk("Si", cubic=True) * (2, 2, 2)):
        scaled = atoms.copy()
        scaled.positions *= 0.1
        scaled.set_cell(atoms.cell * 0.1)
        assert "lengths in nm" in refused(tmp_path, scaled)
    # The control: one short contact in a good structure is an overlap, not a unit.
    atoms = molecule("C6H6") + Atoms("Li", [molecule("C6H6").positions[0] + [0, 0, 0.2]])
    assert "overlap" in refused(tmp_path, atoms)


def test_a_tiny_cell_meets_its_own_image(tmp_path):
    assert "(its own periodic image) overlap, 0.300 A" in refused(tmp_path, Atoms("Ar", cell=[0.3, 9, 9], pbc=True))
    check_structure(Atoms("Ar", cell=[0.3, 9, 9]), "not periodic: fine")


@pytest.mark.parametrize("text", ["", "0\n\n", "garbage\n", "3\ncomment\nO 0 0 0\n"])
def test_broken_files_are_named(tmp_path, text):
    path = tmp_path / "x.xyz"
    path.write_text(text)
    with pytest.raises(InputError, match=r"x\.xyz"):
        read_structures(path)
    with pytest.raises(InputError, match="no structure file"):
        read_structures(tmp_path / "nothere.cif")


# --- signals, threads, progress


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_signals_are_noted_and_handlers_put_back(number, code):
    before = signal.getsignal(number)
    with catch_signals() as caught:
        assert caught.number is None
        os.kill(os.getpid(), number)
        assert caught.number == number
        assert caught.name == signal.Signals(number).name
    assert signal.getsignal(number) is before
    assert Stopped(number, "x").exit_code == code


def test_a_second_interrupt_is_obeyed_at_once():
    with catch_signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with torch_threads(1) as used:
        assert used == torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_progress_in_a_log_file_is_lines(capsys):
    with live("md", every_s=0.0) as progress:
        progress(1, 3, "300 K")
        progress(3, 3, "done")
    assert capsys.readouterr().err == "md 1/3 300 K\nmd 3/3 done\n"
