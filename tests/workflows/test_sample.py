"""Sampling: geometry by hand, statistics of thermal geometries, recipes that repeat, clusters cut out whole."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.build import molecule
from ase.calculators.morse import MorsePotential

from mdplug.errors import InputError
from mdplug.units import BOLTZMANN
from mdplug.workflows import clusters, sample, sample_liquid
from mdplug.workflows.build import build
from mdplug.workflows.molecules import conformers, resolve
from mdplug.workflows.xtb import XTB

pytest.importorskip("tblite")
pytest.importorskip("rdkit")
ROOT = Path(__file__).parents[2]


def one(name):
    atoms = conformers(resolve(name)[0])[0].atoms()
    atoms.set_array("mol_id", np.zeros(len(atoms), dtype=int))
    return atoms


def between(atoms):
    ids = atoms.arrays["mol_id"]
    distances = np.sqrt(((atoms.positions[:, None] - atoms.positions[None]) ** 2).sum(-1))
    distances[ids[:, None] == ids[None]] = np.inf
    return distances


def test_an_aggregate_is_dense_touching_and_whole():
    rng = np.random.default_rng(1)
    parts = [one("Li+"), *(one("EC") for _ in range(4)), one("PF6-")]
    atoms = clusters.aggregate(parts, rng, scale=0.85)
    assert atoms.info["charge"] == 0
    radii = clusters.contact_radii(atoms.numbers)
    ratio = between(atoms) / (radii[:, None] + radii[None])
    assert ratio.min() == pytest.approx(0.85, abs=1e-6)
    for group in clusters.molecule_groups(atoms):
        touching = ratio[group].min()
        assert touching < 0.86  # every molecule came to rest on another
    first = clusters.molecule_groups(atoms)[1]
    np.testing.assert_allclose(atoms[first].get_all_distances(), parts[1].get_all_distances(), atol=1e-9)


def test_distortions_move_what_they_say():
    rng = np.random.default_rng(2)
    atoms = clusters.aggregate([one("water") for _ in range(3)], rng)
    wider = clusters.scale_centres(atoms, 1.2)
    for group in clusters.molecule_groups(atoms):
        np.testing.assert_allclose(wider[group].get_all_distances(), atoms[group].get_all_distances(), atol=1e-9)
    centres = [np.array([a[g].get_center_of_mass() for g in clusters.molecule_groups(a)]) for a in (atoms, wider)]
    apart = [np.sqrt(((c[0] - c[1]) ** 2).sum()) for c in centres]
    assert apart[1] == pytest.approx(1.2 * apart[0])
    moved = clusters.nudge(atoms, 0.1, 10, rng)
    for group in clusters.molecule_groups(atoms):
        np.testing.assert_allclose(moved[group].get_all_distances(), atoms[group].get_all_distances(), atol=1e-9)
    assert np.abs(moved.positions - atoms.positions).max() > 0.02


def test_a_close_contact_is_at_its_distance_and_the_rest_is_further():
    rng = np.random.default_rng(3)
    first, second = one("EC"), one("water")
    pair = clusters.close_contact(first, second, 3, 0, 1.5, rng)
    distances = between(pair)
    assert distances[3, len(first)] == pytest.approx(1.5)
    assert distances.min() > 1.0
    ions = clusters.close_contact(one("Li+"), one("Li+"), 0, 0, 1.3, rng)
    assert ions.info["charge"] == 2
    assert ions.get_distance(0, 1) == pytest.approx(1.3)


@pytest.mark.parametrize(("name", "bond"), [("DMC", (0, 1)), ("EC", (2, 3))])
def test_a_stretched_bond_has_its_length_in_chains_and_rings(name, bond):
    template = conformers(resolve(name)[0])[0]
    bond = next(b for b in template.bonds if set(template.numbers[list(b)]) == {6, 8})
    before = template.atoms().get_distance(*bond)
    longer = clusters.stretch_bond(template.atoms(), template.bonds, bond, 1.4)
    assert longer.get_distance(*bond) == pytest.approx(1.4 * before, rel=1e-9)
    if name == "DMC":  # in a chain no other bond changes
        for other in template.bonds:
            if set(other) != set(bond):
                assert longer.get_distance(*other) == pytest.approx(template.atoms().get_distance(*other), rel=1e-9)


def test_thermal_geometries_follow_equipartition():
    dimer = Atoms("N2", [[0, 0, 0], [0, 0, 1.2]], info={"charge": 0})
    calc = MorsePotential(epsilon=5.0, r0=1.2, rho0=6.0, rcut1=4.0, rcut2=5.0)

    def forces(probe):
        probe.calc = calc
        return probe.get_forces()

    modes = clusters.harmonic_modes(dimer, forces)
    assert len(modes.curvature) == 1
    stiffness = 2 * 5.0 * (6.0 / 1.2) ** 2  # of Morse: 2 epsilon (rho0 / r0)^2
    assert modes.curvature[0] * 14.007 / 2 == pytest.approx(stiffness, rel=1e-2)
    rng, temperature = np.random.default_rng(4), 500.0
    lengths = np.array([modes.sample(temperature, rng).get_distance(0, 1) for _ in range(4000)])
    expected = BOLTZMANN * temperature / stiffness
    assert lengths.var() == pytest.approx(expected, rel=5 * np.sqrt(2 / 4000))
    assert abs(lengths.var() / (2 * expected) - 1) > 5 * np.sqrt(2 / 4000)  # control: another temperature is told apart


def test_a_new_thermal_geometry_stays_where_the_molecule_is():
    calc = XTB()
    atoms = one("water")
    atoms.info["charge"] = 0

    def forces(probe):
        probe.calc = calc
        return probe.get_forces()

    modes = clusters.harmonic_modes(atoms, forces)
    assert len(modes.curvature) == 3
    rng = np.random.default_rng(5)
    turned = atoms.positions @ clusters.random_rotation(rng).T + 7.0
    new = modes.resample_in_place(turned, 300.0, rng)
    assert 0 < np.abs(new - turned).max() < 0.4


def recipe(**more):
    dynamics = {"steps": 4, "save_every": 2, "temperatures_K": [300]}
    tasks = [
        {
            "kind": "molecules",
            "name": "m",
            "molecules": ["water"],
            "starts_each": 2,
            "dynamics": dynamics,
            "rattled_A": [0.05],
        },
        {
            "kind": "clusters",
            "name": "c",
            "count": 2,
            "valid_every": 2,
            "n_atoms": [6, 10],
            "solvents": {"water": 1.0},
            "ions": [[1.0, {"Li+": 1}]],
            "dynamics": dynamics,
            "relax_steps": 2,
            "scaled": [0.9, 1.2],
            "nudged": 1,
        },
        {"kind": "contacts", "name": "k", "molecules": ["water", "Li+"], "count": 1, "each": 3},
        {"kind": "bonds", "name": "b", "molecules": ["water"], "factors": [0.9, 1.3]},
        {"kind": "atoms", "name": "a", "species": {"H": [0, 2], "Li+": [1, 1]}},
    ]
    return sample.Recipe.model_validate({"name": "small", "seed": 9, "tasks": tasks} | more)


def drawn(plan, order=1):
    return {s.id: list(sample.structures(plan, s, XTB)) for s in plan.starts()[::order]}


def test_a_recipe_repeats_in_any_order_and_changes_with_the_seed():
    first, again, other = drawn(recipe()), drawn(recipe(), -1), drawn(recipe(seed=10))
    assert set(first) == {"m-00000", "m-00001", "c-00000", "c-00001", "k-00000", "b-00000", "a-00000"}
    for key in first:
        assert len(first[key]) == len(again[key])
        for a, b in zip(first[key], again[key], strict=True):
            np.testing.assert_allclose(a.positions, b.positions, atol=1e-8)
    assert recipe().starts()[0].id == "a-00000"
    assert np.abs(first["m-00000"][0].positions - other["m-00000"][0].positions).max() > 1e-3


def test_a_start_says_what_it_is_and_keeps_its_split():
    found = drawn(recipe())
    assert {a.info["split"] for a in found["c-00000"]} == {"valid"}
    assert {a.info["split"] for a in found["c-00001"]} == {"train"}
    assert {a.info["config_type"] for a in found["c-00001"]} == {"cation", "cation_nudged", "cation_scaled"}
    for key, frames in found.items():
        for atoms in frames:
            assert atoms.info["group"] == key
            assert "momenta" not in atoms.arrays
    for atoms in found["c-00001"]:
        assert (atoms.info["charge"], (atoms.numbers == 3).sum()) == (1, 1)
        assert 4 <= len(atoms) <= 10
    assert len(found["b-00000"]) == 2 * 2
    assert {(a.info["charge"], a.info["spin"]) for a in found["a-00000"]} == {(0, 2), (1, 1)}


def test_recipes_with_mistakes_are_refused():
    with pytest.raises(ValueError, match="colour"):
        recipe(colour="red")
    with pytest.raises(InputError, match="name its ions"):
        sample._template("LiPF6", 0)


@pytest.fixture(scope="module")
def box():
    return build("EC:10 DMC:10 LiPF6:2", density_g_cm3=1.1, seed=2)


def test_carved_clusters_are_whole_nearest_and_charged_right(box):
    wrapped = box.atoms.copy()
    wrapped.wrap()  # molecules broken over the boundary, as a trajectory may have them
    found = list(sample_liquid.carve_clusters([wrapped], seed=1, per_frame=8, n_atoms=(20, 45)))
    assert len(found) == 8
    inside = {
        tuple(sorted(np.round(np.sort(box.atoms[g].get_all_distances().ravel()), 5)))
        for g in clusters.molecule_groups(box.atoms)
    }
    for cluster in found:
        assert 8 <= len(cluster) <= 45
        assert not cluster.pbc.any()
        total = (cluster.numbers == 3).sum() - (cluster.numbers == 15).sum()
        assert cluster.info["charge"] == total
        for group in clusters.molecule_groups(cluster):
            shape = tuple(sorted(np.round(np.sort(cluster[group].get_all_distances().ravel()), 5)))
            assert any(len(shape) == len(s) and np.allclose(shape, s, atol=1e-4) for s in inside)
        assert between(cluster).min() >= 2.0  # contacts of the packing, images taken right


def test_carving_names_what_is_missing(box):
    bare = Atoms(box.atoms.numbers, box.atoms.positions, cell=box.atoms.cell, pbc=True)
    with pytest.raises(InputError, match="template"):
        list(sample_liquid.carve_clusters([bare], seed=1))
    lent = list(sample_liquid.carve_clusters([bare], seed=1, template=box.atoms, per_frame=1))
    assert "carved" in lent[0].info["config_type"]
    with pytest.raises(InputError, match="too small"):
        clusters.carve(box.atoms, 0, 5000)
    with pytest.raises(InputError, match="not have the atoms"):
        list(sample_liquid.carve_clusters([molecule("H2O")], seed=1, template=box.atoms))


def test_liquid_tasks_carve_repeatable_clusters_with_a_given_potential(tmp_path):
    shutil.copy(ROOT / "data/recipes/liquid_sampler.safetensors", tmp_path / "sampler.safetensors")
    task = {
        "kind": "liquid",
        "name": "l",
        "model": "sampler.safetensors",
        "boxes": [{"composition": "water:40 LiPF6:1", "density_g_cm3": 1.0}],
        "relax_steps": 3,
        "dynamics": {"steps": 6, "save_every": 3, "temperatures_K": [300], "timestep_fs": 0.5},
        "first_frame": 1,
        "per_frame": 6,
        "n_atoms": (12, 20),
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"name": "wet", "seed": 3, "tasks": [task]}))
    plan = sample.Recipe.read(file)
    assert plan.models() == (tmp_path / "sampler.safetensors",)
    first, again = drawn(plan)["l-00000"], drawn(plan)["l-00000"]
    assert len(first) == len(again) == 6
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.positions, b.positions)
        assert len(a) <= 20
        assert a.info["config_type"] in ("liquid_md", "liquid_rattled", "liquid_nudged")
        assert a.info["charge"] == (a.numbers == 3).sum() - (a.numbers == 15).sum()
        assert not a.pbc.any()
    with pytest.raises(InputError, match="no model file"):
        sample.Recipe.model_validate({"name": "x", "seed": 1, "tasks": [task | {"model": "absent"}]}).models()
    small = task | {"boxes": [{"composition": "water:6", "density_g_cm3": 0.6}], "n_atoms": (18, 18), "per_frame": 2}
    small["dynamics"] = task["dynamics"] | {"steps": 12}
    small["model"] = str(plan.models()[0])
    with pytest.raises(InputError, match="too small"):
        drawn(sample.Recipe.model_validate({"name": "x", "seed": 1, "tasks": [small]}))
