"""Members on one body, uncertainties by pulling cotangents back, and the bias on them."""

import copy

import numpy as np
import pytest
import torch
from contract import check_derivatives, liquid
from mace_models import CONTRACT, box, build
from member_models import arguments, ensemble, shared

import mdplug
from mdplug import kernels
from mdplug.biased import Biased
from mdplug.compose import Ensemble, Sum
from mdplug.deployed import call, deploy, evaluate
from mdplug.errors import InputError
from mdplug.pairs import pairs
from mdplug.potentials.members import SharedMembers
from mdplug.potentials.pair import LennardJones
from mdplug.system import AtomicSystem, batch
from mdplug.uncertainty import call_with_sigma, linearised, mixtures, uncertainty

FORMS = {
    "definition": lambda model: model,
    "kernels, exact": lambda model: model.with_kernels(False),
    "kernels, tables": lambda model: model.with_kernels(True),
}


def made(kind, form):
    if form != "definition" and not kernels.available():
        pytest.skip(kernels.why_not())
    return FORMS[form](shared() if kind == "shared" else ensemble())


@pytest.mark.parametrize("form", FORMS)
def test_the_mean_of_shared_members_is_the_body_to_the_last_bit(form):
    model = made("shared", form)
    system = box()
    body, whole = evaluate(model.parts[0], system), evaluate(model, system)
    assert torch.equal(body.forces, whole.forces)
    assert torch.equal(body.interaction_energy, whole.interaction_energy)
    mean = whole.extras["member_atom_energy"].mean(0)
    assert torch.allclose(mean, body.atom_energy, atol=1e-12, rtol=0)
    assert whole.extras["member_atom_energy"].std(0).min() > 1e-4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["shared", "deep"])
def test_pulled_member_forces_are_slopes_of_member_energies(kind, form):
    model, system = made(kind, form), box()
    out, pulled = linearised(model, system, pairs(system, model.cutoff))
    weight = torch.tensor(np.random.default_rng(1).normal(size=out["member_atom_energy"].shape))
    forces, virial = pulled({"member_atom_energy": weight})

    def value(moved):
        there = evaluate(model, moved, forces=False)
        return float((there.extras["member_atom_energy"] * weight).sum())

    h = 1e-4
    for atom, axis in ((0, 0), (7, 2), (13, 1)):
        ends = []
        for sign in (1, -1):
            x = system.positions.clone()
            x[atom, axis] += sign * h
            ends.append(value(system.with_(positions=x)))
        assert -(ends[0] - ends[1]) / (2 * h) == pytest.approx(float(forces[atom, axis]), abs=2e-6)
    ends = []
    for sign in (1, -1):
        strain = torch.eye(3, dtype=torch.float64)
        strain[0, 1] += sign * h / 2
        strain[1, 0] += sign * h / 2
        ends.append(value(system.with_(positions=system.positions @ strain, cell=system.cell @ strain)))
    assert -(ends[0] - ends[1]) / (2 * h) == pytest.approx(float(virial[0, 0, 1]), abs=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_every_output_of_a_body_pulls_back_alike(form):
    model, system = made("shared", form), box()
    given = arguments(model, system)
    reference = shared()
    out, pull = reference.local_with_pull(*given)
    other, other_pull = model.local_with_pull(*given)
    tolerance = 1e-10 if form != "kernels, tables" else 2e-4
    generator = torch.Generator().manual_seed(3)
    for key in ("atom_energy", "features", "member_atom_energy", "feature_distance"):
        assert torch.allclose(out[key], other[key], atol=tolerance, rtol=tolerance)
        cotangent = torch.randn(out[key].shape, generator=generator, dtype=torch.float64)
        for _ in range(2):  # may be called again
            got = other_pull({key: cotangent})
        wanted = pull({key: cotangent})
        assert torch.allclose(got, wanted, atol=tolerance * 30, rtol=tolerance), key


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["shared", "three", "biased", "plain parts"])
def test_looking_at_the_disagreement_changes_no_bit(kind, form, dtype):
    if form != "definition" and not kernels.available():
        pytest.skip(kernels.why_not())
    model = {
        "shared": shared,
        "three": lambda: ensemble(3),  # a third of a force is rounded
        "biased": lambda: Biased.of(shared(), 1.0),
        "plain parts": lambda: Ensemble.of([LennardJones.new(0.02, 2.2, 3.5), LennardJones.new(0.01, 2.0, 3.4)]),
    }[kind]()
    deployed, system = deploy(FORMS[form](model.to(dtype))), box()
    found = pairs(system, deployed.cutoff)
    plain, watched = call(deployed, system, found), call_with_sigma(deployed, system, found, probes=2, seed=5)
    assert set(watched) - set(plain) == {"forces_sigma", "virial_sigma"}
    for key, value in plain.items():
        assert torch.equal(value, watched[key]), key
    assert watched["forces_sigma"].min() > 0


def test_sigma_of_forces_is_the_spread_of_member_forces():
    model, system = ensemble(4), box()
    found = uncertainty(model, system, pairs(system, model.cutoff))
    alone = [evaluate(part, system) for part in model.parts]
    forces = torch.stack([p.forces for p in alone])
    assert torch.allclose(found.forces, forces.var(0).sum(1).sqrt(), atol=1e-10)
    assert torch.allclose(found.virial, torch.stack([p.virial for p in alone]).std(0), atol=1e-9)
    energies = torch.stack([p.interaction_energy for p in alone])
    assert torch.allclose(found.energy, energies.std(0), atol=1e-10)
    assert torch.allclose(found.atom_energy, torch.stack([p.atom_energy for p in alone]).std(0))


def test_few_probes_are_right_on_average_and_all_are_exact():
    model, system = shared(members=6), box()
    found = pairs(system, model.cutoff)
    exact = uncertainty(model, system, found).forces
    draws = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        draws.append(uncertainty(model, system, found, probes=2, generator=generator).forces.square())
    mean, error = torch.stack(draws).mean(0), torch.stack(draws).std(0) / 60**0.5
    z = (mean - exact.square()) / error
    assert z.abs().mean() < 1.3
    assert z.abs().max() < 4.5
    assert (torch.stack(draws).std(0) / exact.square()).mean() > 0.2  # a single draw is noisy
    again = uncertainty(model, system, found, generator=torch.Generator().manual_seed(9)).forces
    assert torch.allclose(exact, again, rtol=1e-9)


def test_mixtures_are_orthonormal_and_sum_to_zero():
    weights = mixtures(5, 3)
    assert torch.allclose(weights.sum(1), torch.zeros(3, dtype=torch.float64), atol=1e-14)
    assert torch.allclose(weights @ weights.t(), torch.eye(3, dtype=torch.float64), atol=1e-14)
    assert mixtures(2, None).shape == (1, 2)
    assert mixtures(4, 100).shape == (3, 4)


def test_sigma_does_not_depend_on_labels_frame_or_company():
    model = shared()
    one, two = box(0), box(1)
    alone = [uncertainty(model, s, pairs(s, model.cutoff)) for s in (one, two)]
    both = batch([one, two])
    together = uncertainty(model, both, pairs(both, model.cutoff))
    assert torch.allclose(together.energy, torch.cat([u.energy for u in alone]), atol=1e-10)
    assert torch.allclose(together.forces, torch.cat([u.forces for u in alone]), atol=1e-10)
    assert torch.allclose(together.virial, torch.cat([u.virial for u in alone]), atol=1e-9)
    order = torch.randperm(len(one.numbers), generator=torch.Generator().manual_seed(2))
    turned = one.with_(numbers=one.numbers[order], positions=one.positions[order])
    there = uncertainty(model, turned, pairs(turned, model.cutoff))
    assert torch.allclose(there.forces, alone[0].forces[order], atol=1e-9)
    assert torch.allclose(there.distance, alone[0].distance[order], atol=1e-9)


def test_equal_members_do_not_disagree():
    part = build({})
    model, system = Ensemble.of([part, copy.deepcopy(part), copy.deepcopy(part)]), box()
    found = uncertainty(model, system, pairs(system, model.cutoff))
    assert float(found.energy) == 0.0
    assert float(found.forces.max()) < 1e-12
    biased = Biased.of(model, 2.0)
    there = evaluate(biased, system)
    assert torch.allclose(there.forces, evaluate(model, system).forces, atol=1e-12)
    assert torch.isfinite(there.forces).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["shared", "deep"])
def test_forces_and_virial_of_a_bias_are_its_slopes(kind, form):
    model = Biased.of(made(kind, form), 1.5, floor_eV=1e-2)
    atoms = liquid([1, 8], n=20, edge=7.5)
    check_derivatives(model, atoms, 3e-6)
    plain, system = model.parts[0], AtomicSystem.from_ase(atoms)
    with_bias, without = evaluate(model, system), evaluate(plain, system)
    sigma = without.extras["member_atom_energy"].std(0)
    wanted = -1.5 * ((sigma**2 + 1e-4).sqrt() - 1e-2)
    assert torch.allclose(with_bias.extras["bias_energy"], wanted, atol=1e-10)
    assert torch.allclose(with_bias.atom_energy - without.atom_energy, wanted, atol=1e-10)
    assert (with_bias.forces - without.forces).abs().max() > 1e-2


def test_a_bias_of_nothing_is_the_plain_potential():
    model, system = shared(), box()
    plain, biased = evaluate(model, system), evaluate(Biased.of(model, 0.0), system)
    assert torch.equal(plain.interaction_energy, biased.interaction_energy)
    assert torch.allclose(plain.forces, biased.forces, atol=1e-12)


@pytest.mark.parametrize("name", ["shared", "biased", "deep biased"])
def test_files_bring_members_back(name, tmp_path):
    model = {
        "shared": lambda: shared(CONTRACT["density"]),
        "biased": lambda: Biased.of(shared(), -0.7),
        "deep biased": lambda: Biased.of(ensemble(), 0.7),
    }[name]()
    path = tmp_path / "model.safetensors"
    mdplug.save(model, path)
    again, system = mdplug.load(path, dtype="float64", radial="exact"), box()
    one, two = evaluate(model, system), evaluate(again, system)
    assert torch.allclose(one.forces, two.forces, atol=1e-10)
    for key in one.extras:
        assert torch.allclose(one.extras[key], two.extras[key], atol=1e-10), key


def test_members_compile_and_export(tmp_path):
    from mdplug.export import portable

    model, system = Biased.of(shared(), 0.5), box()
    file = portable(model)
    found = pairs(system, model.cutoff)
    one, two = call(deploy(model), system, found), call(file, system, found)
    assert torch.allclose(one["forces"], two["forces"], atol=1e-10)
    assert torch.allclose(one["member_atom_energy"], two["member_atom_energy"], atol=1e-10)
    with pytest.raises(InputError, match="safetensors"):
        uncertainty(file, system, found)


def test_what_has_no_members_is_refused():
    model, system = LennardJones.new(0.01, 2.2, 6.0), box()
    with pytest.raises(InputError, match="no members"):
        uncertainty(model, system, pairs(system, 6.0))
    with pytest.raises(InputError, match="no members"):
        Biased.of(model, 1.0)
    with pytest.raises(InputError, match="features"):
        SharedMembers.of(model, 4, 8)
    with pytest.raises(InputError, match="two members"):
        SharedMembers.of(build({}), 1, 8)


def test_a_sum_pulls_back_too():
    system = AtomicSystem.from_ase(liquid([14], n=20, edge=9.0))
    model = Sum.of([LennardJones.new(0.02, 2.2, 6.0), LennardJones.new(0.01, 2.0, 5.0)])
    _, pulled = linearised(model, system, pairs(system, model.cutoff))
    forces, virial = pulled({"atom_energy": torch.ones(20, dtype=torch.float64)})
    there = evaluate(model, system)
    assert torch.allclose(forces, there.forces, atol=1e-12)
    assert torch.allclose(virial, there.virial, atol=1e-12)
