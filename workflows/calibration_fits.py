"""Maps from a raw sigma to the size of the error, fitted on labelled data: scale, isotonic, environment."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from scipy import optimize

from mdplug.calibration import SMALLEST, Calibration, Term
from mdplug.errors import InputError
from mdplug.uncertainty_statistics import ErrorLaw

FEWEST = 20  # values below which no map is fitted
PER_BIN = 30  # values behind one knot of a table
FLOORS = (0.03, 0.1, 0.3, 1.0, 3.0)  # of |F|, in its median; the likeliest is taken


def checked(
    errors: np.ndarray, sigma: np.ndarray, group: np.ndarray | None, fewest: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(n,) |error|, sigma and group as arrays; without groups every value is one of its own.

    Raises:
        InputError: different lengths, too few values, not finite, or a sigma that is negative or nowhere positive.
    """
    e, s = np.abs(np.asarray(errors, dtype=float)), np.asarray(sigma, dtype=float)
    g = np.arange(len(e)) if group is None else np.asarray(group)
    if e.ndim != 1 or e.shape != s.shape or e.shape != g.shape:
        raise InputError(f"errors {e.shape}, sigma {s.shape} and group {g.shape} must be of one length")
    if len(e) < fewest:
        raise InputError(f"{len(e)} labelled values are too few for a calibration; give {fewest} or more")
    for name, values in (("errors", e), ("sigma", s)):
        if not np.isfinite(values).all():
            raise InputError(f"{name} holds values that are not finite; leave those frames out")
    if (s < 0).any() or not (s > 0).any():
        raise InputError("sigma must not be negative, nor zero everywhere (are all members the same?)")
    return e, s, g


def effective_size(values: np.ndarray, group: np.ndarray) -> float:
    """How many independent values the (n,) correlated ones are worth for their mean, between 1 and n.

    n_eff = variance of one value / variance of the mean, the latter from the sums over groups, which are taken as
    independent (the sandwich estimator; L. Kish's design effect is n / n_eff).
    """
    n = len(values)
    centred = values - np.mean(values)
    index = np.unique(group, return_inverse=True)[1]
    groups = int(index.max()) + 1
    if groups < 2:
        return 1.0
    sums = np.bincount(index, weights=centred)
    of_mean = float(sums @ sums) / n**2 * groups / (groups - 1)
    of_one = float(centred @ centred) / (n - 1)
    return float(np.clip(of_one / of_mean, 1.0, n)) if of_mean > 0 else float(n)


def fit_tail(ratio: np.ndarray, components: int) -> ErrorLaw:
    """Law of |error| / sigma with root mean square 1: Student's t of the likeliest degrees; Gaussian above 200."""

    def loss(log_excess: float) -> float:
        return -float(ErrorLaw.heavy(components, 2.0 + math.exp(log_excess)).log_density(ratio).mean())

    best = optimize.minimize_scalar(loss, bounds=(math.log(0.05), math.log(1e3)), method="bounded")
    degrees = 2.0 + math.exp(float(best.x))
    return ErrorLaw.heavy(components, math.inf if degrees > 200 else degrees)


def _facts(errors: np.ndarray, calibrated: np.ndarray, group: np.ndarray, **more: Any) -> dict[str, Any]:
    square = (errors / np.maximum(calibrated, SMALLEST)) ** 2
    n_effective = effective_size(square, group)
    # d(alpha)/alpha = d(mean square)/2
    error = float(square.std() / (2 * math.sqrt(n_effective) * square.mean()))
    counts = {"n": len(errors), "groups": len(np.unique(group)), "n_effective": n_effective}
    return {**counts, "relative_error_of_scale": error, **more}


def fit_scale(
    errors: np.ndarray,
    sigma: np.ndarray,
    *,
    components: int,
    quantity: str,
    group: np.ndarray | None = None,
    law: ErrorLaw | None = None,
) -> Calibration:
    """sigma calibrated = alpha sigma, with the likeliest alpha.

    Args:
        errors: (n,) errors, or lengths of errors of vectors. sigma: (n,) in the same unit.
        components: of the error: 1, or 3 for forces.
        quantity: name and unit, kept in the record.
        group: (n,) ints, the trajectory (or block) of each value, for the effective size; None: all independent.
        law: of |error| / sigma if sigma is right, as `ErrorLaw.of_members(K, components)`. None: Gaussian, for which
            alpha^2 = mean (error / sigma)^2, and the tail of the law is then fitted.

    Raises:
        InputError: see `checked`.
    """
    e, s, g = checked(errors, sigma, group, FEWEST)
    ratio = e / np.maximum(s, SMALLEST)
    if law is None:
        log_alpha = 0.5 * math.log(max(float(np.mean(ratio**2)), SMALLEST))
        kept = fit_tail(ratio / math.exp(log_alpha), components)
    else:
        kept = given = law
        middle = math.log(max(float(np.median(ratio)), SMALLEST))

        def loss(log_alpha: float) -> float:
            return log_alpha - float(given.log_density(ratio / math.exp(log_alpha)).mean())

        log_alpha = float(optimize.minimize_scalar(loss, bounds=(middle - 7, middle + 7), method="bounded").x)
    alpha = math.exp(log_alpha)
    facts = _facts(e, alpha * s, g, alpha=alpha)
    return Calibration("scale", quantity, (Term("sigma", 1.0),), offset=log_alpha, law=kept, facts=facts)


def isotonic_table(errors: np.ndarray, logs: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Knots (log sigma) and values (log root mean square error) of a table that does not fall.

    Bins of equal counts, finer towards the largest sigma, each of `PER_BIN` values at least; their mean squares are
    made monotone by pooling adjacent violators.

    Args:
        errors: (n,) |error|. logs: (n,) log sigma.
    """
    order = np.argsort(logs, kind="stable")
    n = len(order)
    counts = np.unique((n * np.r_[np.linspace(0, 0.95, 20), 0.975, 0.99, 0.995, 0.998, 0.999]).astype(int))
    edges = [0]
    for edge in counts[1:]:
        if edge - edges[-1] >= PER_BIN and n - edge >= PER_BIN:
            edges.append(int(edge))
    starts = np.array(edges)
    sizes = np.diff([*edges, n])
    x = np.add.reduceat(logs[order], starts) / sizes
    squares = np.add.reduceat(errors[order] ** 2, starts) / sizes
    y = 0.5 * np.log(np.maximum(optimize.isotonic_regression(squares, weights=sizes).x, SMALLEST**2))
    distinct = np.r_[True, np.diff(x) > 1e-9]  # many equal sigmas make equal knots
    return tuple(map(float, x[distinct])), tuple(map(float, y[distinct]))


def fit_isotonic(
    errors: np.ndarray, sigma: np.ndarray, *, components: int, quantity: str, group: np.ndarray | None = None
) -> Calibration:
    """sigma calibrated = root mean square error at that sigma, not falling with it; arguments as for `fit_scale`."""
    e, s, g = checked(errors, sigma, group, FEWEST)
    knots, values = isotonic_table(e, np.log(np.maximum(s, SMALLEST)))
    made = Calibration("isotonic", quantity, (Term("sigma", 1.0),), knots=knots, values=values)
    calibrated = made(sigma=s)
    law = fit_tail(e / calibrated, components)
    return replace(made, law=law, facts=_facts(e, calibrated, g, knots=len(knots)))


def fit_environment(
    errors: np.ndarray,
    sigma: np.ndarray,
    *,
    components: int,
    quantity: str,
    group: np.ndarray | None = None,
    element: np.ndarray | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    ridge: float = 1.0,
) -> Calibration:
    """log sigma calibrated is linear in log sigma, the logs of `extra` and the element; then isotonic on top.

    The likeliest coefficients of a Gaussian error (of chi_3 for the length of a force error): minimise
    n_eff mean[eta + error^2 exp(-2 eta) / 2] + ridge |w|^2 / 2 over eta = b + w x, x the logs in units of their
    standard deviations: convex, so that there is one answer. The powers of sigma and of `extra` are not negative, so
    that the calibrated sigma never falls as an atom goes further from what is known. "force" (|F|) gets a floor, since
    a small force is no small error: the likeliest of `FLOORS` medians.

    Args:
        errors, sigma, components, quantity, group: as for `fit_scale`.
        element: (n,) atomic numbers; None: one offset for all.
        extra: further (n,) columns that are not negative, as {"distance": feature distance, "force": |F| in eV/A}.
        ridge: strength of the pull of the coefficients to zero; that of log sigma is pulled to one.

    Raises:
        InputError: see `checked`; a column of another length or with negative values.
    """
    e, s, g = checked(errors, sigma, group, FEWEST)
    columns: dict[str, np.ndarray] = {"sigma": s}
    for name, given in (extra or {}).items():
        columns[name] = checked(e, given, None)[1]
    kinds = [] if element is None else [int(z) for z in np.unique(element)]
    hot = np.zeros((len(e), 0)) if element is None else (np.asarray(element)[:, None] == kinds).astype(float)
    n_effective = effective_size((e / math.sqrt(max(float(np.mean(e**2)), SMALLEST))) ** 2, g)

    candidates: list[tuple[float, tuple[Term, ...], float, np.ndarray]] = []
    for floor in FLOORS if "force" in columns else FLOORS[:1]:
        floors = {n: floor * float(np.median(c)) + SMALLEST if n == "force" else 0.0 for n, c in columns.items()}
        logs = np.stack([np.log(np.maximum(c + floors[n], SMALLEST)) for n, c in columns.items()], axis=1)
        loss, powers, offset, offsets = _linear(e, logs, hot, n_effective, ridge)
        terms = tuple(
            Term(n, float(p), floors[n]) for n, p in zip(columns, powers, strict=True) if p > 0 or n == "sigma"
        )
        candidates.append((loss, terms, offset, offsets))
    _, terms, offset, offsets = min(candidates, key=lambda one: one[0])
    elements = dict(zip(kinds, map(float, offsets), strict=True))
    linear = Calibration("environment", quantity, terms, offset, elements)
    number = {} if element is None else {"number": np.asarray(element)}
    first = linear(**columns, **number)
    knots, values = isotonic_table(e, np.log(np.maximum(first, SMALLEST)))
    made = replace(linear, knots=knots, values=values)
    calibrated = made(**columns, **number)
    return replace(made, law=fit_tail(e / calibrated, components), facts=_facts(e, calibrated, g, knots=len(knots)))


def _linear(
    errors: np.ndarray, logs: np.ndarray, hot: np.ndarray, n_effective: float, ridge: float
) -> tuple[float, np.ndarray, float, np.ndarray]:
    """Loss, powers of the (n, C) columns, offset, offsets of the (n, Z) elements; prior: the first column to the 1."""
    mean, scale = logs.mean(axis=0), np.maximum(logs.std(axis=0), 1e-6)
    x = np.concatenate([(logs - mean) / scale, hot, np.ones((len(logs), 1))], axis=1)
    prior = np.zeros(x.shape[1])
    prior[0] = scale[0]  # a power of one, in units of the standard deviation
    pull = np.full(len(prior), ridge)
    pull[-1] = 0.0
    squares = errors**2

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        eta = x @ w
        part = 0.5 * squares * np.exp(-2.0 * np.clip(eta, -50, 50))
        slope = n_effective * (x.T @ (1.0 - 2.0 * part)) / len(x) + pull * (w - prior)
        return n_effective * float((eta + part).mean()) + 0.5 * float(pull @ (w - prior) ** 2), slope

    start = prior.copy()
    start[-1] = 0.5 * math.log(max(float(squares.mean()), SMALLEST**2))
    bounds = [(0.0, None)] * logs.shape[1] + [(None, None)] * (hot.shape[1] + 1)
    best = optimize.minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B", options={"maxiter": 500})
    w = best.x
    powers = w[: logs.shape[1]] / scale
    return float(best.fun), powers, float(w[-1] - powers @ mean), w[logs.shape[1] : -1]
