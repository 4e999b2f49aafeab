"""Observables with intervals: against exact answers, over many repeated experiments, with controls that fail.

The truth is always drawn anew from what the members are drawn from; nothing else can be promised.
The experiment with liquids is `pytest -m slow tests/workflows/test_reweighting.py -s`, some minutes.
"""

import numpy as np
import pytest
from fluid import Fluids, simulate
from scipy import stats
from scipy.special import logsumexp, ndtr

from mdplug.errors import InputError
from mdplug.units import BOLTZMANN
from mdplug.workflows.intervals import combine_runs, from_members
from mdplug.workflows.reweighting import (
    Reweighting,
    average,
    free_energy_difference,
    free_energy_profile,
    mean_error,
)

LEVEL = 0.9
GAUSS = 1.6449  # what a normal of known width needs for 90 %


# --- intervals


@pytest.mark.parametrize("members", [2, 4, 8, 32])
def test_limits_are_students(members):
    values = np.random.default_rng(members).normal(size=(members, 3))
    for level in (0.5, 0.9, 0.95):
        found = from_members(values, 0.0, 0.0, np.inf, level, "runs")
        student = stats.t.ppf(0.5 + level / 2, members - 1) * values.std(axis=0, ddof=1) * np.sqrt(1 + 1 / members)
        np.testing.assert_allclose(found.total, student, rtol=1e-4)
        np.testing.assert_allclose(found.model, student, rtol=1e-4)
        np.testing.assert_array_equal(found.statistical, 0.0)
        same = from_members(np.ones((members, 1)), 0.3, 0.1, 7.0, level, "runs")
        assert same.total == pytest.approx(0.3 * stats.t.ppf(0.5 + level / 2, 7), rel=1e-3)
        assert same.statistical == pytest.approx(same.total, rel=1e-3)
        assert same.model == 0


@pytest.mark.parametrize("members", [4, 8])
def test_runs_of_members_cover_a_new_draw(members):
    random = np.random.default_rng(1)
    many, dof = 1000, 12
    widths = {}
    for noise in (0.0, 0.5, 1.0, 3.0):
        drawn = random.normal(size=(members + 1, many))
        values = drawn[1:] + noise * random.normal(size=(members, many))
        errors = noise * np.sqrt(random.chisquare(dof, size=(members, many)) / dof)
        found = combine_runs(values, errors, dof)
        truth, away = drawn[0], np.abs(drawn[0] - found.value)
        covered = found.contains(truth).mean()
        # Where noise hides the differences it can only be too careful.
        assert 0.855 < covered < (0.935 if noise < 1 else 0.99), noise
        # Controls: a Gaussian with K in the denominator and no 1 + 1/K; and the noise alone.
        if noise < 1:
            assert (away < GAUSS * values.std(axis=0)).mean() < covered - 0.03
            assert (away < found.statistical).mean() < 0.5
        # Noise counted twice, once between members and once by itself, is far too wide.
        twice = stats.t.ppf(0.95, members - 1) * values.std(axis=0, ddof=1) * np.sqrt(1 + 1 / members)
        widths[noise] = found.total.mean() / np.hypot(twice, found.statistical).mean()
    assert widths[0.0] == pytest.approx(1.0, rel=1e-4)
    assert widths[3.0] < 0.8


def test_combining_keeps_shapes_and_names_what_is_wrong():
    values = np.random.default_rng(2).normal(size=(4, 3, 2))
    found = combine_runs(values, 0.1)
    assert found.total.shape == (3, 2)
    one = combine_runs(values[:, 0, 0], 0.1)
    assert isinstance(one.total, float)
    assert one.total == pytest.approx(found.total[0, 0], rel=1e-12)
    assert str(one).startswith(f"{one.value:.4g} +- {one.total:.2g} at 90 % (statistical ")
    with pytest.raises(InputError, match="1 member says nothing about differences"):
        combine_runs([1.0], [0.1])
    with pytest.raises(InputError, match="no probability"):
        combine_runs([1.0, 2.0], [0.1, 0.1], level=90)


# --- weights


def harmonic(oscillators: int, frames: int, seed: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """(F, K) eV, (F,) <x^2> / kT of independent oscillators of the mean of 8 force constants, exact (K,), kT.

    The exact standard deviation between members is 0.0397 of <x^2>.
    """
    kT = 0.025
    springs = 1 / (1 + 0.0397 * stats.norm.ppf((np.arange(8) + 0.5) / 8) / 0.9271)
    squares = np.random.default_rng(seed).chisquare(oscillators, size=frames) * kT / springs.mean()
    return 0.5 * squares[:, None] * springs, squares / oscillators / kT, 1 / springs, kT


@pytest.mark.parametrize(("oscillators", "beta_sigma"), [(200, 0.42), (1900, 1.31)])
def test_a_harmonic_committee_against_the_exact_one(oscillators, beta_sigma):
    energies, squares, exact, kT = harmonic(oscillators, 20000)
    assert exact.std() == pytest.approx(0.0397, rel=0.01)
    spreads = {}
    for method in ("direct", "cumulant"):
        one = Reweighting(energies, kT / BOLTZMANN, method)
        found = one.intervals(squares)
        spreads[method] = found.members.std()
        if oscillators == 200 or method == "cumulant":
            np.testing.assert_allclose(found.members, exact, atol=0.006 if method == "direct" else 0.01)
    assert one.beta_sigma == pytest.approx(beta_sigma, rel=0.03)
    chosen = Reweighting(energies, kT / BOLTZMANN)
    if oscillators == 200:
        assert spreads["direct"] == pytest.approx(0.0397, rel=0.03)
        assert spreads["cumulant"] == pytest.approx(0.0397, rel=0.03)
        assert chosen.method == "direct"
    else:
        # Few frames carry the weights of the outer members; the first order still stands.
        assert spreads["cumulant"] == pytest.approx(0.0397, rel=0.05)
        assert chosen.effective < 0.1
        assert chosen.method == "cumulant"


def test_direct_and_cumulant_errors_are_those_of_repeated_runs():
    for method, n in (("direct", 200), ("cumulant", 900)):
        found = []
        for seed in range(80):
            energies, squares, _, kT = harmonic(n, 300, seed)
            found.append(Reweighting(energies, kT / BOLTZMANN, method).intervals(squares))
        values = np.array([one.value for one in found])
        apart = np.array([one.members - one.value for one in found])
        assert np.mean([one.statistical_error for one in found]) == pytest.approx(values.std(), rel=0.2)
        noise = np.sqrt(apart.var(axis=0).sum() / 7)
        assert np.mean([one.noise for one in found]) == pytest.approx(noise, rel=0.2)


def test_weights_of_too_few_frames_would_be_wrong():
    """Why members that differ much are refused: the stated error of the outer members is far too small."""
    ratios = {}
    for n in (200, 4000):
        errors, stated = [], []
        for seed in range(40):
            energies, squares, exact, kT = harmonic(n, 300, seed)
            one = Reweighting(energies, kT / BOLTZMANN, "direct")
            outer = one.intervals(squares).members[[0, -1]] - exact[[0, -1]]
            errors.append((outer**2).mean())
            stated.append(np.mean([mean_error(one._one(k, squares[:, None], None)[1])[0] ** 2 for k in (0, 7)]))
        ratios[n] = np.sqrt(np.mean(errors) / np.mean(stated))
    assert ratios[200] < 1.35
    assert ratios[4000] > 2.0


def test_only_differences_of_energies_count():
    energies, squares, _, kT = harmonic(200, 500)
    plain = Reweighting(energies, kT / BOLTZMANN).intervals(squares)
    offsets = 1e5 * np.arange(8) + 1e4 * np.sin(np.arange(500))[:, None]
    moved = Reweighting(energies + offsets, kT / BOLTZMANN).intervals(squares)
    np.testing.assert_allclose(moved.members, plain.members, rtol=1e-6)
    turned = Reweighting(energies[:, ::-1], kT / BOLTZMANN).intervals(squares)
    np.testing.assert_allclose(turned.members[::-1], plain.members, rtol=1e-12)
    alike = Reweighting(np.repeat(energies[:, :1], 4, axis=1), kT / BOLTZMANN)
    assert (alike.method, alike.effective, alike.beta_sigma) == ("direct", pytest.approx(1.0), 0.0)
    none = alike.intervals(squares)
    value, error, _ = average(squares)
    assert none.value == pytest.approx(value, rel=1e-12)
    assert none.statistical_error == pytest.approx(error, rel=1e-9)
    assert none.model < 1e-9
    assert none.total == pytest.approx(none.statistical, rel=1e-3)
    far = Reweighting(energies * 1000, kT / BOLTZMANN, "direct")  # nothing overflows
    assert np.isfinite(far.weights).all()
    assert far.weights.sum(axis=1) == pytest.approx(1.0)


def test_what_cannot_be_reweighted_is_named():
    energies, squares, _, kT = harmonic(200, 50)
    with pytest.raises(InputError, match=r"shape \(50,\) must be \(frames, members\)"):
        Reweighting(energies[:, 0], 300)
    with pytest.raises(InputError, match="temperature_K=0 must be positive"):
        Reweighting(energies, 0)
    broken = energies.copy()
    broken[7, 2] = np.nan
    with pytest.raises(InputError, match="energies of frame 7 are not finite"):
        Reweighting(broken, 300)
    far = harmonic(4000, 1000)
    refused = Reweighting(far[0], kT / BOLTZMANN)
    assert refused.method is None
    with pytest.raises(InputError, match=r"8 members differ by 1\.\d+ kT.*run each member by itself"):
        refused.intervals(far[1])
    good = Reweighting(energies, kT / BOLTZMANN)
    with pytest.raises(InputError, match=r"shape \(49,\) has not the \(50,\) values"):
        good.intervals(squares[1:])
    with pytest.raises(InputError, match="state was never visited"):
        free_energy_difference(good, squares > 0, squares < 0)


# --- repeated small experiments with exact truths: particles in a double well


kT = 0.025
X = np.linspace(-3.0, 3.0, 3001)
EDGES = np.linspace(-1.8, 1.8, 13)
WELLS = np.array([0.03, -0.07, 0.006])  # eV of x^4, x^2, x


def terms(x: np.ndarray) -> np.ndarray:
    return np.stack((x**4, x**2, x))


def probabilities(wells: np.ndarray) -> np.ndarray:
    """(X,) by quadrature."""
    energy = wells @ terms(X) / kT
    p = np.exp(-energy + energy.min())
    return p / p.sum()


def particles(wells: np.ndarray, number: int, frames: int, memory: float, random: np.random.Generator) -> np.ndarray:
    """(F, N) exact samples that are correlated in time: a Gaussian process through the inverse distribution."""
    z = random.normal(size=(frames, number))
    for t in range(1, frames):
        z[t] = memory * z[t - 1] + np.sqrt(1 - memory**2) * z[t]
    cumulative = np.cumsum(probabilities(wells))
    return np.interp(ndtr(z), cumulative / cumulative[-1], X)


class Table:
    """Coverage of the total interval and of what others report, over repeated experiments."""

    def __init__(self):
        self.rows: dict[str, list[np.ndarray]] = {}

    def add(self, name, found, truth):
        away = np.abs(np.asarray(truth) - found.value)
        gauss = GAUSS * found.members.std(axis=0)
        inside = (away <= found.total, away <= found.model, away <= found.statistical, away <= gauss)
        share = (found.statistical / found.total, found.total)
        self.rows.setdefault(name, []).append(np.array([np.nanmean(part) for part in (*inside, *share)]))

    def means(self):
        return {name: np.mean(rows, axis=0) for name, rows in self.rows.items()}

    def __str__(self):
        head = f"{'90 % intervals':24s}   n  total model-only stat-only Gauss-K  stat/total  half-width"
        lines = [
            f"{name:24s} {len(self.rows[name]):3d}  {m[0]:.3f}    {m[1]:.3f}     {m[2]:.3f}    {m[3]:.3f}        "
            f"{m[4]:.2f}  {m[5]:.3g}"
            for name, m in self.means().items()
        ]
        return "\n".join([head, *lines])


def wells_experiment(table: Table, seed: int, spread: float, number: int) -> Reweighting:
    random = np.random.default_rng(seed)
    drawn = WELLS * (1 + spread * random.normal(size=(9, 3)))
    truth, members = drawn[0], drawn[1:]
    x = particles(members.mean(axis=0), number, 300, 0.6, random)
    energies = members @ terms(x).sum(axis=2)  # (K, F)
    one = Reweighting(energies.T, kT / BOLTZMANN)
    if one.method is None:
        return one
    p = probabilities(truth)
    table.add("<x^2>", one.intervals((x**2).mean(axis=1)), p @ X**2)
    table.add("<V>", one.intervals(energies / number, per_member=True), p @ (truth @ terms(X)))
    right = (x > 0).mean(axis=1)
    exact = -kT * np.log(p[X > 0].sum() / p[X < 0].sum())
    table.add("F(right) - F(left)", free_energy_difference(one, 1 - right, right), exact)
    bins = np.array([p[np.searchsorted(EDGES, X, side="right") == k].sum() for k in range(1, len(EDGES))])
    profile = free_energy_profile(one, x, EDGES)
    table.add("free energy, 12 bins", profile, -kT * np.log(bins / np.diff(EDGES)))
    return one


@pytest.mark.parametrize(("spread", "number"), [(0.04, 8), (0.04, 32)])
def test_intervals_hold_the_truth_of_a_double_well(spread, number):
    table = Table()
    methods = [wells_experiment(table, seed, spread, number).method for seed in range(160)]
    print(f"\n{ {str(m): methods.count(m) for m in set(methods)} }\n{table}")
    assert methods.count(None) <= 8
    for name, (total, _, statistical, gauss, share, _) in table.means().items():
        assert 0.85 < total < 0.96, name
        # Controls, where the part that they leave out matters.
        if share < 0.3:
            assert statistical < 0.5, name
        if share < 0.7:
            assert gauss < total - 0.04, name
    assert methods.count("direct") > 140 if number == 8 else methods.count("cumulant") > 60


def test_profile_leaves_out_what_was_never_seen():
    random = np.random.default_rng(4)
    members = WELLS * (1 + 0.02 * random.normal(size=(4, 3)))
    x = particles(members.mean(axis=0), 4, 200, 0.0, random)
    one = Reweighting((members @ terms(x).sum(axis=2)).T, kT / BOLTZMANN)
    found = free_energy_profile(one, x, np.linspace(-9, 9, 13))
    assert np.isnan(found.value[[0, -1]]).all()
    assert np.isnan(found.total[[0, -1]]).all()
    assert np.isfinite(found.total[5:7]).all()
    single = free_energy_profile(one, x[:, 0], EDGES)
    assert np.nansum(np.exp(-single.value / kT)) * 0.3 == pytest.approx(1.0, rel=0.05)


# --- a liquid


ATOMS, TEMPERATURE, PRESSURE = 64, 2.0, 5.0
BINS = np.arange(0.85, 2.01, 0.1)


def liquids(parameters: np.ndarray, sweeps: int, seed: int) -> Fluids:
    options = {"atoms": ATOMS, "kT": TEMPERATURE, "pressure": PRESSURE, "every": 4, "settle": sweeps // 3}
    return simulate(parameters[:, 0], parameters[:, 1], sweeps=sweeps, edges=BINS, seed=seed, **options)


def drawn_liquids(replicas: int, well: float, diameter: float, seed: int) -> np.ndarray:
    """(R, 9, 2) of (twelve, six), the truth first, then eight members."""
    random = np.random.default_rng(seed)
    epsilon, sigma = 1 + np.array([well, diameter])[:, None, None] * random.normal(size=(2, replicas, 9))
    return 4 * np.stack((epsilon * sigma**12, epsilon * sigma**6), axis=-1)


def energies_of(parameters: np.ndarray, frames: Fluids, replica: int) -> np.ndarray:
    """(F, K) of one fluid."""
    return np.outer(frames.sum12[:, replica], parameters[:, 0]) - np.outer(frames.sum6[:, replica], parameters[:, 1])


def averages(parameters: np.ndarray, frames: Fluids) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(R,) densities and energies, (R, B) g of R potentials from all their simulations together.

    M. R. Shirts and J. D. Chodera, J. Chem. Phys. 129, 124105 (2008), with as many frames of each.
    """
    twelve, six = frames.sum12.ravel(), frames.sum6.ravel()
    u = (np.outer(parameters[:, 0], twelve) - np.outer(parameters[:, 1], six)) / TEMPERATURE
    f = np.zeros(len(u))
    for _ in range(100):
        mixture = logsumexp(f[:, None] - u, axis=0)
        new = -logsumexp(-u - mixture, axis=1)
        new -= new[0]
        done = np.abs(new - f).max() < 1e-4
        f = new
        if done:
            break
    assert done
    logs = -u - mixture
    weights = np.exp(logs - logsumexp(logs, axis=1, keepdims=True))
    assert (1 / (weights**2).sum(axis=1)).min() > 0.1 * weights.shape[1]
    energy = weights @ twelve * parameters[:, 0] - weights @ six * parameters[:, 1]
    g = weights @ frames.g.reshape(-1, len(BINS) - 1)
    return weights @ (ATOMS / frames.volume.ravel()), energy / ATOMS, g


@pytest.mark.slow
@pytest.mark.parametrize(("well", "diameter"), [(0.02, 0.003), (0.03, 0.005)])
def test_intervals_hold_the_truth_of_a_liquid(well, diameter):
    drawn = drawn_liquids(170, well, diameter, seed=11)
    truths = liquids(drawn[:, 0], 800, seed=12)
    density, energy, g = averages(drawn[:, 0], truths)
    own = ATOMS / truths.volume
    pulls = (own.mean(axis=0) - density) / mean_error(own)[0]
    assert 0.6 < pulls.std() < 1.5
    frames = liquids(drawn[:, 1:].mean(axis=1), 800, seed=13)
    table, methods, differ = Table(), [], []
    for k in range(len(drawn)):
        energies = energies_of(drawn[k, 1:], frames, k)
        one = Reweighting(energies, TEMPERATURE / BOLTZMANN)
        methods.append(one.method)
        differ.append(one.beta_sigma)
        if one.method is not None:
            table.add("density", one.intervals(ATOMS / frames.volume[:, k]), density[k])
            table.add("energy", one.intervals(energies.T / ATOMS, per_member=True), energy[k])
            table.add("RDF, 10 bins", one.intervals(frames.g[:, k, 1:]), g[k, 1:])
    print(f"\nbeta sigma {np.mean(differ):.2f} { {str(m): methods.count(m) for m in set(methods)} }\n{table}")
    assert len(methods) - methods.count(None) >= 150
    for name, (total, model, statistical, gauss, _, _) in table.means().items():
        assert 0.85 <= total <= 0.95, name
        assert statistical < 0.8, name
        assert gauss < total - 0.05, name
        assert model < total, name


def test_the_liquid_is_one():
    """The sums that moves keep up to date are those of the places; without forces it is an ideal gas."""
    many = 200
    gas = simulate(
        np.full(many, 1e-9), np.zeros(many), atoms=8, kT=1.0, pressure=0.1, sweeps=150, every=2, settle=60,
        edges=BINS, seed=6, density=0.1,
    )  # fmt: skip
    assert gas.volume.mean() == pytest.approx(9 / 0.1, rel=0.03)  # (N + 1) kT / P
    assert gas.g.mean() == pytest.approx(1.0, abs=0.05)
    # Two atoms at a distance r in a cube of side L: the virial theorem of NPT, <V P> = (N + 1) kT + <r.F> / 3.
    pair = simulate(
        np.full(many, 4.0), np.full(many, 4.0), atoms=2, kT=1.0, pressure=0.05, sweeps=600, every=2, settle=100,
        edges=BINS, seed=7, density=0.05,
    )  # fmt: skip
    virial = 4 * (12 * pair.sum12 - 6 * pair.sum6).mean()
    assert virial < -0.2
    assert 0.05 * pair.volume.mean() == pytest.approx(3 + virial / 3, rel=0.03)


def test_the_energy_of_a_liquid_is_that_of_its_places():
    frames = simulate(
        np.full(3, 4.0), np.full(3, 4.0), atoms=27, kT=2.0, pressure=5.0, sweeps=30, every=1, settle=20, edges=BINS,
        seed=8,
    )  # fmt: skip
    # Independent of the sums: from finely binned distances of the last frame.
    fine = np.arange(0.5, 12.0, 1e-4)
    again = simulate(
        np.full(3, 4.0), np.full(3, 4.0), atoms=27, kT=2.0, pressure=5.0, sweeps=30, every=1, settle=20, edges=fine,
        seed=8,
    )  # fmt: skip
    np.testing.assert_array_equal(frames.sum12, again.sum12)
    middle = 0.5 * (fine[1:] + fine[:-1])
    shells = 4 / 3 * np.pi * np.diff(fine**3)
    pairs = again.g[-1] * 351 * shells / again.volume[-1][:, None]
    assert pairs.sum(axis=1) == pytest.approx(351)
    np.testing.assert_allclose(pairs @ middle**-12.0, again.sum12[-1], rtol=2e-3)
    np.testing.assert_allclose(pairs @ middle**-6.0, again.sum6[-1], rtol=1e-3)
