"""How good an uncertainty is: calibration, sharpness and ranking on labelled data, with intervals over trajectories.

Errors are absolute values of scalars or lengths of vectors; sigma is their root mean square (see `ErrorLaw`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from mdplug.calibration import SMALLEST
from mdplug.errors import InputError
from mdplug.uncertainty_statistics import ErrorLaw
from mdplug.workflows.calibration_fits import checked

LEVELS = (0.5, 0.68, 0.9, 0.95)


@dataclass(frozen=True)
class Value:
    """A metric with a bootstrap interval; low and high are NaN where there is no more than one group."""

    value: float
    low: float
    high: float


def reliability(
    errors: np.ndarray, sigma: np.ndarray, law: ErrorLaw, points: int = 100
) -> tuple[np.ndarray, np.ndarray]:
    """(points + 1,) stated levels from 0 to 1, and the shares of errors inside the intervals of those levels."""
    return _curve(law.cdf(_ratio(errors, sigma)), points)


def _curve(reached: np.ndarray, points: int = 100) -> tuple[np.ndarray, np.ndarray]:
    stated = np.linspace(0.0, 1.0, points + 1)
    observed = np.searchsorted(np.sort(reached), stated, side="right") / len(reached)
    observed[0], observed[-1] = 0.0, 1.0
    return stated, observed


def miscalibration_area(errors: np.ndarray, sigma: np.ndarray, law: ErrorLaw) -> float:
    """Area between the reliability curve and the diagonal: 0 perfect, 0.5 worst (V. Kuleshov et al., ICML 2018)."""
    return _area(law.cdf(_ratio(errors, sigma)))


def _area(reached: np.ndarray) -> float:
    stated, observed = _curve(reached)
    return float(np.abs(observed - stated).sum()) / (len(stated) - 1)  # trapezoids; both ends are zero


def binned(errors: np.ndarray, sigma: np.ndarray, bins: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """(bins,) root mean square sigma, and the root mean square error, in bins of equal counts by sigma."""
    parts = [part for part in np.array_split(np.argsort(sigma, kind="stable"), bins) if len(part)]
    return (
        np.array([math.sqrt(np.mean(sigma[part] ** 2)) for part in parts]),
        np.array([math.sqrt(np.mean(errors[part] ** 2)) for part in parts]),
    )


def ence(errors: np.ndarray, sigma: np.ndarray) -> float:
    """Expected normalised calibration error: mean over bins of |rms sigma - rms error| / rms sigma.

    D. Levi et al., Sensors 22, 5540 (2022).
    Its floor for a perfect sigma is about sqrt(bins / (pi n)) for Gaussian scalars, not zero.
    """
    return _ence(*binned(errors, sigma))


def _ence(stated: np.ndarray, seen: np.ndarray) -> float:
    return float(np.mean(np.abs(stated - seen) / np.maximum(stated, SMALLEST)))


def slope(errors: np.ndarray, sigma: np.ndarray) -> float:
    """Slope of log rms error against log rms sigma over the bins: 1 where sigma says how much larger an error is."""
    return _slope(*binned(errors, sigma))


def _slope(stated: np.ndarray, seen: np.ndarray) -> float:
    x, y = np.log(np.maximum(stated, SMALLEST)), np.log(np.maximum(seen, SMALLEST))
    centred = x - x.mean()
    return float(centred @ y / (centred @ centred)) if np.ptp(x) > 1e-9 else float("nan")


def nll(errors: np.ndarray, sigma: np.ndarray, law: ErrorLaw) -> float:
    """Mean negative log likelihood per component; Gaussian scalar: ln(2 pi sigma^2)/2 + error^2/(2 sigma^2)."""
    return float(_nll_each(errors, sigma, law).mean())


def _nll_each(errors: np.ndarray, sigma: np.ndarray, law: ErrorLaw) -> np.ndarray:
    return np.log(np.maximum(sigma, SMALLEST)) - law.log_density(_ratio(errors, sigma))


def rll(errors: np.ndarray, sigma: np.ndarray, components: int) -> float:
    """Relative log likelihood in %, Gaussian: 0 for the best constant sigma, 100 for sigma = |error| everywhere.

    M. Kellner, M. Ceriotti, Mach. Learn.: Sci. Technol. 5, 035006 (2024). Heavy errors make it very negative.
    """
    law = ErrorLaw(components)
    constant = nll(errors, np.full(len(errors), math.sqrt(np.mean(errors**2))), law)
    oracle = nll(errors, np.maximum(errors, SMALLEST), law)
    return 100.0 * (constant - nll(errors, sigma, law)) / (constant - oracle)


def crps(errors: np.ndarray, sigma: np.ndarray, law: ErrorLaw) -> float:
    """Continuous ranked probability score of one component, in the unit of sigma; the smaller the better.

    Closed forms: T. Gneiting, A. Raftery, JASA 102, 359 (2007); Student's t: A. Jordan et al., J. Stat. Softw. 90
    (2019). For vectors, averaged over all directions of the axis. NaN for a law without a mean.

    Raises:
        InputError: neither 1 nor 3 components.
    """
    return float(_crps_each(errors, sigma, law).mean())


def _crps_each(errors: np.ndarray, sigma: np.ndarray, law: ErrorLaw) -> np.ndarray:
    p, v = law.components, law.degrees
    scale = np.maximum(sigma, SMALLEST) * law.width / math.sqrt(p)
    if p not in (1, 3):
        raise InputError(f"CRPS of an error with {p} components; know those with 1 and 3")
    nodes, weights = np.polynomial.legendre.leggauss(24) if p == 3 else (np.ones(1), np.full(1, 2.0))
    total = np.zeros(len(errors))
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):  # u uniform in (0, 1) for a random direction
        z = errors * node / scale
        if math.isinf(v):
            one = (
                z * special.erf(z / math.sqrt(2)) + math.sqrt(2 / math.pi) * np.exp(-z * z / 2) - 1 / math.sqrt(math.pi)
            )
        elif v <= 1:
            return np.full(len(errors), np.nan)
        else:
            spread = 2 * math.sqrt(v) / (v - 1) * special.beta(0.5, v - 0.5) / special.beta(0.5, v / 2) ** 2
            one = z * (2 * stats.t.cdf(z, v) - 1) + 2 * stats.t.pdf(z, v) * (v + z * z) / (v - 1) - spread
        total += weight * one
    return total * scale


def coverage(errors: np.ndarray, sigma: np.ndarray, factor: float) -> tuple[float, float]:
    """Share of errors inside factor x sigma, and the mean half width factor x sigma, in the unit of sigma."""
    if math.isinf(factor):
        return 1.0, math.inf
    return float(np.mean(errors <= factor * sigma)), factor * float(np.mean(sigma))


def spearman(errors: np.ndarray, sigma: np.ndarray) -> float:
    """Rank correlation of sigma and |error|; NaN where one of them is constant."""
    a, b = stats.rankdata(errors), stats.rankdata(sigma)
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else float("nan")


def spearman_ceiling(sigma: np.ndarray, law: ErrorLaw, repeats: int = 20, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of `spearman` where errors are drawn from these very sigmas: what a perfect one gets.

    Even a perfect sigma ranks single errors badly, and a nearly constant one not at all.
    """
    random = np.random.default_rng(seed)
    drawn = [spearman(law.draw(random, len(sigma)) * sigma, sigma) for _ in range(repeats)]
    return float(np.mean(drawn)), float(np.std(drawn, ddof=1))


def auroc(score: np.ndarray, positive: np.ndarray) -> float:
    """Probability that a positive has a higher score than a negative (ties count half); NaN without one of either."""
    p = np.asarray(positive, dtype=bool)
    n_positive, n_negative = int(p.sum()), int((~p).sum())
    if not n_positive or not n_negative:
        return float("nan")
    ranks = float(stats.rankdata(score)[p].sum())
    return (ranks - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative)


def outlier_recall(errors: np.ndarray, sigma: np.ndarray, outliers: int = 25, pool: int = 1000) -> float:
    """Share of the largest `outliers` errors that are among the `pool` largest sigmas; chance gives pool / n."""
    worst = np.argsort(-errors, kind="stable")[:outliers]
    chosen = np.argsort(-sigma, kind="stable")[:pool]
    return float(np.isin(worst, chosen).mean())


def bootstrap(
    function: Callable[..., np.ndarray | list[float] | float],
    arrays: tuple[np.ndarray, ...],
    group: np.ndarray,
    resamples: int = 200,
    level: float = 0.9,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Interval of function(*arrays) from resampled groups, which are taken as independent.

    Percentiles of the resamples, moved by value - mean of the resamples: what is made of absolute values (an area, a
    calibration error) grows by resampling alone.

    Args:
        arrays: (n, ...) each. group: (n,) ints, the trajectory. Few groups (< 10) give intervals that are too narrow.

    Returns:
        low and high, of the shape that the function gives; NaN for a single group.
    """
    random = np.random.default_rng(seed)
    value = np.asarray(function(*arrays), dtype=float)
    index = np.unique(group, return_inverse=True)[1]
    members = np.split(np.argsort(index, kind="stable"), np.cumsum(np.bincount(index))[:-1])
    if len(members) < 2:
        return np.full_like(value, np.nan), np.full_like(value, np.nan)
    drawn = []
    for _ in range(resamples):
        chosen = np.concatenate([members[k] for k in random.integers(len(members), size=len(members))])
        drawn.append(function(*(a[chosen] for a in arrays)))
    edges = [(1 - level) / 2, (1 + level) / 2]
    values = np.array(drawn, dtype=float)
    with np.errstate(invalid="ignore"):
        low, high = np.quantile(values, edges, axis=0) - values.mean(axis=0) + value
    return low, high


def scores(
    errors: np.ndarray, sigma: np.ndarray, law: ErrorLaw, outlier_error: float | None = None
) -> dict[str, float]:
    """All metrics that are one number; half widths, rmse and CRPS in the unit of sigma.

    Args:
        errors: (n,) |error|. sigma: (n,), in the same unit.
        law: of |error| / sigma that is stated: `calibration.law`, or `ErrorLaw.of_members(K, p)` for a raw sigma.
        outlier_error: an error above it is to be told from the others by sigma ("auroc"); None: 3 x rms error.
    """
    return _scores(law, outlier_error, errors, sigma, *_each(errors, sigma, law))


def _each(errors: np.ndarray, sigma: np.ndarray, law: ErrorLaw) -> tuple[np.ndarray, ...]:
    """What costs: computed once for each value, and not in every resample."""
    reached = law.cdf(_ratio(errors, sigma))
    return reached, _nll_each(errors, sigma, law), _crps_each(errors, sigma, law)


def _scores(
    law: ErrorLaw, outlier_error: float | None, errors: np.ndarray, sigma: np.ndarray, *each: np.ndarray
) -> dict[str, float]:
    reached, nll_each, crps_each = each
    bins = binned(errors, sigma)
    rmse = math.sqrt(float(np.mean(errors**2)))
    made = {
        "rmse": rmse,
        "rms_sigma": math.sqrt(float(np.mean(sigma**2))),
        "miscalibration_area": _area(reached),
        "ence": _ence(*bins),
        "nll": float(nll_each.mean()),
        "rll_percent": rll(errors, sigma, law.components),
        "crps": float(crps_each.mean()),
        "spearman": spearman(errors, sigma),
        "auroc": auroc(sigma, errors > (3.0 * rmse if outlier_error is None else outlier_error)),
        "outlier_recall": outlier_recall(errors, sigma),
        "slope": _slope(*bins),
    }
    for level in LEVELS:
        name = f"{100 * level:g}"
        made[f"coverage_{name}"], made[f"half_width_{name}"] = coverage(errors, sigma, float(law.quantile(level)))
    return made


def assess(
    errors: np.ndarray,
    sigma: np.ndarray,
    law: ErrorLaw,
    *,
    group: np.ndarray | None = None,
    outlier_error: float | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> dict[str, Value]:
    """`scores`, each with a 90 % bootstrap interval over groups, and the ceiling of the rank correlation.

    "spearman_ceiling" has its mean -+ standard deviation over simulations as the interval;
    "spearman_of_ceiling" is the ratio of the two, with the interval of the correlation alone.

    Args:
        errors, sigma, law, outlier_error: as for `scores`. group: (n,) ints, the trajectory; None: all independent.
        resamples: 0: no intervals.

    Raises:
        InputError: see `calibration_fits.checked`.
    """
    e, s, g = checked(errors, sigma, group)
    columns = (e, s, *_each(e, s, law))
    central = _scores(law, outlier_error, *columns)
    limit = 3.0 * central["rmse"] if outlier_error is None else outlier_error
    low = high = np.full(len(central), np.nan)
    if resamples:
        low, high = bootstrap(lambda *c: list(_scores(law, limit, *c).values()), columns, g, resamples, seed=seed)
    made = {name: Value(v, float(low[k]), float(high[k])) for k, (name, v) in enumerate(central.items())}
    ceiling, sd = spearman_ceiling(s, law, seed=seed)
    made["spearman_ceiling"] = Value(ceiling, ceiling - sd, ceiling + sd)
    rank = made["spearman"]
    made["spearman_of_ceiling"] = Value(rank.value / ceiling, rank.low / ceiling, rank.high / ceiling)
    return made


def _ratio(errors: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    return errors / np.maximum(sigma, SMALLEST)
