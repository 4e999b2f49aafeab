"""The relax and singlepoint tasks: crystals with known answers, failures kept apart, continuing."""

import csv

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import read, write

import mdplug
from mdplug.errors import InputError
from mdplug.potentials.pair import LennardJones
from mdplug.potentials.stillinger_weber import StillingerWeber
from mdplug.units import GPA
from mdplug.workflows import relax, singlepoint

# Stillinger and Weber, PRB 31, 5262 (1985): diamond at a = 5.431 A with two bonds of 2.1683 eV per atom.
A0, E0 = 5.431, -2 * 2.1683


@pytest.fixture
def silicon(tmp_path):
    return str(mdplug.save(StillingerWeber.new(), tmp_path / "sw.safetensors"))


@pytest.fixture
def lj(tmp_path):
    return str(mdplug.save(LennardJones.new(0.0104, 3.4, 8.5), tmp_path / "lj.safetensors"))


def saved(tmp_path, name, atoms):
    write(tmp_path / name, atoms)
    return tmp_path / name


def test_cells_and_positions_relax_to_the_crystal(tmp_path, silicon):
    stretched = bulk("Si", "diamond", a=5.6, cubic=True)
    shaken = bulk("Si", "diamond", a=5.45, cubic=True)
    shaken.rattle(0.1, seed=1)
    sheared = bulk("Si", "diamond", a=A0)
    sheared.set_cell(sheared.cell.array @ (np.eye(3) + 0.02 * np.tri(3)), scale_atoms=True)
    files = [
        saved(tmp_path, "stretched.cif", stretched),
        saved(tmp_path, "shaken.xyz", shaken),
        saved(tmp_path, "sheared.xyz", sheared),
    ]
    config = relax.Config(structures=files, model=silicon, output=tmp_path / "out", cell=True, fmax_eV_A=1e-4)
    result = relax.run(config)
    assert result.exit_code == 0
    assert [row["status"] for row in result.rows] == ["converged"] * 3
    for row in result.rows:
        assert row["energy_eV"] / row["atoms"] == pytest.approx(E0, abs=2e-4)
        assert row["volume_A3"] / row["atoms"] == pytest.approx(A0**3 / 8, rel=1e-3)
        assert row["space_group"] == "Fd-3m (227)"
        assert abs(row["pressure_GPa"]) < 0.01
        assert row["dE_meV_per_atom"] < 0
    assert result.rows[1]["space_group_before"] == "P1 (1)"
    assert len(read(result.relaxed, index=":")) == 3
    with result.table.open() as file:
        table = list(csv.DictReader(file))
    assert [row["file"] for row in table] == [str(one) for one in files]
    assert float(table[0]["dV_percent"]) == pytest.approx(100 * ((A0 / 5.6) ** 3 - 1), abs=0.1)


def test_fixed_cell_pressure_and_both_optimisers(tmp_path, silicon):
    atoms = bulk("Si", "diamond", a=A0, cubic=True)
    atoms.rattle(0.1, seed=3)
    file = saved(tmp_path, "si.xyz", atoms)
    for name in ("lbfgs", "fire"):
        config = relax.Config(structures=[file], model=silicon, output=tmp_path / name, optimiser=name, fmax_eV_A=1e-3)
        row = relax.run(config).rows[0]
        assert row["status"] == "converged"
        assert row["volume_A3"] == pytest.approx(A0**3)
        assert row["energy_eV"] / 8 == pytest.approx(E0, abs=1e-4)
    pressed = relax.Config(
        structures=[file], model=silicon, output=tmp_path / "p", cell=True, pressure_GPa=5.0, fmax_eV_A=1e-3
    )
    row = relax.run(pressed).rows[0]
    assert row["pressure_GPa"] == pytest.approx(5.0, abs=0.02)
    # The bulk modulus of this potential is 101.4 GPa (Balamane et al., PRB 46, 2250 (1992): 1.01 Mbar).
    strain = row["volume_A3"] / A0**3 - 1
    assert -5.0 / strain == pytest.approx(101.4 + 0.5 * 5 * 4, rel=0.06)
    with pytest.raises(InputError, match="pressure_GPa needs cell"):
        relax.run(relax.Config(structures=[file], model=silicon, output=tmp_path / "x", pressure_GPa=5.0))


def test_symmetry_is_kept_on_request_and_lost_without(tmp_path, lj):
    # The simple cubic crystal is a saddle of Lennard-Jones: kept by symmetry, left when something breaks it.
    atoms = bulk("Ar", "sc", a=3.7) * (2, 2, 2)
    atoms.rattle(0.05, seed=4)
    file = saved(tmp_path, "sc.xyz", atoms)
    base = {"structures": [file], "model": lj, "cell": True, "fmax_eV_A": 1e-3, "symmetry_precision_A": 0.3}
    kept = relax.run(relax.Config(**base, output=tmp_path / "kept", symmetry=True)).rows[0]
    assert kept["space_group_before"] == kept["space_group"] == "Pm-3m (221)"
    free = relax.run(relax.Config(**base, output=tmp_path / "free")).rows[0]
    assert free["space_group"] != "Pm-3m (221)"
    assert free["energy_eV"] < kept["energy_eV"] - 0.01


def test_failures_stay_apart_and_what_is_done_is_not_done_again(tmp_path, silicon):
    good = saved(tmp_path, "good.cif", bulk("Si", "diamond", a=5.5))
    germanium = saved(tmp_path, "ge.cif", bulk("Ge", "diamond", a=5.65))
    molecule = saved(tmp_path, "open.xyz", Atoms("Si2", [[0, 0, 0], [2.4, 0, 0]]))
    files = [tmp_path / "nothere.cif", good, germanium, molecule]
    config = relax.Config(structures=files, model=silicon, output=tmp_path / "out", cell=True)
    result = relax.run(config)
    assert result.exit_code == 1
    assert [row["status"] for row in result.rows] == ["failed", "converged", "failed", "failed"]
    messages = [row["error"] for row in result.rows]
    assert "no structure file" in messages[0]
    assert "atom 0 is Ge" in messages[2]
    assert "periodic in three directions" in messages[3]
    record = tmp_path / "out" / "00001-good.json"
    before = record.stat().st_mtime_ns
    assert relax.run(config).rows[1] == result.rows[1]
    assert record.stat().st_mtime_ns == before


def test_what_did_not_converge_says_so_and_goes_on_with_more_steps(tmp_path, silicon):
    atoms = bulk("Si", "diamond", a=A0, cubic=True)
    atoms.rattle(0.15, seed=5)
    options = {"structures": [saved(tmp_path, "si.xyz", atoms)], "model": silicon, "output": tmp_path / "out"}
    short = relax.run(relax.Config(**options, max_steps=4))
    assert short.exit_code == 1
    assert short.rows[0]["status"] == "not converged"
    assert "not converged in 4 steps" in str(short)
    longer = relax.run(relax.Config(**options, max_steps=200))
    assert longer.exit_code == 0
    assert 4 < longer.rows[0]["steps"] <= 200
    assert longer.rows[0]["dE_meV_per_atom"] < short.rows[0]["dE_meV_per_atom"] < 0


def test_a_cell_that_runs_away_is_stopped(tmp_path, lj):
    # Two atoms far apart in a large box under tension: nothing holds the volume.
    atoms = Atoms("Ar2", [[0, 0, 0], [4, 4, 4]], cell=[8, 8, 8], pbc=True)
    config = relax.Config(
        structures=[saved(tmp_path, "x.xyz", atoms)], model=lj, output=tmp_path / "out", cell=True, pressure_GPa=-3.0
    )
    row = relax.run(config).rows[0]
    assert row["status"] == "failed"
    assert "times its volume" in row["error"]


# --- single points


def test_single_points_equal_the_calculator(tmp_path, silicon):
    atoms = bulk("Si", "diamond", a=5.5, cubic=True)
    atoms.rattle(0.05, seed=6)
    cluster = Atoms("Si3", [[0, 0, 0], [2.4, 0, 0], [0, 2.4, 0]], info={"charge": 1.0})
    write(tmp_path / "two.xyz", [atoms, cluster], format="extxyz")
    config = singlepoint.Config(
        structures=[tmp_path / "two.xyz", saved(tmp_path, "ge.cif", bulk("Ge"))], model=silicon, output=tmp_path / "out"
    )
    result = singlepoint.run(config)
    assert (result.failed, result.exit_code) == (1, 1)
    assert "atom 0 is Ge" in result.rows[2]["error"]
    frames = read(result.extxyz, index=":")
    for given, row, frame in zip((atoms, cluster), result.rows, frames, strict=False):
        given.calc = mdplug.Calculator(silicon)
        assert row["energy_eV"] == pytest.approx(given.get_potential_energy(), abs=1e-7)  # 8 digits in the file
        assert frame.get_potential_energy() == pytest.approx(row["energy_eV"], abs=1e-7)
        np.testing.assert_allclose(frame.get_forces(), given.get_forces(), atol=1e-7)
    assert result.rows[0]["pressure_GPa"] == pytest.approx(-atoms.get_stress()[:3].mean() / GPA, abs=1e-5)
    assert "pressure_GPa" not in result.rows[1]
    assert result.rows[1]["charge_e"] == 1.0
    with pytest.raises(InputError, match="no structure file"):
        singlepoint.run(singlepoint.Config(structures=[tmp_path / "no.xyz"], model=silicon, output=tmp_path / "x"))
