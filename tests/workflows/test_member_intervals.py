"""Intervals of `analyze` over the members of an ensemble, against exact answers."""

import json

import numpy as np
import pytest
from ase import Atoms
from run_folders import folder_of, write_log
from scipy import stats

from mdplug import cli
from mdplug.errors import InputError
from mdplug.units import BAR, BOLTZMANN, G_CM3_PER_AMU_A3, M2_S, PS
from mdplug.workflows import analyze
from mdplug.workflows.member_intervals import MEMBERS

ATOMS, TEMPERATURE_K, PRESSURE_BAR = 30, 300.0, 400.0
KT = BOLTZMANN * TEMPERATURE_K
MASS = ATOMS * 39.948 * G_CM3_PER_AMU_A3


def write_members(path, energies, frame_ps=0.1):
    """members.csv for energies (F, K)."""
    columns = ["time_ps", *(f"member_{k}_eV" for k in range(energies.shape[1]))]
    table = np.column_stack((np.arange(len(energies)) * frame_ps, energies))
    np.savetxt(path / MEMBERS, table, delimiter=",", header=",".join(columns), comments="", fmt="%.8f")


def gas_folder(path, extra_bar, seed=1, frames=400, **options):
    """A gas whose K members are an ideal gas plus c_k times the volume: c_k only adds to the pressure.

    So the volumes of each are of a Gamma distribution with (N + 1) and kT / (P + c_k), and the exact mean density is
    m (P + c_k) / kT.
    """
    random = np.random.default_rng(seed)
    extra = np.asarray(extra_bar) * BAR
    volumes = random.gamma(ATOMS + 1, KT / (PRESSURE_BAR * BAR + extra.mean()), size=frames)
    boxes = np.cbrt(volumes)[:, None, None] * np.eye(3)
    positions = random.random((frames, ATOMS, 3)) * np.cbrt(volumes)[:, None, None]
    atoms = Atoms(f"Ar{ATOMS}", positions[0], cell=boxes[0], pbc=True)
    given = {"temperature_K": TEMPERATURE_K, "ensemble": "npt", **options}
    folder_of(path, atoms, positions, boxes, density=MASS / volumes, **given)
    write_members(path, volumes[:, None] * extra)
    return path


def density_of(extra_bar):
    return MASS / ATOMS * (PRESSURE_BAR + np.asarray(extra_bar)) * BAR / KT


def test_members_of_one_run_give_their_densities(tmp_path):
    extra = 15 * np.random.default_rng(2).normal(size=6)
    path = gas_folder(tmp_path / "gas", extra, frames=1000)
    # The log may have rows at other times than the frames.
    table = np.loadtxt(path / "log.csv", delimiter=",", skiprows=1)
    write_log(path, table[::3])
    result = analyze.run(analyze.Config(run_folder=path, density=True, rdf=["Ar-Ar"], start_ps=0))
    found = result.intervals["density_g_cm3"]
    assert found.method == "direct"
    np.testing.assert_allclose(found.members, density_of(extra), rtol=0.03)
    spread = density_of(extra).std(ddof=1) * np.sqrt(1 + 1 / 6) * stats.t.ppf(0.95, 5)
    assert found.model == pytest.approx(spread, rel=0.15)
    assert found.total > max(found.model, found.statistical)
    assert found.total < np.hypot(found.model, found.statistical) * 1.1
    # All members are ideal gases: no difference is found in their structure.
    g = result.intervals["rdf Ar-Ar g"]
    seen = g.value > 0.1
    assert np.median(g.model[seen] / g.statistical[seen]) < 0.5
    assert np.abs(g.value - 1)[seen].mean() < 0.2
    text = str(result)
    assert "6 members differ by 0." in text
    assert f"  density_g_cm3 {found.value:.4g} +- {found.total:.2g} at 90 % (statistical " in text
    assert "  rdf Ar-Ar coordination_number " in text
    record = json.loads((path / "analysis" / "analysis.json").read_text())
    assert record["intervals"]["density_g_cm3"]["total"] == found.total
    assert record["intervals"]["density_g_cm3"]["members"] == found.members.tolist()
    assert MEMBERS in record["inputs_sha256"]
    header = (path / "analysis" / "rdf-Ar-Ar.csv").read_text().splitlines()[0]
    assert header.startswith(
        "r_A,g,g_error,coordination,members_g,members_g_statistical,members_g_model,members_g_total"
    )


def test_energies_go_with_their_frames(tmp_path):
    extra = [-60, 0, 60]
    path = gas_folder(tmp_path / "gas", extra, frames=600)
    whole = analyze.run(analyze.Config(run_folder=path, density=True, start_ps=0)).intervals["density_g_cm3"]
    late = analyze.run(analyze.Config(run_folder=path, density=True, start_ps=20)).intervals["density_g_cm3"]
    for one in (whole, late):
        np.testing.assert_allclose(one.members, density_of(extra), rtol=0.06)
    # The control: energies of other frames say nothing of the members.
    table = np.loadtxt(path / MEMBERS, delimiter=",", skiprows=1)
    write_members(path, np.roll(table[:, 1:], 1, axis=0))
    wrong = analyze.run(analyze.Config(run_folder=path, density=True, start_ps=0)).intervals["density_g_cm3"]
    assert np.ptp(wrong.members) < 0.3 * np.ptp(density_of(extra))


def test_what_reweighting_cannot_do_is_said(tmp_path):
    far = gas_folder(tmp_path / "far", [-300, -100, 0, 400])
    result = analyze.run(analyze.Config(run_folder=far, density=True, start_ps=0))
    assert result.intervals == {}
    assert "run each member by itself" in str(result)
    assert result.density["value"] > 0
    nve = gas_folder(tmp_path / "nve", [-20, 20], ensemble="nve")
    assert "this run is NVE" in str(analyze.run(analyze.Config(run_folder=nve, density=True, start_ps=0)))
    short = gas_folder(tmp_path / "short", [-20, 20])
    lines = (short / MEMBERS).read_text().splitlines()
    (short / MEMBERS).write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(InputError, match="399 rows, which are not the 400 frames"):
        analyze.run(analyze.Config(run_folder=short, start_ps=0))
    (short / MEMBERS).write_text("\n".join([lines[0].replace("member_1_eV", "b"), *lines[1:]]) + "\n")
    with pytest.raises(InputError, match="must have time_ps, member_0_eV, member_1_eV"):
        analyze.run(analyze.Config(run_folder=short, start_ps=0))


# --- a run of each member


def walk_folder(path, diffusion_m2_s, number, **options):
    random = np.random.default_rng(number)
    step = np.sqrt(2 * diffusion_m2_s * M2_S * 0.5 * PS)
    side = 15 + 0.01 * number
    positions = random.normal(scale=step, size=(240, 40, 3)).cumsum(axis=0) + random.random((40, 3)) * side
    atoms = Atoms("Ar40", positions[0] % side, cell=[side] * 3, pbc=True)
    given = {"temperature_K": TEMPERATURE_K, "model": f"{path.name}.safetensors", **options}
    return folder_of(path, atoms, positions % side, frame_ps=0.5, density=1.0 + 0.01 * number, **given)


def test_runs_of_members_give_diffusion(tmp_path, capsys):
    truth = 1e-9 * np.array([1.0, 1.6, 0.7, 1.3])
    paths = [walk_folder(tmp_path / f"member{k}", one, k) for k, one in enumerate(truth)]
    with pytest.raises(SystemExit) as end:
        cli.main(["analyze", *map(str, paths), "--msd", "Ar", "--rdf", "Ar-Ar", "--density", "--start_ps", "0"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "analysis" / "analysis.json").read_text())
    found = record["intervals"]["diffusion_m2_s Ar"]
    np.testing.assert_allclose(found["members"], truth, rtol=0.3)
    spread = truth.std(ddof=1) * np.sqrt(1 + 1 / 4) * stats.t.ppf(0.95, 3)
    assert found["model"] == pytest.approx(spread, rel=0.4)
    assert found["statistical"] < 0.5 * found["model"]
    assert "diffusion_m2_s Ar" in text
    assert "intervals from 4 runs" in text
    assert record["intervals"]["density_g_cm3"]["value"] == pytest.approx(1.015)
    assert record["intervals"]["density_g_cm3"]["total"] == pytest.approx(
        0.01 * np.std(range(4), ddof=1) * np.sqrt(1.25) * stats.t.ppf(0.95, 3), rel=1e-3
    )
    # Each run is there by itself, with boxes of different sizes; the curve goes as far as the smallest.
    assert (tmp_path / "analysis" / "2-member2" / "msd-Ar.csv").is_file()
    rows = np.genfromtxt(tmp_path / "analysis" / "rdf-Ar-Ar.csv", delimiter=",", names=True)
    assert rows["r_A"][-1] < 7.5
    assert rows["g"][rows["r_A"] > 4].mean() == pytest.approx(1.0, abs=0.05)
    assert (rows["g_total"] >= rows["g_statistical"] * 0.99).all()


def test_runs_that_are_not_of_members_are_refused(tmp_path):
    first = walk_folder(tmp_path / "a", 1e-9, 1)
    same = walk_folder(tmp_path / "b", 1e-9, 2, model="a.safetensors", seed=2)
    with pytest.raises(InputError, match="runs of the same potential"):
        analyze.run(analyze.Config(run_folder=[first, same], msd=["Ar"]))
    with pytest.raises(InputError, match="runs of the same potential"):
        analyze.run(analyze.Config(run_folder=[first, first], msd=["Ar"]))
    hot = walk_folder(tmp_path / "hot", 1e-9, 3) / "config.yaml"
    hot.write_text(hot.read_text().replace("300.0", "350.0"))
    with pytest.raises(InputError, match=r"temperature_K 350\.0, .* has 300\.0: runs of the members"):
        analyze.run(analyze.Config(run_folder=[first, hot.parent], msd=["Ar"]))
    mean = walk_folder(tmp_path / "mean", 1e-9, 4)
    write_members(mean, np.zeros((240, 2)), 0.5)
    with pytest.raises(InputError, match="a run of the mean of an ensemble"):
        analyze.run(analyze.Config(run_folder=[first, mean], msd=["Ar"]))
