"""`mdplug active` on argon whose truth is ASE's Lennard-Jones: rounds, budgets, kill -9, refused updates; its parts."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from ase import Atoms
from ase.calculators.lj import LennardJones
from ase.io import read

import mdplug
from mdplug.errors import InputError
from mdplug.workflows import active, active_carve, active_md, active_select, active_update, ensemble, train
from mdplug.workflows._common import silent
from mdplug.workflows.dataset import read as read_labels
from mdplug.workflows.journal import as_extxyz
from mdplug.workflows.label import label

LJ = {"epsilon": 0.0104, "sigma": 3.4, "rc": 1e6}
TINY = {"channels": 4, "l_hidden": 0, "l_max": 1, "kinds": ["R", "R"], "correlation": [2, 2], "repulsion": False}


def cluster(n, rng, spread=0.05):
    """Argon atoms near a piece of a close-packed lattice."""
    lattice = np.array([[0, 0, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1], [2, 0, 0], [0, 2, 0]]) * 3.82 / np.sqrt(2)
    atoms = Atoms(f"Ar{n}", lattice[:n] + spread * rng.normal(size=(n, 3)), info={"charge": 0, "spin": 1})
    atoms.set_array("mol_id", np.arange(n))
    return atoms


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A folder with labels of cold clusters, an ensemble of a small model trained on them, and a walker's start."""
    folder = tmp_path_factory.mktemp("learnt")
    rng = np.random.default_rng(0)
    frames = []
    for k in range(36):
        one = label(cluster(3 + k % 4, rng), LennardJones(**LJ), "LJ")
        one.info |= {"group": f"g{k}", "split": "valid" if k % 3 == 2 else "train"}
        frames.append(one)
    (folder / "labels.extxyz").write_bytes(as_extxyz(frames))
    given = {
        "data": (folder / "labels.extxyz",), "output": folder / "train", "architecture": "mace", "cutoff_A": 6.0,
        "model": TINY, "epochs": 15, "batch_pairs": 60, "threads": 1, "dtype": "float64",
        "loss": {"energy": 1.0, "forces": 100.0, "delta_forces_eV_A": 0.01},
    }  # fmt: skip
    made = train.run(train.Config.read(given=given))
    ensemble.run(
        ensemble.Config(
            models=(made.model,), data=(folder / "labels.extxyz",), output=folder / "ensemble.safetensors", members=8
        )
    )
    (folder / "start.extxyz").write_bytes(as_extxyz([cluster(5, rng)]))
    return folder


def options(learnt, output, **more):
    """A run that is soon at the end of its knowledge: cold labels, hot dynamics, a low threshold."""
    return {
        "structures": [str(learnt / "start.extxyz")], "data": [str(learnt / "labels.extxyz")], "output": str(output),
        "model": str(learnt / "ensemble.safetensors"), "label": "ase.calculators.lj:LennardJones",
        "label_options": {"calculator_kwargs": LJ}, "temperature_K": 60.0, "time_ps": 3.0, "threshold_eV_A": 0.06,
        "md_options": {"timestep_fs": 5.0, "sigma_every": 5, "frame_ps": 0.05, "minimise_fmax_eV_A": 0.005},
        "training": {"epochs": 2, "batch_pairs": 200}, "labels_per_round": 3, "budget_labels": 5, "around": 1,
        "around_ps": 0.5, "threads": 1, **more,
    }  # fmt: skip


def go(learnt, output, **more):
    return active.run(active.Config.read(given=options(learnt, output, **more)))


@pytest.fixture(scope="module")
def whole(learnt, tmp_path_factory):
    return go(learnt, tmp_path_factory.mktemp("whole") / "run")


def test_rounds_use_the_budget_and_no_more(whole):
    folder = whole.folder
    assert whole.rounds >= 2
    assert (whole.labels_used, whole.finished, whole.exit_code) == (5, False, 3)
    assert "5 labels" in whole.ended
    labels = read(whole.labels, ":")
    assert len(labels) == 5
    for one in labels:
        truth = one.copy()
        truth.calc = LennardJones(**LJ)
        assert np.allclose(one.arrays["REF_forces"], truth.get_forces(), atol=1e-6)
    report = json.loads((folder / "report.json").read_text())
    selected = [row["selected"] for row in report["rounds"]]
    assert sum(selected) == 5
    assert max(selected) <= 3
    seen = [row for one in report["rounds"] for row in one["seen"]]
    assert sum(row["alarm"] for row in seen) == whole.rounds  # the frame of every alarm is labelled
    for row in seen:
        assert row["held"] == (row["score"] <= row["factor"])
    for name in ("report.md", "report.png", "model.safetensors", "walker-0.extxyz", "summary.yaml"):
        assert (folder / name).stat().st_size > 0
    assert "| 2 |" in (folder / "report.md").read_text()


def test_what_sigma_says_is_the_error_of_the_model_that_ran(whole):
    """By hand: the ensemble of the first round on the first label."""
    folder = whole.folder
    report = json.loads((folder / "report.json").read_text())
    row, first = report["rounds"][0]["seen"][0], read(whole.labels, "0")
    first.calc = mdplug.Calculator(mdplug.load(folder / "round-00/model.safetensors"))
    error = np.linalg.norm(first.get_forces() - first.arrays["REF_forces"], axis=1).max()
    assert row["error_eV_A"] == pytest.approx(error, rel=1e-4)


def test_walkers_keep_frames_below_the_limit_in_order(whole):
    frames = read(whole.folder / "walker-0.extxyz", ":")
    times = [one.info["time_ps"] for one in frames]
    assert np.all(np.diff(times) > 0)
    assert max(one.arrays["sigma_forces_eV_A"].max() for one in frames) <= limit_of_all(whole.folder)
    assert times[-1] == pytest.approx(whole.walker_ps[0])


def limit_of_all(folder):
    specs = [mdplug.load(path).spec for path in sorted(folder.glob("round-*/model.safetensors"))]
    return max(spec.calibration["sigma_max_eV_A"] for spec in specs)


def test_alarms_raise_when_calibrated_sigma_passes_the_limit(whole):
    """The frame of the alarm, evaluated anew: its sigma in `Spec.calibration`'s terms is over the limit of the file."""
    folder = whole.folder / "round-01/walker-0"
    segment = json.loads((folder / "segment.json").read_text())
    spec = mdplug.load(whole.folder / "round-00/model.safetensors").spec
    last = read(folder / "md/uncertain.extxyz", -1)
    assert segment["status"] == "alarm"
    assert last.arrays["sigma_forces_eV_A"].max() > spec.calibration["sigma_max_eV_A"]
    assert last.arrays["sigma_forces_eV_A"].max() == pytest.approx(segment["sigma_eV_A"], rel=1e-6)


def test_same_command_on_a_finished_run_changes_nothing(learnt, whole):
    before = {path: path.read_bytes() for path in whole.folder.glob("round-*/*.safetensors")}
    again = go(learnt, whole.folder)
    assert (again.rounds, again.labels_used, again.ended) == (whole.rounds, whole.labels_used, whole.ended)
    assert all(path.read_bytes() == data for path, data in before.items())


def test_larger_budget_goes_on(learnt, whole, tmp_path):
    first = go(learnt, tmp_path / "run", budget_labels=3)
    assert first.labels_used == 3
    more = go(learnt, tmp_path / "run")
    assert more.labels_used == 5
    assert more.labels.read_bytes() == whole.labels.read_bytes()


@pytest.mark.parametrize(
    "at", ["round-01/walker-0/md/checkpoint.npz", "round-01/selected.extxyz", "round-02/train-1/checkpoint.pt"]
)
def test_killed_run_goes_on_with_the_same_decisions(learnt, whole, tmp_path, at):
    config = tmp_path / "active.yaml"
    config.write_text(yaml.safe_dump(options(learnt, tmp_path / "run")))
    command = [sys.executable, "-m", "mdplug.cli", "active", "--config", str(config)]
    child = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    for _ in range(6000):
        if (tmp_path / "run" / at).exists() or child.poll() is not None:
            break
        time.sleep(0.01)
    assert child.poll() is None, "it ended before it was killed"
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    again = go(learnt, tmp_path / "run")
    assert (again.rounds, again.labels_used) == (whole.rounds, whole.labels_used)
    for name in ("round-01/selected.extxyz", "round-02/selected.extxyz", "labels.extxyz"):
        assert (again.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name
    ours, theirs = (mdplug.load(one.model).state_dict() for one in (again, whole))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_stopped_by_the_clock_ends_in_good_order(learnt, tmp_path):
    result = go(learnt, tmp_path / "run", max_hours=1e-6)
    assert "hours are over" in result.ended
    assert result.exit_code == 3


def test_random_selection_labels_frames_of_the_dynamics(learnt, tmp_path):
    result = go(learnt, tmp_path / "run", selection="random", budget_labels=3)
    assert result.labels_used == 3
    assert not any(one.info["alarm"] for one in read(result.folder / "round-01/selected.extxyz", ":"))


def test_walker_that_dies_goes_back_and_is_labelled(learnt, tmp_path):
    """No limit in reach; atoms 'fly apart' at a kinetic energy that a hot start soon gives one of them."""
    result = go(
        learnt, tmp_path / "run", threshold_eV_A=1e6, budget_labels=2, labels_per_round=2,
        md_options=options(learnt, tmp_path)["md_options"] | {"max_atom_energy_eV": 0.015, "frame_ps": 0.02},
    )  # fmt: skip
    segments = json.loads((result.folder / "report.json").read_text())["segments"]
    assert segments[0]["status"] == "died"
    assert segments[0]["safe_ps"] <= max(0.0, segments[0]["end_ps"] - active_md.BACK_PS)
    assert result.labels_used == 2


def test_wrong_model_and_data_are_refused(learnt, tmp_path):
    with pytest.raises(InputError, match="ensemble"):
        go(learnt, tmp_path / "a", model=str(learnt / "train/model.safetensors"))
    frames = read(learnt / "labels.extxyz", ":")
    for one in frames:
        one.info |= {"split": "train", "group": "one"}
    (tmp_path / "one.extxyz").write_bytes(as_extxyz(frames))
    with pytest.raises(InputError, match="group"):
        go(learnt, tmp_path / "b", data=[str(tmp_path / "one.extxyz")])


# --- updates


@pytest.fixture
def parts(learnt, tmp_path):
    """Body, known and new labels of an update."""
    active_update.body_of(learnt / "ensemble.safetensors", tmp_path / "body.safetensors")
    active_update.write_known([learnt / "labels.extxyz"], 1000, 1, tmp_path / "known.extxyz")
    rng = np.random.default_rng(8)
    new = [label(cluster(4, rng, 0.25), LennardJones(**LJ), "LJ") for _ in range(10)]
    (tmp_path / "new.extxyz").write_bytes(as_extxyz(active_update.as_new(new, 0, 3.0)))
    return tmp_path / "body.safetensors", tmp_path / "known.extxyz", tmp_path / "new.extxyz"


def test_update_learns_and_is_taken(parts, tmp_path):
    loss = {"energy": 1.0, "forces": 100.0, "delta_forces_eV_A": 0.01}
    settings = {"epochs": 30, "batch_pairs": 100, "loss": loss, "optimiser": {"learning_rate": 0.01}}
    found = active_update.train_on(tmp_path / "update", *parts, settings, 1, 0, silent)
    assert found.accepted
    assert found.new_after < 0.9 * found.new_before
    assert found.error_after <= active_update.WORSE * found.error_before
    held = [s for s in read_labels([parts[1]]).structures if s.split == "valid"]
    assert active_update.force_error(found.body, held) == pytest.approx(found.error_after)


@pytest.mark.parametrize("rate", [1.0, 1e6])
def test_update_that_spoils_the_model_is_refused(parts, tmp_path, rate):
    settings = {"epochs": 2, "batch_pairs": 200, "optimiser": {"learning_rate": rate, "clip_norm": None}}
    found = active_update.train_on(tmp_path / "update", *parts, settings, 1, 0, silent)
    assert not found.accepted
    assert found.body == parts[0]
    assert found.learning_rate == pytest.approx(active_update.GENTLER * rate)
    assert found.error_after > active_update.WORSE * found.error_before


def test_new_labels_are_weighted_and_some_held_out(learnt):
    frames = read(learnt / "labels.extxyz", ":4")
    made = active_update.as_new(frames, 3, 2.0)
    assert [one.info["split"] for one in made] == ["train", "valid", "train", "train"]
    assert all(one.info["config_weight"] == 2.0 for one in made)


def test_replay_is_drawn_and_held_out_labels_stay(learnt, tmp_path):
    active_update.write_known([learnt / "labels.extxyz"], 7, 1, tmp_path / "known.extxyz")
    splits = [one.info["split"] for one in read(tmp_path / "known.extxyz", ":")]
    assert (splits.count("train"), splits.count("valid")) == (7, 12)


# --- selection


def _posterior(rng, width=6):
    return active_select.Posterior(rng.normal(size=(width, width)), 0.3)


def expected_error(rows, posterior, chosen):
    """Sum of the posterior variances of all rows once the chosen frames are labelled, from the normal equations."""
    precision = np.linalg.inv(posterior.root @ posterior.root.T)
    for k in chosen:
        precision = precision + rows[k].T @ rows[k] / posterior.noise**2
    covariance = np.linalg.inv(precision)
    return sum(np.trace(x @ covariance @ x.T) for x in rows)


def test_selection_is_the_greedy_one_by_expected_errors():
    rng = np.random.default_rng(2)
    posterior = _posterior(rng)
    rows = [rng.normal(size=(3, 6)) for _ in range(9)]
    expected = []
    for _ in range(4):
        left = [k for k in range(9) if k not in expected]
        expected.append(min(left, key=lambda k: expected_error(rows, posterior, [*expected, k])))
    chosen, gains = active_select.informative(rows, posterior, 4)
    assert chosen == expected
    assert sum(gains) == pytest.approx(
        expected_error(rows, posterior, []) - expected_error(rows, posterior, chosen), rel=1e-9
    )
    worst = max(range(9), key=lambda k: expected_error(rows, posterior, [k]))
    assert chosen[0] != worst


def test_what_was_said_before_is_not_chosen():
    posterior = active_select.Posterior(np.eye(6), 0.01)
    loud, other = np.zeros((1, 6)), np.zeros((1, 6))
    loud[0, 0], other[0, 1] = 10.0, 1.0
    chosen, gains = active_select.informative([loud, loud * 1.01, other], posterior, 2)
    assert chosen == [1, 2]  # though the other loud one has ten times the sigma
    assert active_select.informative([loud, other, loud * 1.01], posterior, 2, first=[1])[0] == [1, 2]
    assert len(active_select.informative([other], posterior, 5)[0]) == 1
    assert gains[0] > gains[1] > 0


def test_what_is_met_often_counts():
    posterior = active_select.Posterior(np.eye(6), 0.1)
    rare, common = np.zeros((1, 6)), np.zeros((1, 6))
    rare[0, 0], common[0, 1] = 1.5, 1.0
    assert active_select.informative([rare, common], posterior, 1)[0] == [0]
    assert active_select.informative([rare, *[common] * 4], posterior, 1)[0] == [1]


def test_posterior_is_the_inverse_of_the_equations(tmp_path):
    from mdplug.workflows.last_layer import Rows

    rng = np.random.default_rng(4)
    n = 40
    rows = Rows(
        rng.normal(size=(n, 5)), rng.normal(size=n), np.full(n, 0.2), rng.uniform(1, 2, n), np.arange(n),
        np.ones(n, dtype=bool),
    )  # fmt: skip
    made = active_select.Posterior.of(rows, 3.0)
    x = rows.x * np.sqrt(rows.weight)[:, None] / 0.2
    assert np.allclose(made.root @ made.root.T, 9.0 * np.linalg.inv(x.T @ x), rtol=1e-4)
    made.save(tmp_path / "p.npz")
    assert np.array_equal(active_select.Posterior.load(tmp_path / "p.npz").root, made.root)


# --- clusters


def water_box(n=27, edge=4.0):
    """Waters on a lattice, the last one replaced by a lithium ion; the first is cut by the border."""
    water = np.array([[0.0, 0.0, 0.0], [0.76, 0.59, 0.0], [-0.76, 0.59, 0.0]])
    sites = np.array(list(np.ndindex(3, 3, 3)))[:n] * edge
    positions = [water + site for site in sites[:-1]] + [sites[-1:]]
    atoms = Atoms("OHH" * (n - 1) + "Li", np.concatenate(positions), cell=[3 * edge] * 3, pbc=True)
    atoms.wrap()
    atoms.set_array("mol_id", np.r_[np.repeat(np.arange(n - 1), 3), n - 1])
    atoms.set_array("mol_charge", np.r_[np.zeros(3 * (n - 1)), 1.0])
    return atoms


def test_cluster_is_of_whole_molecules_with_their_charge():
    box = water_box()
    cut = active_carve.to_label(box, 0, 20)
    assert not cut.pbc.any()
    assert len(cut) <= 20
    charged = int((cut.numbers == 3).sum())
    assert cut.info["charge"] == charged
    assert (cut.numbers == 1).sum() == 2 * (cut.numbers == 8).sum()
    for k in np.flatnonzero(cut.numbers == 8):
        assert np.sort(cut.get_distances(k, np.flatnonzero(cut.numbers == 1)))[1] < 1.0
    around_ion = active_carve.to_label(box, len(box) - 1, 20)
    assert around_ion.info["charge"] == 1
    assert np.linalg.norm(around_ion.positions[around_ion.numbers == 3]) < 4.0


def test_open_systems_are_labelled_whole():
    atoms = Atoms("OHH", [[0, 0, 0], [0.76, 0.59, 0], [-0.76, 0.59, 0]], info={"charge": 0.0, "spin": 1.0})
    cut = active_carve.to_label(active_carve.with_molecules(atoms), 0, 60)
    assert len(cut) == 3
    assert cut.info["charge"] == 0.0


def test_molecules_follow_from_bonds_and_unknown_charges_are_refused():
    box = water_box()
    del box.arrays["mol_id"], box.arrays["mol_charge"]
    found = active_carve.with_molecules(box)
    assert len(np.unique(found.arrays["mol_id"])) == 27
    with pytest.raises(InputError, match="mol_charge"):
        active_carve.to_label(found, 0, 20)
    plain = active_carve.with_molecules(box[:-1])  # water alone: neutral
    assert not plain.arrays["mol_charge"].any()
    with pytest.raises(InputError, match="cluster_atoms"):
        active_carve.to_label(plain, 0, 2)


# --- walkers


def _segment(status, begin, end, number=1):
    return active_md.Segment(0, number, status, begin, end, begin, 0, 1.0, "")


def _frames(times):
    return [(t, Atoms("Ar", [[t, 0, 0]])) for t in times]


def test_walker_goes_back_twice_as_far_when_it_comes_no_further():
    track, start = active_md.Track(), Atoms("Ar", [[-1, 0, 0]])
    one = _segment("alarm", 0.0, 1.0)
    assert track.extend(one, _frames(np.arange(0, 1.0, 0.01)), start).positions[0, 0] == pytest.approx(0.95)
    two = _segment("alarm", 0.95, 1.0)
    track.extend(two, _frames([0.0, 0.02, 0.04]), start)
    assert two.safe_ps == pytest.approx(0.90)
    three = _segment("alarm", 0.9, 0.93)
    track.extend(three, _frames([0.0, 0.02]), start)
    assert three.safe_ps == pytest.approx(0.73)
    on = _segment("alarm", 0.73, 2.0)
    track.extend(on, _frames(np.arange(0, 1.27, 0.01)), start)
    assert on.safe_ps == pytest.approx(1.95)
    assert np.all(np.diff([t for t, _ in track.frames]) > 0)
    end = _segment("done", 1.95, 3.0)
    assert track.extend(end, _frames(np.arange(0, 1.06, 0.01)), start).positions[0, 0] == pytest.approx(1.05)
    assert end.safe_ps == 3.0


def test_walker_that_has_no_frame_starts_again():
    start = Atoms("Ar", [[-1, 0, 0]])
    one = _segment("alarm", 0.0, 0.0)
    assert active_md.Track().extend(one, [], start) == start
    assert one.safe_ps == 0.0
