"""Intervals that hold both the noise of a simulation and the differences between the members of an ensemble.

The truth is taken as one more draw from what the members were drawn from: a_0 and the K members' a_k are exchangeable,
normal about an unknown mean with an unknown variance. Nothing here knows of an error that all members share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import gammaincinv, ndtr, stdtrit

from mdplug.errors import InputError

NODES = 32, 12  # of Gauss-Legendre over the two unknown variances
MANY = 1e6  # degrees of freedom of an error that is known


@dataclass(frozen=True)
class Intervals:
    """A quantity of an ensemble, or many (...) of them; each interval is value +- half-width.

    Attributes:
        value: (...) mean over the members.
        statistical: (...) half-width from the noise of the simulation alone.
        model: (...) half-width from the differences between members alone, without their noise.
        total: (...) half-width of both: where the truth is, at `level`.
        level: such as 0.9. method: "direct", "cumulant" or "runs".
        members: (K, ...) each member's value.
        statistical_error: (...) standard error of `value`. noise: (...) standard deviation that noise alone puts
            between the members. dof: (...) degrees of freedom of these two.
    """

    value: Any
    statistical: Any
    model: Any
    total: Any
    level: float
    method: str
    members: np.ndarray
    statistical_error: Any
    noise: Any
    dof: Any

    def contains(self, truth: Any) -> Any:
        """(...) whether `truth` is in the total interval."""
        return np.abs(np.asarray(truth) - self.value) <= self.total

    def __str__(self) -> str:
        return (
            f"{self.value:.4g} +- {self.total:.2g} at {100 * self.level:g} % "
            f"(statistical {self.statistical:.2g}, model {self.model:.2g})"
        )


def from_members(
    members: np.ndarray, error: Any, noise: Any, dof: Any, level: float, method: str, careful: bool = False
) -> Intervals:
    """Intervals of a new draw, from K members' values that carry noise.

    With s^2 the variance of the members' values (K - 1), of which noise^2 is noise, the variance of the model is
    max(0, (K - 1) s^2 / chi2(K - 1) - noise^2 nu / chi2(nu)) in the sense of generalised inference (S. Weerahandi,
    J. Am. Stat. Assoc. 88, 899 (1993)), and a new draw lies about the mean with (1 + 1/K) times that, plus error^2
    nu / chi2(nu). Without noise this is Student's t with K - 1 degrees of freedom times s sqrt(1 + 1/K), exactly;
    without differences it is Student's t with nu.

    Args:
        members: (K, ...). error, noise, dof: (...), see `Intervals`.
        level: between 0 and 1.
        careful: leave the noise between the members in the total, which is then never too narrow for it.

    Raises:
        InputError: fewer than two members, or an impossible level.
    """
    count = len(members)
    if count < 2:
        raise InputError(f"{count} member says nothing about differences between members; give two or more")
    if not 0 < level < 1:
        raise InputError(f"level={level:g} is no probability; take such as 0.9")
    shape = members.shape[1:]
    error, noise, dof = (np.broadcast_to(np.asarray(x, float), shape).reshape(-1) for x in (error, noise, dof))
    dof = np.clip(dof, 1.0, MANY)
    between = members.reshape(count, -1).var(axis=0, ddof=1)
    (u, u_weight), (v, v_weight) = (_unit_gauss(n) for n in NODES)
    drawn = (count - 1) / (2 * gammaincinv((count - 1) / 2, u))  # (U,) of (K - 1) / chi2
    factor = dof[:, None] / (2 * gammaincinv(dof[:, None] / 2, v))  # (M, V) of nu / chi2
    spread = between[:, None, None] * drawn[:, None]
    less = np.maximum(spread - (noise[:, None] ** 2 * factor)[:, None, :], 0.0)  # (M, U, V)
    model = (1 + 1 / count) * less
    both = (1 + 1 / count) * (spread if careful else less) + (error[:, None] ** 2 * factor)[:, None, :]
    weight = (u_weight[:, None] * v_weight).ravel()
    return Intervals(
        value=members.mean(axis=0)[()],
        statistical=(stdtrit(dof, 0.5 + level / 2) * error).reshape(shape)[()],
        model=_half_width(model.reshape(len(dof), -1), weight, level).reshape(shape)[()],
        total=_half_width(both.reshape(len(dof), -1), weight, level).reshape(shape)[()],
        level=level,
        method=method,
        members=members,
        statistical_error=error.reshape(shape)[()],
        noise=noise.reshape(shape)[()],
        dof=dof.reshape(shape)[()],
    )


def combine_runs(values: Any, errors: Any, dof: Any = np.inf, level: float = 0.9) -> Intervals:
    """Intervals from independent simulations, one with each member.

    Args:
        values: (K, ...). errors: (K, ...) their standard errors.
        dof: degrees of freedom of each error, such as blocks - 1.
        level: between 0 and 1.

    Raises:
        InputError: fewer than two runs.
    """
    members = np.asarray(values, float)
    square = np.broadcast_to(np.asarray(errors, float), members.shape) ** 2
    each = np.broadcast_to(np.minimum(np.asarray(dof, float), MANY), members.shape)
    mean = square.mean(axis=0)
    # Welch and Satterthwaite: degrees of freedom of a sum of variances.
    together = np.divide(
        square.sum(axis=0) ** 2, (square**2 / each).sum(axis=0), out=np.full_like(mean, MANY), where=mean > 0
    )
    return from_members(members, np.sqrt(mean / max(len(members), 1)), np.sqrt(mean), together, level, "runs")


def _unit_gauss(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on (0, 1), crowded at both ends, where chi2 has its tails."""
    x, weight = np.polynomial.legendre.leggauss(n)
    t = 0.5 * (x + 1)
    return t**2 * (3 - 2 * t), 3 * t * (1 - t) * weight  # weight / 2 * 6 t (1 - t)


def _half_width(variances: np.ndarray, weight: np.ndarray, level: float) -> np.ndarray:
    """(M,) q with P(|x| < q) = level, x normal about 0 with a variance out of (M, J) of the given weights."""
    deviation = np.sqrt(variances)
    high = deviation.max(axis=1, initial=0.0) * 40.0
    low = np.zeros_like(high)
    good = np.isfinite(high)
    deviation = np.where(deviation > 0, deviation, 1e-300)
    for _ in range(50):
        middle = 0.5 * (low + high)
        inside = (2 * ndtr(middle[:, None] / deviation) - 1) @ weight
        low, high = np.where(inside < level, middle, low), np.where(inside < level, high, middle)
    return np.where(good, high, np.nan)
