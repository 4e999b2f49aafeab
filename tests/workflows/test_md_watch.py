"""The watch on an MD run: what it writes, its policies, that it changes nothing, and exact restarts."""

import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import yaml
from argon import crystal_file, model_file
from ase.io import read, write
from contract import liquid
from member_models import ensemble, shared

import mdplug
from mdplug import Calculator
from mdplug.biased import Biased
from mdplug.errors import InputError, RunFolderError
from mdplug.export import export
from mdplug.pairs import pairs
from mdplug.potential import Potential
from mdplug.system import AtomicSystem
from mdplug.uncertainty import Uncertainty, uncertainty
from mdplug.units import BOLTZMANN
from mdplug.workflows import md, md_monitor
from mdplug.workflows.md_files import read_log
from mdplug.workflows.md_monitor import Monitor, Rule, State
from mdplug.workflows.md_watch import Uncertain

SHORT = {"temperature_K": 300, "timestep_fs": 0.5, "time_ps": 0.02, "log_ps": 0.001, "frame_ps": 0.005}
SHORT |= {"checkpoint_ps": 0.004, "barostat_steps": 4, "minimise": False, "sigma_every": 2}
WATCHED = ("events.csv", "members.csv", "sigma_forces_eV_A.npy", "uncertain.extxyz")
EXACT = 99  # probes: more than there are members


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A structure, an ensemble on one body, the body alone, an ensemble of three models."""
    folder = tmp_path_factory.mktemp("models")
    write(folder / "box.xyz", liquid([1, 8], n=20, edge=7.5), format="extxyz")
    model = shared({"repulsion": True})
    mdplug.save(model, folder / "shared.safetensors")
    mdplug.save(model.parts[0], folder / "body.safetensors")
    mdplug.save(ensemble(3), folder / "three.safetensors")
    return folder


@pytest.fixture(autouse=True)
def no_picture(request, monkeypatch):
    """log.png would take most of the time here; test_the_picture and test_md.py draw it."""
    if "picture" not in request.node.name:
        monkeypatch.setattr(md, "plot_log", lambda *_: None)


@pytest.fixture(autouse=True)
def no_allowance(request, monkeypatch):
    """Limits are those of the largest sigma as it is, but where the allowance for its sampling is tested."""
    if "sampling" not in request.node.name and "killed" not in request.node.name:  # that one runs elsewhere
        monkeypatch.setattr(md_monitor, "alarm_factor", lambda *_: 1.0)


@pytest.mark.parametrize(("atoms", "members"), [(20, 4), (2000, 4), (300, 32)])
def test_the_largest_of_many_sigmas_is_allowed_its_sampling(atoms, members, monkeypatch):
    spec = replace(shared().spec, calibration={})
    rng = np.random.default_rng(atoms + members)

    def drawn(_):
        forces = rng.normal(size=(members, atoms, 3)) / np.sqrt(3)  # every true sigma is 1, the limit
        sigma = torch.tensor(np.sqrt(forces.var(axis=0, ddof=1).sum(axis=-1)))
        zero = torch.zeros(atoms)
        return Uncertainty(members, zero[:1], zero, torch.zeros(members, 1), forces=sigma)

    def alarms(n=300):
        model = Watched(spec)
        monitor = Monitor(Rule(limit=1.0, probes=EXACT), model, np.ones(atoms, dtype=int), State())
        return sum(monitor.look(step, drawn)[0].above for step in range(n)) / n

    assert 0.01 < alarms() < 0.1  # 5 % of the looks
    monkeypatch.setattr(md_monitor, "alarm_factor", lambda *_: 1.0)
    assert alarms(50) > 0.98


class Watched(Potential):
    """Says what an ensemble says of itself; the energies come from the test."""


@pytest.fixture
def config(files, tmp_path):
    base = {"structure": files / "box.xyz", "model": str(files / "shared.safetensors"), **SHORT}

    def make(name: str = "run", **options) -> md.Config:
        return md.Config(**{**base, "output": tmp_path / name, **options})

    return make


def run(config, **options):
    """A run whose warnings are of no interest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return md.run(config, **options)


def disagreement(config, atoms):
    model, system = mdplug.load(config.model), AtomicSystem.from_ase(atoms)
    return uncertainty(model, system, pairs(system, model.cutoff))


@pytest.fixture(scope="module")
def limit(files, tmp_path_factory):
    """A limit that some looks of the run are above, the first of them late."""
    options = {"structure": files / "box.xyz", "model": str(files / "shared.safetensors"), **SHORT}
    folder = tmp_path_factory.mktemp("limit") / "run"
    log = md.run(md.Config(**options, output=folder, sigma_probes=EXACT)).log["sigma_forces_max_eV_A"]
    record = np.maximum.accumulate(log)
    later = record[record > 1.02 * record[4]]
    assert len(later), log
    return 0.5 * (record[4] + later[0])


# --- what is written


@pytest.mark.parametrize("engine", ["openmm", "ase"])
@pytest.mark.parametrize("ensemble_", ["nve", "nvt", "npt"])
def test_watching_changes_no_bit(config, files, engine, ensemble_):
    """The mean of the members is the body: so the body's run, unwatched, is the same to the last bit."""
    options = {"engine": engine, "ensemble": ensemble_, "format": "dcd"}
    plain = md.run(config("plain", model=str(files / "body.safetensors"), **options))
    watched = run(config("watched", sigma_max_eV_A=0.05, policy="collect", collect_ps=0.002, **options))
    assert watched.watched["collected"] >= 2
    assert plain.watched == {}
    for name in ("trajectory.dcd", "final.extxyz"):
        assert (plain.folder / name).read_bytes() == (watched.folder / name).read_bytes(), name
    for name, column in plain.log.items():
        assert np.array_equal(column, watched.log[name], equal_nan=True), name
    assert not (plain.folder / "members.csv").exists()


@pytest.mark.parametrize("engine", ["openmm", "ase"])
@pytest.mark.parametrize("model", ["shared", "three"])
def test_log_and_files_are_what_the_members_say_there(config, files, engine, model):
    said = []
    options = {"engine": engine, "format": "extxyz", "sigma_probes": EXACT, "sigma_every": 7}
    options |= {"model": str(files / f"{model}.safetensors"), "time_ps": 0.01}
    result = md.run(config(**options), progress=lambda *what: said.append(what[2]))
    assert "sigma" in said[-1]
    assert "eV/A" in said[-1]
    final = read(result.folder / "final.extxyz")
    found = disagreement(config(**options), final)
    assert result.log["sigma_energy_eV"][-1] == pytest.approx(float(found.energy), rel=1e-5)
    assert result.log["sigma_forces_max_eV_A"][-1] == pytest.approx(float(found.forces.max()), rel=1e-5)
    assert result.log["sigma_atom"][-1] == int(found.forces.argmax())
    assert np.isfinite(result.log["sigma_forces_max_eV_A"]).all()  # also between the looks of sigma_every
    frames = read(result.trajectory, index=":")
    sigma = np.load(result.folder / "sigma_forces_eV_A.npy")
    members = read_log(result.folder / "members.csv")
    assert sigma.shape == (len(frames), 20)
    assert list(members) == ["time_ps", *(f"member_{k}_eV" for k in range(found.members))]
    np.testing.assert_allclose(members["time_ps"], [frame.info["time_ps"] for frame in frames])
    energies = np.array([members[f"member_{k}_eV"] for k in range(found.members)])
    for k, frame in enumerate(frames):
        there = disagreement(config(**options), frame)
        np.testing.assert_allclose(sigma[k], there.forces, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(frame.arrays["sigma_forces_eV_A"], there.forces, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(frame.arrays["sigma_energy_eV"], there.atom_energy, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(energies[:, k], there.member_energy[:, 0], atol=2e-6)
        assert energies[:, k].mean() == pytest.approx(frame.get_potential_energy(), abs=1e-6)


def test_members_carry_reference_energies(config, files, tmp_path):
    model = shared({"repulsion": True})
    object.__setattr__(model.spec, "atomic_energies", {"default": {"H": -13.6, "O": -432.1}})
    path = mdplug.save(model, tmp_path / "reference.safetensors")
    result = md.run(config(model=str(path), time_ps=0.005))
    members = read_log(result.folder / "members.csv")
    mean = np.mean([members[f"member_{k}_eV"] for k in range(5)], axis=0)
    assert mean[0] == pytest.approx(result.log["potential_energy_eV"][0], abs=1e-6)
    assert mean[0] < -1000


def test_probes_are_drawn_from_seed_and_step(config):
    one, same = md.run(config("one", sigma_every=1)), md.run(config("two"))
    # The same step has the same probes, however often somebody looks.
    assert np.array_equal(one.log["sigma_forces_max_eV_A"], same.log["sigma_forces_max_eV_A"])
    exact = md.run(config("exact", sigma_probes=EXACT))
    assert np.abs(one.log["sigma_forces_max_eV_A"] / exact.log["sigma_forces_max_eV_A"] - 1).max() > 0.01


def test_the_picture_has_two_panels_more(config, files):
    from PIL import Image

    heights = []
    for name in ("body", "shared"):
        result = md.run(config(name, model=str(files / f"{name}.safetensors"), time_ps=0.002))
        with Image.open(result.picture) as picture:
            heights.append(picture.height)
    assert heights[1] - heights[0] == pytest.approx(2 * 1.9 * 130, abs=2)


# --- restarts


def killed(path, log, rows):
    """Start the command, kill -9 it when its log has so many rows."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mdplug.cli", "md", "--config", str(path)],
        stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    for _ in range(6000):
        if log.exists() and log.read_text().count("\n") > rows:
            break
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("engine", "ensemble_", "kind"), [("openmm", "npt", "xtc"), ("openmm", "nvt", "extxyz"), ("ase", "npt", "dcd")]
)
def test_killed_and_continued_decides_the_same(config, tmp_path, limit, engine, ensemble_, kind):
    options = {"engine": engine, "ensemble": ensemble_, "format": kind, "time_ps": 0.04, "policy": "collect"}
    options |= {"sigma_max_eV_A": limit, "collect_ps": 0.002}
    whole = run(config("whole", **options))
    assert whole.watched["events"] > 0
    assert whole.watched["collected"] > 0
    again = config("again", **options)
    (tmp_path / "again.yaml").write_text(again.to_yaml())
    killed(tmp_path / "again.yaml", again.output / "log.csv", 10)
    result = run(again)
    assert result.continued
    assert result.watched == whole.watched
    for name in ("log.csv", "final.extxyz", f"trajectory.{kind}", *WATCHED):
        assert (whole.folder / name).read_bytes() == (result.folder / name).read_bytes(), name


def test_what_was_written_after_the_checkpoint_is_cut_away(config, limit):
    options = {"policy": "collect", "sigma_max_eV_A": limit, "collect_ps": 0.002}
    whole = run(config("whole", **options))
    part = run(config("part", time_ps=0.012, **options))
    for name in WATCHED:  # as if it had been killed while it wrote
        with (part.folder / name).open("ab") as file:
            file.write(b"half a li")
    result = run(config("part", **options))
    for name in WATCHED:
        assert (whole.folder / name).read_bytes() == (result.folder / name).read_bytes(), name
    # Where there was nothing at the checkpoint, nothing stays.
    none = md.run(config("none", time_ps=0.004))
    (none.folder / "events.csv").write_text("half")
    md.run(config("none"))
    assert not (none.folder / "events.csv").exists()


# --- policies


@pytest.mark.parametrize("engine", ["openmm", "ase"])
def test_stop_keeps_the_last_frame_below_and_the_one_above(config, limit, engine):
    options = {"engine": engine, "policy": "stop", "sigma_max_eV_A": limit}
    with pytest.raises(
        Uncertain, match=r"step \d+: members disagree on the force of atom \d+ \([HO]\) by .* eV/A, limit"
    ):
        md.run(config(**options))
    with pytest.raises(Uncertain) as stopped:  # the same command again: the same end
        md.run(config(**options))
    assert "\n" not in str(stopped.value)
    reading = stopped.value.reading
    assert reading.exact
    safe, unsafe = read(config().output / "last_good.extxyz"), read(config().output / "uncertain.extxyz")
    assert safe.info["step"] < unsafe.info["step"] == reading.step
    assert float(disagreement(config(), safe).forces.max()) < limit
    above = disagreement(config(), unsafe).forces
    assert float(above.max()) > limit
    np.testing.assert_allclose(unsafe.arrays["sigma_forces_eV_A"], above, rtol=1e-4)
    assert int(above.argmax()) == reading.atom
    record = yaml.safe_load((config().output / "summary.yaml").read_text())["results"]
    assert record["stopped"] == str(stopped.value)
    table = (config().output / "events.csv").read_text().splitlines()
    assert table[0] == "step,time_ps,signal,atom,element,value,limit,exact"
    assert table[1].startswith(f"{reading.step},")
    assert len(table) == 2
    # Somebody who accepts more goes on from the checkpoint, and gets what never was stopped.
    went_on = run(config(engine=engine, policy="warn", sigma_max_eV_A=10 * limit))
    whole = run(config("whole", engine=engine, sigma_max_eV_A=10 * limit))
    assert went_on.continued
    assert (went_on.folder / "trajectory.xtc").read_bytes() == (whole.folder / "trajectory.xtc").read_bytes()


def test_the_command_exits_with_3(config, limit, tmp_path):
    given = config(policy="stop", sigma_max_eV_A=0.3 * limit)
    (tmp_path / "stop.yaml").write_text(given.to_yaml())
    done = subprocess.run(
        [sys.executable, "-m", "mdplug.cli", "md", "--config", str(tmp_path / "stop.yaml")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert "members disagree" in done.stderr.splitlines()[-1]


def test_warn_says_it_once_an_event(config, limit):
    with pytest.warns(UserWarning, match="members disagree on the force of atom") as said:
        result = md.run(config(sigma_max_eV_A=limit))
    assert len(said) == result.watched["events"]
    looks = result.log["sigma_forces_max_eV_A"]
    assert (looks > limit).sum() >= len(said)
    assert result.steps == 40


def test_collected_frames_are_apart_above_and_not_too_many(config, limit):
    options = {"policy": "collect", "sigma_max_eV_A": 0.5 * limit}
    many = run(config("many", collect_ps=0.0, **options))
    frames = read(many.folder / "uncertain.extxyz", index=":")
    assert len(frames) == many.watched["collected"] > 5
    assert all(frame.arrays["sigma_forces_eV_A"].max() > 0.5 * limit for frame in frames)
    apart = run(config("apart", collect_ps=0.003, **options))
    steps = [frame.info["step"] for frame in read(apart.folder / "uncertain.extxyz", index=":")]
    assert np.diff(steps).min() >= 6
    assert 1 < len(steps) < len(frames)
    few = run(config("few", collect_ps=0.0, collect_max=3, **options))
    assert len(read(few.folder / "uncertain.extxyz", index=":")) == 3
    # What is more than ten times above is broken.
    broken = run(config("broken", policy="collect", sigma_max_eV_A=0.01 * limit))
    assert broken.watched["events"] == 1
    assert broken.watched["collected"] == 0


@pytest.mark.parametrize("engine", ["openmm", "ase"])
def test_bias_is_logged_with_its_weight(config, engine):
    plain = md.run(config("plain", engine=engine))
    result = md.run(config(engine=engine, policy="bias", bias_strength=2.0, format="extxyz"))
    log = result.log
    assert not np.array_equal(log["potential_energy_eV"], plain.log["potential_energy_eV"])
    np.testing.assert_allclose(log["bias_log_weight"], log["bias_energy_eV"] / (BOLTZMANN * 300), rtol=1e-4)
    final = read(result.folder / "final.extxyz")
    model = mdplug.load(config().model)
    final.calc = Calculator(model)
    without = final.get_potential_energy()
    final.calc = Calculator(Biased.of(model, 2.0))
    assert log["potential_energy_eV"][-1] == pytest.approx(final.get_potential_energy(), abs=1e-6)
    assert log["bias_energy_eV"][-1] == pytest.approx(final.get_potential_energy() - without, abs=1e-6)
    assert log["bias_energy_eV"].max() < 0
    # Reweighting starts from a run of the members' mean, which this is not.
    assert not (result.folder / "members.csv").exists()
    nve = md.run(config("nve", engine=engine, ensemble="nve", policy="bias", bias_strength=-1.0, time_ps=0.002))
    assert np.isnan(nve.log["bias_log_weight"]).all()
    with pytest.raises(RunFolderError, match=r"bias_strength was 2\.0"):
        md.run(config(engine=engine))


# --- decisions


def disagreeing(forces):
    """Members that disagree so on forces."""
    forces = torch.as_tensor(forces, dtype=torch.float64)
    return Uncertainty(5, torch.zeros(1), torch.zeros(len(forces)), torch.zeros(5, 1), forces)


def monitor(limit=1.0, probes=2, state=None):
    return Monitor(Rule(limit=limit, probes=probes, seed=3), shared(), np.array([1, 8]), state)


def test_an_estimate_near_the_limit_is_checked_with_all_members():
    asked = []

    def ask(probing):
        asked.append(probing)
        return disagreeing([0.1, 0.95] if probing == (None, 0) else [0.2, 1.5])

    one = monitor()
    reading, found = one.look(40, ask)
    assert asked == [one.probing(40), (None, 0)]
    assert (reading.value, reading.atom, reading.exact, reading.above) == (0.95, 1, True, False)
    assert float(found.forces[1]) == 0.95
    assert one.state.rechecks == 1
    # The control: what is far below needs no check; and without a limit there is none to check.
    asked.clear()
    reading, _ = monitor(limit=2.0).look(40, ask)
    assert len(asked) == 1
    assert not reading.exact
    assert not monitor(limit=None).look(0, ask)[0].above


def test_an_event_has_one_begin_until_it_is_over():
    one = monitor(probes=4)  # of five members: exact
    said = [one.look(k, lambda _, v=v: disagreeing([0.1, v]))[0] for k, v in enumerate([0.5, 1.1, 0.9, 1.2, 0.7, 1.3])]
    assert [r.above for r in said] == [False, True, False, True, False, True]
    assert [r.new for r in said] == [False, True, False, False, False, True]  # 0.9 is no end of it, 0.7 is
    assert one.state.events == 2
    assert one.state.largest == 1.3
    again = monitor(probes=4, state=State(**asdict(one.state)))
    assert not again.look(9, lambda _: disagreeing([0.1, 1.4]))[0].new
    assert monitor().look(0, lambda _: disagreeing([float("nan"), 0.1]))[0].above  # what is not a number is no good


def test_probes_alone_would_stop_runs_that_all_members_let_go(config, files):
    """Why estimates are checked: with a limit that no step passes, some estimates do."""
    exact = md.run(config("exact", sigma_probes=EXACT, time_ps=0.03)).log["sigma_forces_max_eV_A"]
    limit = 1.05 * exact.max()
    estimates = md.run(config("few", sigma_probes=1, time_ps=0.03)).log["sigma_forces_max_eV_A"]
    assert estimates.max() > limit
    result = md.run(config(sigma_probes=1, time_ps=0.03, policy="stop", sigma_max_eV_A=limit))
    assert result.watched["events"] == 0
    assert result.watched["rechecks"] > 0


@pytest.mark.parametrize(("signal_", "option"), [("energy", "sigma_max_eV"), ("distance", "distance_max")])
def test_other_signals(config, signal_, option):
    first = disagreement(config(), read(config().structure))
    value = float({"energy": first.atom_energy, "distance": first.distance}[signal_].max())
    with pytest.raises(Uncertain, match=r"by .* limit") as stopped:
        md.run(config(policy="stop", **{option: 0.9 * value}))
    assert stopped.value.reading.step == 0
    assert stopped.value.reading.value == pytest.approx(value, rel=1e-9)
    result = md.run(config("calm", policy="stop", **{option: 3 * value}))
    assert result.watched["signal"] == signal_
    assert result.watched["rechecks"] == 0


def test_an_exported_file_is_watched_by_its_energies(config, files, tmp_path):
    file = export(files / "shared.safetensors", tmp_path / "shared.pt")
    result = md.run(config(model=str(file), time_ps=0.005))
    assert np.isfinite(result.log["sigma_energy_eV"]).all()
    assert np.isnan(result.log["sigma_forces_max_eV_A"]).all()
    assert np.load(result.folder / "sigma_energy_eV.npy").shape == (2, 20)
    with pytest.raises(InputError, match="exported file"):
        md.run(config("forces", model=str(file), sigma_max_eV_A=0.1))
    with pytest.raises(Uncertain):
        md.run(config("energies", model=str(file), sigma_max_eV=1e-6, policy="stop"))


def test_a_limit_in_the_model_file_is_the_default(config, tmp_path):
    model = shared({"repulsion": True})
    object.__setattr__(model.spec, "calibration", {"sigma_max_eV_A": 1e-4})
    path = mdplug.save(model, tmp_path / "limited.safetensors")
    with pytest.raises(Uncertain, match=r"limit 0\.0001"):
        md.run(config(model=str(path), policy="stop"))
    assert md.run(config("other", model=str(path), policy="stop", sigma_max_eV_A=99, time_ps=0.002)).steps == 4


def test_what_cannot_be_is_refused_before_anything_runs(config, tmp_path):
    argon = {"structure": crystal_file(tmp_path), "model": str(model_file(tmp_path))}
    cases = [
        ({"policy": "stop"}, "policy stop needs a limit"),
        ({"policy": "collect"}, "policy collect needs a limit"),
        ({"sigma_max_eV_A": 1.0, "sigma_max_eV": 1.0}, "give one limit"),
        ({"policy": "bias"}, "belong together"),
        ({"bias_strength": 1.0}, "belong together"),
        ({**argon, "sigma_max_eV_A": 1.0}, "has no members"),
        ({**argon, "policy": "collect"}, "has no members"),
        ({**argon, "policy": "bias", "bias_strength": 1.0}, "has no members"),
    ]
    for options, message in cases:
        with pytest.raises(InputError, match=message) as error:
            md.run(config(**options))
        assert "\n" not in str(error.value)
        shutil.rmtree(config().output)
