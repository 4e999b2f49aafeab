"""The one contract that every potential keeps. `check(potential, species)` runs it all.

Truth is physics or an independent evaluation: finite differences, symmetry, a domain split in two halves with ghosts.
"""

import copy
import itertools
import threading

import numpy as np
import torch
from ase import Atoms
from scipy.spatial.transform import Rotation

import mdplug
from mdplug import potential as core
from mdplug.deployed import Deployed, call, evaluate
from mdplug.exchange import set_exchange
from mdplug.pairs import Pairs, pairs
from mdplug.potential import Potential
from mdplug.system import AtomicSystem, batch


def liquid(species, n=24, edge=8.0, seed=0, pbc=True, min_distance=1.6):
    """Random atoms no closer than `min_distance` A in a skewed cell; spin and charge set."""
    rng = np.random.default_rng(seed)
    cell = np.array([[edge, 0, 0], [0.23 * edge, 0.97 * edge, 0], [-0.15 * edge, 0.2 * edge, 1.05 * edge]])
    placed = np.empty((0, 3))
    while len(placed) < n:
        x = rng.random(3) @ cell
        images = np.array(list(itertools.product((-1, 0, 1), repeat=3))) @ cell
        if not len(placed) or np.linalg.norm(placed[:, None] + images - x, axis=2).min() > min_distance:
            placed = np.vstack([placed, x])
    z = rng.choice(species, n)
    z[: len(species)] = species  # each kind is there
    return Atoms(z, placed, cell=cell if pbc else None, pbc=pbc)


def energy(potential, atoms):
    """Interaction energy in eV as a float."""
    return float(evaluate(potential, AtomicSystem.from_ase(atoms), forces=False).interaction_energy)


def check_derivatives(potential, atoms, tolerance):
    """Forces and virial against central differences."""
    p = evaluate(potential, AtomicSystem.from_ase(atoms))
    scale = max(float(p.forces.abs().max()), 1e-3)
    h = 1e-4
    rng = np.random.default_rng(5)
    for atom, axis in zip(rng.integers(len(atoms), size=6), rng.integers(3, size=6), strict=True):
        values = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[atom, axis] += sign * h
            values.append(energy(potential, moved))
        numeric = -(values[0] - values[1]) / (2 * h)
        assert abs(numeric - float(p.forces[atom, axis])) < tolerance * scale, (atom, axis)
    scale = max(float(p.virial.abs().max()), 1e-3)
    for a, b in ((0, 0), (1, 1), (2, 2), (0, 1), (0, 2), (1, 2)):
        values = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[a, b] += sign * h / 2
            strain[b, a] += sign * h / 2
            moved = atoms.copy()
            moved.set_cell(atoms.cell.array @ strain, scale_atoms=False)
            moved.positions = atoms.positions @ strain
            values.append(energy(potential, moved))
        numeric = -(values[0] - values[1]) / (2 * h)
        assert abs(numeric - float(p.virial[0, a, b])) < tolerance * scale, (a, b)


def check_symmetry(potential, atoms, tolerance):
    """Rotation, reflection, permutation, lattice translation of single atoms, rigid translation."""
    reference = evaluate(potential, AtomicSystem.from_ase(atoms))
    f = reference.forces.numpy()
    e, scale = float(reference.interaction_energy), tolerance * max(1.0, np.abs(f).max())
    rng = np.random.default_rng(3)
    for matrix in (Rotation.random(random_state=1).as_matrix(), np.diag([1.0, 1.0, -1.0])):
        turned = atoms.copy()
        turned.set_cell(atoms.cell.array @ matrix.T)
        turned.positions = atoms.positions @ matrix.T
        p = evaluate(potential, AtomicSystem.from_ase(turned))
        assert abs(float(p.interaction_energy) - e) < scale * len(atoms)
        np.testing.assert_allclose(p.forces.numpy(), f @ matrix.T, atol=scale, rtol=0)
    order = rng.permutation(len(atoms))
    p = evaluate(potential, AtomicSystem.from_ase(atoms[order]))
    assert abs(float(p.interaction_energy) - e) < scale * len(atoms)
    np.testing.assert_allclose(p.forces.numpy(), f[order], atol=scale, rtol=0)
    shifted = atoms.copy()
    shifted.positions += np.array([0.31, -7.7, 100.3])
    if atoms.pbc.all():
        shifted.positions += rng.integers(-3, 4, (len(atoms), 3)) @ atoms.cell.array
    p = evaluate(potential, AtomicSystem.from_ase(shifted))
    assert abs(float(p.interaction_energy) - e) < scale * len(atoms)
    np.testing.assert_allclose(p.forces.numpy(), f, atol=scale, rtol=0)


def check_batch(potential, structures, tolerance):
    """A batch gives what its members give alone; inputs are not mutated."""
    systems = [AtomicSystem.from_ase(a) for a in structures]
    joined = batch(systems)
    before = {k: getattr(joined, k).clone() for k in ("positions", "cell", "numbers")}
    together = evaluate(potential, joined)
    for key, value in before.items():
        assert torch.equal(getattr(joined, key), value), f"{key} was mutated"
    for s, system in enumerate(systems):
        alone = evaluate(potential, system)
        mask = joined.system_index == s
        scale = tolerance * max(1.0, float(alone.forces.abs().max()))
        assert torch.allclose(together.interaction_energy[s], alone.interaction_energy[0], atol=scale * 30, rtol=0)
        assert torch.allclose(together.forces[mask], alone.forces, atol=scale, rtol=0)
        assert torch.allclose(together.virial[s], alone.virial[0], atol=scale * 30, rtol=0)
        assert torch.allclose(together.energy[s], alone.energy[0], atol=scale * 30, rtol=1e-14)


def check_split(potential, atoms, tolerance):
    """Owned atoms of two halves, with ghosts and exchanged features, give the whole's energies and forces."""
    if potential.spec.long_range:
        return
    system = AtomicSystem.from_ase(atoms)
    whole_pairs = pairs(system, potential.spec.cutoff)
    whole = evaluate(potential, system, whole_pairs)
    n = system.n_atoms
    left = system.positions[:, 0] < system.positions[:, 0].median()
    halves = [left.nonzero().squeeze(1), (~left).nonzero().squeeze(1)]
    domains = []
    for owned in halves:
        mine = torch.isin(whole_pairs.index[0], owned)
        index, vectors = whole_pairs.index[:, mine], whole_pairs.vectors[mine]
        ghosts = torch.unique(index[1][~torch.isin(index[1], owned)])
        members = torch.cat([owned, ghosts])
        place = torch.full((n,), -1, dtype=torch.int64)
        place[members] = torch.arange(len(members))
        domains.append((members, len(owned), place[index], vectors.to(core.dtype_of(potential)), mine))

    # Both halves run in lockstep: a feature request waits until every half has made it.
    barrier, board = threading.Barrier(2, timeout=60), {}
    local = threading.local()

    def hook(features, n_owned):
        me = local.rank
        board[me] = features
        barrier.wait()
        # Owner rows of both halves, in the whole's numbering; autograd carries ghost cotangents to their owners.
        full = features.new_zeros(n, features.shape[1])
        for rank, (members, owned, *_rest) in enumerate(domains):
            full = full.index_copy(0, members[:owned], board[rank][:owned])
        barrier.wait()
        return full[domains[me][0]]

    class Lockstep(torch.autograd.Function):
        """The same with a reverse that waits for every half, too: what a written adjoint calls in mid-pass."""

        @staticmethod
        def forward(ctx, features):
            return hook(features, 0)

        @staticmethod
        def backward(ctx, grad):
            board[local.rank] = grad
            barrier.wait()
            full = grad.new_zeros(n, grad.shape[1])
            for rank, (members, *_rest) in enumerate(domains):
                full = full.index_add(0, members, board[rank])
            barrier.wait()
            members, owned = domains[local.rank][:2]
            return torch.cat([full[members[:owned]], torch.zeros_like(grad[owned:])])

    results, errors = {}, []

    def run(rank):
        local.rank = rank
        members, owned, index, vectors, _ = domains[rank]
        arguments = (
            system.numbers[members],
            index,
            vectors.requires_grad_(not potential.has_written_adjoint),
            owned,
            system.system_index[members],
            system.total_charge.to(vectors.dtype),
            system.total_spin.to(vectors.dtype),
            system.head,
        )
        try:
            if potential.has_written_adjoint:
                out = potential.local_with_gradient(*arguments)
                results[rank] = (out["atom_energy"], out["pair_gradient"])
            else:
                results[rank] = (potential.local(*arguments)["atom_energy"], vectors)
        except Exception as error:
            errors.append(error)
            barrier.abort()

    set_exchange((lambda features, _: Lockstep.apply(features)) if potential.has_written_adjoint else hook)
    try:
        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
        [t.start() for t in threads]
        [t.join() for t in threads]
    finally:
        set_exchange(None)
    if errors:
        raise errors[0]
    grads = [results[r][1] for r in range(2)]
    if not potential.has_written_adjoint:
        total = sum(results[r][0].to(torch.float64).sum() for r in range(2))
        grads = torch.autograd.grad(total, grads)
    gradient = torch.zeros(whole_pairs.n_pairs, 3, dtype=torch.float64)
    for rank, (_m, _o, _i, _v, mine) in enumerate(domains):
        gradient[mine] = grads[rank].to(torch.float64)
    forces = torch.zeros(n, 3, dtype=torch.float64).index_add(0, whole_pairs.index[0], gradient)
    forces = forces.index_add(0, whole_pairs.index[1], -gradient)
    for rank, owned in enumerate(halves):
        assert torch.allclose(
            results[rank][0].to(torch.float64),
            whole.atom_energy[owned].to(torch.float64),
            atol=tolerance * 10,
            rtol=tolerance * 10,
        )
    scale = tolerance * max(1.0, float(whole.forces.abs().max()))
    assert torch.allclose(forces, whole.forces, atol=scale * 10, rtol=0)


def check_edges(potential, species, tolerance):
    """One atom; no pairs; isolated atoms cost nothing in force; size extensive; smooth at the cutoff; tiny cell."""
    cutoff = potential.spec.cutoff
    z = species[0]
    one = evaluate(potential, AtomicSystem.from_ase(Atoms([z], [[0.0, 0.0, 0.0]])))
    assert torch.isfinite(one.energy).all()
    assert float(one.forces.abs().max()) == 0.0
    assert float(one.virial.abs().max()) == 0.0
    apart = Atoms([z, species[-1]], [[0, 0, 0], [cutoff + 0.01, 0, 0]])
    far = evaluate(potential, AtomicSystem.from_ase(apart))
    assert float(far.forces.abs().max()) == 0.0
    assert abs(float(far.interaction_energy) - sum(energy(potential, apart[[k]]) for k in (0, 1))) < tolerance * 10
    # Smooth at the cutoff: energy and force go to those of separate atoms.
    for r, size in ((cutoff - 1e-2, 1e-2), (cutoff - 1e-4, 1e-6)):
        close = evaluate(potential, AtomicSystem.from_ase(Atoms([z, species[-1]], [[0, 0, 0], [r, 0, 0]])))
        assert float(close.forces.abs().max()) < size
    # Size extensive: two far copies cost twice.
    cluster = liquid(species, n=6, edge=5.0, seed=4, pbc=False)
    twin = cluster.copy()
    twin.positions += 50.0
    assert abs(energy(potential, cluster + twin) - 2 * energy(potential, cluster)) < tolerance * 100
    # A cell smaller than the cutoff: the same crystal, repeated, costs as many times as much.
    cell = cutoff * 0.7 * np.array([[1, 0, 0], [0.3, 1, 0], [0, -0.2, 1.1]])
    tiny = Atoms([z, species[-1]], [[0.1, 0.2, 0.3], [0.3 * cutoff, 0.35 * cutoff, 0.4 * cutoff]], cell=cell, pbc=True)
    assert abs(energy(potential, tiny * (2, 1, 3)) - 6 * energy(potential, tiny)) < tolerance * 1e3
    check_derivatives(potential, tiny, max(tolerance * 1e4, 1e-6))


def check_files(potential, atoms, folder, tolerance):
    """Definition = deployed = scripted = reloaded; default dtype and grad mode of the caller do not matter."""
    system = AtomicSystem.from_ase(atoms)
    reference = evaluate(potential, system)
    pair_list = pairs(system, potential.spec.cutoff)
    path = mdplug.save(potential, folder / "model.safetensors")
    again = mdplug.load(path, radial="exact", dtype=str(core.dtype_of(potential)).split(".")[1])
    assert again.spec == potential.spec
    scripted = torch.jit.script(Deployed(potential.without_kernels()))
    scale = tolerance * max(1.0, float(reference.forces.abs().max()))
    for other in (Deployed(potential), again, scripted):
        with torch.no_grad():
            out = _call(other, system, pair_list)
        assert torch.allclose(out["energy"], reference.interaction_energy, atol=scale * len(atoms), rtol=0)
        assert torch.allclose(out["forces"], reference.forces, atol=scale, rtol=0)
        assert torch.allclose(out["virial"], reference.virial, atol=scale * len(atoms), rtol=0)
    old = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32 if old == torch.float64 else torch.float64)
    try:
        hostile = evaluate(mdplug.load(path, radial="exact", dtype=again.spec.dtype), system)
        assert hostile.forces.dtype == torch.float64
    finally:
        torch.set_default_dtype(old)


def _call(deployed, system: AtomicSystem, pair_list: Pairs):
    if isinstance(deployed, Potential):
        deployed = Deployed(deployed)
    if isinstance(deployed, torch.jit.ScriptModule):
        return deployed(
            system.numbers,
            system.positions,
            system.cell,
            system.pbc,
            pair_list.index,
            pair_list.shifts,
            system.system_index,
            system.total_charge,
            system.total_spin,
            system.head,
        )
    return call(deployed, system, pair_list)


def check_single(potential, atoms):
    """Single precision stays near double precision and keeps its dtype."""
    reference = evaluate(potential, AtomicSystem.from_ase(atoms))
    single = evaluate(copy.deepcopy(potential).to(torch.float32), AtomicSystem.from_ase(atoms))
    scale = max(1.0, float(reference.forces.abs().max()))
    assert float((single.forces - reference.forces).abs().max()) < 2e-5 * scale
    assert single.energy.dtype == single.forces.dtype == torch.float64


def check(potential: Potential, species: list[int], folder, min_distance: float = 1.6) -> None:
    """Everything, in float64 with exact radial functions."""
    tolerance = 1e-10
    n, edge = 24, max(8.0, 1.3 * potential.spec.cutoff)
    box = liquid(species, n=n, edge=edge, min_distance=min_distance)
    cluster = liquid(species, n=9, edge=6.0, seed=2, pbc=False, min_distance=min_distance)
    check_derivatives(potential, box, 1e-6)
    check_symmetry(potential, box, tolerance)
    check_symmetry(potential, cluster, tolerance)
    check_batch(potential, [box, cluster, box[:7]], tolerance)
    check_split(potential, liquid(species, n=n, edge=edge, seed=7, min_distance=min_distance), tolerance)
    check_edges(potential, species, tolerance)
    check_files(potential, box, folder, tolerance)
    check_single(potential, box)
