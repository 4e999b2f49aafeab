"""Statistics of an uncertainty from few members: how errors scatter about it, when to raise an alarm, what drifts.

A sigma here is the root mean square length of an error: of a scalar (energy) or of a vector (force of an atom).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import linalg, special, stats

from mdplug.errors import InputError


def deviation(members: np.ndarray, vector: bool = False) -> np.ndarray:
    """Standard deviation of K members about their mean, with K - 1 in the denominator.

    Args:
        members: (K, ...) values; with `vector` the last axis holds components and is summed over.

    Returns:
        (...) sigma, in the unit of the values; with `vector` one axis less.

    Raises:
        InputError: fewer than two members.
    """
    if len(members) < 2:
        raise InputError("one member has no spread; an ensemble takes two or more")
    variance = np.var(members, axis=0, ddof=1)
    return np.sqrt(variance.sum(axis=-1) if vector else variance)


@dataclass(frozen=True)
class ErrorLaw:
    """Law of |error| / sigma: width sqrt(F), with F of Fisher's law with (components, degrees) degrees of freedom.

    One component and infinite degrees: the Gaussian; three: Maxwell's law (chi_3). Finite degrees: Student's t, or its
    isotropic vector form. sigma is the root mean square length of the error where width^2 degrees / (degrees - 2) = 1.

    Attributes:
        components: of the error: 1 for a scalar, 3 for a force.
        degrees: of freedom behind sigma; infinite: sigma is known.
        width: of the error over sigma.
    """

    components: int = 1
    degrees: float = math.inf
    width: float = 1.0

    def __post_init__(self) -> None:
        if self.components < 1 or not self.degrees > 0 or not 0 < self.width < math.inf:
            raise InputError(f"{self} is no law; components, degrees and width are positive")

    @classmethod
    def of_members(cls, members: int | None, components: int = 1) -> ErrorLaw:
        """Truth and K members are draws of one Gaussian; the error is that of their mean, sigma is their `deviation`.

        The mean of the members is itself off by sigma / sqrt(K), hence width sqrt(1 + 1/K); sigma rests on
        components (K - 1) squares, hence Student's t (isotropic for vectors). None: sigma is a parameter, not a sample.
        """
        if members is None:
            return cls(components)
        if members < 2:
            raise InputError("one member has no spread; an ensemble takes two or more")
        return cls(components, components * (members - 1.0), math.sqrt(1.0 + 1.0 / members))

    @classmethod
    def heavy(cls, components: int, degrees: float) -> ErrorLaw:
        """Student's t with `degrees` > 2, scaled so that sigma is the root mean square error."""
        return cls(components, degrees, 1.0 if math.isinf(degrees) else math.sqrt((degrees - 2.0) / degrees))

    def quantile(self, level: float | np.ndarray) -> Any:
        """|error| / sigma that is not exceeded with this probability: the half width of an interval, in sigma."""
        p = self.components
        square = stats.chi2.ppf(level, p) / p if math.isinf(self.degrees) else stats.f.ppf(level, p, self.degrees)
        return self.width * np.sqrt(square)

    def cdf(self, ratio: np.ndarray) -> np.ndarray:
        """Probability that |error| / sigma is below `ratio`."""
        square, p = (np.abs(ratio) / self.width) ** 2, self.components
        return stats.chi2.cdf(p * square, p) if math.isinf(self.degrees) else stats.f.cdf(square, p, self.degrees)

    def log_density(self, ratio: np.ndarray) -> np.ndarray:
        """ln of the density of the error (a scalar, or a vector of any direction) in units of sigma, per component."""
        p, v = self.components, self.degrees
        variance = self.width**2 / p
        square = np.asarray(ratio) ** 2 / variance
        if math.isinf(v):
            return -0.5 * (math.log(2 * math.pi * variance) + square / p)
        norm = special.gammaln((v + p) / 2) - special.gammaln(v / 2) - p / 2 * math.log(v * math.pi * variance)
        return (norm - (v + p) / 2 * np.log1p(square / v)) / p

    def draw(self, random: np.random.Generator, size: int | tuple[int, ...]) -> np.ndarray:
        """Samples of |error| / sigma."""
        square = random.chisquare(self.components, size) / self.components
        if not math.isinf(self.degrees):
            square = square * self.degrees / random.chisquare(self.degrees, size)
        return self.width * np.sqrt(square)


def half_width(members: int | None, level: float, components: int = 1) -> float:
    """Half width of an interval about the mean of K members, in units of their `deviation`.

    One component: t_{K-1}((1 + level)/2) sqrt(1 + 1/K); vectors: the radius sqrt((1 + 1/K) F_{p, p(K-1)}(level)).
    """
    if not 0 < level < 1:
        raise InputError(f"a level lies between 0 and 1, not {level}")
    return float(ErrorLaw.of_members(members, components).quantile(level))


# --- alarms


def degrees_of_freedom(members: int | None, components: float = 3, probes: int | None = None) -> float:
    """nu such that nu sigma_estimated^2 / sigma^2 follows the chi-square law with nu degrees.

    All members: nu = p (K - 1), for p isotropic components. With m probes of `probe_weights`: G_a = sum_k q_ak F_k; the
    rows q_a are orthonormal and sum to zero, so the G_a are m independent Gaussian vectors with the covariance of one
    member, and sigma^2 = sum_a |G_a|^2 / m has nu = p min(m, K - 1): exact, for any draw of the weights, shared by all
    atoms or not. (Random signs instead: the G_a overlap, and to second order
    1/nu = [1/(K-1) + (1/m) (1 + (p+1)/(K-1) - (p+2)/K)] / p, with a heavier tail that atoms share.)
    Anisotropic scatter with covariance C: take p = (tr C)^2 / tr C^2 (Satterthwaite), between 1 and 3.
    """
    if members is not None and members < 2:
        raise InputError("one member has no spread; an ensemble takes two or more")
    if probes is not None and probes < 1:
        raise InputError(f"probes={probes} measures nothing; take one or more")
    return components * min(math.inf if members is None else members - 1, math.inf if probes is None else probes)


def probe_weights(members: int, probes: int, random: np.random.Generator) -> np.ndarray:
    """(m, K) random orthonormal rows, each summing to zero, m = min(probes, K - 1).

    mean_a |sum_k w_ak F_k|^2 estimates the squared `deviation` of the member forces F_k without bias from m
    vector-Jacobian products instead of K; with m = K - 1 it is the squared deviation itself.
    """
    m = int(degrees_of_freedom(members, 1, probes))
    return np.linalg.qr(random.normal(size=(members - 1, m)))[0].T @ linalg.helmert(members)


def trigger_factor(
    members: int | None, comparisons: float, false_alarm: float, components: float = 3, probes: int | None = None
) -> float:
    """By how much max_i sigma_i may pass a limit before it means that some true sigma does.

    A sigma from few members scatters, and the largest of N scatters upwards. With t = factor x limit,
    P(max_i sigma_i > t) = 1 - F_nu(nu factor^2)^N = `false_alarm` when every true sigma equals the limit, F_nu the
    chi-square law and nu from `degrees_of_freedom`. Below the limit, and for correlated atoms (Gaussian correlation
    inequality, T. Royen 2014), alarms are rarer; a smaller, effective N may then be given. Where a monotone calibration
    is applied, divide sigma by the factor before it and compare the result with the limit.

    Args:
        members: K; None: sigma is a parameter without sampling noise.
        comparisons: N, atoms; times the number of checks for a probability per run. Real and >= 1.
        false_alarm: probability of at least one alarm.
        components: 1 for a scalar, 3 for a force (see `degrees_of_freedom`).
        probes: m of `probe_weights`; None: all members were differentiated.

    Raises:
        InputError: an argument out of range.
    """
    if not 0 < false_alarm < 1 or not 1 <= comparisons < math.inf:
        raise InputError(f"a false alarm of {false_alarm} for {comparisons} comparisons; give 0 < it < 1 and N >= 1")
    nu = degrees_of_freedom(members, components, probes)
    if math.isinf(nu):
        return 1.0
    each = -math.expm1(math.log1p(-false_alarm) / comparisons)
    return math.sqrt(float(stats.chi2.isf(each, nu)) / nu)


def false_alarm_of(
    factor: float, members: int | None, comparisons: float, components: float = 3, probes: int | None = None
) -> float:
    """Probability of an alarm at factor x limit when every true sigma equals the limit: inverse of `trigger_factor`."""
    nu = degrees_of_freedom(members, components, probes)
    if math.isinf(nu):
        return float(factor < 1.0)
    return -math.expm1(comparisons * math.log1p(-float(stats.chi2.sf(nu * factor**2, nu))))


# --- conformal


def conformal_quantile(scores: np.ndarray, level: float) -> float:
    """The ceil((n + 1) level)-th smallest of n exchangeable scores; infinite where n < 1 / (1 - level) - 1.

    A new score is not above it with a probability of at least `level` (Vovk et al., 2005).
    """
    n = len(scores)
    rank = max(1, math.ceil((n + 1) * level - 1e-9))  # 1e-9: 0.9 x 10 is 9
    return math.inf if rank > n else float(np.partition(np.asarray(scores), rank - 1)[rank - 1])


class AdaptiveConformal:
    """A factor on sigma whose misses come at the asked rate in the long run, whatever drifts.

    After each label alpha <- alpha + step (1 - level - missed), and the factor is the conformal quantile at 1 - alpha
    of the last `window` scores |error| / sigma: infinite for alpha <= 0, nothing for alpha >= 1. For any sequence
    |misses / T - (1 - level)| <= (max(level, 1 - level) + step) / (step T). I. Gibbs, E. Candes, NeurIPS 2021.
    """

    def __init__(self, level: float, scores: Iterable[float] = (), step: float = 0.02, window: int = 1000):
        if not 0 < level < 1 or not 0 < step < 1 or window < 1:
            raise InputError(
                f"level={level}, step={step}, window={window}; the first two lie between 0 and 1, window > 0"
            )
        self.level, self.step, self.window = level, step, window
        self.alpha = 1.0 - level
        self.scores = [float(s) for s in scores][-window:]
        self.seen = self.missed = 0

    @property
    def factor(self) -> float:
        """Half width of the next interval in units of sigma; may be infinite."""
        if self.alpha <= 0:
            return math.inf
        return 0.0 if self.alpha >= 1 else conformal_quantile(np.array(self.scores), 1.0 - self.alpha)

    def update(self, score: float) -> bool:
        """Take the score of a new label; returns whether the interval had held it. NaN is a miss, and not kept."""
        held = self.alpha < 1 and bool(score <= self.factor)
        self.seen, self.missed = self.seen + 1, self.missed + (not held)
        self.alpha += self.step * (1.0 - self.level - (not held))
        if math.isfinite(score):
            self.scores = [*self.scores, float(score)][-self.window :]
        return held

    def state(self) -> dict[str, Any]:
        """All there is to it, as plain JSON."""
        return {**vars(self), "scores": list(self.scores)}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> AdaptiveConformal:
        """From `state`.

        Raises:
            InputError: a key is missing or unknown.
        """
        made = cls(state.get("level", 0.9))
        if set(state) != set(vars(made)):
            raise InputError(f"no state of an adaptive interval: its keys are {sorted(vars(made))}")
        vars(made).update(state)
        made.scores = list(state["scores"])
        return made
