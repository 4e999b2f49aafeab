"""MACE against the contract, finite differences, and itself in its other forms. Upstream parity is in tests/peers."""

import dataclasses

import numpy as np
import pytest
import torch
from contract import check, check_derivatives, liquid
from mace_models import CONTRACT, FURTHER, box, build

from mdplug.deployed import Deployed, evaluate
from mdplug.errors import InputError
from mdplug.pairs import pairs
from mdplug.potentials.mace import MACE, complete_config, describe


@pytest.mark.parametrize("name", list(CONTRACT))
def test_contract(name, tmp_path):
    check(build(CONTRACT[name]), [1, 8], tmp_path)


@pytest.mark.parametrize("name", list(FURTHER))
def test_derivatives_of_further_kinds(name):
    check_derivatives(build(FURTHER[name]), liquid([1, 8], n=12, edge=6.0), 1e-5)


@pytest.mark.parametrize("name", list(CONTRACT))
def test_float32_with_tables_is_close_to_float64_exact(name):
    model = build(CONTRACT[name])
    exact = evaluate(model, box())
    tables = model.float().with_tables()
    assert 0.0 < tables.table_error < 1e-5
    got = evaluate(tables, box())
    assert got.forces.dtype == torch.float64
    scale = exact.forces.abs().max()
    assert (got.forces - exact.forces).abs().max() < 1e-4 * scale
    assert (got.interaction_energy - exact.interaction_energy).abs() < 1e-4 * scale
    scripted = torch.jit.script(Deployed(tables))
    s, p = box(), pairs(box(), 3.5)
    out = scripted(
        s.numbers, s.positions, s.cell, s.pbc, p.index, p.shifts, s.system_index, s.total_charge, s.total_spin, s.head
    )
    torch.testing.assert_close(out["forces"], got.forces, rtol=1e-5, atol=1e-5 * scale.item())


def test_longer_and_unsorted_pair_lists_change_nothing():
    model, system = build(CONTRACT["residual"]), box()
    wanted = evaluate(model, system)
    longer = pairs(system, 4.5)
    shuffle = torch.randperm(longer.index.shape[1], generator=torch.Generator().manual_seed(0))
    out = Deployed(model)(
        system.numbers, system.positions, system.cell, system.pbc, longer.index[:, shuffle], longer.shifts[shuffle],
        system.system_index, system.total_charge, system.total_spin, system.head,
    )  # fmt: skip
    assert longer.index.shape[1] > pairs(system, 3.5).index.shape[1]
    torch.testing.assert_close(out["forces"], wanted.forces, rtol=1e-11, atol=1e-11)


def test_charge_spin_and_head_matter():
    model = build(CONTRACT["state"], heads=("first", "second"))
    energies = []
    for info, head in (({}, 0), ({}, 1), ({"charge": 2}, 0), ({"spin": 3}, 0)):
        system = box(**info)
        system.head.fill_(head)
        energies.append(float(evaluate(model, system, forces=False).interaction_energy))
    assert len({round(e, 6) for e in energies}) == 4
    with pytest.raises(InputError, match=r"total_charge .* range -4 to 4"):
        evaluate(model, box(charge=5))


def test_gradient_of_a_force_loss():
    """Reverse over reverse against a central difference in each of several weights."""
    model, system = build(CONTRACT["density"]), box()
    target = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def loss(create_graph=False):
        return (evaluate(model, system, create_graph=create_graph).forces - target).square().mean()

    model.zero_grad()
    loss(create_graph=True).backward()
    rng = np.random.default_rng(0)
    names = [n for n, p in model.named_parameters() if p.numel() and not n.startswith("readouts.0")]
    for name in rng.choice(names, 6, replace=False):
        parameter = model.get_parameter(name)
        place = int(parameter.grad.abs().argmax())
        flat, values = parameter.data.view(-1), []
        for sign in (1, -2):
            flat[place] += sign * 1e-5
            values.append(loss().item())
        flat[place] += 1e-5
        numeric = (values[0] - values[1]) / 2e-5
        assert numeric == pytest.approx(parameter.grad.view(-1)[place].item(), rel=1e-4, abs=1e-7), name


def test_no_default_dtype_leaks_in():
    wanted = evaluate(build(CONTRACT["nonlinear"]), box()).forces
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    try:
        model = build(CONTRACT["nonlinear"])
        assert {t.dtype for t in model.state_dict().values()} == {torch.float64}
        torch.testing.assert_close(evaluate(model, box()).forces, wanted)
    finally:
        torch.set_default_dtype(before)


def test_initialise_follows_the_seed_and_unit_variance():
    a, b, c = (
        MACE.from_spec(describe("t", {"channels": 48, "repulsion": True}, 4.0, (1, 8))).initialise(
            torch.Generator().manual_seed(seed)
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(a.embedding, b.embedding)
    assert not torch.equal(a.embedding, c.embedding)
    for name, scale in a.scales().items():
        parameter = a.get_parameter(name)
        if parameter.numel() > 2000:
            ratio = (parameter / torch.as_tensor(scale)).std().item()
            assert ratio == pytest.approx(1.0, abs=0.1), name


def test_domains_without_atoms_of_their_own():
    """A region of space may own no atom at all, or atoms without neighbours."""
    model = build(CONTRACT["residual"])
    none = torch.zeros(0, dtype=torch.int64)
    out = model.local(
        none, none.view(1, 0).expand(2, 0), torch.zeros(0, 3, dtype=torch.float64), 0, none,
        torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64),
    )  # fmt: skip
    assert out["atom_energy"].shape == (0,)
    assert out["features"].shape == (0, 8)


def test_bad_options_and_elements_are_refused():
    with pytest.raises(InputError, match="unknown MACE option 'chanels'"):
        complete_config({"chanels": 3})
    with pytest.raises(InputError, match=r"unknown MACE option radial\.width"):
        complete_config({"radial": {"width": 3}})
    with pytest.raises(InputError, match="unknown MACE layer 'Att'"):
        complete_config({"kinds": ["R", "Att"]})
    with pytest.raises(InputError, match="one value per layer"):
        complete_config({"kinds": ["R"] * 3})
    with pytest.raises(InputError, match="no readout"):
        complete_config({**FURTHER["one layer"], "readout": {"last_only": True}})
    system = box()
    for z in (6, 50):
        numbers = system.numbers.clone()
        numbers[0] = z
        p = pairs(system, 3.5)
        with pytest.raises(InputError, match="element"):
            build({}).local(
                numbers, p.index, p.vectors, 20, system.system_index, system.total_charge, system.total_spin,
                system.head,
            )  # fmt: skip


def test_untrained_takes_the_statistics_of_the_labels():
    statistics = {"mean_neighbours": 7.0, "rms_force": 0.8, "mean_interaction_energy": -0.3}
    spec = describe("t", {"channels": 8, "l_hidden": 1}, 4.0, (1, 8), licence="MIT")
    bare = dataclasses.replace(spec, config={"channels": 8, "l_hidden": 1}, layers=1, outputs=("atom_energy",))
    model = MACE.untrained(bare, statistics, torch.Generator().manual_seed(0))
    assert model.spec == dataclasses.replace(spec, config={**spec.config, "neighbours": [7.0, 7.0]})
    assert (float(model.scale), float(model.shift)) == (0.8, -0.3)
    assert torch.equal(model.embedding, MACE.from_spec(spec).initialise(torch.Generator().manual_seed(0)).embedding)


def test_detached_basis_keeps_the_energy_and_changes_the_forces():
    radial = {"basis": "chebyshev", "transform": "agnesi"}
    true, detached = build({"radial": radial}), build({"radial": {**radial, "detached": True}})
    a, b = evaluate(true, box()), evaluate(detached, box())
    torch.testing.assert_close(a.interaction_energy, b.interaction_energy)
    assert (a.forces - b.forces).abs().max() > 0.05 * a.forces.abs().max()
    assert detached.with_tables() is detached


@pytest.mark.parametrize("name", ["residual", "nonlinear"])
def test_chunks_change_nothing(name):
    model = build(CONTRACT[name]).eval()
    wanted = evaluate(model, box()).forces
    model.chunk = 3
    for layer in model.layers:
        layer.messenger.messages.cached = 1
    torch.testing.assert_close(evaluate(model, box()).forces, wanted, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(evaluate(model.train(), box()).forces, wanted, rtol=1e-11, atol=1e-11)
