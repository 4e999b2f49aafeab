"""Whether chains are a posterior: rank-normalised split R-hat and effective sample sizes, and the gate on them.

Ref.: A. Vehtari, A. Gelman, D. Simpson, B. Carpenter, P.-C. Buerkner, Bayesian Analysis 16, 667 (2021), with
C. J. Geyer's initial monotone sequence of autocorrelations, Statistical Science 7, 473 (1992).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import ndtri
from scipy.stats import rankdata

from mdplug.workflows._common import replacing


def split(chains: np.ndarray) -> np.ndarray:
    """(2 C, n/2) halves of chains (C, n); an odd middle sample is left out."""
    half = chains.shape[1] // 2
    return np.concatenate([chains[:, :half], chains[:, -half:]])


def rank_normalised(chains: np.ndarray) -> np.ndarray:
    """Normal scores of the ranks over all chains, of the same shape."""
    ranks = rankdata(chains, method="average").reshape(chains.shape)
    return ndtri((ranks - 0.375) / (chains.size + 0.25))


def plain_rhat(chains: np.ndarray) -> float:
    """sqrt(variance over all chains / that within them); 1 where nothing varies, infinite where only chains do.

    Args:
        chains: (C, n).
    """
    n = chains.shape[1]
    within = float(chains.var(axis=1, ddof=1).mean())
    between = float(n * chains.mean(axis=1).var(ddof=1))
    if within <= 1e-300:
        return 1.0 if between <= 1e-300 else math.inf
    return math.sqrt((n - 1) / n + between / (n * within))


def rhat(chains: np.ndarray) -> float:
    """Rank-normalised split R-hat, the larger of bulk and folded: location and spread of the chains.

    Args:
        chains: (C, n) of one number, C >= 1, n >= 4.
    """
    folded = np.abs(chains - np.median(chains))
    return max(plain_rhat(rank_normalised(split(one))) for one in (chains, folded))


def effective_samples(chains: np.ndarray) -> float:
    """Independent samples that the mean over chains is worth; at most S log10 S, of S samples.

    Args:
        chains: (C, n) of one number.
    """
    c, n = chains.shape
    size = c * n
    centred = chains - chains.mean(axis=1, keepdims=True)
    within = float(chains.var(axis=1, ddof=1).mean())
    total = within * (n - 1) / n + (float(chains.mean(axis=1).var(ddof=1)) if c > 1 else 0.0)
    if total <= 1e-300:
        return float(size)
    padded = np.fft.rfft(centred, 2 * n, axis=1)
    covariance = np.fft.irfft((padded * padded.conj()), 2 * n, axis=1)[:, :n].mean(axis=0) / n
    correlation = 1.0 - (within - covariance) / total
    correlation[0] = 1.0
    pairs = correlation[: n - n % 2].reshape(-1, 2).sum(axis=1)
    below = np.flatnonzero(pairs <= 0)
    stop = int(below[0]) if len(below) else len(pairs)
    time = -1.0 + 2.0 * float(np.minimum.accumulate(pairs[:stop]).sum())
    return size / max(time, 1.0 / math.log10(size))


def bulk_samples(chains: np.ndarray) -> float:
    """Bulk effective sample size: of rank-normalised split chains (C, n)."""
    return effective_samples(rank_normalised(split(chains)))


@dataclass(frozen=True)
class Verdict:
    """Whether samples may be called a posterior.

    Attributes:
        converged: R-hat and effective samples of every number pass. reasons: why not.
        rhat, effective: worst of all numbers. worst_rhat, worst_effective: their names.
        rows: one for each number: name, mean, sd, rhat, effective.
        chains: one for each chain: worst effective samples, mean log posterior, R-hat of the chain against itself.
    """

    converged: bool
    reasons: tuple[str, ...]
    rhat: float
    effective: float
    worst_rhat: str
    worst_effective: str
    rows: list[dict[str, Any]]
    chains: list[dict[str, Any]]

    @property
    def status(self) -> str:
        """For people and for the model file."""
        return "converged" if self.converged else "unconverged"

    def __str__(self) -> str:
        text = f"{self.status}: R-hat {self.rhat:.3f} ({self.worst_rhat}), "
        text += f"{self.effective:.0f} effective samples ({self.worst_effective})"
        return text + "".join(f"; {reason}" for reason in self.reasons)


def judge(values: np.ndarray, names: Sequence[str], rhat_max: float, effective_min: float) -> Verdict:
    """The gate.

    Args:
        values: (C, n, Q) numbers of each sample of each chain. names: (Q,).
        rhat_max, effective_min: for every number.
    """
    rows: list[dict[str, Any]] = []
    for q, name in enumerate(names):
        one = values[:, :, q]
        rows.append(
            {
                "name": name,
                "mean": float(one.mean()),
                "sd": float(one.std(ddof=1)),
                "rhat": rhat(one),
                "effective": bulk_samples(one),
            }
        )
    chains: list[dict[str, Any]] = []
    for k, one in enumerate(values):
        chains.append(
            {
                "chain": k,
                "mean_log_posterior": float(one[:, list(names).index("log_posterior")].mean()),
                "rhat_of_halves": max(rhat(one[None, :, q]) for q in range(len(names))),
                "effective": min(bulk_samples(one[None, :, q]) for q in range(len(names))),
            }
        )
    worst: dict[str, Any] = max(rows, key=lambda row: row["rhat"])
    fewest: dict[str, Any] = min(rows, key=lambda row: row["effective"])
    reasons = []
    if len(values) < 2:
        reasons.append("one chain cannot show that it finds everything; take several")
    if not worst["rhat"] <= rhat_max:
        reasons.append(f"R-hat is above {rhat_max:g}: the chains have not mixed; raise burn_in_steps or thinning")
    if not fewest["effective"] >= effective_min:
        reasons.append(f"fewer than {effective_min:g} effective samples; raise samples or thinning")
    return Verdict(
        not reasons, tuple(reasons), worst["rhat"], fewest["effective"], worst["name"], fewest["name"], rows, chains
    )


def plot(values: np.ndarray, verdict: Verdict, names: Sequence[str], path: Path) -> None:
    """Traces of the log posterior and of the worst number, and R-hat of all, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    for axes, name in ((left, "log_posterior"), (middle, verdict.worst_rhat)):
        for k, one in enumerate(values[:, :, list(names).index(name)]):
            axes.plot(one, lw=0.8, label=f"chain {k}")
        axes.set(xlabel="sample", ylabel=name)
    left.legend(frameon=False)
    right.hist([min(row["rhat"], 3.0) for row in verdict.rows], bins=30)
    right.set(xlabel="R-hat", ylabel="numbers", title=verdict.status)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
