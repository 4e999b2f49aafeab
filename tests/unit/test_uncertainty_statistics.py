"""Statistics of few members against simulation, each with the naive way beside it, which must fail."""

import json
import math

import numpy as np
import pytest
from scipy import integrate, stats

from mdplug.errors import InputError
from mdplug.uncertainty_statistics import (
    AdaptiveConformal,
    ErrorLaw,
    conformal_quantile,
    degrees_of_freedom,
    deviation,
    false_alarm_of,
    half_width,
    probe_weights,
    trigger_factor,
)


def within(rate: float, expected: float, trials: int) -> None:
    """Four binomial standard deviations."""
    assert abs(rate - expected) < 4 * math.sqrt(expected * (1 - expected) / trials), (rate, expected)


# --- intervals


def test_deviation_by_hand():
    assert deviation(np.array([[1.0, 5.0], [3.0, 5.0]])) == pytest.approx([math.sqrt(2), 0])
    vectors = np.array([[[1.0, 0, 0]], [[-1.0, 0, 0]], [[0, 0, 3.0]]])  # one atom; variances 1, 0, 3
    assert deviation(vectors, vector=True) == pytest.approx([2.0])
    with pytest.raises(InputError, match="two or more"):
        deviation(np.ones((1, 4)))


@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("members", [4, 5, 6, 8])
def test_small_ensembles_cover_what_they_state(members, components):
    """Truth and members from one Gaussian, whose mean and width are unknown."""
    random = np.random.default_rng(members)
    n = 40_000
    drawn = random.normal(size=(members + 1, n, components))
    error = np.linalg.norm(drawn[0] - drawn[1:].mean(axis=0), axis=1)
    sigma = deviation(drawn[1:], vector=True)
    for level in (0.5, 0.95):
        within((error <= half_width(members, level, components) * sigma).mean(), level, n)
    law = ErrorLaw.of_members(members, components)
    assert stats.kstest(error / sigma, law.cdf).pvalue > 1e-3
    assert stats.kstest(law.draw(random, n), law.cdf).pvalue > 1e-3
    if components == 1:
        naive = (error <= 1.96 * drawn[1:, :, 0].std(axis=0)).mean()
        assert naive < 0.89
        if members == 4:
            assert naive == pytest.approx(0.77, abs=0.01)
    assert stats.kstest(error / sigma, ErrorLaw(components).cdf).pvalue < 1e-10


def test_half_width_is_students():
    assert half_width(4, 0.95) == pytest.approx(stats.t.ppf(0.975, 3) * math.sqrt(1.25))
    assert half_width(None, 0.95) == pytest.approx(1.959964, abs=1e-6)
    assert half_width(None, 0.5, 3) == pytest.approx(stats.maxwell.ppf(0.5) / math.sqrt(3))
    for members, level in ((1, 0.9), (4, 1.0), (4, 0.0)):
        with pytest.raises(InputError):
            half_width(members, level)


LAWS = [ErrorLaw(), ErrorLaw(3), ErrorLaw.of_members(4), ErrorLaw.of_members(5, 3), ErrorLaw.heavy(3, 4.0)]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_a_law_is_one(law):
    levels = np.array([0.01, 0.5, 0.9, 0.999])
    np.testing.assert_allclose(law.cdf(law.quantile(levels)), levels, rtol=1e-9)
    shell = {1: 2.0, 3: 4 * math.pi}[law.components]

    def density(r):
        return shell * r ** (law.components - 1) * math.exp(law.components * float(law.log_density(r)))

    for level in levels[:3]:
        assert integrate.quad(density, 0, float(law.quantile(level)))[0] == pytest.approx(level, rel=1e-7)
    if law == ErrorLaw.heavy(3, 4.0) or math.isinf(law.degrees):
        assert integrate.quad(lambda r: r * r * density(r), 0, math.inf)[0] == pytest.approx(1.0, rel=1e-5)


# --- alarms


def largest(random, members: int, atoms: int, trials: int, components: int = 3) -> np.ndarray:
    """(trials,) of max_i sigma_i where every true sigma is 1."""
    scale = np.float32(1 / math.sqrt(components))
    return np.array(
        [
            deviation(scale * random.standard_normal((members, atoms, components), dtype=np.float32), True).max()
            for _ in range(trials)
        ]
    )


@pytest.mark.parametrize(
    ("atoms", "trials"), [(10, 2000), (1000, 400), (10_000, 60)], ids=["10 atoms", "1000 atoms", "10000 atoms"]
)
@pytest.mark.parametrize("members", [4, 8, 32])
def test_false_alarms_come_as_stated(members, atoms, trials):
    found = largest(np.random.default_rng(1), members, atoms, trials)
    for stated in (0.05, 0.3):
        factor = trigger_factor(members, atoms, stated)
        within((found > factor).mean(), stated, trials)
        assert false_alarm_of(factor, members, atoms) == pytest.approx(stated)
    # Uncorrected: nearly always an alarm.
    assert (found > 1.0).mean() > 0.97
    assert false_alarm_of(1.0, members, atoms) > 0.97
    # Corrected for ten atoms only: the size must be in it.
    if atoms == 10_000:
        assert (found > trigger_factor(members, 10, 0.05)).mean() > 0.9


def test_scalars_have_a_third_of_the_degrees():
    found = largest(np.random.default_rng(2), 8, 100, 2000, components=1)
    within((found > trigger_factor(8, 100, 0.1, components=1)).mean(), 0.1, 2000)
    assert (found > trigger_factor(8, 100, 0.1, components=3)).mean() > 0.8


def test_the_largest_of_many_grows_as_measured_before():
    """Medians of max_i sigma_i for forces of four members, against quantiles of the formula."""
    found = np.median(largest(np.random.default_rng(3), 4, 1000, 200))
    assert found == pytest.approx(trigger_factor(4, 1000, 0.5), rel=0.01)


def test_correlated_atoms_alarm_less_often_and_twins_count_once():
    random = np.random.default_rng(4)
    members, pairs, trials = 4, 100, 800
    stated = 0.2
    alarms = {"half": 0, "twins": 0}
    for _ in range(trials):
        one, other = random.normal(size=(2, members, pairs, 3)) / math.sqrt(3)
        half = np.concatenate([one, math.sqrt(0.8) * one + math.sqrt(0.2) * other], axis=1)
        alarms["half"] += deviation(half, True).max() > trigger_factor(members, 2 * pairs, stated)
        alarms["twins"] += deviation(np.concatenate([one, one], axis=1), True).max() > trigger_factor(
            members, pairs, stated
        )
    assert alarms["half"] / trials < stated
    within(alarms["twins"] / trials, stated, trials)


def test_anisotropic_scatter_takes_fewer_degrees():
    random = np.random.default_rng(5)
    variances = np.array([0.6, 0.3, 0.1])
    components = 1.0 / (variances**2).sum()  # (tr C)^2 / tr C^2
    found = np.array([deviation(random.normal(size=(8, 100, 3)) * np.sqrt(variances), True).max() for _ in range(3000)])
    rate = (found > trigger_factor(8, 100, 0.1, components=components)).mean()
    assert 0.07 < rate < 0.15  # matched moments, not exact
    assert (found > trigger_factor(8, 100, 0.1)).mean() > 0.25


def test_a_parameter_has_no_noise():
    assert trigger_factor(None, 10_000, 0.01) == 1.0
    assert (false_alarm_of(0.99, None, 10), false_alarm_of(1.01, None, 10)) == (1.0, 0.0)
    for bad in ((1, 10, 0.1), (4, 0, 0.1), (4, 10, 0.0), (4, 10, 1.0)):
        with pytest.raises(InputError):
            trigger_factor(*bad)
    with pytest.raises(InputError):
        trigger_factor(4, 10, 0.1, probes=0)


# --- probes


@pytest.mark.parametrize(("members", "probes"), [(8, 1), (8, 4), (32, 4), (4, 9)])
def test_probes_give_the_deviation_on_average(members, probes):
    random = np.random.default_rng(6)
    forces = random.normal(size=(members, 20, 3))
    square = deviation(forces, True) ** 2
    weights = np.array([probe_weights(members, probes, random) for _ in range(1500)])
    assert weights.shape[1] == min(probes, members - 1)
    np.testing.assert_allclose(weights.sum(axis=2), 0.0, atol=1e-12)
    estimate = (np.einsum("tmk,kic->tmic", weights, forces) ** 2).sum(axis=3).mean(axis=1)
    error = estimate.std(axis=0) / math.sqrt(len(weights))
    assert (np.abs(estimate.mean(axis=0) - square) < 5 * error + 1e-9).all()
    if probes >= members - 1:
        np.testing.assert_allclose(estimate, np.broadcast_to(square, estimate.shape), rtol=1e-9)


def probed(random, members, atoms, probes, trials, signs):
    """(trials,) of the largest estimate over atoms that share the probes."""
    out = []
    for _ in range(trials):
        forces = random.normal(size=(members, atoms, 3)) / math.sqrt(3)
        if signs:
            weights = random.choice([-1.0, 1.0], size=(probes, members)) / math.sqrt(members - 1)
            forces = forces - forces.mean(axis=0)
        else:
            weights = probe_weights(members, probes, random)
        square = (np.tensordot(weights, forces, 1) ** 2).sum(axis=2).mean(axis=0)
        out.append(math.sqrt(square.max()))
    return np.array(out)


@pytest.mark.parametrize(("members", "probes"), [(8, 2), (8, 4), (32, 4)])
def test_false_alarms_of_probes_come_as_stated(members, probes):
    random = np.random.default_rng(7)
    atoms, trials, stated = 200, 800, 0.1
    found = probed(random, members, atoms, probes, trials, signs=False)
    factor = trigger_factor(members, atoms, stated, probes=probes)
    within((found > factor).mean(), stated, trials)
    # As if all members had been differentiated: far too many alarms.
    assert (found > trigger_factor(members, atoms, stated)).mean() > 0.5


@pytest.mark.parametrize(("members", "probes"), [(8, 4), (32, 4)])
def test_random_signs_are_noisier_by_the_stated_amount(members, probes):
    random, n, k = np.random.default_rng(8), 40_000, members - 1
    forces = random.normal(size=(n, members, 3))
    signs = random.choice([-1.0, 1.0], size=(n, probes, members))
    square = ((signs @ (forces - forces.mean(axis=1, keepdims=True))) ** 2).sum(axis=(1, 2))
    nu = 3 / (1 / k + (1 + 4 / k - 5 / members) / probes)
    assert 2 / (square.var() / square.mean() ** 2) == pytest.approx(nu, rel=0.05)
    assert nu < degrees_of_freedom(members, 3, probes)


def test_random_signs_break_the_rule_of_orthonormal_probes():
    found = probed(np.random.default_rng(9), 8, 200, 4, 1000, signs=True)
    assert (found > trigger_factor(8, 200, 0.1, probes=4)).mean() > 0.2


# --- conformal


def test_the_quantile_of_few_scores():
    scores = np.arange(1.0, 10.0)  # nine
    assert conformal_quantile(scores, 0.9) == 9.0
    assert conformal_quantile(scores[:8], 0.9) == math.inf
    assert conformal_quantile(scores, 0.5) == 5.0
    assert conformal_quantile(np.array([]), 0.5) == math.inf


def drifting(n: int, seed: int) -> np.ndarray:
    """Scores that grow fivefold, as of a simulation that leaves its data."""
    random = np.random.default_rng(seed)
    return np.abs(random.normal(size=n)) * np.exp(np.linspace(0.0, math.log(5.0), n))


def test_adaptive_intervals_hold_under_drift_where_static_ones_fail():
    start = np.abs(np.random.default_rng(10).normal(size=500))
    scores = drifting(4000, 11)
    static = conformal_quantile(start, 0.9)
    assert (scores <= static).mean() < 0.75
    adaptive = AdaptiveConformal(0.9, start, step=0.02, window=200)
    held = np.array([adaptive.update(s) for s in scores])
    assert held.mean() == pytest.approx(0.9, abs=0.01)
    assert [part.mean() for part in np.split(held, 4)] == pytest.approx([0.9] * 4, abs=0.03)
    assert adaptive.missed == (~held).sum()


@pytest.mark.parametrize("kind", ["alternating", "growing", "falling", "infinite"])
def test_the_rate_of_misses_is_bounded_for_any_sequence(kind):
    n, step, level = 2000, 0.05, 0.8
    k = np.arange(n)
    scores = {
        "alternating": 10.0 * (k // 50 % 2),
        "growing": 1.01**k,
        "falling": 0.99**k,
        "infinite": np.where(k % 2, 1.0, math.inf),
    }[kind]
    adaptive = AdaptiveConformal(level, [1.0, 2.0, 3.0], step)
    for t, score in enumerate(scores, start=1):
        adaptive.update(score)
        assert abs(adaptive.missed / t - (1 - level)) <= (level + step) / (step * t) + 1e-12


def test_adaptive_state_survives_json():
    scores = drifting(300, 12)
    whole = AdaptiveConformal(0.9, step=0.1, window=50)
    for s in scores:
        whole.update(s)
    first = AdaptiveConformal(0.9, step=0.1, window=50)
    for s in scores[:123]:
        first.update(s)
    second = AdaptiveConformal.restored(json.loads(json.dumps(first.state(), allow_nan=False)))
    for s in scores[123:]:
        second.update(s)
    assert second.state() == whole.state()
    assert len(whole.scores) == 50
    with pytest.raises(InputError, match="no state"):
        AdaptiveConformal.restored({"level": 0.9})


def test_adaptive_edges():
    fresh = AdaptiveConformal(0.9)
    assert fresh.factor == math.inf  # nothing is known yet
    assert fresh.update(1e9)
    assert not fresh.update(math.nan)
    assert fresh.scores == [1e9]
    for bad in ((1.0, 0.1, 10), (0.9, 0.0, 10), (0.9, 0.1, 0)):
        with pytest.raises(InputError):
            AdaptiveConformal(bad[0], step=bad[1], window=bad[2])
