"""Labelled structures: what is read, what is refused, reference energies, batches."""

import labelled as made
import numpy as np
import pytest
import torch
from ase import Atoms

from mdplug.errors import InputError
from mdplug.workflows import dataset


@pytest.fixture
def frames():
    return made.argon_frames(8)


def read(tmp_path, frames):
    return dataset.read([made.save(tmp_path / "labels.xyz", frames)])


def test_reads_labels_splits_and_counts(tmp_path, frames):
    frames[3].info["config_weight"] = 2.5
    del frames[5].arrays["REF_forces"]
    data = read(tmp_path, frames)
    assert data.counts == {
        "structures": 8, "atoms": sum(len(a) for a in frames), "energies": 8, "forces": 7, "stresses": 0,
    }  # fmt: skip
    assert [s.split for s in data.structures] == [a.info["split"] for a in frames]
    assert data.structures[3].weight == 2.5
    assert data.structures[5].forces is None
    assert any("1 of 8 structures have no forces" in w for w in data.warnings)
    np.testing.assert_allclose(data.structures[2].forces, frames[2].arrays["REF_forces"], atol=1e-8)


def test_stress_and_virials_are_one_label(tmp_path):
    frames = made.crystal_frames(2)
    full = frames[1].info.pop("REF_stress").reshape(3, 3)
    frames[1].info["REF_virials"] = -full * frames[1].get_volume()
    voigt = frames[0].info.pop("REF_stress").reshape(3, 3)
    frames[0].info["REF_stress"] = voigt[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]]
    first, second = read(tmp_path, frames).structures
    np.testing.assert_allclose(first.stress, voigt, atol=1e-7)
    np.testing.assert_allclose(second.stress, full, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: [(a.info.pop("REF_energy"), a.arrays.pop("REF_forces")) for a in f], "has no labels"),
        (lambda f: [a.arrays["REF_forces"].fill(0.0) for a in f], "every force is zero"),
        (lambda f: [a.info.update(REF_energy=0.0) for a in f], "every energy is zero"),
        (lambda f: f[2].arrays["REF_forces"].__setitem__((1, 0), np.nan), "frame 2: the force on atom 1 is not finite"),
        (lambda f: f[4].info.update(REF_energy=np.inf), "frame 4: REF_energy is not finite"),
        (lambda f: f[4].info.update(config_weight=-1.0), "frame 4: config_weight"),
        (lambda f: [a.arrays["REF_forces"].__imul__(1e4) for a in f], "is not one in eV/A"),
        (lambda f: f[1].info.update(REF_stress=np.ones(9)), "frame 1 has REF_stress but is not periodic"),
        (lambda f: f[1].positions.__setitem__((0, 0), np.nan), "frame 1: atom 0 has a position that is not finite"),
    ],
)
def test_bad_labels_are_refused_by_name(tmp_path, frames, change, message):
    change(frames)
    with pytest.raises(InputError, match=message):
        read(tmp_path, frames)


def test_hartree_is_noticed(tmp_path):
    rng = np.random.default_rng(3)
    frames = []
    for n_h, n_o in [(2, 0), (2, 1), (4, 2), (1, 2), (3, 1)]:
        atoms = Atoms(f"H{n_h}O{n_o}", rng.uniform(0, 6, (n_h + n_o, 3)))
        atoms.info["REF_energy"] = -0.5 * n_h - 75.0 * n_o  # hartree
        atoms.arrays["REF_forces"] = 0.1 * rng.normal(size=(len(atoms), 3))
        frames.append(atoms)
    with pytest.raises(InputError, match="hartree"):
        read(tmp_path, frames)
    for atoms in frames:
        atoms.info["REF_energy"] *= 27.2114
    read(tmp_path, frames)


def test_no_extended_xyz(tmp_path):
    (tmp_path / "noise.xyz").write_bytes(bytes(range(256)))
    for path, message in ((tmp_path / "noise.xyz", "not extended XYZ"), (tmp_path / "none.xyz", "No such file")):
        with pytest.raises(InputError, match=message):
            dataset.read([path])


def test_reference_energies_and_their_rank(tmp_path):
    truth = {"H": -13.0, "P": -23.0, "F": -139.0, "O": -110.0}
    frames = []
    rng = np.random.default_rng(0)
    for formula in ("H2O", "H2", "PF6", "HPF6", "P2F12O", "O2"):
        atoms = Atoms(formula)
        atoms.positions = rng.uniform(0, 20, (len(atoms), 3))
        atoms.info["REF_energy"] = sum(truth[s] for s in atoms.get_chemical_symbols())
        frames.append(atoms)
    fit = dataset.fit_reference_energies(read(tmp_path, frames).structures)
    assert fit.rank == 3
    assert set(fit.confounded) == {"P", "F"}
    assert fit.values["H"] == pytest.approx(-13.0)
    assert fit.values["P"] + 6 * fit.values["F"] == pytest.approx(truth["P"] + 6 * truth["F"])
    assert fit.residual_meV_per_atom < 1e-6
    assert "rank 3 of 4" in fit.describe()


def test_batches_hold_every_structure_once_within_the_limit(tmp_path):
    data = read(tmp_path, made.argon_frames(30))
    loader = dataset.Loader(data.structures, 9.0, {"Ar": made.OFFSET}, batch_pairs=120)
    plan = loader.plan(seed=4)
    assert sorted(k for chosen in plan for k in chosen) == list(range(30))
    assert all(loader.n_pairs[chosen].sum() <= 120 or len(chosen) == 1 for chosen in plan)
    assert len(plan) > 3
    assert plan == loader.plan(seed=4)
    assert plan != loader.plan(seed=5)
    assert [k for chosen in loader.plan() for k in chosen] == list(range(30))


def test_batch_equals_its_structures(tmp_path):
    data = read(tmp_path, made.argon_frames(5) + made.crystal_frames(1))
    loader = dataset.Loader(data.structures, 5.0, {"Ar": made.OFFSET, "Cu": 0.0})
    batch = loader.collate([4, 5, 1])
    for s, k in enumerate([4, 5, 1]):
        one = loader.collate([k])
        mine = batch.system.system_index[batch.pairs.index[0]] == s
        offset = int((batch.system.system_index < s).sum())
        assert torch.equal(batch.pairs.index[:, mine] - offset, one.pairs.index)
        assert torch.equal(batch.pairs.shifts[mine], one.pairs.shifts)
        assert batch.energy[s] == one.energy[0]
    assert batch.stress_weight.tolist() == [0.0, 1.0, 0.0]
    assert float(loader.collate([4]).energy) == pytest.approx(
        data.structures[4].energy - made.OFFSET * data.structures[4].n_atoms
    )
