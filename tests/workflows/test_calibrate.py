"""`mdplug calibrate` against errors whose law is known."""

import json

import labelled as made
import numpy as np
import pytest
import torch
from mace_models import build
from readouts import frames_of, truth

import mdplug
from mdplug.calibration import Calibration
from mdplug.errors import InputError
from mdplug.pairs import pairs
from mdplug.system import AtomicSystem
from mdplug.uncertainty import uncertainty
from mdplug.workflows import calibrate, ensemble

FACTOR = 5.0


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An ensemble whose sigma is FACTOR times too small, and labels that it was not fitted to."""
    folder = tmp_path_factory.mktemp("calibrate")
    body = build({}).requires_grad_(False).eval()
    model = mdplug.save(body, folder / "body.safetensors")
    answer = truth(body)
    train = made.save(folder / "train.xyz", frames_of(body, answer, n=24))
    options = {"models": (model,), "data": (train,), "members": 24, "threads": 1}
    result = ensemble.run(ensemble.Config(output=folder / "ens.safetensors", **options))
    right = mdplug.load(result.model, dtype="float64", radial="exact").without_kernels()
    with torch.no_grad():
        right.weight.div_(FACTOR)
        right.offset.div_(FACTOR)
    wrong = mdplug.save(right, folder / "wrong.safetensors")
    frames = frames_of(body, answer, n=36, seed=500)
    for k, atoms in enumerate(frames):
        atoms.info["group"] = f"t{k}"
    crushed = frames_of(body, answer, n=8, seed=900)
    for atoms in crushed:
        atoms.positions *= 0.7
        atoms.set_cell(0.7 * atoms.cell.array)
        atoms.info |= {"config_type": "crushed"}
    return result.model, wrong, made.save(folder / "test.xyz", [*frames, *crushed])


def run(files, folder, which, **options):
    config = calibrate.Config(
        model=str(files[which]),
        data=(files[2],),
        output=folder,
        novel=("crushed",),
        repeats=6,
        dtype="float64",
        **options,
    )
    return calibrate.run(config)


def test_finds_the_factor_that_was_taken_off(files, tmp_path):
    right, wrong = (run(files, tmp_path / name, k, map="scale") for k, name in enumerate(("right", "wrong")))
    one, two = (
        Calibration.from_dict(mdplug.load(r.model).spec.calibration["forces_eV_A"]).offset for r in (right, wrong)
    )
    assert np.exp(two - one) == pytest.approx(FACTOR, rel=1e-3)
    assert wrong.raw["miscalibration_area"] > right.raw["miscalibration_area"] + 0.1
    assert wrong.forces["miscalibration_area"][0] == pytest.approx(right.forces["miscalibration_area"][0], abs=0.01)
    assert wrong.trajectories == 36


def test_intervals_hold_on_trajectories_that_were_not_seen(files, tmp_path):
    result = run(files, tmp_path / "run", 1)
    assert 0.8 < result.forces["coverage_of_90"][0] < 0.97
    assert result.forces["miscalibration_area"][0] < 0.1
    assert result.novel["crushed"]["distance"] > 0.95
    assert result.novel["crushed"]["calibrated"] > 0.95
    assert set(result.maps) == {"scale", "isotonic", "environment"}
    record = json.loads((tmp_path / "run" / "calibration.json").read_text())
    assert record["probes"] == 8
    assert 0 < record["sigma_max_eV_A"] < 10
    assert 1 < record["distance_max"] < 20
    assert (tmp_path / "run" / "reliability-forces.png").stat().st_size > 10000
    assert "trajectories" in str(result)


def test_the_file_gives_the_same_forces_and_members(files, tmp_path):
    result = run(files, tmp_path / "run", 0, map="scale")
    before, after = (mdplug.load(path, dtype="float64") for path in (files[0], result.model))
    from contract import liquid

    system = AtomicSystem.from_ase(liquid([1, 8], n=10, edge=6.0))
    one, two = (uncertainty(m, system, pairs(system, m.cutoff)) for m in (before, after))
    assert torch.equal(one.forces, two.forces)
    assert after.spec.calibration
    assert not before.spec.calibration


def test_what_cannot_be_calibrated_is_refused(files, tmp_path):
    body = mdplug.save(build({}), tmp_path / "plain.safetensors")
    with pytest.raises(InputError, match="mdplug ensemble"):
        run((body, body, files[2]), tmp_path / "a", 0)
    frames = frames_of(build({}).requires_grad_(False), n=6)
    for atoms in frames:
        atoms.info["group"] = "one"
    few = made.save(tmp_path / "few.xyz", frames)
    with pytest.raises(InputError, match="independent trajectories"):
        run((files[0], files[1], few), tmp_path / "b", 0)
    with pytest.raises(InputError, match="check novel"):
        calibrate.run(
            calibrate.Config(model=str(files[0]), data=(files[2],), output=tmp_path / "c", novel=("nothing",))
        )
