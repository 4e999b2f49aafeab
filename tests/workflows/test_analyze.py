"""The analyze task: against what can be known by hand, with controls."""

import json

import numpy as np
import pytest
from argon import crystal_file, model_file
from ase import Atoms
from ase.build import bulk
from ase.io import write
from run_folders import folder_of

from mdplug.errors import InputError
from mdplug.units import M2_S, PS
from mdplug.workflows import analyze, md
from mdplug.workflows.statistics import block_error, equilibrated, inefficiency, mean_of

# --- statistics


def correlated(n: int, memory: float, seed: int) -> np.ndarray:
    """An AR(1) series of unit variance: its inefficiency is (1 + a) / (1 - a)."""
    random = np.random.default_rng(seed)
    out = np.empty(n)
    out[0] = random.normal()
    noise = random.normal(size=n) * np.sqrt(1 - memory**2)
    for k in range(1, n):
        out[k] = memory * out[k - 1] + noise[k]
    return out


def test_the_error_of_a_correlated_mean_is_honest():
    memory, n = 0.9, 4000
    expected = (1 + memory) / (1 - memory)
    found = [mean_of(correlated(n, memory, seed), 0) for seed in range(60)]
    assert np.mean([n / one.n_effective for one in found]) == pytest.approx(expected, rel=0.15)
    pulls = np.array([one.value / one.error for one in found])
    assert 0.75 < pulls.std() < 1.35
    # The control: an error that takes the values for independent is far too small.
    naive = np.array([one.value / (correlated(n, memory, seed).std() / np.sqrt(n)) for seed, one in enumerate(found)])
    assert naive.std() > 3
    assert np.mean([one.block_error for one in found]) == pytest.approx(np.mean([one.error for one in found]), rel=0.3)


def test_equilibration_is_left_out():
    series = correlated(3000, 0.5, 1) * 0.1 + 5.0
    series[:400] += 3.0 * np.exp(-np.arange(400) / 80)
    start = equilibrated(series)
    assert 150 < start < 1000
    assert mean_of(series).value == pytest.approx(5.0, abs=0.02)
    assert abs(series.mean() - 5.0) > 0.05  # the control
    assert equilibrated(correlated(3000, 0.5, 2)) < 600
    assert inefficiency(np.ones(10)) == 1.0
    assert np.isnan(block_error(np.ones(3), 5))


# --- structure


def test_an_ideal_gas_has_no_structure(tmp_path):
    random = np.random.default_rng(0)
    atoms = Atoms("Ar60", random.random((60, 3)) * 20, cell=[20] * 3, pbc=True)
    path = folder_of(tmp_path / "gas", atoms, random.random((150, 60, 3)) * 20)
    result = analyze.run(analyze.Config(run_folder=path, rdf=["Ar-Ar"], start_ps=0))
    one = result.rdf["Ar-Ar"]
    assert one.r_A[-1] == pytest.approx(10, abs=0.06)
    far = one.r_A > 3
    pulls = (one.g[far] - 1) / one.g_error[far]
    assert abs(one.g[far].mean() - 1) < 0.01
    assert np.median(np.abs(pulls)) < 1.5
    expected = 59 / 8000 * 4 / 3 * np.pi * (one.r_A + 0.025) ** 3
    np.testing.assert_allclose(one.coordination[far], expected[far], rtol=0.05)


def test_a_crystal_has_its_shells(tmp_path):
    atoms = bulk("Ar", "fcc", a=5.4, cubic=True) * (4, 4, 4)
    random = np.random.default_rng(1)
    frames = atoms.positions + random.normal(scale=0.12, size=(12, 256, 3))
    path = folder_of(tmp_path / "fcc", atoms, frames)
    one = analyze.run(analyze.Config(run_folder=path, rdf=["Ar-Ar"], start_ps=0)).rdf["Ar-Ar"]
    assert one.peak_A == pytest.approx(5.4 / np.sqrt(2), abs=0.05)
    assert 4.0 < one.minimum_A < 5.2
    assert one.coordination_number == pytest.approx(12, abs=0.02)


def test_pairs_of_different_elements_and_molecules(tmp_path):
    # Each Li has exactly four O at 2.0 A; water-like molecules O-H.
    tetrahedron = np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]) * 2.0 / np.sqrt(3)
    corners = np.array([[2.5, 2.5, 2.5], [7.5, 7.5, 7.5]]) * 2
    symbols, places, bonds = [], [], []
    for corner in corners:
        symbols.append("Li")
        places.append(corner)
        for vertex in tetrahedron:
            bonds.append((len(symbols), len(symbols) + 1))
            symbols += ["O", "H"]
            places += [corner + vertex, corner + vertex * 1.48]
    atoms = Atoms(symbols, places, cell=[20] * 3, pbc=True)
    shaken = atoms.positions + np.random.default_rng(2).normal(scale=0.03, size=(20, len(atoms), 3))
    path = folder_of(tmp_path / "ions", atoms, shaken, bonds=bonds)
    result = analyze.run(analyze.Config(run_folder=path, rdf=["Li-O", "O-Li", "O-H"], start_ps=0))
    assert result.rdf["Li-O"].peak_A == pytest.approx(2.0, abs=0.05)
    assert result.rdf["Li-O"].coordination_number == pytest.approx(4.0)
    assert result.rdf["O-Li"].coordination_number == pytest.approx(1.0)
    assert result.rdf["O-H"].coordination_number == pytest.approx(1.0)  # its own
    between = analyze.run(analyze.Config(run_folder=path, rdf=["O-H"], between_molecules=True, start_ps=0))
    assert between.rdf["O-H"].peak_A > 2.5
    assert (result.bonds, result.broken) == (8, {})
    with pytest.raises(InputError, match=r"no element or residue 'Na'; there are H Li O and HO LI"):
        analyze.run(analyze.Config(run_folder=path, rdf=["Na-O"]))
    with pytest.raises(InputError, match="beyond half of the smallest box"):
        analyze.run(analyze.Config(run_folder=path, rdf=["Li-O"], r_max_A=11))


def test_a_broken_bond_is_seen_in_its_frames_only(tmp_path):
    atoms = Atoms("N4", [[0, 0, 0], [1.1, 0, 0], [5, 5, 5], [6.1, 5, 5]], cell=[12] * 3, pbc=True)
    frames = np.repeat(atoms.positions[None], 10, axis=0)
    frames[4:7, 3, 0] += 1.0
    path = folder_of(tmp_path / "n2", atoms, frames, bonds=[(0, 1), (2, 3)])
    result = analyze.run(analyze.Config(run_folder=path))
    assert result.broken == {"2-3": 3}
    assert "bonds broken: 1 of 2 {'2-3': 3}" in str(result)


# --- diffusion


def walk(n_frames: int, n_atoms: int, diffusion_m2_s: float, frame_ps: float, seed: int) -> np.ndarray:
    step = np.sqrt(2 * diffusion_m2_s * M2_S * frame_ps * PS)
    return np.random.default_rng(seed).normal(scale=step, size=(n_frames, n_atoms, 3)).cumsum(axis=0)


def test_a_random_walk_diffuses_as_it_was_made_to(tmp_path):
    truth, n = 2.0e-9, 64
    path = walk(400, n, truth, 0.5, 3) + np.random.default_rng(4).random((n, 3)) * 15
    drift = np.arange(400)[:, None, None] * np.array([0.3, 0.0, 0.0])  # of everything: no diffusion
    atoms = Atoms(f"Ar{n}", (path[0] + drift[0]) % 15, cell=[15] * 3, pbc=True)
    wrapped = folder_of(tmp_path / "walk", atoms, (path + drift) % 15, frame_ps=0.5)
    result = analyze.run(analyze.Config(run_folder=wrapped, msd=["Ar"], start_ps=0))
    one = result.msd["Ar"]
    assert one.diffusion_m2_s == pytest.approx(truth, rel=0.15)
    assert abs(one.diffusion_m2_s - truth) < 4 * one.diffusion_error_m2_s
    assert one.diffusion_error_m2_s < 0.2 * truth
    assert one.msd_A2[0] == 0
    assert one.lag_ps[1] == 0.5


def test_a_changing_box_is_no_diffusion(tmp_path):
    n, frames = 50, 80
    fractional = np.random.default_rng(5).random((n, 3))
    sides = 15 * (1 + 0.02 * np.sin(np.arange(frames)))
    boxes = sides[:, None, None] * np.eye(3)
    positions = fractional * sides[:, None, None]
    atoms = Atoms(f"Ar{n}", positions[0], cell=boxes[0], pbc=True)
    path = folder_of(tmp_path / "breath", atoms, positions, boxes)
    one = analyze.run(analyze.Config(run_folder=path, msd=["Ar"], start_ps=0)).msd["Ar"]
    assert abs(one.diffusion_m2_s) < 2e-10


def test_molecules_diffuse_by_their_centre(tmp_path):
    n, truth = 40, 1.0e-9
    centres = walk(300, n, truth, 0.5, 6) + np.random.default_rng(7).random((n, 3)) * 18
    spin = np.random.default_rng(8).normal(size=(300, n, 3))
    spin *= 0.55 / np.linalg.norm(spin, axis=2, keepdims=True)
    positions = np.stack((centres + spin, centres - spin), axis=2).reshape(300, 2 * n, 3)
    atoms = Atoms(f"N{2 * n}", positions[0], cell=[18] * 3, pbc=True)
    path = folder_of(tmp_path / "n2", atoms, positions, bonds=[(2 * k, 2 * k + 1) for k in range(n)], frame_ps=0.5)
    result = analyze.run(analyze.Config(run_folder=path, msd=["N2", "N"], start_ps=0))
    assert result.msd["N2"].diffusion_m2_s == pytest.approx(truth, rel=0.2)
    assert result.msd["N"].msd_A2[1] - result.msd["N2"].msd_A2[1] == pytest.approx(2 * 0.55**2, rel=0.1)


# --- a whole run


def test_density_and_files_of_a_real_run(tmp_path):
    options = {"structure": crystal_file(tmp_path), "model": str(model_file(tmp_path)), "output": tmp_path / "md"}
    options |= {"timestep_fs": 4, "ensemble": "npt", "temperature_K": 80, "barostat_steps": 5, "checkpoint_ps": 0.4}
    run = md.run(md.Config(**options, time_ps=1.6, log_ps=0.02, frame_ps=0.04))
    result = analyze.run(analyze.Config(run_folder=run.folder, density=True, rdf=["Ar-Ar"], msd=["Ar"]))
    log = run.log["density_g_cm3"][run.log["time_ps"] >= result.start_ps - 1e-9]
    assert result.density["value"] == pytest.approx(log.mean(), rel=1e-9)
    assert 0 < result.density["error"] < 0.2
    assert "density_g_cm3" in str(result)
    record = json.loads((run.folder / "analysis" / "analysis.json").read_text())
    assert record["density"]["value"] == result.density["value"]
    assert record["rdf"]["Ar-Ar"]["peak_A"] == result.rdf["Ar-Ar"].peak_A
    names = {one.name for one in (run.folder / "analysis").iterdir()}
    assert names == {"analysis.json", "analysis.png", "rdf-Ar-Ar.csv", "msd-Ar.csv"}


def test_bad_input_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"holds no topology\.pdb and trajectory"):
        analyze.run(analyze.Config(run_folder=tmp_path))
    with pytest.raises(InputError, match="write a pair as Li-O"):
        analyze.Config.read(given={"run_folder": tmp_path, "rdf": ["Li"]})
    atoms = Atoms("Ar2", [[0, 0, 0], [4, 0, 0]])
    path = folder_of(tmp_path / "open", atoms, np.repeat(atoms.positions[None], 8, axis=0), density=np.nan)
    with pytest.raises(InputError, match="open system, which has no density"):
        analyze.run(analyze.Config(run_folder=path, density=True))
    with pytest.raises(InputError, match="leaves nothing of"):
        analyze.run(analyze.Config(run_folder=path, start_ps=50))
    with pytest.raises(InputError, match="too few for diffusion"):
        analyze.run(analyze.Config(run_folder=path, msd=["Ar"]))
    write(tmp_path / "x.xyz", atoms)
    (path / "trajectory.xtc").write_bytes(b"not a trajectory")
    with pytest.raises(InputError, match=r"trajectory\.xtc cannot be read"):
        analyze.run(analyze.Config(run_folder=path))
