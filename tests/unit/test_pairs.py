"""Pair lists against an independent brute force: open, mixed, triclinic, tiny cells, unwrapped atoms."""

import itertools

import numpy as np
import pytest
import torch

from mdplug.errors import InputError
from mdplug.pairs import PairList, _vesin_pairs, pair_vectors, pairs
from mdplug.pairs_torch import torch_pairs
from mdplug.system import AtomicSystem, batch


def brute_force(positions, cell, pbc, cutoff):
    """{(i, j, shift)} by looking at every image that could matter."""
    reach = []
    box = np.array(cell, dtype=float)
    for k in range(3):
        if not pbc[k]:
            reach.append([0])
            continue
        # The distance between the faces along k, from the other two periodic (or any orthogonal) directions.
        others = [box[d] if pbc[d] else None for d in range(3) if d != k]
        basis = np.array([o for o in others if o is not None])
        v = box[k]
        if len(basis):
            q, _ = np.linalg.qr(basis.T)
            v = v - q @ (q.T @ v)
        height = np.linalg.norm(v)
        spread = np.ptp(positions, axis=0).max() + cutoff
        reach.append(range(-int(np.ceil(spread * 2 / height)) - 1, int(np.ceil(spread * 2 / height)) + 2))
    found = set()
    for shift in itertools.product(*reach):
        d = positions[None] - positions[:, None] + np.array(shift) @ box
        r = np.linalg.norm(d, axis=2)
        for i, j in zip(*np.nonzero(r < cutoff), strict=True):
            if i != j or any(shift):
                found.add((int(i), int(j), *shift))
    return found


def as_set(index, shifts):
    return {(int(i), int(j), *(int(x) for x in s)) for i, j, s in zip(index[0], index[1], shifts, strict=True)}


CASES = [
    (pbc, edge, seed)
    for seed, (pbc, edge) in enumerate(
        itertools.product(
            [(True, True, True), (True, True, False), (False, True, False), (False, False, False)], [3.1, 6.5, 13.0]
        )
    )
]


@pytest.mark.parametrize(("pbc", "edge", "seed"), CASES)
def test_against_brute_force(pbc, edge, seed):
    rng = np.random.default_rng(seed)
    cell = edge * (np.eye(3) + 0.35 * rng.standard_normal((3, 3)))
    n = 9
    positions = rng.random((n, 3)) @ cell + rng.integers(-1, 2, (n, 3)) @ (cell * np.array(pbc)[:, None])
    system = AtomicSystem.from_arrays(rng.integers(1, 9, n), positions, cell, pbc)
    expected = brute_force(positions, cell, pbc, 4.0)
    found = pairs(system, 4.0)
    assert as_set(found.index, found.shifts) == expected
    assert found.n_pairs == len(expected)
    index, shifts = torch_pairs(system.positions, system.cell[0], system.pbc[0], 4.0)
    assert torch.equal(index, found.index)
    assert torch.equal(shifts, found.shifts)
    assert torch.equal(pair_vectors(system, index, shifts), found.vectors)


@pytest.mark.parametrize("at_once", [1, 64, 8192])
@pytest.mark.parametrize(
    ("n", "edge", "pbc"),
    [
        (200, 14.0, (True, True, True)),
        (200, 14.0, (True, False, True)),
        (200, 14.0, (False, False, False)),
        (70, 6.0, (False, True, True)),
        (3, 2.5, (True, True, True)),
        (1, 2.5, (True, True, False)),
    ],
)
def test_in_torch_it_is_the_list_of_vesin(n, edge, pbc, at_once):
    """Triclinic cells, mixed periodicity, several images, atoms outside the cell; some atoms at a time."""
    rng = np.random.default_rng(n)
    cell = edge * (np.eye(3) + 0.2 * rng.standard_normal((3, 3)))
    x = rng.random((n, 3)) @ cell + rng.integers(-2, 3, (n, 3)) @ (cell * np.array(pbc)[:, None])
    arguments = (torch.from_numpy(x), torch.from_numpy(cell), torch.tensor(pbc), 4.0)
    index, shifts = torch_pairs(*arguments, at_once)
    wanted, its_shifts = _vesin_pairs(*arguments)
    assert wanted.shape[1] > 0
    assert torch.equal(index, wanted)
    assert torch.equal(shifts, its_shifts)


def test_missing_cell_rows():
    """A slab given with two lattice vectors only."""
    rng = np.random.default_rng(0)
    cell = np.array([[5.0, 0, 0], [1.0, 6.0, 0], [0, 0, 0]])
    x = rng.random((8, 3)) * 6
    system = AtomicSystem.from_arrays([6] * 8, x, cell, (True, True, False))
    expected = brute_force(x, cell, (True, True, False), 4.0)
    found = pairs(system, 4.0)
    assert as_set(found.index, found.shifts) == expected
    index, _ = torch_pairs(system.positions, system.cell[0], system.pbc[0], 4.0)
    assert torch.equal(index, found.index)


def random_system(seed=0, n=40, edge=11.0):
    rng = np.random.default_rng(seed)
    cell = edge * (np.eye(3) + 0.1 * rng.standard_normal((3, 3)))
    return AtomicSystem.from_arrays(rng.integers(1, 9, n), rng.random((n, 3)) @ cell, cell, True)


def test_skin_reuse_is_invisible():
    """A moving system: the reused list equals a fresh one bit for bit, and is rebuilt only now and then."""
    system, rng = random_system(), np.random.default_rng(1)
    kept = PairList(4.0, skin=1.0)
    for _ in range(60):
        moved = system.positions + torch.from_numpy(rng.normal(0, 0.03, (system.n_atoms, 3)))
        system = system.with_(positions=moved)
        a, b = kept.update(system), pairs(system, 4.0)
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.shifts, b.shifts)
        assert torch.equal(a.vectors, b.vectors)
    assert 2 <= kept.builds < 30


def test_stale_list_would_be_wrong():
    """Negative control: without the displacement check the list misses pairs."""
    system = random_system()
    kept = PairList(4.0, skin=0.5)
    kept.update(system)
    kept.skin = 100.0
    rng = np.random.default_rng(2)
    moved = system.with_(positions=system.positions + torch.from_numpy(rng.normal(0, 0.8, (system.n_atoms, 3))))
    assert kept.update(moved).n_pairs != pairs(moved, 4.0).n_pairs


@pytest.mark.parametrize("change", ["cell", "numbers", "pbc", "fewer", "lattice jump"])
def test_changes_are_noticed(change):
    system = random_system()
    kept = PairList(4.0, skin=1.0)
    kept.update(system)
    new = {
        "cell": lambda: system.with_(cell=system.cell * 1.001),
        "numbers": lambda: system.with_(numbers=system.numbers.flip(0)),
        "pbc": lambda: system.with_(pbc=torch.tensor([[True, True, False]])),
        "fewer": lambda: AtomicSystem.from_ase(system.to_ase()[0][:20]),
        "lattice jump": lambda: system.with_(
            positions=system.positions + torch.cat([system.cell[0, :1], torch.zeros(system.n_atoms - 1, 3)])
        ),
    }[change]()
    assert torch.equal(kept.update(new).index, pairs(new, 4.0).index)
    assert kept.builds == 2


def test_batch_lists_do_not_mix():
    a, b = random_system(0, 12), random_system(1, 17)
    both = pairs(batch([a, b]), 4.0)
    n = pairs(a, 4.0).n_pairs
    assert torch.equal(both.index[:, n:] - 12, pairs(b, 4.0).index)


def test_overlap_and_bad_cutoff_are_named():
    system = AtomicSystem.from_arrays([1, 1, 1], [[0, 0, 0], [5, 0, 0], [0, 0, 0]])
    with pytest.raises(InputError, match="atoms 0 and 2"):
        pairs(system, 3.0)
    with pytest.raises(InputError, match="cutoff"):
        pairs(system, 0.0)


@pytest.mark.gpu
def test_cuda_equals_cpu():
    system = random_system(3, 200, 15.0)
    on_gpu, on_cpu = pairs(system.to("cuda"), 5.0), pairs(system, 5.0)
    assert torch.equal(on_gpu.index.cpu(), on_cpu.index)
    assert torch.equal(on_gpu.shifts.cpu(), on_cpu.shifts)
