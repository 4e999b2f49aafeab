"""Intervals without a law: split conformal prediction, with the units that may be called exchangeable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from mdplug.calibration import Conformal
from mdplug.errors import InputError
from mdplug.uncertainty_statistics import conformal_quantile


def fit_conformal(
    scores: np.ndarray,
    unit: np.ndarray,
    levels: Sequence[float] = (0.5, 0.68, 0.9, 0.95),
    target: Literal["atom", "unit"] = "atom",
    exact: bool = False,
) -> tuple[Conformal, ...]:
    """Factors on sigma from scores |error| / sigma of units that are exchangeable with a new one.

    The inside of a unit may be correlated in any way. What may be a unit: an independent trajectory, for a new
    trajectory; a block of frames longer than the memory of a long trajectory (`block_units`), for its continuation,
    approximately; frames only if they were drawn independently.

    - target "unit": all values of a new unit at once, from the largest score of each. Exact in finite samples, on
      average over calibrations.
    - target "atom", exact: one value of a new unit, drawn at random. Every unit weighs 1/(k + 1), shared by its values,
      and 1/(k + 1) lies at infinity; the factor is the `level` quantile of that (Y. Lee, R. Barber, R. Willett,
      arXiv:2306.06342). Coverage is at least the level, and above it by up to 2/(k + 1) where units are alike.
    - target "atom", not exact: the units weigh 1/k and the quantile is taken at level (1 + 1/n_eff), with n_eff the
      independent values that the share of misses rests on, k <= n_eff <= n, from how that share scatters over units:
      the rule for n_eff exchangeable values. Close to the level for few units too, but no theorem.

    With k < 1 / (1 - level) - 1 units nothing finite can be said, and the factor is infinite.

    Args:
        scores: (n,) of data that no map and no early stopping has seen.
        unit: (n,) ints.

    Raises:
        InputError: no scores, other lengths, NaN, a level out of range.
    """
    s, u = np.asarray(scores, dtype=float), np.asarray(unit)
    if s.ndim != 1 or s.shape != u.shape or not len(s):
        raise InputError(f"scores {s.shape} and units {u.shape} must be of one length, and not empty")
    if np.isnan(s).any():
        raise InputError("a score is not a number; leave out frames without labels")
    index, sizes = np.unique(u, return_inverse=True, return_counts=True)[1:]
    k = len(sizes)
    largest = np.full(k, -math.inf)
    np.maximum.at(largest, index, s)
    order = np.argsort(s)
    heaped = np.cumsum((1.0 / sizes[index])[order]) / k
    heaped[-1] = 1.0

    def quantile(share: float) -> float:
        return float(s[order[int(np.searchsorted(heaped, share - 1e-12))]])

    made = []
    for level in levels:
        if not 0 < level < 1:
            raise InputError(f"a level lies between 0 and 1, not {level}")
        n_effective, factor = float(k), math.inf
        if target == "unit":
            factor = conformal_quantile(largest, level)
        elif (k + 1) * level <= k + 1e-9:
            if not exact:
                # The share of misses hardly moves n_eff, so one step from the plain quantile is enough.
                missed = np.bincount(index, weights=s > quantile(level)) / sizes
                n_effective = _effective(missed, len(s))
            factor = quantile(min(1.0, level * (1.0 + 1.0 / n_effective)))
        spread = math.sqrt(level * (1.0 - level) / (n_effective + 2.0))
        made.append(Conformal(target, float(level), factor, k, len(s), n_effective, spread, exact or target == "unit"))
    return tuple(made)


def _effective(missed: np.ndarray, n: int) -> float:
    """Independent values behind the mean of the (k,) shares of misses: binomial variance / variance of the mean."""
    k, share = len(missed), float(missed.mean())
    of_mean = float(missed.var(ddof=1)) / k if k > 1 else math.inf
    return float(n) if of_mean == 0 else float(np.clip(share * (1.0 - share) / of_mean, k, n))


def memory_frames(values: np.ndarray, trajectory: np.ndarray, frame: np.ndarray) -> float:
    """Statistical inefficiency g of the mean value per frame, in frames; >= 1.

    The autocorrelation is about the mean of *all* trajectories, and summed until it first falls to zero: where
    trajectories differ from each other for good it does not fall, and g is as long as they are.

    Args:
        values: (n,) per atom or frame. trajectory: (n,) ints. frame: (n,) ints, consecutive within a trajectory.
    """
    series = [_per_frame(values[trajectory == t], frame[trajectory == t]) for t in np.unique(trajectory)]
    mean = np.concatenate(series).mean()
    longest = max(map(len, series))
    total, count = np.zeros(longest), np.zeros(longest)
    for one in series:
        n = len(one)
        padded = np.fft.rfft(one - mean, 2 * n)
        total[:n] += np.fft.irfft(padded * padded.conj(), 2 * n)[:n]
        count[:n] += n - np.arange(n)
    if total[0] < 1e-300:
        return 1.0
    correlation = total / count / (total[0] / count[0])
    below = np.flatnonzero(correlation <= 0)
    stop = int(below[0]) if len(below) else longest
    weight = count[1:stop] / count[0]  # pairs at that distance
    return float(max(1.0, 1.0 + 2.0 * (weight * correlation[1:stop]).sum()))


def _per_frame(values: np.ndarray, frame: np.ndarray) -> np.ndarray:
    index, sizes = np.unique(frame, return_inverse=True, return_counts=True)[1:]
    return np.bincount(index, weights=values) / sizes


def block_units(trajectory: np.ndarray, frame: np.ndarray, frames_per_block: int) -> np.ndarray:
    """Unit of each value: blocks of consecutive frames; what is left over joins the last block of its trajectory.

    Args:
        trajectory: (n,) ints. frame: (n,) ints, counted within the trajectory.
        frames_per_block: take one to two times `memory_frames`; a trajectory's length or more: whole trajectories.

    Returns:
        (n,) ints from 0.

    Raises:
        InputError: a block without frames.
    """
    if frames_per_block < 1:
        raise InputError(f"frames_per_block={frames_per_block}; take one or more")
    unit = np.zeros(len(trajectory), dtype=int)
    used = 0
    for t in np.unique(trajectory):
        mine = trajectory == t
        rank = np.unique(frame[mine], return_inverse=True)[1]
        blocks = max(1, (int(rank.max()) + 1) // frames_per_block)
        unit[mine] = used + np.minimum(rank // frames_per_block, blocks - 1)
        used += blocks
    return unit
