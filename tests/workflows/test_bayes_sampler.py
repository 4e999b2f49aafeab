"""Samplers against densities known in closed form, each with a control; diagnostics against known values."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

from mdplug.errors import InputError
from mdplug.workflows import bayes_report as report
from mdplug.workflows.bayes_sampler import Chain, SamplerConfig, hamiltonian, langevin

REPLICAS = 4000


def moments(gradient, sampler, step, temperature=1.0, root=1.0, steps=400, burn_in=400, metric=None, divergence=None):
    """Mean and variance of many independent one-dimensional walkers, with their standard errors."""
    generator = torch.Generator().manual_seed(7)
    x, v = torch.zeros(REPLICAS, dtype=torch.float64), torch.zeros(REPLICAS, dtype=torch.float64)
    roots = torch.full_like(x, root)
    first, second = torch.zeros_like(x), torch.zeros_like(x)
    for k in range(burn_in + steps):
        noise = torch.randn(REPLICAS, generator=generator, dtype=torch.float64)
        if sampler == "sgld":
            before = x
            roots = metric(x).sqrt() if metric else roots
            x = langevin(x, gradient(x), roots, step, temperature, noise)
            if divergence:
                x = x + step * temperature * divergence(before)
        else:
            x, v = hamiltonian(x, v, gradient(x), roots, step, 0.3, temperature, noise)
        if k >= burn_in:
            first += x / steps
            second += x.square() / steps
    error = float(second.std()) / math.sqrt(REPLICAS)  # walkers are independent
    return float(first.mean()), float(first.std()) / math.sqrt(REPLICAS), float(second.mean()), error


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize(("sampler", "step"), [("sgld", 0.02), ("sghmc", 0.1), ("sghmc", 0.9)])
def test_a_gaussian_has_the_right_mean_and_variance_at_any_temperature(sampler, step, temperature):
    curvature, centre, root = 2.5, 0.0, 0.7
    stable = step / (curvature * root**2) if sampler == "sgld" else step / (math.sqrt(curvature) * root)
    mean, mean_error, square, error = moments(
        lambda x: curvature * (x - centre), sampler, 2 * stable, temperature, root, steps=600
    )
    wanted = temperature / curvature / (1 - step if sampler == "sgld" else 1)
    assert abs(mean) < 4 * mean_error
    assert abs(square - wanted) < 4 * error
    assert error < 0.015 * wanted


def test_control_large_steps_of_langevin_heat_a_gaussian():
    _, _, square, error = moments(lambda x: x, "sgld", 0.8)
    assert abs(square - 1 / (1 - 0.4)) < 4 * error
    assert square > 1.5


def test_a_wavy_well_is_right_at_small_steps_and_control_wrong_at_large_ones():
    def density(x):
        return math.exp(-0.5 * x * x - math.cos(2 * x))

    wanted = quad(lambda x: x * x * density(x), -9, 9)[0] / quad(density, -9, 9)[0]
    found = {}
    for sampler, step in (("sgld", 0.01), ("sgld", 0.3), ("sghmc", 0.15), ("sghmc", 0.85)):
        _, _, square, error = moments(lambda x: x - 2 * (2 * x).sin(), sampler, step, steps=800, burn_in=600)
        found[sampler, step] = (square - wanted) / error
    assert abs(found["sgld", 0.01]) < 4
    assert abs(found["sghmc", 0.15]) < 4
    assert abs(found["sgld", 0.3]) > 10
    assert abs(found["sghmc", 0.85]) > 10


def test_what_a_preconditioner_that_follows_the_position_does_and_that_a_frozen_one_does_not():
    """Without div G the density is exp(-U)/G; with it, or with G held, it is exp(-U)."""
    floor, soft = 0.3, 0.1

    def metric(x):  # of RMSprop with no memory: 1/(floor + |gradient|), smoothed at 0
        return 1 / (floor + (x.square() + soft**2).sqrt())

    def divergence(x):
        return -metric(x).square() * x / (x.square() + soft**2).sqrt()

    def density(x, power):
        return math.exp(-0.5 * x * x) * (floor + math.sqrt(x * x + soft**2)) ** power

    wrong = quad(lambda x: x * x * density(x, 1), -9, 9)[0] / quad(lambda x: density(x, 1), -9, 9)[0]
    assert wrong > 1.3
    options = {"sampler": "sgld", "step": 0.01, "steps": 2000, "burn_in": 1000}
    _, _, bare, error = moments(lambda x: x, metric=metric, **options)
    assert abs(bare - wrong) < 4 * error + 0.01 * wrong
    assert bare - 1 > 10 * error
    _, _, corrected, error = moments(lambda x: x, metric=metric, divergence=divergence, **options)
    assert abs(corrected - 1) < 4 * error + 0.02
    fixed = float(metric(torch.tensor(0.8, dtype=torch.float64))) ** 0.5
    _, _, frozen, error = moments(lambda x: x, root=fixed, **options)
    assert abs(frozen - 1) < 4 * error + 0.01


class Regression:
    """y = X w + noise of unit variance, prior N(0, 1): the posterior is known. Several copies are sampled in one."""

    displacement = 1e-4

    def __init__(self, n=60, copies=15, batch=60, seed=0):
        rng = np.random.default_rng(seed)
        self.x = torch.tensor(rng.normal(size=(n, 4)) @ np.diag(2.0 ** np.arange(4)))
        self.x[:, 1] += 0.5 * self.x[:, 0]
        self.y = self.x @ torch.tensor(rng.normal(size=4)) + torch.tensor(rng.normal(size=n))
        self.n, self.batch, self.n_weights = n, batch, 4 * copies
        self.covariance = torch.linalg.inv(self.x.t() @ self.x + torch.eye(4, dtype=torch.float64))
        self.mean = self.covariance @ (self.x.t() @ self.y)

    def plan(self, seed):
        order = np.arange(self.n) if seed is None else np.random.default_rng(seed).permutation(self.n)
        return [part.tolist() for part in np.array_split(order, max(1, self.n // self.batch))]

    def likelihood(self, position, chosen):
        residual = position.view(-1, 4) @ self.x[chosen].t() - self.y[chosen]
        return 0.5 * float(residual.square().sum()), (residual @ self.x[chosen]).reshape(-1)

    def prior(self, position):
        return 0.5 * float(position.square().sum()), position.clone()

    def prior_curvature(self):
        return torch.ones(self.n_weights, dtype=torch.float64)


def options_of(**given):
    most = {"approach_steps": 300, "learning_rate": 0.03, "burn_in_steps": 200, "samples": 600, "thinning": 4}
    return SamplerConfig(**(most | {"full_batch": True} | given))


def walk(target, start=None, seed=1, **given):
    """(n, P) samples."""
    config = options_of(**given)
    start = torch.zeros(target.n_weights, dtype=torch.float64) if start is None else start
    chain = Chain(target, config, seed, start, lambda position: position.clone())
    while not chain.done:
        chain.advance()
    return torch.stack(chain.state.seen), chain


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "sghmc"},
        {"sampler": "sgld", "step": 0.06},
        {"sampler": "sghmc", "preconditioner": "rmsprop", "samples": 1500},
        {
            "sampler": "sghmc",
            "temperature": 0.05,
            "copies": 40,
            "burn_in_steps": 500,
        },  # too many numbers for the whole Hessian
        {"sampler": "sghmc", "cycles": 20, "step": 0.5},
    ],
)
def test_linear_regression_has_its_posterior(options):
    target = Regression(copies=options.pop("copies", 15))
    samples, chain = walk(target, **options)
    assert chain.state.root.dim() == (1 if target.n_weights > 64 or "preconditioner" in options else 2)
    samples = samples.view(-1, 4)
    wanted = target.covariance * options.get("temperature", 1.0)
    sd = wanted.diagonal().sqrt()
    assert ((samples.mean(0) - target.mean).abs() / sd).max() < 0.2
    found = torch.cov(samples.t())
    assert ((found - wanted) / torch.outer(sd, sd)).abs().max() < 0.1


def test_batches_count_for_all_data_and_control_without_that_factor():
    target = Regression(batch=6, copies=100)
    samples, chain = walk(target, full_batch=False, heat_max=0.1, burn_in_steps=400, samples=1000)
    assert 0 < chain.heat() <= 0.1 * (1 + 1e-9)
    ratio = torch.cov(samples.view(-1, 4).t()).diagonal() / target.covariance.diagonal()
    assert (ratio - 1).abs().max() < 0.15

    class Forgetful(Chain):
        def _batch(self):
            batches, _ = super()._batch()
            return batches, 1.0

    config = chain.config
    wrong = Forgetful(target, config, 1, torch.zeros(400, dtype=torch.float64), lambda position: position.clone())
    while not wrong.done:
        wrong.advance()
    ratio = torch.cov(torch.stack(wrong.state.seen).view(-1, 4).t()).diagonal() / target.covariance.diagonal()
    assert ratio.min() > 3  # ten batches: about ten times too wide


def test_a_pass_over_the_data_adds_up_to_the_exact_gradient():
    target = Regression(n=50, batch=7, copies=1)  # batches of unequal size
    position = torch.ones(4, dtype=torch.float64)
    chain = Chain(target, SamplerConfig(approach_steps=0), 1, position, lambda x: x)
    total, n = torch.zeros(4, dtype=torch.float64), len(target.plan(0))
    for step in range(2 * n):
        chain.state.step = step
        batches, factor = chain._batch()
        total += chain.gradient(position, batches, factor)[1] / (2 * n)
    exact = target.likelihood(position, list(range(50)))[1] + position
    assert torch.allclose(total, exact, atol=1e-9)


class DoubleWell(Regression):
    """U = height (x^2 - 1)^2."""

    def __init__(self, height):
        self.height, self.n_weights, self.n, self.batch = height, 1, 1, 1

    def likelihood(self, position, chosen):
        x = position
        return float(self.height * (x.square() - 1).square().sum()), 4 * self.height * x * (x.square() - 1)

    def prior(self, position):
        return 0.0, torch.zeros_like(position)

    def prior_curvature(self):
        return torch.full((1,), 1e-6, dtype=torch.float64)


@pytest.mark.parametrize(("height", "mixes"), [(1.0, True), (30.0, False)])
def test_chains_in_two_wells_pass_the_gate_only_where_they_cross(height, mixes):
    chains = []
    for k, start in enumerate((-1.0, 1.0, -1.0, 1.0)):
        samples, _ = walk(
            DoubleWell(height), torch.tensor([start], dtype=torch.float64), seed=k, samples=1000, thinning=6, step=0.15
        )
        chains.append(samples.numpy())
    values = np.stack(chains)
    verdict = report.judge(np.concatenate([values, values], axis=2), ["log_posterior", "x"], 1.05, 100)
    assert verdict.converged is mixes
    assert (verdict.rhat < 1.05) is mixes
    if not mixes:
        assert "R-hat is above 1.05" in str(verdict)
        # Each chain for itself looks well: several are needed.
        assert max(row["rhat_of_halves"] for row in verdict.chains) < 1.05


def test_one_chain_or_few_samples_are_no_posterior():
    rng = np.random.default_rng(0)
    one = report.judge(rng.normal(size=(1, 4000, 1)), ["log_posterior"], 1.05, 100)
    assert not one.converged
    assert "one chain" in one.reasons[0]
    few = report.judge(rng.normal(size=(4, 10, 1)), ["log_posterior"], 2.0, 100)
    assert few.reasons == ("fewer than 100 effective samples; raise samples or thinning",)


def test_rhat_of_independent_and_of_displaced_chains():
    rng = np.random.default_rng(1)
    chains = rng.normal(size=(4, 1000))
    assert report.rhat(chains) == pytest.approx(1.0, abs=0.005)
    assert report.rhat(chains + np.array([[0], [0], [1.0], [1.0]])) > 1.1
    assert report.rhat(chains * np.array([[1], [1], [1], [3.0]])) > 1.1  # same place, another width: folded ranks
    drifting = chains + np.linspace(0, 3, 1000)
    assert report.rhat(drifting) > 1.1  # halves
    assert report.rhat(np.exp(30 * chains)) == pytest.approx(report.rhat(chains), abs=0.02)  # ranks: no moments needed
    assert report.plain_rhat(chains) == pytest.approx(1.0, abs=0.005)
    assert report.rhat(np.ones((4, 10))) == 1.0
    assert report.rhat(np.arange(4.0)[:, None].repeat(10, 1)) > 10


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9, -0.4])
def test_effective_samples_of_an_autoregressive_series(phi):
    rng = np.random.default_rng(2)
    c, n = 4, 20000
    noise = rng.normal(size=(c, n)) * math.sqrt(1 - phi**2)
    x = np.empty((c, n))
    x[:, 0] = rng.normal(size=c)
    for t in range(1, n):
        x[:, t] = phi * x[:, t - 1] + noise[:, t]
    wanted = c * n * (1 - phi) / (1 + phi)
    assert report.effective_samples(x) == pytest.approx(wanted, rel=0.1)
    assert report.bulk_samples(x) == pytest.approx(wanted, rel=0.12)


@pytest.mark.parametrize("options", [{}, {"full_batch": False}, {"cycles": 5, "sampler": "sgld"}])
def test_a_chain_that_is_taken_up_again_goes_the_same_way(options):
    target = Regression(batch=6, copies=1)
    given = {"samples": 50, "approach_steps": 30, "burn_in_steps": 40} | options
    whole, _ = walk(target, **given)
    config = options_of(**given)

    def chain():
        return Chain(target, config, 1, torch.zeros(4, dtype=torch.float64), lambda position: position.clone())

    for stop in (11, 30, 45, 133):
        first, second = chain(), chain()
        for _ in range(stop):
            first.advance()
        second.restore(dict(vars(first.state)))
        while not second.done:
            second.advance()
        assert torch.equal(torch.stack(second.state.seen), whole)


def test_cycles_and_thinning_give_the_samples_that_were_asked_for():
    for cycles in (0, 1, 4):
        samples, chain = walk(Regression(), samples=40, thinning=5, cycles=cycles)
        assert len(samples) == 40
        assert chain.state.step == chain.config.total_steps
    with pytest.raises(ValueError, match="multiple of cycles"):
        SamplerConfig(samples=10, cycles=3)


def test_a_chain_that_runs_away_is_named():
    class Wall(Regression):
        def likelihood(self, position, chosen):
            return math.inf, position

    with pytest.raises(InputError, match="not finite at step 0 of the chain with seed 1"):
        walk(Wall())
