"""Members on one body against readouts that were put in; joined models; the command."""

import labelled as made
import numpy as np
import pytest
import torch
from contract import liquid
from mace_models import build
from readouts import SPECIES, frames_of, truth

import mdplug
from mdplug.deployed import evaluate
from mdplug.errors import InputError
from mdplug.pairs import pairs
from mdplug.system import AtomicSystem
from mdplug.uncertainty import uncertainty
from mdplug.workflows import ensemble, last_layer
from mdplug.workflows.dataset import Loader, read


@pytest.fixture(scope="module")
def body():
    return build({}).requires_grad_(False).eval()


def rows_of(body, frames, path, directions=6):
    data = read([made.save(path, frames)])
    loader = Loader(data.structures, body.cutoff, {"H": 0.0, "O": 0.0})
    statistics = last_layer.feature_statistics(body, loader, SPECIES)
    return last_layer.gather(body, loader, statistics, SPECIES, directions, 0), statistics


@pytest.mark.parametrize("which", ["energies", "forces"])
def test_rows_hold_what_the_labels_say_of_a_readout(body, tmp_path, which):
    answer = truth(body)
    rows, statistics = rows_of(body, frames_of(body, answer), tmp_path / "labels.xyz", directions=12)
    chosen = rows.where(rows.of_forces if which == "forces" else ~rows.of_forces)
    width = len(statistics.centre)
    # In standardised features; what the centre takes off goes to the offsets, of which forces know nothing.
    scaled = answer[:width] / statistics.scale
    moved = answer[width:] + statistics.centre @ answer[:width]
    expected = chosen.x @ np.concatenate([scaled, moved])
    assert np.abs(expected - chosen.y).max() < 2e-5 * np.abs(chosen.y).max()
    assert np.abs(chosen.y).max() > 0.1
    if which == "forces":
        found = np.linalg.lstsq(chosen.x[:, :width], chosen.y, rcond=None)[0]
        assert np.allclose(found, scaled, atol=1e-4 * np.abs(scaled).max())


def test_laplace_draws_have_the_covariance_of_the_posterior(body, tmp_path):
    rows, _ = rows_of(body, frames_of(body, truth(body), noise=0.05), tmp_path / "labels.xyz")
    members = last_layer.members_of(rows, "laplace", 6000, 1)
    x = rows.x / rows.noise[:, None] * np.sqrt(rows.weight)[:, None]
    ridge = 1e-9 * np.trace(x.T @ x) / x.shape[1] + 1e-6
    covariance = np.linalg.inv(x.T @ x + ridge * np.eye(x.shape[1]))
    some = rows.x[:: len(rows.x) // 40]
    wanted = np.sqrt(np.einsum("rf,fg,rg->r", some, covariance, some))
    assert np.allclose((some @ members.T).std(axis=1), wanted, rtol=0.06)


def test_pops_members_find_the_readout_within_their_spread(body, tmp_path):
    answer = truth(body)
    rows, statistics = rows_of(body, frames_of(body, answer, n=30, noise=0.05), tmp_path / "labels.xyz")
    members = last_layer.members_of(rows, "pops", 200, 1)
    scaled = answer[: len(statistics.centre)] / statistics.scale
    test = rows.where(rows.of_forces)
    said = test.x[:, : len(scaled)] @ members[:, : len(scaled)].T
    off = (said.mean(axis=1) - test.x[:, : len(scaled)] @ scaled) / said.std(axis=1)
    assert np.mean(off**2) < 4.0
    assert np.mean(np.abs(off) > 0.01) > 0.9  # and not by having no spread


def test_sigma_is_scaled_to_the_residuals(body, tmp_path):
    rows, _ = rows_of(body, frames_of(body, None, noise=0.03), tmp_path / "labels.xyz")
    members = last_layer.members_of(rows, "laplace", 200, 1)
    scale = last_layer.typical_ratio(members, rows)
    chosen = rows.where(rows.of_forces)
    sigma = scale * (chosen.x @ members.T).std(axis=1, ddof=1)
    assert np.sqrt(np.pi / 2) * np.mean(np.abs(chosen.y) / sigma) == pytest.approx(1.0, rel=1e-6)
    assert last_layer.typical_ratio(2 * members, rows) == pytest.approx(scale / 2)


def test_unknown_method_is_named(body, tmp_path):
    rows, _ = rows_of(body, frames_of(body), tmp_path / "labels.xyz")
    with pytest.raises(InputError, match="laplace, pops"):
        last_layer.members_of(rows, "magic", 4, 0)


def test_command_makes_members_that_leave_the_model_as_it_is(body, tmp_path):
    model = mdplug.save(body, tmp_path / "body.safetensors")
    data = made.save(tmp_path / "labels.xyz", frames_of(body, truth(body)))
    options = {"models": (model,), "data": (data,), "members": 6, "threads": 1}
    result = ensemble.run(ensemble.Config(output=tmp_path / "ens.safetensors", **options))
    assert (result.members, result.kind) == (6, "shared body")
    again = ensemble.run(ensemble.Config(output=tmp_path / "two.safetensors", **options))
    assert again.model.read_bytes() == result.model.read_bytes()
    loaded, plain = (mdplug.load(path, dtype="float64") for path in (result.model, model))
    system = AtomicSystem.from_ase(liquid([1, 8], n=12, edge=6.5, seed=99))
    one, two = evaluate(loaded, system), evaluate(plain, system)
    assert torch.equal(one.forces, two.forces)
    assert torch.equal(one.energy, two.energy)
    found = uncertainty(loaded, system, pairs(system, loaded.cutoff))
    assert float(found.forces.min()) > 0
    assert 0.3 < float(found.distance.median()) < 3
    crushed = system.with_(positions=0.6 * system.positions, cell=0.6 * system.cell)
    far = uncertainty(loaded, crushed, pairs(crushed, loaded.cutoff))
    assert float(far.distance.max()) > 3 * float(found.distance.max())
    assert float(far.forces.mean()) > 3 * float(found.forces.mean())


def test_command_joins_models(body, tmp_path):
    files = [mdplug.save(build({}, seed=10 * k), tmp_path / f"{k}.safetensors") for k in range(3)]
    result = ensemble.run(ensemble.Config(models=tuple(files), output=tmp_path / "ens.safetensors"))
    loaded = mdplug.load(result.model, dtype="float64")
    system = AtomicSystem.from_ase(liquid([1, 8], n=12, edge=6.5))
    alone = torch.stack([evaluate(mdplug.load(f, dtype="float64"), system).forces for f in files])
    assert torch.allclose(evaluate(loaded, system).forces, alone.mean(0), atol=1e-10)
    found = uncertainty(loaded, system, pairs(system, loaded.cutoff))
    assert torch.allclose(found.forces, alone.var(0).sum(1).sqrt(), atol=1e-10)


def test_what_does_not_go_together_is_refused(body, tmp_path):
    model = mdplug.save(body, tmp_path / "body.safetensors")
    with pytest.raises(ValueError, match="needs data"):
        ensemble.Config(models=(model,))
    with pytest.raises(InputError, match="check the name"):
        ensemble.run(ensemble.Config(models=(model,), data=(tmp_path / "none.xyz",)))
    from mdplug.potentials.pair import LennardJones

    other = mdplug.save(LennardJones.new(0.01, 3.4, 9.0), tmp_path / "lj.safetensors")
    data = made.save(tmp_path / "labels.xyz", frames_of(body))
    with pytest.raises(InputError, match="features"):
        ensemble.run(ensemble.Config(models=(other,), data=(data,)))
