"""Bench: the same atoms through every engine, in records that can be compared; no word on how fast anything is."""

import json
import os
import signal

import numpy as np
import pytest
import yaml

import mdplug
from mdplug.errors import InputError, MdplugError
from mdplug.pairs import pairs
from mdplug.potentials.pair import LennardJones
from mdplug.potentials.stillinger_weber import StillingerWeber
from mdplug.system import AtomicSystem
from mdplug.units import G_CM3_PER_AMU_A3
from mdplug.workflows._common import Stopped
from mdplug.workflows.bench import Config, Result, Worker, motion, run, table, water_box
from mdplug.workflows.bench_peers import ENGINES, installed


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
    assert set(by) == {(engine, 24) for engine in ENGINES}
    for (engine, atoms), record in by.items():
        if engine not in ("mdplug-ase", "mdplug-openmm"):
            assert record["left_out"] == ("has no such weights" if installed(engine) else "not installed")
            continue
        assert 0 < record["min_ms"] <= record["ms_per_step"] <= record["max_ms"]
        assert record["steps"] == config.rounds * config.steps
        assert record["pairs"] == pairs(AtomicSystem.from_ase(water_box(atoms // 3)), 4.0).n_pairs
        assert record["peak_MiB"] > 50
        # Single against double precision: close, and not the same.
        assert 0 < record["max_dF_eV_A"] < 1e-4 * max(1.0, record["rms_F_eV_A"])
        assert record["reference"] == "mdplug-ase float64"
        assert record["versions"]["mdplug"] == mdplug.__version__
    assert said[-1][:2] == (config.rounds, config.rounds)


def test_files(bench):
    config, result, _ = bench
    lines = (config.output / "bench.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == result.records
    assert str(result).splitlines()[: len(lines)] == [json.dumps(r) for r in result.records]
    text = (config.output / "bench.md").read_text()
    assert text.count("left out: ") == 3
    assert (config.output / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((config.output / "summary.yaml").read_text())["results"]["records"] == result.records


def test_continues_without_measuring_again(bench):
    config, result, _ = bench
    said = []
    again = run(config, progress=lambda *what: said.append(what))
    assert again.records == result.records
    assert not said


def test_table_compares_with_mace_torch():
    common = {"model": "m", "atoms": 3, "pairs": 6, "min_ms": 1.0, "max_ms": 9.0, "peak_MiB": 1.0, "max_dF_eV_A": 0.0}
    records = [{**common, "what": "mace-torch", "ms_per_step": 8.0}, {**common, "what": "x", "ms_per_step": 2.0}]
    rows = table(records).splitlines()
    assert rows[-1].endswith("| 4.00 |")
    assert rows[-2].endswith("| 1.00 |")


def test_bad_input(tmp_path):
    sw = str(mdplug.save(StillingerWeber.new(), tmp_path / "sw.safetensors"))
    with pytest.raises(InputError, match=r"atom 0 is .*does not know"):
        run(Config(models=[sw], molecules=[1], output=tmp_path / "a"))
    with pytest.raises(InputError, match="at least 1"):
        run(Config(models=[sw], molecules=[0], output=tmp_path / "b"))
    with pytest.raises(InputError, match="shipped models"):
        run(Config(models=["no-such"], output=tmp_path / "c"))


def test_engine_that_dies_is_named(tmp_path):
    job = {"engine": "mdplug-ase", "dtype": "float32", "device": "cpu", "threads": 1, "model": "absent.safetensors"}
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


def test_stops_when_asked(tmp_path):
    """SIGTERM while an engine starts: a clean end, nothing half-written, and the same command goes on."""
    model = mdplug.save(LennardJones.new(0.004, 1.8, 4.0), tmp_path / "lj.safetensors")
    config = Config(models=[str(model)], molecules=[8], output=tmp_path / "out")
    with pytest.raises(Stopped, match="stopped by SIGTERM; the same command goes on") as caught:
        run(config, progress=lambda *what: os.kill(os.getpid(), signal.SIGTERM))
    assert caught.value.exit_code == 75
    assert not (config.output / "bench.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["l0", "l1"])
def test_peers_have_the_same_forces(model, tmp_path):
    pytest.importorskip("mace")
    result: Result = run(Config(models=[model], molecules=[8], rounds=1, steps=1, warmup=1, output=tmp_path / "out"))
    measured = [r for r in result.records if "left_out" not in r]
    assert {"mdplug-ase", "mdplug-openmm", "mace-torch"} <= {r["what"] for r in measured}
    for record in measured:
        assert record["reference"] == "mace-torch float64"
        assert record["max_dF_eV_A"] < 1e-4, record
        assert 0.2 < record["rms_F_eV_A"] < 5.0  # so that the line above says something
