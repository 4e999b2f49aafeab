"""Error tables against errors that were put in."""

import csv
import json

import labelled as made
import numpy as np
import pytest
from ase import Atoms

import mdplug
from mdplug.errors import InputError
from mdplug.potentials.pair import LennardJones
from mdplug.workflows import evaluate


@pytest.fixture
def model(tmp_path):
    potential = LennardJones.new(made.EPSILON, made.SIGMA, 18.0, 17.0)
    object.__setattr__(potential.spec, "atomic_energies", {"default": {"Ar": made.OFFSET}})
    return mdplug.save(potential, tmp_path / "lj.safetensors")


def run(tmp_path, model, frames, **options):
    data = made.save(tmp_path / "labels.xyz", frames)
    return evaluate.run(evaluate.Config(model=str(model), data=[data], output=tmp_path / "out", **options))


def test_exact_potential_has_no_error_and_a_wrong_label_is_named(tmp_path, model):
    frames = made.argon_frames(12)
    frames[7].arrays["REF_forces"][2] += [0.3, 0.0, 0.4]
    frames[4].info["REF_energy"] -= 0.05 * len(frames[4])
    result = run(tmp_path, model, frames, batch_pairs=60, threads=2)
    worst = result.outliers[0]
    assert (worst.file, worst.frame, worst.atom, worst.element) == ("labels.xyz", 7, 2, "Ar")
    assert worst.force_error_meV_A == pytest.approx(500.0, rel=1e-5)
    assert result.outliers[1].force_error_meV_A < 0.01
    assert "labels.xyz frame 7" in str(result)
    n = sum(len(a) for a in frames)
    everything = result["all"]
    assert (everything.n_structures, everything.n_atoms) == (12, n)
    assert everything.forces_mae_meV_A == pytest.approx(700.0 / (3 * n), rel=1e-4)
    assert everything.forces_rmse_meV_A == pytest.approx(500.0 / np.sqrt(3 * n), rel=1e-4)
    assert everything.energy_mae_meV_atom == pytest.approx(50.0 / 12, rel=1e-4)
    forces = np.concatenate([a.arrays["REF_forces"] for a in frames])
    assert everything.rms_force_meV_A == pytest.approx(1e3 * np.sqrt((forces**2).mean()), rel=1e-5)


def test_groups(tmp_path, model):
    frames = made.argon_frames(12)
    small = [a for a in frames if a.info["config_type"] == "small"]
    for atoms in small:
        atoms.arrays["REF_forces"][:, 0] += 0.03
    result = run(tmp_path, model, frames)
    assert result["kind:small"].forces_mae_meV_A == pytest.approx(10.0, rel=1e-3)
    assert result["kind:large"].forces_mae_meV_A < 1e-3
    assert result["element:Ar"].n_atoms == result["all"].n_atoms
    assert np.isnan(result["element:Ar"].energy_mae_meV_atom)
    assert result["split:train"].n_structures + result["split:valid"].n_structures == 12
    assert result[f"formula:{small[0].get_chemical_formula()}"].n_structures >= 1
    with (tmp_path / "out/errors.csv").open() as file:
        assert [row["group"] for row in csv.DictReader(file)] == [row.group for row in result.table]
    assert json.loads((tmp_path / "out/errors.json").read_text())["outliers"][0]["file"] == "labels.xyz"
    assert (tmp_path / "out/parity.png").read_bytes().startswith(b"\x89PNG")


def test_missing_labels_do_not_count(tmp_path, model):
    frames = made.argon_frames(6)
    del frames[0].arrays["REF_forces"]
    del frames[1].info["REF_energy"]
    everything = run(tmp_path, model, frames)["all"]
    assert everything.forces_mae_meV_A < 1e-3
    assert everything.energy_mae_meV_atom < 1e-3


def test_split_that_is_not_there_and_unknown_element(tmp_path, model):
    with pytest.raises(InputError, match="no structure of split test is in the data; it has: train, valid"):
        run(tmp_path, model, made.argon_frames(12), splits=("test",))
    mace = {"species": (18,)}
    potential = LennardJones.new(made.EPSILON, made.SIGMA, 18.0, 17.0)
    object.__setattr__(potential.spec, "species", mace["species"])
    known = mdplug.save(potential, tmp_path / "argon.safetensors")
    krypton = Atoms("ArKr", [[0, 0, 0], [0, 0, 4.0]], info={"REF_energy": 1.0})
    krypton.arrays["REF_forces"] = np.full((2, 3), 0.1)
    with pytest.raises(InputError, match="frame 4: atom 1 is Kr, which potential 'lj' does not know"):
        run(tmp_path, known, [*made.argon_frames(4), krypton])
