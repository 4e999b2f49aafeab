"""Means of correlated series with honest errors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mean:
    """A mean with its standard error.

    Attributes:
        value: the mean after `start`.
        error: s sqrt(g / n) with the statistical inefficiency g of the series.
        block_error: from the means of blocks, as a check.
        start: values left out at the beginning.
        n_effective: independent values in what is left.
    """

    value: float
    error: float
    block_error: float
    start: int
    n_effective: float


def inefficiency(series: np.ndarray) -> float:
    """g = 1 + 2 (sum of the normalised autocorrelation up to where it first falls to zero); >= 1.

    W. Janke, in Quantum Simulations of Complex Many-Body Systems, 2002; J. D. Chodera et al., JCTC 3, 26 (2007).
    """
    return float(inefficiencies(series[:, None])[0])


def inefficiencies(series: np.ndarray) -> np.ndarray:
    """(M,) of the columns of (n, M), see `inefficiency`."""
    n = len(series)
    centred = series - series.mean(axis=0)
    variance = (centred**2).mean(axis=0)
    if n < 3:
        return np.ones(series.shape[1])
    padded = np.fft.rfft(centred, 2 * n, axis=0)
    spectrum = padded.real**2 + padded.imag**2
    correlation = np.fft.irfft(spectrum, axis=0)[:n] / (np.maximum(variance, 1e-300) * n)  # (1 - t/n) is in it
    correlation[np.logical_or.accumulate(correlation <= 0, axis=0)] = 0.0
    return np.where(variance < 1e-300, 1.0, np.maximum(1.0, 1.0 + 2.0 * correlation[1:].sum(axis=0)))


def equilibrated(series: np.ndarray, trials: int = 50) -> int:
    """How many values to leave out, so that most independent ones are left (J. D. Chodera, JCTC 12, 1799 (2016)).

    Half of the series is kept at least.
    """
    starts = np.unique(np.linspace(0, len(series) // 2, trials, dtype=int))
    left = [(len(series) - s) / inefficiency(series[s:]) for s in starts]
    return int(starts[int(np.argmax(left))])


def mean_of(series: np.ndarray, start: int | None = None, blocks: int = 5) -> Mean:
    """Mean of a series whose beginning may not be equilibrated.

    Args:
        series: (n,) values at equal intervals.
        start: values to leave out; None: chosen by `equilibrated`.
        blocks: number of blocks of the check.
    """
    begin = equilibrated(series) if start is None else start
    kept = series[begin:]
    g, n = inefficiency(kept), len(kept)
    error = float(kept.std(ddof=1) * np.sqrt(g / n)) if n > 1 else float("nan")
    return Mean(float(kept.mean()), error, block_error(kept, blocks), begin, n / g)


def block_error(series: np.ndarray, blocks: int = 5) -> float:
    """Standard error from the means of equal blocks; NaN where there are too few values."""
    size = len(series) // blocks
    if size < 1 or blocks < 2:
        return float("nan")
    means = series[len(series) - blocks * size :].reshape(blocks, size).mean(axis=1)
    return float(means.std(ddof=1) / np.sqrt(blocks))


def spread(values: np.ndarray) -> float:
    """Standard error of the mean of independent values; NaN for fewer than two."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")
