"""What every member of an ensemble would have given, from one trajectory that their mean potential made.

G. Imbalzano et al., J. Chem. Phys. 154, 074102 (2021), whose weights and cumulant expansion these are. Averages at
constant temperature, and at constant temperature and pressure (all members share the pressure, so its work cancels);
of the dynamics nothing follows: for a diffusion coefficient run each member and use `intervals.combine_runs`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from mdplug.errors import InputError
from mdplug.units import BOLTZMANN
from mdplug.workflows.intervals import Intervals, from_members
from mdplug.workflows.statistics import inefficiencies

MIN_EFFECTIVE = 0.5  # effective fraction of the frames from which weights are good
MAX_BETA_SIGMA = 1.5  # up to which the first order of the cumulant expansion is

Method = Literal["direct", "cumulant"]
Transform = Callable[[np.ndarray], Any]


class Reweighting:
    """Members' weights for the frames of a trajectory of their mean potential.

    Args:
        energies_eV: (F, K) total potential energy of each frame by each member; constants do not matter.
        temperature_K: of the trajectory.
        method: "direct" (weights) or "cumulant" (first order in the differences); None: direct where `effective` is
            above 0.5, else cumulant where `beta_sigma` is up to 1.5, else neither will do.

    Attributes:
        frames, members: numbers. kT: eV.
        differences: (K, F) (V_k - mean over members) / kT, each with mean zero over the frames.
        weights: (K, F), each with sum one.
        effective: (sum w)^2 / (F sum w^2), the fraction of frames that the weights leave; of the worst member.
        beta_sigma: standard deviation of the members' energies about their mean / kT, offsets left out.
        method: None where the members differ too much.

    Members that by chance differ little are kept more often than others: where `beta_sigma` is about 1.5, so that many
    ensembles would be refused, the intervals of those kept are too narrow.

    Raises:
        InputError: energies or temperature that cannot be right.
    """

    def __init__(self, energies_eV: Any, temperature_K: float, method: Method | None = None):
        energies = np.asarray(energies_eV, float)
        if energies.ndim != 2 or energies.shape[0] < 3 or energies.shape[1] < 2:
            raise InputError(f"energies of shape {energies.shape} must be (frames, members), 3 and 2 at least")
        if not np.isfinite(energies).all():
            raise InputError(f"energies of frame {int(np.argmin(np.isfinite(energies).all(axis=1)))} are not finite")
        if not temperature_K > 0:
            raise InputError(f"temperature_K={temperature_K:g} must be positive")
        self.kT = BOLTZMANN * temperature_K
        self.frames, self.members = energies.shape
        h = (energies - energies.mean(axis=1, keepdims=True)).T / self.kT
        self.differences = h - h.mean(axis=1, keepdims=True)
        raw = np.exp(-self.differences + self.differences.min(axis=1, keepdims=True))  # the largest is one
        self.weights = raw / raw.sum(axis=1, keepdims=True)
        self.effective = float((1.0 / (self.frames * (self.weights**2).sum(axis=1))).min())
        self.beta_sigma = float(np.sqrt((self.differences**2).mean(axis=1).sum() / (self.members - 1)))
        self.method: Method | None = method
        if method is None and self.effective > MIN_EFFECTIVE:
            self.method = "direct"
        elif method is None and self.beta_sigma <= MAX_BETA_SIGMA:
            self.method = "cumulant"

    def __str__(self) -> str:
        text = (
            f"{self.members} members differ by {self.beta_sigma:.2f} kT, weights leave {100 * self.effective:.0f} % of "
        )
        text += f"{self.frames} frames: "
        return text + (f"{self.method} estimate" if self.method else "too much to reweight; run each member by itself")

    def intervals(
        self, series: Any, *, level: float = 0.9, transform: Transform | None = None, per_member: bool = False
    ) -> Intervals:
        """Intervals of an average, or of a function of averages.

        Args:
            series: (F, ...) the quantity in each frame; with `per_member` (K, F, ...), where members measure
                differently (their own energies or pressures).
            level: between 0 and 1.
            transform: smooth function of the averages (M,) of a series (F, M), to (P,) or a number: a logarithm, say.
            per_member: see `series`.

        Raises:
            InputError: the members differ too much, or the series has another length.
        """
        if self.method is None:
            raise InputError(str(self))
        given = np.asarray(series, float)
        lead = (self.members, self.frames) if per_member else (self.frames,)
        if given.shape[: len(lead)] != lead:
            raise InputError(f"a series of shape {given.shape} has not the {lead} values of the trajectory")
        flat = given.reshape(*lead, -1)
        values: list[np.ndarray] = []
        mean: Any = 0.0
        for k in range(self.members):
            value, influence = self._one(k, flat[k] if per_member else flat, transform)
            values.append(value)
            mean = mean + influence / self.members
        square = np.zeros(mean.shape[1])
        for k in range(self.members):
            influence = self._one(k, flat[k] if per_member else flat, transform)[1]
            square += mean_error(influence - mean)[0] ** 2 / (self.members - 1)
        error, independent = mean_error(mean)
        shape = given.shape[len(lead) :]
        if transform is not None:
            shape = np.shape(transform(flat.mean(axis=tuple(range(len(lead))))))
        error, noise, dof = (part.reshape(shape) for part in (error, np.sqrt(square), dof_of(independent)))
        each = np.array(values).reshape(self.members, *shape)
        # In one trajectory this noise is small beside the error that the members share, and costs little width.
        return from_members(each, error, noise, dof, level, self.method or "", careful=True)

    def _one(self, k: int, series: np.ndarray, transform: Transform | None) -> tuple[np.ndarray, np.ndarray]:
        """A member's estimate (P,), and what each frame adds to its error, (F, P): the mean of that is zero."""
        if self.method == "direct":
            value = self.weights[k] @ series
            influence = self.frames * self.weights[k][:, None] * (series - value)
            return _through(transform, value, np.zeros_like(value), influence)
        h, value = self.differences[k][:, None], series.mean(axis=0)
        centred = series - value
        change = -(centred * h).mean(axis=0)
        return _through(transform, value, change, centred * (1 - h) - change)


def average(series: np.ndarray, transform: Transform | None = None) -> tuple[Any, Any, Any]:
    """Value, standard error and its degrees of freedom: of an average (F, ...), or of a function of averages.

    See `Reweighting.intervals`; here all frames count the same.
    """
    flat = series.reshape(len(series), -1)
    mean = flat.mean(axis=0)
    value, influence = _through(transform, mean, np.zeros_like(mean), flat - mean)
    error, independent = mean_error(influence)
    shape = series.shape[1:] if transform is None else np.shape(transform(mean))
    value, error, dof = (part.reshape(shape) for part in (value, error, dof_of(independent)))
    return value, error, dof


def free_energy_difference(
    reweighting: Reweighting, in_first: np.ndarray, in_second: np.ndarray, level: float = 0.9
) -> Intervals:
    """F(second) - F(first) = -kT ln(p_second / p_first) in eV.

    Args:
        reweighting: of the trajectory. level: between 0 and 1.
        in_first, in_second: (F,) whether a frame is in the state, or what fraction of it is.

    Raises:
        InputError: a state that was never visited, or as `Reweighting.intervals`.
    """
    states = np.stack((in_first, in_second), axis=1).astype(float)
    if not states.any(axis=0).all():
        raise InputError("a state was never visited; run longer or draw the states wider")
    kT = reweighting.kT
    return reweighting.intervals(states, level=level, transform=lambda p: -kT * np.log(p[1] / p[0]))


def free_energy_profile(
    reweighting: Reweighting, variable: np.ndarray, edges: np.ndarray, level: float = 0.9
) -> Intervals:
    """-kT ln p(bin) in eV, p being the density in 1 / (unit of the variable); NaN in bins never visited.

    Args:
        reweighting: of the trajectory. level: between 0 and 1.
        variable: (F,) collective variable, or (F, N) of N particles alike. edges: (B + 1,) of the bins, rising.

    Raises:
        InputError: as `Reweighting.intervals`.
    """
    bins = len(edges) - 1
    flat = np.asarray(variable, float).reshape(len(variable), -1)
    place = np.searchsorted(edges, flat, side="right") - 1
    place = np.where((place < 0) | (place >= bins), bins, place) + np.arange(len(flat))[:, None] * (bins + 1)
    counts = np.bincount(place.ravel(), minlength=len(flat) * (bins + 1)).reshape(-1, bins + 1)[:, :bins]
    seen = counts.any(axis=0)
    scale = np.where(seen, np.diff(edges) * flat.shape[1], np.nan)
    # Bins never visited go through as NaN, without a logarithm of zero.
    series = np.where(seen, counts / scale, 1.0)
    found = reweighting.intervals(series, level=level, transform=lambda p: -reweighting.kT * np.log(p))
    names = ("value", "members", "statistical", "model", "total", "statistical_error", "noise", "dof")
    hidden: dict[str, Any] = {name: np.where(seen, getattr(found, name), np.nan) for name in names}
    return replace(found, **hidden)


def mean_error(series: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(M,) standard errors of the means of correlated series (F, M), and (M,) independent values in them."""
    n = len(series)
    g = inefficiencies(series)
    return series.std(axis=0, ddof=1) * np.sqrt(g / n), n / g


def dof_of(independent: np.ndarray) -> np.ndarray:
    """Degrees of freedom of an error that came with a statistical inefficiency.

    Its relative variance is 2 (2 W + 1) / n with a window of W values (N. Madras and A. D. Sokal, J. Stat. Phys. 50,
    109 (1988)); the window of `inefficiencies` is about 2 g, and 2 / dof is the relative variance of chi2 / dof.
    """
    return np.maximum(np.asarray(independent) / 4, 1.0)


def _through(
    transform: Transform | None, value: np.ndarray, change: np.ndarray, influence: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """A function of averages to first order in `change` and in the noise: its value (P,) and influence (F, P)."""
    if transform is None:
        return value + change, influence
    columns = []
    for m, step in enumerate(1e-5 * np.maximum(np.abs(value), 1e-12)):
        near = np.zeros_like(value)
        near[m] = step
        columns.append((np.atleast_1d(transform(value + near)) - np.atleast_1d(transform(value - near))) / (2 * step))
    slope = np.stack(columns, axis=1)
    return np.atleast_1d(transform(value)) + slope @ change, influence @ slope.T
