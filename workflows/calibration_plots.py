"""Reliability of an uncertainty in one picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mdplug.uncertainty_statistics import ErrorLaw
from mdplug.workflows._common import replacing
from mdplug.workflows.calibration_metrics import binned, miscalibration_area, reliability

POINTS = 5000  # of a scatter plot; more only makes it slow


def plot(path: Path, data: Mapping[str, tuple[np.ndarray, np.ndarray, ErrorLaw]], unit: str) -> None:
    """A row for each entry: stated against observed coverage; error against sigma, with the bins' root mean squares.

    Args:
        data: {title: ((n,) |error|, (n,) sigma, law of their ratio)}, as {"raw": ..., "calibrated": ...}.
        unit: of errors and sigma, for the axes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    figure = Figure(figsize=(8, 3.6 * len(data)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(data), 2, squeeze=False)
    for (left, right), (title, (errors, sigma, law)) in zip(rows, data.items(), strict=True):
        stated, observed = reliability(errors, sigma, law)
        left.plot([0, 1], [0, 1], color="0.6", lw=1)
        left.plot(stated, observed)
        left.fill_between(stated, stated, observed, alpha=0.3)
        area = miscalibration_area(errors, sigma, law)
        left.set(
            xlabel="stated coverage", ylabel="observed coverage", title=f"{title}: area {area:.3f}", aspect="equal"
        )

        shown = (errors > 0) & (sigma > 0)
        if shown.any():
            few = np.random.default_rng(0).permutation(np.flatnonzero(shown))[:POINTS]
            right.plot(sigma[few], errors[few], ".", ms=2, alpha=0.3, color="0.5", rasterized=True)
            at, rms = binned(errors[shown], sigma[shown])
            right.plot(at, rms, "o-", ms=3, label="rms error")
            ends = np.array([sigma[shown].min(), sigma[shown].max()])
            right.plot(ends, ends, "k-", lw=1, label="ideal")
            right.plot(ends, float(law.quantile(0.95)) * ends, "k:", lw=1, label="95 %")
            right.set(xscale="log", yscale="log", xlabel=f"sigma / {unit}", ylabel=f"|error| / {unit}", title=title)
            right.xaxis.set_minor_formatter(NullFormatter())  # they overlap where the range is short
            right.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
