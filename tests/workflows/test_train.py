"""Training: known parameters are found again, runs continue exactly, weights and options do what they say."""

import signal
import subprocess
import sys

import labelled as made
import numpy as np
import pytest
import yaml

import mdplug
from mdplug.errors import InputError, MdplugError, RunFolderError
from mdplug.workflows import train

# Wider than any cluster, so that our smoothed potential is ASE's bare one.
WIDE = {"cutoff": 18.0, "switch": 17.0}
LJ = {"architecture": "lj", "cutoff_A": 18.0, "dtype": "float64", "reference_energies_eV": {"Ar": made.OFFSET}}
ADAM = {"learning_rate": 0.05, "warm_up_steps": 3, "ema_decay": 0.5, "amsgrad": False}
MACE = {
    "channels": 4,
    "l_max": 1,
    "correlation": [2, 2],
    "radial": {"widths": [8], "n_basis": 4},
    "readout": {"hidden": 4},
}


def lj_config(folder, data, **changes):
    options = {
        "data": [data],
        "output": folder,
        "model": {"epsilon": 0.013, "sigma": 3.3, **WIDE},
        "optimiser": ADAM,
        "loss": {"kind": "squared", "energy": 1.0, "forces": 1.0},
        "batch_pairs": 100,
        "epochs": 30,
        "threads": 2,
        **LJ,
    }
    return train.Config(**{**options, **changes})


def parameters(result):
    model = mdplug.load(result.model)
    return float(model.epsilon), float(model.sigma)


@pytest.fixture(scope="module")
def argon(tmp_path_factory):
    return made.save(tmp_path_factory.mktemp("argon") / "argon.xyz", made.argon_frames(24))


def test_finds_the_parameters_of_the_labels(tmp_path, argon):
    lines = []
    config = lj_config(tmp_path / "run", argon, cite=("whom",))
    result = train.run(config, progress=lambda done, total, text: lines.append(text))
    epsilon, sigma = parameters(result)
    assert epsilon == pytest.approx(made.EPSILON, rel=0.02)
    assert sigma == pytest.approx(made.SIGMA, rel=0.002)
    assert result.errors["forces_mae_meV_A"] < 0.3
    assert (result.n_train, result.n_valid) == (18, 6)
    assert any("18 structures to train on, 6 for validation" in line for line in lines)
    rows = (tmp_path / "run/learning_curve.csv").read_text().splitlines()
    assert len(rows) == 31
    assert (tmp_path / "run/learning_curve.png").read_bytes().startswith(b"\x89PNG")
    summary = yaml.safe_load((tmp_path / "run/summary.yaml").read_text())
    assert summary["results"]["best_epoch"] == result.best_epoch
    spec = mdplug.load(result.model).spec
    assert spec.atomic_energies == {"default": {"Ar": made.OFFSET}}
    assert list(spec.provenance["data_sha256"]) == ["argon.xyz"]
    assert spec.provenance["seed"] == 0
    assert spec.cite == ("whom",)
    paths = ["a/labels.extxyz", "b/labels.extxyz", "c/other.extxyz"]
    assert [train.short_name(path, paths) for path in paths] == ["a/labels.extxyz", "b/labels.extxyz", "other.extxyz"]


def test_control_wrong_labels_give_other_parameters(tmp_path):
    frames = made.argon_frames(24)
    for atoms in frames:
        atoms.arrays["REF_forces"] *= 1.3
    data = made.save(tmp_path / "wrong.xyz", frames)
    epsilon, _ = parameters(train.run(lj_config(tmp_path / "run", data)))
    assert abs(epsilon / made.EPSILON - 1) > 0.05


def test_structures_of_weight_zero_teach_nothing(tmp_path):
    frames = made.argon_frames(24)
    for k, atoms in enumerate(frames):
        if k % 3 == 0:
            atoms.arrays["REF_forces"] *= -2.0
            atoms.info |= {"REF_energy": 0.0, "config_weight": 0.0}
        elif k % 3 == 1:
            atoms.info["config_type"] = "spoilt"
            atoms.arrays["REF_forces"] *= 3.0
    data = made.save(tmp_path / "spoilt.xyz", frames)
    result = train.run(lj_config(tmp_path / "run", data, kind_weights={"spoilt": 0.0}, batch_pairs=40))
    assert parameters(result)[0] == pytest.approx(made.EPSILON, rel=0.05)
    assert parameters(result)[1] == pytest.approx(made.SIGMA, rel=0.005)


def test_learns_from_stress_alone(tmp_path):
    data = made.save(tmp_path / "cu.xyz", made.crystal_frames(6))
    r0, switch, cutoff = (made.MORSE["r0"] * factor for factor in (1.0, made.MORSE["rcut1"], made.MORSE["rcut2"]))
    config = train.Config(
        data=[data],
        output=tmp_path / "run",
        valid_fraction=0.0,
        architecture="morse",
        cutoff_A=cutoff,
        dtype="float64",
        model={"depth": 0.5, "a": made.MORSE["rho0"] / r0, "r0": 1.03 * r0, "cutoff": cutoff, "switch": switch},
        reference_energies_eV={"Cu": 0.0},
        loss={"kind": "squared", "energy": 0.0, "forces": 0.0, "stress": 1.0},
        optimiser=ADAM | {"learning_rate": 0.01},
        batch_pairs=4000,
        epochs=12,
    )
    result = train.run(config)
    curve = np.genfromtxt(tmp_path / "run/learning_curve.csv", delimiter=",", names=True)
    assert curve["valid_loss"][-1] < 0.02 * curve["valid_loss"][0]
    assert float(mdplug.load(result.model).r0) == pytest.approx(r0, rel=0.01)
    assert result.n_valid == 0


KILLED = """
import os, signal, sys
from mdplug.workflows import train
config = train.Config.model_validate_json(sys.argv[1])
train.run(config, progress=lambda done, total, text: os.kill(os.getpid(), signal.SIGKILL) if done == 17 else None)
"""


def test_kill_9_changes_nothing(tmp_path, argon):
    whole = train.run(lj_config(tmp_path / "whole", argon, epochs=6))
    broken = lj_config(tmp_path / "broken", argon, epochs=6)
    process = subprocess.run([sys.executable, "-c", KILLED, broken.model_dump_json()], check=False)
    assert process.returncode == -signal.SIGKILL
    resumed = train.run(broken)
    assert parameters(resumed) == parameters(whole)  # to the last bit
    assert resumed.errors["valid_loss"] == whole.errors["valid_loss"]


def test_ctrl_c_in_mid_epoch_changes_nothing(tmp_path, argon):
    def interrupt(done, total, text):
        if done == 5:
            raise KeyboardInterrupt

    config = lj_config(tmp_path / "run", argon, epochs=3)
    with pytest.raises(KeyboardInterrupt):
        train.run(config, progress=interrupt)
    steps = []
    resumed = train.run(config, progress=lambda done, total, text: steps.append(done) if done else None)
    assert steps[0] == 6
    assert parameters(resumed) == parameters(train.run(lj_config(tmp_path / "whole", argon, epochs=3)))


def test_threads_only_split_the_work(tmp_path, argon):
    one = train.run(lj_config(tmp_path / "one", argon, epochs=2, threads=1))
    three = train.run(lj_config(tmp_path / "three", argon, epochs=2, threads=3))
    np.testing.assert_allclose(parameters(one), parameters(three), rtol=1e-9)


def test_mace_learns_and_is_fixed_by_its_seed(tmp_path, argon):
    def one(name, **changes):
        options = {
            "data": [argon], "output": tmp_path / name, "architecture": "mace", "cutoff_A": 6.0, "model": MACE,
            "epochs": 2, "batch_pairs": 60, "threads": 1, "seed": 5,
            "optimiser": ADAM | {"learning_rate": 0.02}, **changes,
        }  # fmt: skip
        return train.run(train.Config(**options))

    first, again, other = one("first"), one("again"), one("other", seed=6)
    assert first.errors["valid_loss"] == again.errors["valid_loss"]
    assert first.errors["valid_loss"] != other.errors["valid_loss"]
    long = one("long", epochs=12)
    curve = np.genfromtxt(tmp_path / "long/learning_curve.csv", delimiter=",", names=True)
    assert curve["forces_mae_meV_A"].min() < 0.7 * curve["forces_mae_meV_A"][0]
    # Going on from a model file keeps its energies, its description and its errors at the start.
    onward = train.run(
        train.Config(data=[argon], output=tmp_path / "onward", start=long.model, epochs=1, threads=1,
                     optimiser={"learning_rate": 1e-9})
    )  # fmt: skip
    assert onward.errors["forces_mae_meV_A"] == pytest.approx(long.errors["forces_mae_meV_A"], rel=1e-4)
    assert mdplug.load(onward.model).spec.atomic_energies == mdplug.load(long.model).spec.atomic_energies


def test_stops_in_time_and_without_improvement(tmp_path, argon):
    result = train.run(lj_config(tmp_path / "time", argon, epochs=100000, max_minutes=0.02))
    assert "minutes are over" in result.stopped
    frozen = lj_config(tmp_path / "idle", argon, patience=2, optimiser=ADAM | {"learning_rate": 1e-30})
    assert train.run(frozen).stopped == "no improvement in 2 epochs"


def test_validation_is_held_back_by_group(tmp_path):
    data = made.save(tmp_path / "all.xyz", made.argon_frames(40, split=False))
    training, held, _ = train.split(lj_config(tmp_path / "run", data, valid_fraction=0.2))
    assert len(held) == 8
    assert not {s.group for s in training} & {s.group for s in held}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "ljj"}, "no architecture 'ljj'; known: lj"),
        ({"model": {"sigma": 3.0, **WIDE}}, "needs the option 'epsilon'"),
        ({"reference_energies_eV": {"Kr": 0.0}}, "argon.xyz frame . holds Ar, for which there is no reference energy"),
        ({"fmax_eV_A": 1e-6}, "no structure is left to train on"),
        ({"data": "nowhere.xyz"}, "no file nowhere.xyz"),
        (
            {"optimiser": {"learning_rate": 1e30, "warm_up_steps": 0, "clip_norm": None}},
            "the loss is not finite at step",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, argon, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        train.run(lj_config(tmp_path / "run", **({"data": argon} | changes)))
    assert "\n" not in str(caught.value)


def test_start_excludes_an_architecture(argon):
    with pytest.raises(MdplugError, match="start brings architecture"):
        train.Config.read(given={"data": [argon], "start": "m.safetensors", "architecture": "lj", "cutoff_A": 5.0})


def test_folder_of_another_run_and_damaged_checkpoint(tmp_path, argon):
    train.run(lj_config(tmp_path / "run", argon, epochs=1))
    with pytest.raises(RunFolderError, match="seed was 0, now 1"):
        train.run(lj_config(tmp_path / "run", argon, epochs=1, seed=1))
    checkpoint = tmp_path / "run/checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:500])
    with pytest.raises(RunFolderError, match="does not continue this run"):
        train.run(lj_config(tmp_path / "run", argon, epochs=1))
