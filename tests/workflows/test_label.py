"""Labels: right numbers, one label per structure whatever kills the run, clear refusals."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.io import read, write

from mdplug.errors import InputError, MissingExtraError, RunFolderError, SimulationError
from mdplug.workflows import label
from mdplug.workflows.xtb import XTB

pytest.importorskip("tblite")


def water(seed=0, charge=0):
    atoms = molecule("H2O")
    atoms.rattle(0.03, seed=seed)
    atoms.info = {"charge": charge, "spin": 1}
    return atoms


def test_forces_are_the_derivative_of_the_energy_and_charges_add_up():
    atoms = water()
    atoms.calc = XTB(accuracy=0.01)
    forces, step = atoms.get_forces(), 1e-3
    for i, axis in ((0, 2), (1, 1), (2, 0)):
        energies = []
        for sign in (1, -1):
            probe = atoms.copy()
            probe.positions[i, axis] += sign * step
            probe.calc = XTB(accuracy=0.01)
            energies.append(probe.get_potential_energy())
        assert forces[i, axis] == pytest.approx(-(energies[0] - energies[1]) / (2 * step), abs=2e-4)
    charges = atoms.get_charges()
    assert charges.sum() == pytest.approx(0, abs=1e-6)
    assert charges[0] < -0.3
    # GFN2-xTB water: the dipole is about 2.2 D; at the geometry of ase.build it must lie along the symmetry axis.
    straight = molecule("H2O", info={"charge": 0})
    straight.calc = XTB()
    dipole = straight.get_dipole_moment() / 0.20819433442462576
    assert 1.9 < np.linalg.norm(dipole) < 2.6
    assert abs(dipole[:2]).max() < 1e-4


def test_charge_and_spin_reach_the_calculation():
    ion = Atoms("Li", info={"charge": 1, "spin": 1})
    atom = Atoms("Li", info={"charge": 0, "spin": 2})
    shared = XTB()  # same numbers and positions: a cached result would be the other's
    for atoms in (ion, atom):
        atoms.calc = shared
    # Li: 5.39 eV measured; GFN-xTB ionisation energies lie about 4.85 eV too high (Neugebauer et al., 2020).
    assert ion.get_potential_energy() - atom.get_potential_energy() - 4.846 == pytest.approx(5.39, abs=1.5)
    assert ion.get_charges()[0] == pytest.approx(1)
    wrong = Atoms("Li", info={"charge": 0, "spin": 1})
    wrong.calc = XTB()
    with pytest.raises(InputError, match="spin"):
        wrong.get_potential_energy()
    unknown = molecule("H2O")
    unknown.calc = XTB()
    with pytest.raises(InputError, match="charge"):
        unknown.get_potential_energy()


def test_a_warm_start_gives_the_same_forces():
    warm = XTB(restart=True)
    for seed in range(3):
        atoms, fresh = water(seed), water(seed)
        atoms.calc, fresh.calc = warm, XTB()
        np.testing.assert_allclose(atoms.get_forces(), fresh.get_forces(), atol=2e-4)
    other = Atoms("Li", info={"charge": 1})
    other.calc = warm
    assert np.isfinite(other.get_potential_energy())


def test_periodic_stress_is_the_derivative_by_strain():
    atoms = molecule("H2O", info={"charge": 0}, cell=[4.5, 5.0, 5.5], pbc=True)
    atoms.calc = XTB(accuracy=0.01)
    stress, step = atoms.get_stress(), 1e-3
    for voigt, (i, j) in ((0, (0, 0)), (3, (1, 2))):
        energies = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[i, j] += sign * step / (1 if i == j else 2)
            strain[j, i] = strain[i, j]
            probe = atoms.copy()
            probe.set_cell(np.asarray(atoms.cell) @ strain, scale_atoms=True)
            probe.calc = XTB(accuracy=0.01)
            energies.append(probe.get_potential_energy())
        expected = (energies[0] - energies[1]) / (2 * step) / atoms.get_volume()
        assert stress[voigt] == pytest.approx(expected, abs=2e-5)
    assert np.abs(stress).max() > 1e-3


def test_no_convergence_is_an_error_that_names_the_structure():
    atoms = water()
    atoms.calc = XTB(max_iterations=1)
    with pytest.raises(SimulationError, match="H2O"):
        atoms.get_potential_energy()


def test_run_labels_files_and_a_second_call_computes_nothing(tmp_path):
    source = tmp_path / "in.xyz"
    write(source, [water(s) for s in range(4)])
    config = label.Config(inputs=(source,), output=tmp_path / "out")
    first = label.run(config)
    assert (first.n_labelled, first.n_failed, first.n_new) == (4, 0, 4)
    frames = read(first.labels, ":")
    for seed, frame in enumerate(frames):
        check = water(seed)
        check.calc = XTB()
        assert frame.info["REF_energy"] == pytest.approx(check.get_potential_energy(), abs=1e-6)
        np.testing.assert_allclose(frame.arrays["REF_forces"], check.get_forces(), atol=1e-6)
        assert frame.arrays["REF_charges"].shape == (3,)
        assert np.asarray(frame.info["REF_dipole"]).shape == (3,)
        assert (frame.info["charge"], frame.info["spin"], frame.info["method"]) == (0, 1, "GFN2-xTB")
    second = label.run(config)
    assert (second.n_new, second.n_labelled, second.sha256) == (0, 4, first.sha256)


def test_workers_give_the_same_file(tmp_path):
    source = tmp_path / "in.xyz"
    write(source, [water(s) for s in range(9)])
    one = label.run(label.Config(inputs=(source,), output=tmp_path / "one"))
    two = label.run(label.Config(inputs=(source,), output=tmp_path / "two", workers=2))
    assert two.n_labelled == 9
    assert two.sha256 == one.sha256


def test_a_recipe_is_sampled_labelled_and_can_grow(tmp_path):
    pytest.importorskip("rdkit")
    recipe = tmp_path / "small.yaml"
    text = (
        "name: small\nseed: 4\ntasks:\n"
        "- {kind: molecules, name: w, molecules: [water], starts_each: 4, "
        "dynamics: {steps: 4, save_every: 2, temperatures_K: [300]}}\n"
        "- {kind: atoms, name: a, species: {H: [0, 2]}}\n"
    )
    recipe.write_text(text)
    whole = label.run(label.Config(inputs=(recipe,), output=tmp_path / "whole"))
    frames = read(whole.labels, ":")
    assert len(frames) == whole.n_labelled == 4 * 2 * 2 + 1
    assert {f.info["group"] for f in frames} == {"w-00000", "w-00001", "w-00002", "w-00003", "a-00000"}
    recipe.write_text(text + "first_starts: 2\n")
    part = label.run(label.Config(inputs=(recipe,), output=tmp_path / "part"))
    for a, b in zip(read(part.labels, ":"), frames, strict=False):
        assert a.info["group"] == b.info["group"]
        np.testing.assert_allclose(a.positions, b.positions, atol=1e-6)
        assert a.info["REF_energy"] == pytest.approx(b.info["REF_energy"], abs=1e-4)


def test_failed_scf_is_kept_aside_and_counted(tmp_path):
    source = tmp_path / "in.xyz"
    write(source, [water(0), water(1)])
    result = label.run(label.Config(inputs=(source,), output=tmp_path / "out", max_iterations=1))
    assert (result.n_labelled, result.n_failed) == (0, 2)
    failed = read(result.failed, ":")
    assert len(failed) == 2
    assert "SimulationError" in failed[0].info["error"]


def test_what_is_no_failed_scf_ends_the_run(tmp_path, monkeypatch):
    source = tmp_path / "in.xyz"
    write(source, water(0))
    config = label.Config(inputs=(source,), output=tmp_path / "out")
    monkeypatch.setitem(sys.modules, "tblite.interface", None)
    with pytest.raises(MissingExtraError, match="label"):
        label.run(config)
    monkeypatch.undo()
    assert label.run(config).n_labelled == 1
    write(source, water(0, charge=1))
    with pytest.raises(InputError, match="spin"):
        label.run(label.Config(inputs=(source,), output=tmp_path / "odd"))


def test_periodic_structures_get_a_stress_and_no_dipole(tmp_path):
    source = tmp_path / "in.xyz"
    atoms = molecule("H2O", info={"charge": 0}, cell=[4.5, 5.0, 5.5], pbc=True)
    write(source, atoms)
    frame = read(label.run(label.Config(inputs=(source,), output=tmp_path / "out")).labels)
    atoms.calc = XTB()
    np.testing.assert_allclose(np.asarray(frame.info["REF_stress"]), atoms.get_stress(voigt=False), atol=1e-6)
    assert "REF_dipole" not in frame.info


def test_large_forces_are_left_out_and_counted(tmp_path):
    source = tmp_path / "in.xyz"
    squeezed = molecule("H2O", info={"charge": 0})
    squeezed.positions *= 0.6
    write(source, [water(0), squeezed])
    result = label.run(label.Config(inputs=(source,), output=tmp_path / "out", fmax_eV_A=20))
    assert (result.n_labelled, result.n_left_out) == (1, 1)


def test_any_ase_calculator_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "shifted_calculator.py").write_text(
        "from ase.calculators.emt import EMT\n"
        "class Shifted(EMT):\n"
        "    def __init__(self, shift_eV):\n        super().__init__()\n        self.shift = shift_eV\n"
        "    def calculate(self, *a, **k):\n        super().calculate(*a, **k)\n"
        "        self.results['energy'] += self.shift\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    source = tmp_path / "in.xyz"
    write(source, Atoms("Cu2", [[0, 0, 0], [0, 0, 2.3]]))
    energies = []
    for shift in (0.0, 1.5):
        config = label.Config(
            inputs=(source,),
            output=tmp_path / f"out{shift}",
            method="ase",
            calculator="shifted_calculator:Shifted",
            calculator_kwargs={"shift_eV": shift},
            charge=0,
        )
        frame = read(label.run(config).labels)
        assert "REF_charges" not in frame.arrays
        energies.append(frame.info["REF_energy"])
    assert energies[1] - energies[0] == pytest.approx(1.5)
    with pytest.raises(InputError, match="no_such_module"):
        label.run(config.model_copy(update={"calculator": "no_such_module:x", "output": tmp_path / "bad"}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.info.pop("charge"), "charge is unknown"),
        (lambda a: a.positions.__setitem__((1, 0), np.nan), "atom 1"),
        (lambda a: a.__delitem__([0, 1, 2]), "at least one atom"),
    ],
)
def test_bad_frames_are_refused_by_name(tmp_path, change, message):
    frames = [water(0), water(1)]
    change(frames[1])
    source = tmp_path / "in.xyz"
    write(source, frames)
    with pytest.raises(InputError, match=f"in.xyz.*frame 1.*{message}"):
        label.run(label.Config(inputs=(source,), output=tmp_path / "out"))


def test_no_structure_file_and_no_recipe_are_refused(tmp_path):
    (tmp_path / "noise.xyz").write_text("not a structure\n")
    with pytest.raises(InputError, match=r"noise\.xyz"):
        label.run(label.Config(inputs=(tmp_path / "noise.xyz",), output=tmp_path / "out"))
    with pytest.raises(InputError, match=r"missing\.yaml"):
        label.run(label.Config(inputs=(tmp_path / "missing.yaml",), output=tmp_path / "out"))
    (tmp_path / "bad.yaml").write_text(
        "name: x\nseed: 1\ntasks: [{kind: bonds, name: b, molecules: [EC], colour: red}]\n"
    )
    with pytest.raises(InputError, match="colour"):
        label.run(label.Config(inputs=(tmp_path / "bad.yaml",), output=tmp_path / "out"))
    with pytest.raises(ValueError, match="not both"):
        label.Config(inputs=(tmp_path / "bad.yaml", tmp_path / "noise.xyz"))


def test_a_folder_of_another_run_is_refused(tmp_path):
    source = tmp_path / "in.xyz"
    write(source, water(0))
    label.run(label.Config(inputs=(source,), output=tmp_path / "out"))
    with pytest.raises(RunFolderError, match="hamiltonian"):
        label.run(label.Config(inputs=(source,), output=tmp_path / "out", hamiltonian="GFN1-xTB"))
    write(source, water(1))
    with pytest.raises(RunFolderError, match="changed"):
        label.run(label.Config(inputs=(source,), output=tmp_path / "out"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunFolderError, match="cannot write"):
        label.run(label.Config(inputs=(source,), output=tmp_path / "file"))


RUN = """
import sys
from pathlib import Path
from mdplug.workflows import label

def show(done, total, text):
    print(done, flush=True)

if __name__ == "__main__":
    config = label.Config(inputs=(Path(sys.argv[1]),), output=Path(sys.argv[2]), workers=int(sys.argv[3]))
    label.run(config, progress=show)
"""


@pytest.mark.parametrize("workers", [1, 2])
def test_kill_9_loses_nothing_and_repeats_nothing(tmp_path, workers):
    source, script, out = tmp_path / "in.xyz", tmp_path / "go.py", tmp_path / "out"
    write(source, [water(s) for s in range(150)])
    script.write_text(RUN)
    command = [sys.executable, str(script), str(source), str(out), str(workers)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    for line in process.stdout:
        if int(line) >= 20:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    entries = (out / "ledger.jsonl").read_text().splitlines()
    kept = sum(1 for line in entries if line.endswith("}"))
    assert 20 <= kept < 150
    # What a crash in mid-write leaves behind: half a record, half a ledger line.
    with (out / "labels.partial.extxyz").open("ab") as handle:
        handle.write(b"3\nProperties=species:S:1:pos:R:3 REF_en")
    with (out / "ledger.jsonl").open("ab") as handle:
        handle.write(b'{"id": "0003')
    config = label.Config(inputs=(source,), output=out, workers=workers)
    result = label.run(config)
    assert result.n_labelled == 150
    assert result.n_new == 150 - kept
    whole = label.run(label.Config(inputs=(source,), output=tmp_path / "straight"))
    assert result.sha256 == whole.sha256
    assert len(read(result.labels, ":")) == 150
    ids = [json.loads(line)["id"] for line in (out / "ledger.jsonl").read_text().splitlines()]
    assert len(set(ids)) == len(ids) == 150


@pytest.mark.parametrize(("number", "workers", "code"), [(signal.SIGTERM, 1, 75), (signal.SIGINT, 2, 130)])
def test_a_signal_ends_the_command_in_one_line_and_the_same_command_goes_on(tmp_path, number, workers, code):
    source, out = tmp_path / "in.xyz", tmp_path / "out"
    write(source, [water(s) for s in range(600)])
    command = [sys.executable, "-c", "from mdplug.cli import main; main()", "label", str(source)]
    command += ["-o", str(out), "--workers", str(workers)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    ledger = out / "ledger.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (ledger.exists() and ledger.stat().st_size):
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert "the same command goes on" in errors.strip().splitlines()[-1]
    done = len(ledger.read_text().splitlines())
    assert 0 < done < 600
    assert len(read(out / "labels.partial.extxyz", ":")) == done


def test_workers_end_when_their_parent_is_killed(tmp_path):
    source, script = tmp_path / "in.xyz", tmp_path / "go.py"
    write(source, [water(s) for s in range(600)])
    script.write_text(RUN)
    command = [sys.executable, str(script), str(source), str(tmp_path / "out"), "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    process.stdout.readline()
    group = os.getpgid(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.2)
    os.killpg(group, signal.SIGKILL)
    pytest.fail("workers were left behind")
