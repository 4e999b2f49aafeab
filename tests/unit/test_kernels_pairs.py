"""The MD loop's native operators against their definition in torch: fuzzed shapes, one thread and two, wrong input."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from mace_models import box, build

from mdplug import kernels
from mdplug.deployed import evaluate, totals
from mdplug.errors import InputError
from mdplug.pairs import PairList, translations, within
from mdplug.pairs import pairs as find
from mdplug.potentials.mace_kernels import KernelMACE
from mdplug.system import AtomicSystem, batch

pytestmark = pytest.mark.skipif(not kernels.available(), reason="the native library is not there")


@pytest.fixture
def in_torch(monkeypatch):
    """A function that evaluates another by the definition."""

    def by_definition(function):
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "serves", lambda _: False)
            return function()

    return by_definition


@pytest.fixture
def on_threads():
    """A function that gives the results of another on one thread and on two."""
    before = torch.get_num_threads()

    def both(function):
        results = []
        for number in (1, 2):
            torch.set_num_threads(number)
            results.append(function())
        return results

    yield both
    torch.set_num_threads(before)


def crystal(n, edge, seed=0, pbc=(True, True, True)):
    rng = np.random.default_rng(seed)
    cell = edge * (np.eye(3) + 0.2 * rng.standard_normal((3, 3)))
    return AtomicSystem.from_arrays(rng.integers(1, 9, n), rng.random((n, 3)) @ cell, cell, pbc)


SYSTEMS = {
    "one atom": lambda: crystal(1, 30.0),
    "one atom and its images": lambda: crystal(1, 2.3),
    "no pairs": lambda: AtomicSystem.from_arrays([1, 2], [[0, 0, 0], [50, 0, 0]]),
    "open": lambda: crystal(17, 7.0, pbc=False),
    "slab": lambda: crystal(30, 8.0, pbc=(True, False, True)),
    "small cell": lambda: crystal(5, 3.1),
    "several": lambda: batch([crystal(9, 6.0, 1), crystal(1, 40.0, 2), crystal(12, 5.0, 3, False), crystal(4, 3.0, 4)]),
    "many pairs": lambda: crystal(1200, 14.0),  # more than one piece of work
}


@pytest.mark.parametrize("name", list(SYSTEMS))
def test_compaction(name, in_torch, on_threads):
    """The same pairs, shifts and vectors to the last bit, in the same order."""
    system = SYSTEMS[name]()
    loose = find(system, 5.0)
    rng = np.random.default_rng(7)
    moved = system.with_(positions=system.positions + torch.from_numpy(rng.normal(0, 0.02, (system.n_atoms, 3))))
    arguments = (moved, system, loose.index, loose.shifts, translations(system, loose.index, loose.shifts), 4.0, 0.5)
    wanted = in_torch(lambda: within(*arguments))
    assert wanted is not None
    assert wanted.n_pairs < loose.n_pairs or loose.n_pairs == 0
    for got in on_threads(lambda: within(*arguments)):
        assert got.system is moved
        for key in ("index", "shifts", "vectors"):
            assert torch.equal(getattr(got, key), getattr(wanted, key)), key
    if name == "many pairs":
        assert loose.n_pairs > 2 * 2**15


@pytest.mark.parametrize("native", [True, False])
def test_a_list_that_no_longer_holds(native, monkeypatch):
    """Neither after half the skin, nor where a position is lost."""
    if not native:
        monkeypatch.setattr(kernels, "serves", lambda _: False)
    system = crystal(9, 6.0)
    kept = PairList(4.0, skin=1.0)
    kept.update(system)
    for move, holds in ((0.49, True), (0.51, False), (math.nan, False), (math.inf, False)):
        x = system.positions.clone()
        x[4, 1] += move
        moved = dataclasses.replace(system)
        moved.__dict__["positions"] = x  # past the check
        assert (kept.reuse(moved) is not None) is holds, move


@pytest.mark.parametrize("native", [True, False])
def test_overlap_is_named(native, monkeypatch):
    if not native:
        monkeypatch.setattr(kernels, "serves", lambda _: False)
    system = AtomicSystem.from_arrays([1] * 4, [[0, 0, 0], [3, 0, 0], [0, 2, 0], [3.2, 0, 0]])
    kept = PairList(4.0, skin=1.0)
    kept.update(system)
    x = system.positions.clone()
    x[3, 0] = 3.0 + 1e-8
    with pytest.raises(InputError, match="atoms 1 and 3 sit on the same point"):
        kept.update(system.with_(positions=x))


@pytest.mark.parametrize("name", list(SYSTEMS))
@pytest.mark.parametrize("cutoff", [0.7, 4.0, 9.0])
def test_finding(name, cutoff, in_torch, on_threads):
    """The same list as vesin's, in the same order; atoms far outside the cell included."""
    system = SYSTEMS[name]()
    if cutoff > 5.0 and system.n_atoms > 100:
        pytest.skip("large")
    jumps = np.random.default_rng(5).integers(-3, 4, (system.n_atoms, 3)) * system.pbc[system.system_index].numpy()
    away = torch.einsum("nk,nka->na", torch.from_numpy(jumps).double(), system.cell[system.system_index])
    for one in (system, system.with_(positions=system.positions + away)):
        wanted = in_torch(lambda one=one: find(one, cutoff))
        for got in on_threads(lambda one=one: find(one, cutoff)):
            assert torch.equal(got.index, wanted.index)
            assert torch.equal(got.shifts, wanted.shifts)


def test_finding_in_odd_places():
    """All atoms in a plane, on a line, very far apart; a flat cell that nothing is periodic in."""
    rng = np.random.default_rng(0)
    x = 4 * rng.random((12, 3))
    flat = [[1.0, 0, 0], [2.0, 0, 0], [0, 0, 1.0]]
    cases = [(x * [1, 1, 0], None), (x * [0, 1, 0], None), (x * [1, 1, 1e7], None), (x, flat), (x[:1], None)]
    for positions, cell in cases:
        got = find(AtomicSystem.from_arrays([1] * len(positions), positions, cell, False), 3.0)
        r = np.linalg.norm(positions[:, None] - positions, axis=2) + 9 * np.eye(len(positions))
        assert got.index.T.tolist() == np.argwhere(r < 3.0).tolist()
        assert not got.shifts.any()
    with pytest.raises(RuntimeError, match="too many cells away"):
        find(AtomicSystem.from_arrays([1], [[1e12, 0, 0]], np.eye(3), True), 3.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", list(SYSTEMS))
@pytest.mark.parametrize("shuffled", [False, True])
def test_sums(name, dtype, shuffled, in_torch, on_threads):
    system = SYSTEMS[name]()
    found = find(system, 5.0)
    g = torch.Generator().manual_seed(3)
    index, r = found.index, found.vectors
    if shuffled:
        order = torch.randperm(found.n_pairs, generator=g)
        index, r = index[:, order], r[order]
    gradient = torch.randn(r.shape, generator=g, dtype=torch.float64).to(dtype)
    atom_energy = torch.randn(system.n_atoms, generator=g, dtype=torch.float64).to(dtype)
    arguments = (r, gradient, index, atom_energy, system.system_index, system.positions, system.cell)
    wanted = in_torch(lambda: totals(*arguments))
    one, two = on_threads(lambda: totals(*arguments))
    for key in ("energy", "forces", "virial"):
        assert torch.equal(one[key], two[key]), key
        assert one[key].dtype == torch.float64
        scale = max(1.0, float(wanted[key].abs().max()))
        torch.testing.assert_close(one[key], wanted[key], atol=1e-13 * scale, rtol=0)
    assert torch.equal(one["energy"], wanted["energy"])  # in the order of the atoms, either way
    if name == "many pairs":
        assert found.n_pairs > 2 * 2**16


def test_wrong_arguments_are_refused():
    """Indices are followed into memory: none may point outside."""
    ops = torch.ops.mdplug
    x, one = torch.zeros(2, 3, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.int64)
    t = one.double()
    for pair in ([[0], [2]], [[-1], [0]]):
        index = torch.tensor(pair)
        with pytest.raises(RuntimeError, match="not there"):
            ops.pair_list(x, x, index, one, t, 4.0, 1e-6, 1.0)
        with pytest.raises(RuntimeError, match="not there"):
            ops.sum_pairs(t, t, index, x[:, 0].clone(), torch.zeros(2, dtype=torch.int64), 1)
    good = torch.tensor([[0], [1]])
    with pytest.raises(RuntimeError, match="do not agree"):
        ops.pair_list(x, x[:1], good, one, t, 4.0, 1e-6, 1.0)
    with pytest.raises(RuntimeError, match="do not agree"):
        ops.sum_pairs(t, x, good, x[:, 0].clone(), torch.zeros(2, dtype=torch.int64), 1)
    with pytest.raises(RuntimeError, match="structure that is not there"):
        ops.sum_atoms(x[:, 0].clone(), torch.tensor([0, 1]), 1)
    with pytest.raises(RuntimeError, match="dtype"):
        ops.pair_list(x.float(), x, good, one, t, 4.0, 1e-6, 1.0)


def test_pair_vectors_are_taken_where_they_belong():
    """Those of a list made for this very system are not computed again; of any other list, they are."""
    model = KernelMACE(build({}), False)
    system = box()
    mine = find(system, model.cutoff + 1.0)
    wanted = evaluate(model, system, dataclasses.replace(mine, system=None, vectors=mine.vectors * math.nan))
    assert torch.equal(evaluate(model, system, mine).forces, wanted.forces)
    assert torch.equal(evaluate(model, system, mine).virial, wanted.virial)
    moved = system.with_(positions=system.positions + 0.05 * torch.sin(system.positions))
    fresh = evaluate(model, moved)
    assert torch.equal(evaluate(model, moved, mine).forces, fresh.forces)
    assert not torch.allclose(fresh.forces, wanted.forces, atol=1e-3)
