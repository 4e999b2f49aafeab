"""Boxes: right contents and density, whole molecules, no contacts over the boundary, clear refusals."""

import numpy as np
import pytest
from ase.io import read

from mdplug.errors import InputError, MissingExtraError
from mdplug.workflows import build as build_module
from mdplug.workflows._bonds import bonds_of
from mdplug.workflows.build import Config, build, molecule_counts, parse_composition, run
from mdplug.workflows.molecules import conformers, resolve

pytest.importorskip("rdkit")
AVOGADRO = 6.02214076e23
MASSES = {"H": 1.008, "Li": 6.94, "C": 12.011, "O": 15.999, "F": 18.998403163, "P": 30.973761998}


def closest_contact(atoms):
    """Smallest distance between atoms of different molecules, all 27 images, written out."""
    cell = np.asarray(atoms.cell)
    images = np.array(list(np.ndindex(3, 3, 3))) - 1
    apart = atoms.positions[:, None] - atoms.positions[None]
    apart -= np.round(apart @ np.linalg.inv(cell)) @ cell
    ids = atoms.arrays["mol_id"]
    different = ids[:, None] != ids[None]
    return min(np.sqrt(((apart + image @ cell) ** 2).sum(-1))[different].min() for image in images)


@pytest.fixture(scope="module")
def electrolyte():
    return build("EC:12 DMC:12 LiPF6:3", density_g_cm3=1.2, seed=3)


def test_the_box_holds_what_was_asked_for_at_the_density(electrolyte):
    atoms = electrolyte.atoms
    assert electrolyte.counts == {"EC": 12, "DMC": 12, "Li+": 3, "PF6-": 3}
    assert len(atoms) == 12 * 10 + 12 * 12 + 3 * 8
    assert atoms.get_chemical_symbols().count("Li") == 3
    assert atoms.pbc.all()
    grams = sum(MASSES[s] for s in atoms.get_chemical_symbols()) / AVOGADRO
    assert grams / (atoms.get_volume() * 1e-24) == pytest.approx(1.2, rel=1e-3)
    assert electrolyte.density_g_cm3 == pytest.approx(1.2, rel=1e-6)
    litres = atoms.get_volume() * 1e-27
    assert electrolyte.molarity_mol_L["Li+"] == pytest.approx(3 / AVOGADRO / litres, rel=1e-6)
    assert atoms.info["charge"] == 0
    per_molecule = {i: atoms.arrays["mol_charge"][atoms.arrays["mol_id"] == i][0] for i in range(30)}
    assert sorted(per_molecule.values()) == [-1] * 3 + [0] * 24 + [1] * 3


def test_molecules_are_whole_and_do_not_touch_over_the_boundary(electrolyte):
    atoms, bonds = electrolyte.atoms, electrolyte.bonds
    lengths = np.sqrt(((atoms.positions[bonds[:, 0]] - atoms.positions[bonds[:, 1]]) ** 2).sum(-1))
    assert lengths.min() > 0.9
    assert lengths.max() < 1.7
    # Ring molecules have as many bonds as atoms, chains one less.
    assert len(bonds) == 12 * 10 + 12 * 11 + 3 * 6
    ids = atoms.arrays["mol_id"]
    assert (ids[bonds[:, 0]] == ids[bonds[:, 1]]).all()
    assert closest_contact(atoms) >= 2.0
    moved = atoms.copy()
    moved.positions[ids == 0] += moved.cell[0] * 0.5  # the control: a molecule put down anywhere does touch
    assert closest_contact(moved) < 2.0


def test_same_seed_same_box_other_seed_other_box():
    first, again, other = (build("water:20", density_g_cm3=0.9, seed=s).atoms for s in (5, 5, 6))
    np.testing.assert_array_equal(first.positions, again.positions)
    assert np.abs(first.positions - other.positions).max() > 0.5


def test_files_come_back(tmp_path, electrolyte):
    result = run(Config(composition="EC:3 LiPF6:1 water:2", density_g_cm3=0.8, output=tmp_path / "out" / "box.xyz"))
    back = read(result.output)
    np.testing.assert_allclose(back.positions, result.atoms.positions, atol=1e-7)
    np.testing.assert_allclose(np.asarray(back.cell), np.asarray(result.atoms.cell), atol=1e-7)
    np.testing.assert_array_equal(bonds_of(back), result.bonds)
    np.testing.assert_array_equal(back.arrays["mol_id"], result.atoms.arrays["mol_id"])
    assert back.info["charge"] == 0
    assert list(np.unique(back.arrays["residue"])) == ["EC", "HOH", "LI", "PF6"]

    import mdtraj
    from openmm.app import PDBFile

    topology = PDBFile(str(result.topology)).topology
    assert topology.getNumAtoms() == len(back)
    assert topology.getNumResidues() == 3 + 2 + 2
    bonds = {frozenset((a.index, b.index)) for a, b in topology.bonds()}
    assert bonds == {frozenset(map(int, pair)) for pair in result.bonds}
    assert [a.element.atomic_number for a in topology.atoms()] == back.numbers.tolist()
    loaded = mdtraj.load(str(result.topology))
    assert loaded.topology.n_bonds == len(result.bonds)
    assert loaded.unitcell_lengths[0, 0] * 10 == pytest.approx(result.box_A, abs=2e-3)


@pytest.mark.parametrize(
    ("composition", "options", "expected"),
    [
        ("EC:1 DMC:1 LiPF6:1mol/kg", {"n_atoms": 1000}, "molality"),
        ("EC:30wt% DMC:70wt% LiPF6:1mol/L", {"n_atoms": 3000}, "molarity"),
        ("EC:40 DMC:40 LiPF6:1M", {}, "molarity"),
        ("EC:40 DMC:40 LiPF6:1mol/kg", {}, "molality"),
    ],
)
def test_concentrations(composition, options, expected):
    density = 1.25
    counts = {
        m.name: n for m, n in molecule_counts(Config(composition=composition, density_g_cm3=density, **options)).items()
    }
    mass = {"EC": 88.062, "DMC": 90.078, "Li+": 6.94, "PF6-": 144.9642}
    solvent = counts["EC"] * mass["EC"] + counts["DMC"] * mass["DMC"]
    salt = counts["Li+"] * (mass["Li+"] + mass["PF6-"])
    one = 1.0 / counts["Li+"]  # whole molecules: half a molecule is the rounding
    if expected == "molality":
        assert counts["Li+"] / (solvent / 1000) == pytest.approx(1, rel=one)
    else:
        assert counts["Li+"] / ((solvent + salt) / (1000 * density)) == pytest.approx(1, rel=one)
    if "wt%" in composition:
        assert counts["EC"] * mass["EC"] / solvent == pytest.approx(0.3, abs=0.02)
    if options:
        total = 10 * counts["EC"] + 12 * counts["DMC"] + 8 * counts["Li+"]
        assert total == pytest.approx(options["n_atoms"], rel=0.03)


def test_smiles_and_names_for_them():
    items = {i.name: i for i in parse_composition("FA=C=O:3 CCO:2 C=O:1")}
    assert set(items) == {"FA", "CCO", "C=O"}
    assert items["FA"].n_atoms == items["C=O"].n_atoms == 4
    result = build("FA=C=O:6", density_g_cm3=0.5)
    assert set(result.atoms.arrays["residue"]) == {"FA"}
    assert len(result.bonds) == 18


def test_ions_have_their_known_shapes():
    octahedron = conformers(resolve("PF6-")[0])[0]
    centre = octahedron.positions[octahedron.numbers == 15][0]
    arms = octahedron.positions[octahedron.numbers == 9] - centre
    assert octahedron.charge == -1
    np.testing.assert_allclose(np.sqrt((arms**2).sum(1)), 1.60)
    angles = np.sort((arms @ arms.T / 1.60**2)[np.triu_indices(6, 1)])
    np.testing.assert_allclose(angles, [-1] * 3 + [0] * 12, atol=1e-12)
    assert [m.name for m in resolve("lipf6")] == ["Li+", "PF6-"]
    assert resolve("h2o")[0].name == "water"
    flexible = conformers(resolve("DEC")[0], 3, seed=2)
    assert len(flexible) == 3
    assert flexible[0].charge == 0


@pytest.mark.parametrize(
    ("composition", "options", "message"),
    [
        ("ECC:3", {}, "did you mean EC"),
        ("PF7:3", {}, "did you mean PF6-"),
        ("EC:x", {}, "name:amount"),
        ("EC", {}, "name:amount"),
        ("EC:3 EC:4", {}, "twice"),
        ("EC:0", {}, "positive"),
        ("EC:2.5", {}, "whole number"),
        ("", {}, "empty"),
        ("EC:50wt% DMC:50wt%", {}, "n_atoms"),
        ("EC:50wt% DMC:40wt%", {"n_atoms": 500}, "90 %"),
        ("EC:50wt% DMC:4", {"n_atoms": 500}, "amounts mix"),
        ("LiPF6:1mol/L", {}, "amounts mix"),
        ("EC:10 LiPF6:0.1mol/L", {}, "too small for one LiPF6"),
        ("DEC:1", {"density_g_cm3": 2.5}, "shorter than its molecules"),
    ],
)
def test_bad_compositions_are_refused_in_one_line(composition, options, message):
    with pytest.raises(InputError, match=message) as caught:
        build(composition, **({"density_g_cm3": 1.2} | options))
    assert "\n" not in str(caught.value)


def test_too_dense_a_box_is_refused():
    with pytest.raises(InputError, match="lower the density"):
        build("water:12", density_g_cm3=4.0)
    with pytest.raises(InputError, match="not done after"):
        build("EC:200", density_g_cm3=1.3, timeout_s=0.05)


def test_a_charged_box_warns():
    with pytest.warns(UserWarning, match=r"\+2 e"):
        result = build("water:10 Li+:2", density_g_cm3=0.8)
    assert result.atoms.info["charge"] == 2


def test_packmol_is_looked_for_beside_the_interpreter_only(monkeypatch, tmp_path):
    monkeypatch.setattr(build_module.sys, "executable", str(tmp_path / "python"))
    with pytest.raises(MissingExtraError, match="packmol"):
        build("water:3", density_g_cm3=0.5)
