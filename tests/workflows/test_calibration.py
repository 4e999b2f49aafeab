"""Calibration on synthetic truths: what is known comes back, and the naive way beside it fails."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from mdplug.calibration import Calibration, Term
from mdplug.errors import InputError
from mdplug.spec import Spec
from mdplug.uncertainty_statistics import ErrorLaw, deviation
from mdplug.workflows import calibration_metrics as metrics
from mdplug.workflows.calibration_conformal import block_units, fit_conformal, memory_frames
from mdplug.workflows.calibration_fits import (
    effective_size,
    fit_environment,
    fit_isotonic,
    fit_scale,
    fit_tail,
    isotonic_table,
)
from mdplug.workflows.calibration_plots import plot

FORCE = {"components": 3, "quantity": "forces_eV_A"}
ENERGY = {"components": 1, "quantity": "energy_eV"}


def autoregressive(random, rows: int, length: int, memory: float) -> np.ndarray:
    """(rows, length) of unit variance, stationary."""
    out = random.normal(size=(rows, length))
    for t in range(1, length):
        out[:, t] = memory * out[:, t - 1] + math.sqrt(1 - memory**2) * out[:, t]
    return out


# --- maps


def test_effective_size():
    random = np.random.default_rng(0)
    group = np.repeat(np.arange(200), 10)
    assert effective_size(random.normal(size=2000), group) > 1300
    assert effective_size(np.repeat(random.normal(size=200), 10), group) == pytest.approx(200, rel=0.01)
    assert effective_size(random.normal(size=50), np.zeros(50)) == 1.0


@pytest.mark.parametrize("components", [1, 3])
def test_scale_is_found_within_its_stated_error(components):
    """Errors of a trajectory share a factor, so that 2000 values are worth fewer."""
    alphas, stated = [], []
    for seed in range(60):
        random = np.random.default_rng(seed)
        group = np.repeat(np.arange(40), 50)
        sigma = np.exp(random.normal(size=2000))
        shared = np.exp(0.4 * random.normal(size=40) - 0.4**2)[group]  # mean square 1
        errors = 2.5 * sigma * shared * ErrorLaw(components).draw(random, 2000)
        made = fit_scale(errors, sigma, components=components, quantity="x", group=group)
        alphas.append(made.facts["alpha"])
        stated.append(made.facts["relative_error_of_scale"] * made.facts["alpha"])
    assert made.facts["n_effective"] < 800
    assert np.mean(alphas) == pytest.approx(2.5, rel=0.03)
    assert np.std(alphas) == pytest.approx(np.mean(stated), rel=0.4)
    # Taken for independent, the error is stated far too small.
    naive = fit_scale(errors, sigma, components=components, quantity="x").facts["relative_error_of_scale"]
    assert 2.5 * naive < 0.6 * np.std(alphas)


def test_scale_of_a_right_small_ensemble_is_one():
    """Four members about the truth: one by the law of members, though the plain ratio of squares is far from it."""
    random = np.random.default_rng(1)
    size = np.exp(random.normal(size=20_000))
    drawn = random.normal(size=(5, 20_000)) * size
    errors, sigma = drawn[0] - drawn[1:].mean(axis=0), deviation(drawn[1:])
    law = ErrorLaw.of_members(4)
    made = fit_scale(errors, sigma, **ENERGY, law=law)
    assert made.facts["alpha"] == pytest.approx(1.0, abs=0.02)
    assert made.law == law
    naive = fit_scale(errors, sigma, **ENERGY)
    assert naive.facts["alpha"] > 1.5
    assert naive.law.degrees < 6  # but its tail is seen
    calibrated = made(sigma=sigma)
    assert metrics.miscalibration_area(np.abs(errors), calibrated, made.law) < 0.01
    assert metrics.miscalibration_area(np.abs(errors), sigma, ErrorLaw()) > 0.05


def test_tail():
    random = np.random.default_rng(2)
    for degrees in (3.0, 6.0):
        law = ErrorLaw.heavy(3, degrees)
        assert fit_tail(law.draw(random, 40_000), 3).degrees == pytest.approx(degrees, rel=0.1)
    assert fit_tail(ErrorLaw(3).draw(random, 40_000), 3) == ErrorLaw(3)


def bent(sigma):
    """A law that no scale mends: root mean square error against sigma."""
    return 0.05 + 0.3 * sigma**2


def bent_data(seed: int, n: int = 30_000):
    random = np.random.default_rng(seed)
    sigma = np.exp(0.7 * random.normal(size=n) - 1)
    return bent(sigma) * ErrorLaw(3).draw(random, n), sigma


def test_isotonic_finds_a_bent_law():
    errors, sigma = bent_data(3)
    made = fit_isotonic(errors, sigma, **FORCE)
    scale = fit_scale(errors, sigma, **FORCE)
    new_errors, new = bent_data(4)
    inner = (new > np.quantile(sigma, 0.01)) & (new < np.quantile(sigma, 0.99))
    assert np.abs(made(sigma=new[inner]) / bent(new[inner]) - 1).max() < 0.15
    assert metrics.miscalibration_area(new_errors, made(sigma=new), made.law) < 0.01
    assert metrics.miscalibration_area(new_errors, scale(sigma=new), ErrorLaw(3)) > 0.03
    assert metrics.ence(new_errors, made(sigma=new)) < 0.04 < 0.2 < metrics.ence(new_errors, scale(sigma=new))


def test_isotonic_never_falls_and_goes_on_above_what_it_saw():
    random = np.random.default_rng(5)
    sigma = np.exp(random.normal(size=3000))
    errors = ErrorLaw(1).draw(random, 3000)  # not related at all: bins fall by chance
    made = fit_isotonic(errors, sigma, **ENERGY)
    grid = np.exp(np.linspace(-20, 12, 2001))
    out = made(sigma=grid)
    assert (np.diff(out) >= 0).all()
    top = math.exp(made.knots[-1])
    assert made(sigma=np.array([10 * top])) == pytest.approx(10 * made(sigma=np.array([top])))
    assert made(sigma=np.array([0.0])) == pytest.approx(made(sigma=np.array([1e-9])))
    # Raw bins do fall: pooling did something.
    assert (np.diff(metrics.binned(errors, sigma)[1]) < 0).any()


def test_tables_of_equal_sigmas():
    knots, values = isotonic_table(np.full(100, 2.0), np.zeros(100))
    assert (knots, values) == ((0.0,), (pytest.approx(math.log(2)),))
    made = Calibration("isotonic", "x", (Term("sigma", 1.0),), knots=knots, values=values)
    assert made(sigma=np.array([0.1, 1.0, 3.0])) == pytest.approx([2, 2, 6])


LAW = {"sigma": 0.5, "distance": 0.4, "force": 0.6}
FLOOR = 0.3
OFFSETS = {1: -0.6, 8: 0.5, 3: 0.1}


def environment(seed: int, trajectories: int = 20, n: int = 400):
    """Forces of atoms whose error follows a known law of its surroundings."""
    random = np.random.default_rng(seed)
    total = trajectories * n
    group = np.repeat(np.arange(trajectories), n)
    element = random.choice(list(OFFSETS), size=total)
    columns = {
        "sigma": 0.05 * np.exp(0.8 * random.normal(size=total)),
        "distance": np.exp(0.6 * random.normal(size=total)),
        "force": np.linalg.norm(random.normal(size=(total, 3)), axis=1) * np.exp(0.5 * random.normal(size=total)),
    }
    log = sum(p * np.log(columns[name] + (FLOOR if name == "force" else 0)) for name, p in LAW.items())
    true = 0.7 * np.exp(log + np.vectorize(OFFSETS.get)(element))
    return true * ErrorLaw(3).draw(random, total), true, group, element, columns


def test_environment_recovers_a_known_law():
    errors, true, group, element, columns = environment(6)
    extra = {name: columns[name] for name in ("distance", "force")}
    made = fit_environment(errors, columns["sigma"], **FORCE, group=group, element=element, extra=extra)
    powers = {t.column: t.power for t in made.terms}
    assert powers == pytest.approx(LAW, rel=0.15)
    assert made.elements[8] - made.elements[1] == pytest.approx(OFFSETS[8] - OFFSETS[1], abs=0.1)

    errors, true, group, element, columns = environment(7)  # other trajectories
    calibrated = made(**columns, number=element)
    assert np.sqrt(np.mean(np.log(calibrated / true) ** 2)) < 0.1
    ceiling, spread = metrics.spearman_ceiling(true, ErrorLaw(3))
    assert spread < 0.02
    reached = metrics.spearman(errors, calibrated) / ceiling
    assert reached > 0.95
    assert metrics.assess(errors, calibrated, made.law, resamples=0)["spearman_of_ceiling"].value > 0.95
    assert metrics.miscalibration_area(errors, calibrated, made.law) < 0.02
    # The raw sigma ranks worse, however it is scaled.
    assert metrics.spearman(errors, columns["sigma"]) / ceiling < 0.7
    # An element that it never saw is not trusted more than any other.
    unknown = made(**columns, number=np.full(len(element), 92))
    assert (unknown >= calibrated * (1 - 1e-9)).all()


def test_environment_never_falls_with_distance():
    """Errors that shrink with distance: the power is held at zero, the term is left out."""
    random = np.random.default_rng(8)
    sigma, distance = np.exp(random.normal(size=(2, 4000)))
    errors = sigma / distance * ErrorLaw(3).draw(random, 4000)
    made = fit_environment(errors, sigma, **FORCE, extra={"distance": distance})
    assert made.columns == ("sigma",)
    useless = fit_environment(1 / sigma * ErrorLaw(3).draw(random, 4000), sigma, **FORCE)
    assert useless.columns == ("sigma",)
    assert np.ptp(useless(sigma=np.sort(sigma)[:-40])) < 0.1 * useless(sigma=sigma).mean()


def test_refusals():
    fine = np.ones(30)
    for errors, sigma, group, text in (
        (fine[:5], fine[:5], None, "too few"),
        (fine, fine[:5], None, "one length"),
        (fine, fine, fine[:5], "one length"),
        (fine * np.nan, fine, None, "finite"),
        (fine, -fine, None, "negative"),
        (fine, 0 * fine, None, "zero everywhere"),
    ):
        with pytest.raises(InputError, match=text):
            fit_isotonic(errors, sigma, **ENERGY, group=group)
    with pytest.raises(InputError, match="one length"):
        fit_environment(fine, fine, **ENERGY, extra={"distance": fine[:4]})
    with pytest.raises(InputError, match="knots"):
        Calibration("isotonic", "x", (Term("sigma", 1.0),), knots=(1.0, 0.0), values=(0.0, 1.0))


# --- the record


@pytest.fixture(scope="module")
def calibration():
    errors, _, group, element, columns = environment(9, trajectories=8)
    extra = {name: columns[name] for name in ("distance", "force")}
    made = fit_environment(errors, columns["sigma"], **FORCE, group=group, element=element, extra=extra)
    scores = errors / made(**columns, number=element)
    intervals = (*fit_conformal(scores, group, (0.5, 0.95)), *fit_conformal(scores, group, (0.8,), "unit"))
    return replace(made, conformal=intervals)


def test_the_record_travels_in_a_model_file(calibration):
    record = calibration.to_dict()
    json.dumps(record, allow_nan=False)  # plain JSON, though an interval of 8 units at 95 % is infinite
    spec = Spec(name="m", architecture="a:B", config={}, cutoff=5.0, calibration={"forces": record})
    back = Calibration.from_dict(Spec.from_json(spec.to_json(), "here").calibration["forces"])
    assert back == calibration
    assert back.factor(0.95) == (math.inf, "conformal")
    _, _, _, element, columns = environment(10, trajectories=1)
    np.testing.assert_array_equal(back(**columns, number=element), calibration(**columns, number=element))
    for broken in ({**record, "colour": 1}, {k: v for k, v in record.items() if k != "law"}, {**record, "terms": [1]}):
        with pytest.raises(InputError, match="not the record"):
            Calibration.from_dict(broken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_give_what_arrays_give(calibration, dtype):
    _, _, _, element, columns = environment(11, trajectories=2)
    expected = calibration(**columns, number=element)
    tensors = {name: torch.tensor(c, dtype=dtype) for name, c in columns.items()}
    out = calibration(**tensors, number=torch.tensor(element))
    assert out.dtype == dtype
    np.testing.assert_allclose(out, expected, rtol=1e-12 if dtype == torch.float64 else 2e-5)


def test_it_is_differentiable_for_a_bias(calibration):
    _, _, _, element, columns = environment(12, trajectories=1, n=40)
    tensors = {name: torch.tensor(c, requires_grad=True) for name, c in columns.items()}
    number = torch.tensor(element)
    (slope,) = torch.autograd.grad(calibration(**tensors, number=number).sum(), tensors["sigma"])
    step = 1e-7
    moved = {**columns, "sigma": columns["sigma"] * (1 + step)}, {**columns, "sigma": columns["sigma"] * (1 - step)}
    up, down = (calibration(**c, number=element) for c in moved)
    np.testing.assert_allclose(slope, (up - down) / (2 * step * columns["sigma"]), rtol=1e-5, atol=1e-9)


def test_asking_for_what_is_not_there(calibration):
    with pytest.raises(InputError, match="'distance'"):
        calibration(sigma=np.ones(2), force=np.ones(2), number=np.ones(2, dtype=int))
    assert calibration.factor(0.68) == (pytest.approx(float(calibration.law.quantile(0.68))), "law")
    assert calibration.factor(0.8, "unit")[1] == "conformal"
    with pytest.raises(InputError, match=r"no 0\.9 interval"):
        calibration.factor(0.9, "unit")


# --- conformal


def test_few_units_say_nothing_finite():
    scores, unit = np.arange(160.0), np.repeat(np.arange(8), 20)
    for target, exact in (("atom", False), ("atom", True), ("unit", False)):
        below, above = fit_conformal(scores, unit, (0.88, 0.9), target, exact)
        assert math.isfinite(below.factor)
        assert above.factor == math.inf
    assert math.isfinite(fit_conformal(np.arange(9.0), np.arange(9), (0.9,))[0].factor)
    for bad in ((scores, unit[:3]), (scores * np.nan, unit), (scores[:0], unit[:0])):
        with pytest.raises(InputError):
            fit_conformal(*bad)


def test_single_values_are_plain_split_conformal():
    scores = np.random.default_rng(13).exponential(size=57)
    ranked = np.sort(scores)
    for target, exact in (("atom", True), ("unit", False), ("atom", False)):
        made = fit_conformal(scores, np.arange(57), (0.5, 0.9), target, exact)
        assert [m.factor for m in made] == [ranked[28], ranked[52]]  # ceil(58 x level)


def test_exchangeable_units_hold_the_level():
    """Units of different sizes and widths: the mean coverage of a new unit over many calibrations."""
    random = np.random.default_rng(14)
    k, level, repeats = 19, 0.9, 1500
    held = {"atom": [], "exact": [], "unit": [], "pooled": []}
    for _ in range(repeats):
        sizes = random.integers(1, 30, size=k + 1)
        unit = np.repeat(np.arange(k + 1), sizes)
        width = np.exp(0.7 * random.normal(size=k + 1))
        scores = np.abs(random.normal(size=len(unit))) * width[unit]
        old, new = unit < k, scores[unit == k]
        for name, target, exact in (("atom", "atom", False), ("exact", "atom", True), ("unit", "unit", False)):
            factor = fit_conformal(scores[old], unit[old], (level,), target, exact)[0].factor
            held[name].append((new <= factor).all() if name == "unit" else (new <= factor).mean())
        held["pooled"].append((new <= np.quantile(scores[old], level)).all())
    mean = {name: np.mean(h) for name, h in held.items()}
    error = {name: np.std(h) / math.sqrt(repeats) for name, h in held.items()}
    assert abs(mean["unit"] - level) < 4 * error["unit"]
    assert level - 3 * error["exact"] < mean["exact"] < level + 2 / (k + 1)
    assert abs(mean["atom"] - level) < 0.02
    assert mean["pooled"] < 0.6  # a quantile over atoms is no alarm for "no atom outside"


def splits(repeats: int = 200, per_split: int = 9, frames: int = 24, atoms: int = 8, memory: float = 0.99):
    """Correlated frames with frame effects: a few calibration trajectories, 40 others to test on, many splits."""
    random = np.random.default_rng(15)
    for _ in range(repeats):
        log = 1.5 * autoregressive(random, per_split + 40, frames, memory)
        within_frame = np.abs(1 + 0.3 * random.normal(size=(per_split + 40, frames, atoms)))
        scores = within_frame * np.exp(log)[:, :, None]
        trajectory = np.repeat(np.arange(per_split), frames * atoms)
        frame = np.tile(np.repeat(np.arange(frames), atoms), per_split)
        yield scores[:per_split].ravel(), trajectory, frame, scores[per_split:]


def test_blocks_hold_and_state_their_spread_where_frames_do_not():
    level = 0.9
    covered, stated = {"block": [], "frame": []}, {"block": [], "frame": []}
    alarm = {"block": [], "atom": []}
    for scores, trajectory, frame, new in splits():
        length = math.ceil(memory_frames(np.log(scores), trajectory, frame))
        blocks = block_units(trajectory, frame, length)
        for name, unit in (("block", blocks), ("frame", block_units(trajectory, frame, 1))):
            (made,) = fit_conformal(scores, unit, (level,))
            covered[name].append((new <= made.factor).mean())
            stated[name].append(made.coverage_sd)
        alarm["atom"].append((new <= made.factor).all(axis=2).mean())
        (whole,) = fit_conformal(scores, blocks, (level,), "unit")
        alarm["block"].append((new <= whole.factor).all(axis=2).mean())
    assert np.mean(covered["block"]) == pytest.approx(level, abs=0.02)
    assert np.std(covered["block"]) == pytest.approx(np.mean(stated["block"]), rel=0.5)
    # Frames taken for independent: too small on average, and three times as sure as they may be.
    assert np.mean(covered["frame"]) < level - 0.02
    assert np.std(covered["frame"]) > 3 * np.mean(stated["frame"])
    # For an alarm on whole frames the largest score of a block is needed, not a quantile over atoms.
    assert np.mean(alarm["atom"]) < 0.87
    assert np.mean(alarm["block"]) > 0.88


def test_trajectories_that_differ_are_the_units():
    """Half of the variance is between trajectories: the memory is as long as they are, blocks become trajectories."""
    random = np.random.default_rng(16)
    log = random.normal(size=(30, 1)) + autoregressive(random, 30, 50, 0.5)
    trajectory, frame = np.repeat(np.arange(30), 50), np.tile(np.arange(50), 30)
    assert memory_frames(log.ravel(), trajectory, frame) > 20
    assert memory_frames(log.ravel(), trajectory, frame) > 3 * memory_frames(
        (log - log.mean(axis=1, keepdims=True)).ravel(), trajectory, frame
    )


def test_memory_is_that_of_an_autoregressive_series():
    random = np.random.default_rng(17)
    values = autoregressive(random, 10, 2000, 0.9)
    trajectory, frame = np.repeat(np.arange(10), 2000), np.tile(np.arange(2000), 10)
    assert memory_frames(values.ravel(), trajectory, frame) == pytest.approx(19.0, rel=0.15)
    assert memory_frames(random.normal(size=20_000), trajectory, frame) == pytest.approx(1.0, abs=0.2)
    assert memory_frames(np.ones(20_000), trajectory, frame) == 1.0


def test_block_units():
    trajectory = np.array([0] * 14 + [5] * 3)
    frame = np.array([*np.repeat(np.arange(7), 2), 0, 1, 2])
    assert block_units(trajectory, frame, 3).tolist() == [0] * 6 + [1] * 8 + [2] * 3
    assert block_units(trajectory, frame, 100).tolist() == [0] * 14 + [1] * 3
    with pytest.raises(InputError):
        block_units(trajectory, frame, 0)


# --- metrics


@pytest.fixture(scope="module", params=[1, 3], ids=["scalar", "vector"])
def perfect(request):
    random = np.random.default_rng(18)
    sigma = np.exp(0.5 * random.normal(size=40_000))
    law = ErrorLaw(request.param)
    return law.draw(random, 40_000) * sigma, sigma, law


def test_a_perfect_sigma(perfect):
    errors, sigma, law = perfect
    found = metrics.scores(errors, sigma, law)
    assert found["miscalibration_area"] < 0.006
    assert found["ence"] < 0.03
    assert found["slope"] == pytest.approx(1.0, abs=0.03)
    for level in metrics.LEVELS:
        assert found[f"coverage_{100 * level:g}"] == pytest.approx(level, abs=0.01)
    assert found["half_width_95"] == pytest.approx(float(law.quantile(0.95)) * sigma.mean())
    ceiling, sd = metrics.spearman_ceiling(sigma, law)
    assert abs(found["spearman"] - ceiling) < 4 * sd
    assert found["spearman"] == pytest.approx(stats.spearmanr(errors, sigma).statistic)
    # Entropy of the Gaussian per component, with its scale.
    entropy = 0.5 * math.log(2 * math.pi * math.e / law.components) + np.log(sigma).mean()
    assert found["nll"] == pytest.approx(entropy, abs=0.02)
    # E CRPS of a Gaussian about itself: sigma / sqrt(pi).
    assert found["crps"] == pytest.approx(sigma.mean() / math.sqrt(law.components * math.pi), rel=0.02)


@pytest.mark.parametrize("change", [0.5, 2.0])
def test_a_wrong_sigma_is_seen_by_every_metric(perfect, change):
    errors, sigma, law = perfect
    good, bad = metrics.scores(errors, sigma, law), metrics.scores(errors, change * sigma, law)
    assert bad["miscalibration_area"] > 0.1
    assert bad["ence"] > 0.4
    assert bad["nll"] > good["nll"] + 0.1
    assert bad["crps"] > good["crps"]
    assert bad["rll_percent"] < good["rll_percent"]
    assert bad["spearman"] == good["spearman"]  # but not by a rank


def test_miscalibration_area_of_scaled_sigma_by_quadrature():
    expected = integrate.quad(lambda p: abs(2 * stats.norm.cdf(0.5 * stats.norm.ppf((1 + p) / 2)) - 1 - p), 0, 1)[0]
    errors = np.abs(np.random.default_rng(19).normal(size=100_000))
    assert metrics.miscalibration_area(errors, np.full(100_000, 0.5), ErrorLaw()) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("law", [ErrorLaw(), ErrorLaw.of_members(4), ErrorLaw.heavy(1, 3.0)], ids=str)
def test_scores_of_one_scalar_against_quadrature(law):
    sigma, error = 0.7, 0.4
    scale = sigma * law.width
    cdf = (
        (lambda x: stats.norm.cdf(x / scale))
        if math.isinf(law.degrees)
        else lambda x: stats.t.cdf(x / scale, law.degrees)
    )
    below = integrate.quad(lambda x: cdf(x) ** 2, -np.inf, error)[0]
    above = integrate.quad(lambda x: (1 - cdf(x)) ** 2, error, np.inf)[0]
    one = (np.array([error]), np.array([sigma]), law)
    assert metrics.crps(*one) == pytest.approx(below + above, rel=1e-6)
    exact = stats.norm(0, scale) if math.isinf(law.degrees) else stats.t(law.degrees, 0, scale)
    assert metrics.nll(*one) == pytest.approx(-exact.logpdf(error))


def test_scores_of_vectors_are_means_over_components():
    """NLL and CRPS of lengths equal those of the components, on average over directions."""
    random = np.random.default_rng(20)
    sigma = np.exp(0.3 * random.normal(size=60_000))
    vectors = 1.3 * random.normal(size=(60_000, 3)) * sigma[:, None] / math.sqrt(3)
    length = np.linalg.norm(vectors, axis=1)
    flat, each = np.abs(vectors).ravel(), np.repeat(sigma / math.sqrt(3), 3)
    for metric in (metrics.nll, metrics.crps):
        assert metric(length, sigma, ErrorLaw(3)) == pytest.approx(metric(flat, each, ErrorLaw()), rel=0.003)


def test_rll_ends():
    errors = np.abs(np.random.default_rng(21).normal(size=2000)) + 1e-3
    assert metrics.rll(errors, np.full(2000, math.sqrt(np.mean(errors**2))), 1) == pytest.approx(0.0, abs=1e-9)
    assert metrics.rll(errors, errors, 1) == pytest.approx(100.0)


def test_ranking_by_hand():
    assert metrics.auroc(np.array([1.0, 2, 3, 4]), np.array([0, 1, 0, 1])) == 0.75
    assert metrics.auroc(np.ones(4), np.array([0, 1, 0, 1])) == 0.5
    assert math.isnan(metrics.auroc(np.ones(4), np.zeros(4)))
    errors = np.arange(100.0)
    assert metrics.outlier_recall(errors, errors, 5, 10) == 1.0
    assert metrics.outlier_recall(errors, -errors, 5, 10) == 0.0
    assert metrics.outlier_recall(errors, np.where(errors > 97, 1.0, 0.0), 5, 2) == 0.4
    assert math.isnan(metrics.spearman(errors, np.ones(100)))
    assert metrics.coverage(errors, np.ones(100), math.inf) == (1.0, math.inf)


def test_bootstrap_goes_by_trajectories():
    random = np.random.default_rng(22)
    group = np.repeat(np.arange(40), 25)
    values = np.repeat(random.normal(size=40), 25)
    low, high = metrics.bootstrap(np.mean, (values,), group, resamples=500)
    width = 2 * 1.645 * values[::25].std(ddof=1) / math.sqrt(40)
    assert high - low == pytest.approx(width, rel=0.15)
    low, high = metrics.bootstrap(np.mean, (values,), np.arange(1000), resamples=500)
    assert high - low < 0.3 * width  # the control: frames taken for independent
    assert np.isnan(metrics.bootstrap(np.mean, (values,), np.zeros(1000))).all()


def test_assess_reports_everything(tmp_path):
    errors, sigma = bent_data(23, 3000)
    group = np.repeat(np.arange(30), 100)
    made = fit_isotonic(errors, sigma, **FORCE, group=group)
    found = metrics.assess(errors, made(sigma=sigma), made.law, group=group, resamples=50)
    assert set(metrics.scores(errors, sigma, made.law)) < set(found)
    for name in ("rmse", "crps", "spearman", "coverage_90", "nll"):
        assert found[name].low < found[name].value < found[name].high
    assert found["spearman_of_ceiling"].value == pytest.approx(1.0, abs=0.15)
    plot(
        tmp_path / "r.png",
        {"raw": (errors, sigma, ErrorLaw(3)), "calibrated": (errors, made(sigma=sigma), made.law)},
        "eV/A",
    )
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["r.png"]
