"""Bench: the same atoms through every engine, in records that can be compared; no word on how fast anything is."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import yaml

import mdplug
from mdplug.errors import InputError, MdplugError
from mdplug.pairs import pairs
from mdplug.potentials.mace import describe
from mdplug.potentials.pair import LennardJones
from mdplug.system import AtomicSystem
from mdplug.units import G_CM3_PER_AMU_A3
from mdplug.workflows import bench_training
from mdplug.workflows._common import Stopped
from mdplug.workflows.bench import Config, Result, motion, run, too_much, water_box
from mdplug.workflows.bench_limit import limit_of, mflop_per_atom
from mdplug.workflows.bench_models import RANDOM
from mdplug.workflows.bench_peers import ENGINES, missing
from mdplug.workflows.bench_report import memory, ratios, table
from mdplug.workflows.bench_training import labelled_boxes
from mdplug.workflows.bench_worker import Worker


def test_water_box():
    atoms = water_box(64, seed=3)
    assert atoms.get_chemical_formula() == "H128O64"
    assert atoms.get_masses().sum() / atoms.get_volume() * G_CM3_PER_AMU_A3 == pytest.approx(1.0)
    for k in range(0, len(atoms), 3):
        assert sorted(atoms.get_distances(k, [k + 1, k + 2], mic=True)) == pytest.approx([0.9685, 0.9685], abs=1e-3)
    # No two molecules on top of each other, and about as many pairs as water has.
    system = AtomicSystem.from_ase(atoms)
    close = pairs(system, 1.2).index
    assert (close[0] // 3 == close[1] // 3).all()
    assert 7000 < pairs(system, 4.5).n_pairs < 8500
    assert np.array_equal(atoms.positions, water_box(64, seed=3).positions)
    assert not np.array_equal(atoms.positions, water_box(64, seed=4).positions)
    assert len(water_box(5)) == 15


def test_motion_ages_pair_lists_without_breaking_molecules():
    atoms = water_box(27)
    frames = motion(atoms, 60)
    steps = np.linalg.norm(np.diff(frames, axis=0), axis=2)
    assert steps.min() > 0  # nothing may be taken from a cache
    assert np.median(steps) < 0.1
    assert np.linalg.norm(frames - frames[0], axis=2).max() > 0.5  # half the usual skin
    bonds = np.linalg.norm(frames[:, 0::3] - frames[:, 1::3], axis=2)
    assert bonds.min() > 0.85
    assert bonds.max() < 1.1


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    """Our two engines on a Lennard-Jones fluid in the shape of water, in single precision."""
    folder = tmp_path_factory.mktemp("bench")
    model = mdplug.save(LennardJones.new(0.004, 1.8, 4.0), folder / "lj.safetensors")
    config = Config(models=[str(model)], molecules=[8], rounds=2, steps=3, warmup=2, output=folder / "out")
    said = []
    return config, run(config, progress=lambda *what: said.append(what)), said


def test_records(bench):
    config, result, said = bench
    by = {(r["what"], r["atoms"]): r for r in result.records}
    assert set(by) == {(what, 24) for what in ("roofline", *ENGINES)}
    machine = by.pop(("roofline", 24))
    assert machine["gflops"] > 0.1
    assert machine["copy_GB_s"] > 0.1
    assert "mflop_per_atom" not in machine  # counted for MACE alone
    for (engine, atoms), record in by.items():
        if engine not in ("mdplug-ase", "mdplug-openmm"):
            assert record["left_out"] == (missing(engine, "cpu") or "has no such weights")
            continue
        assert 0 < record["min_ms"] <= record["ms_per_step"] <= record["max_ms"]
        assert 0 < record["outside_model_ms"] < record["ms_per_step"]
        assert record["steps"] == config.rounds * config.steps
        assert record["pairs"] == pairs(AtomicSystem.from_ase(water_box(atoms // 3)), 4.0).n_pairs
        assert record["us_per_atom"] == pytest.approx(1e3 * record["ms_per_step"] / atoms, rel=1e-2)
        assert 50 < record["start_MiB"] <= record["peak_MiB"]
        assert 0.1 < record["time_to_first_force_s"] < 300
        # Single against double precision: close, and not the same.
        assert 0 < record["max_dF_eV_A"] < 1e-4 * max(1.0, record["rms_F_eV_A"])
        assert record["reference"] == "mdplug-ase float64"
        assert record["versions"]["mdplug"] == mdplug.__version__
        assert record["versions"]["kernels"] in ("avx512", "avx2", "baseline", "plain torch")
    assert said[-1][:2] == (config.rounds, config.rounds)


def test_files(bench):
    config, result, _ = bench
    lines = (config.output / "bench.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.records
    assert str(result).splitlines()[: len(lines)] == [json.dumps(r) for r in result.records]
    text = (config.output / "bench.md").read_text()
    assert text.count("left out: ") == len(ENGINES) - 2
    assert "matrix product" in text
    assert (config.output / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((config.output / "summary.yaml").read_text())["results"]["records"] == result.records


def test_continues_without_measuring_again(bench):
    config, result, _ = bench
    said = []
    again = run(config, progress=lambda *what: said.append(what))
    assert again.records == result.records
    assert not said


def record(what, atoms, ms, **more):
    """A record as `run` makes them."""
    common = {"model": "m", "pairs": 6, "min_ms": 1.0, "max_ms": 9.0, "max_dF_eV_A": 0.0, "start_MiB": 400.0}
    more = {"peak_MiB": 1.0, "time_to_first_force_s": 1.0, **more}
    return {**common, "what": what, "atoms": atoms, "ms_per_step": ms, **more}


def test_tables_compare():
    records = [record("mace-torch", 3, 8.0), record("symmetrix", 3, 5.0), record("mdplug-ase", 3, 2.0)]
    assert [line.split(" | ")[-1] for line in table(records).splitlines()[2:]] == ["1.00 |", "1.60 |", "4.00 |"]
    assert ratios(records).splitlines()[0].endswith("| mace-torch / ours | symmetrix / ours |")
    assert ratios(records).splitlines()[-1] == "| m | mdplug-ase | 3 | 4.00 | 2.50 |"
    assert ratios(records[:2]) == ""


def test_memory_over_size():
    """100 MiB more from 100 to 200 atoms: 1 MiB per atom, and 8192 MiB hold 7692 atoms more than 200."""
    peaks = {100: 400.0, 200: 500.0}
    records = [record("mdplug-ase", n, 1.0, peak_MiB=peaks[n]) for n in (200, 100)]
    (found,) = memory([*records, record("symmetrix", 100, 1.0)])
    assert found["bytes_per_atom"] == 2**20
    assert found["from_atoms"] == [100, 200]
    assert found["atoms_in_8_GiB"] == 200 + 7692
    assert memory(records[:1]) == []


def test_engines_that_would_take_too_much_are_left_out(tmp_path):
    config = Config(turn_s=10.0, memory_GiB=4.0, output=tmp_path)
    known = [record("mace-torch", 100, 900.0, peak_MiB=600.0), record("mace-torch", 10, 1e9, peak_MiB=1e9)]

    def of(atoms, **more):
        return too_much("mace-torch", "m", atoms, known, config, **more)

    assert of(10) == ""  # nothing smaller is known
    assert of(1000) == ""  # 9 s, 2.3 GiB
    assert of(1200) == "a step would take about 11 s at 1200 atoms (turn_s: 10)"
    assert of(1000, factor=2.0).startswith("a step would take about 18 s")
    known[0]["ms_per_step"] = 1.0
    assert of(2000) == "it would need about 4 GiB at 2000 atoms (memory_GiB: 4)"
    known.append({"what": "mace-torch", "model": "m", "atoms": 2000, "left_out": "because"})
    assert of(4000) == "because"
    assert too_much("mace-torch", "another", 4000, known, config) == ""


def test_operations_per_atom():
    """The counts of an independent table for 128 channels, six elements (MFLOP, at 40, 50, 60, 100 neighbours)."""
    table = {0: (4.2, 4.5, 4.8, 6.0), 1: (10.0, 11.1, 12.3, 17.0), 2: (19.8, 22.7, 25.6, 37.3)}
    for degree, row in table.items():
        ours = [mflop_per_atom(128, degree, n, elements=6) for n in (40, 50, 60, 100)]
        assert ours == pytest.approx(row, rel=0.015)
    direct = [mflop_per_atom(128, degree, 50, 6, sender_by_element=False) for degree in range(3)]
    assert direct == pytest.approx([5.1, 11.7, 23.3], rel=0.015)
    assert mflop_per_atom(128, 0, 50, elements=89) <= direct[0]


def test_limit_is_of_models_that_were_counted():
    spec = describe("m", {"channels": 96, "l_hidden": 1}, 5.0, (1, 8))
    assert limit_of(spec, 40.0, 2) == mflop_per_atom(96, 1, 40.0, 2)
    charged = [{"feature": "total_charge", "kind": "categorical"}]
    assert limit_of(replace(spec, config={**spec.config, "embedding": charged}), 40.0, 2) > limit_of(spec, 40.0, 2)
    for key, value in (("kinds", ["NL", "NL"]), ("correlation", [3, 2]), ("l_max", 2), ("edge_channels", 8)):
        assert limit_of(replace(spec, config={**spec.config, key: value}), 40.0, 2) is None
    assert limit_of(LennardJones.new(0.004, 1.8, 4.0).spec, 40.0, 2) is None


JOB = {"engine": "mdplug-ase", "dtype": "float32", "device": "cpu", "threads": 1, "head": None, "memory_MiB": 1e6}


def test_engine_that_dies_is_named(tmp_path):
    job = {**JOB, "model": "absent.safetensors"}
    with (
        Worker(job, tmp_path, 60.0) as worker,
        pytest.raises(MdplugError, match=r"mdplug-ase stopped: .*absent\.safetensors"),
    ):
        worker.ask()
    with (
        Worker({**job, "structure": "x"}, tmp_path, 0.01) as worker,
        pytest.raises(MdplugError, match=r"within 0\.01 s"),
    ):
        worker.ask()


def test_engine_that_takes_too_much_memory_is_ended(tmp_path):
    job = {**JOB, "engine": "roofline", "memory_MiB": 64}  # less than torch alone
    with (
        Worker(job, tmp_path, 60.0) as worker,
        pytest.raises(MdplugError, match=r"roofline stopped: it needs more than 0\.1 GiB"),
    ):
        worker.ask()


def test_one_that_dies_on_the_way_does_not_end_the_others(bench, tmp_path, monkeypatch):
    config, _, _ = bench
    asked = []
    ask = Worker.ask

    def mostly(self, request=None):
        if self.what == "mdplug-openmm":
            asked.append(request)
            if len(asked) == 4:  # its first turn, after the start, the forces and the warm-up
                self.kill()
        return ask(self, request)

    monkeypatch.setattr(Worker, "ask", mostly)
    records = {r["what"]: r for r in run(config.model_copy(update={"output": tmp_path / "out"})).records}
    assert records["mdplug-ase"]["steps"] == config.rounds * config.steps
    assert records["mdplug-openmm"]["left_out"].startswith("mdplug-openmm stopped: ")


def test_wrong_forces_are_not_timed(bench, tmp_path, monkeypatch):
    config, _, _ = bench
    monkeypatch.setattr("mdplug.workflows.bench.WRONG", 0.0)
    change = {"output": tmp_path / "out", "engines": ["mdplug-ase"]}
    machine, ours = run(config.model_copy(update=change)).records
    assert ours["left_out"].startswith("its forces are those of another function: off by ")
    assert machine["gflops"] > 0


def test_stops_when_asked(tmp_path):
    """SIGTERM while an engine starts: a clean end, nothing half-written, and the same command goes on."""
    model = mdplug.save(LennardJones.new(0.004, 1.8, 4.0), tmp_path / "lj.safetensors")
    config = Config(models=[str(model)], molecules=[8], output=tmp_path / "out")
    with pytest.raises(Stopped, match="stopped by SIGTERM; the same command goes on") as caught:
        run(config, progress=lambda *what: os.kill(os.getpid(), signal.SIGTERM))
    assert caught.value.exit_code == 75
    assert not (config.output / "bench.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", list(RANDOM))
def test_peers_have_the_same_forces(model, tmp_path):
    """But compiled ones, whose compilers take minutes."""
    pytest.importorskip("mace")
    engines = ["mdplug-ase", "mdplug-openmm", "mace-torch", "openmmml"]
    config = Config(
        models=[model], molecules=[8], engines=engines, rounds=1, steps=1, warmup=1, output=tmp_path / "out"
    )
    result: Result = run(config)
    measured = [r for r in result.records if "ms_per_step" in r]
    assert {"mdplug-ase", "mdplug-openmm", "mace-torch"} <= {r["what"] for r in measured}
    for record in measured:
        assert record["reference"] == "mace-torch float64"
        assert record["max_dF_eV_A"] < 1e-4, record
        assert 0.2 < record["rms_F_eV_A"] < 5.0  # so that the line above says something
        assert 0 < record["fraction_of_limit"] < 1


def test_boxes_to_train_on():
    frames = labelled_boxes(3, 4, seed=1)
    assert [len(one) for one in frames] == [12, 12, 12]
    assert all(one.pbc.all() for one in frames)
    assert len({one.info["REF_energy"] for one in frames}) == 3
    assert abs(frames[0].info["REF_energy"] + 4 * (432.6 + 2 * 13.6)) < 5.0
    assert np.array_equal(frames[2].arrays["REF_forces"], labelled_boxes(3, 4, seed=1)[2].arrays["REF_forces"])
    with pytest.raises(InputError, match="no model 'electrolyte' to train"):
        bench_training.run(bench_training.Config(models=["electrolyte"]))


def test_training_table():
    common = {"model": "m", "dtype": "float64", "threads": 1, "atoms": 30, "steps": 2, "loss": 1.0, "peak_MiB": 1.0}
    common |= {"ms_per_step": 1.0, "min_ms": 1.0, "max_ms": 1.0}
    records = [
        {**common, "what": "mdplug", "structures_per_s": 8.0},
        {**common, "what": "mace-torch", "structures_per_s": 2.0},
    ]
    assert [row.split(" | ")[-1] for row in bench_training.table(records).splitlines()[2:]] == ["4.00 |", "1.00 |"]
    left = [{"model": "m", "dtype": "float64", "threads": 1, "atoms": 30, "what": "mace-torch", "left_out": "why"}]
    assert "left out: why" in bench_training.table(left)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_both_trainers_minimise_the_same_function(dtype, tmp_path):
    """Same loss and same derivative along the embeddings, whatever the parametrisation; two threads beside one."""
    pytest.importorskip("mace")
    config = bench_training.Config(
        models=["l0"], molecules=3, batch=2, rounds=1, steps=2, threads=2, dtype=dtype, output=tmp_path / "out"
    )
    said = []
    result = bench_training.run(config, progress=lambda *what: said.append(what))
    ours, theirs = result.records
    assert (ours["what"], theirs["what"]) == ("mdplug", "mace-torch")
    for key in ("loss", "slope"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-10 if dtype == "float64" else 1e-4), key
    assert abs(ours["slope"]) > 1.0
    for one in result.records:
        assert one["structures_per_s"] == pytest.approx(2e3 / one["ms_per_step"], rel=1e-3)
    assert bench_training.run(config, progress=lambda *what: pytest.fail("measured again")).records == result.records
