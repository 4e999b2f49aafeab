"""What an ensemble costs: the records, and that what is timed is what the names say."""

import json

import numpy as np
import pytest
from argon import model_file
from mace_models import build

import mdplug
from mdplug.errors import InputError
from mdplug.workflows import bench_uncertainty
from mdplug.workflows.bench import water_box
from mdplug.workflows.bench_uncertainty import Config, shared


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return mdplug.save(build({}), tmp_path_factory.mktemp("model") / "tiny.safetensors")


def test_records(model, tmp_path):
    config = Config(
        model=str(model), output=tmp_path / "out.jsonl", molecules=6, members=[3], models=2, every=3, rounds=2
    )
    seen = []
    result = bench_uncertainty.run(config, progress=lambda *what: seen.append(what))
    assert [json.loads(line) for line in config.output.read_text().splitlines()] == result.records
    names = [record["what"] for record in result.records]
    assert names == ["body", "shared-3, sigma of energies", "shared-3, sigma of forces too", "models-2"]
    assert [record["members"] for record in result.records] == [1, 3, 3, 2]
    assert result.records[0]["ratio"] == 1.0
    for record in result.records:
        assert 0 < record["min_ms"] <= record["ms_per_step"] <= record["max_ms"]
        assert record["ratio_low"] <= record["ratio"] <= record["ratio_high"]
        assert (record["atoms"], record["every"], record["probes"]) == (18, 3, 2)
    assert str(result).count("\n") == 3
    assert len(seen) == 3


def test_a_turn_looks_once_and_evaluates_every_frame_once(model):
    from mdplug.units import NM

    atoms, config = water_box(6), Config(model=str(model))
    made = shared(mdplug.load(model), 4, 0, atoms)
    variant = bench_uncertainty._Variant(made, atoms, config, True, 2)
    frames = np.array([atoms.positions + 0.01 * k for k in range(4)]) / NM
    assert variant.turn(frames) > 0
    assert variant.plug.evaluations == 4
    assert variant.plug.uncertainty().forces is None
    assert float(variant.plug.uncertainty().energy) > 0
    variant.turn(frames[:1])
    assert variant.plug.uncertainty().forces.shape == (18,)


def test_a_model_without_features_is_refused(tmp_path):
    with pytest.raises(InputError, match="gives no features"):
        bench_uncertainty.run(Config(model=str(model_file(tmp_path)), molecules=2, output=tmp_path / "out"))
