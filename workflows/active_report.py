"""What an active run says of itself: a line, a table and a picture of every round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase.io import iread

import mdplug
from mdplug.errors import InputError
from mdplug.potential import Potential
from mdplug.workflows._common import replacing, silent
from mdplug.workflows.active_update import PROBES, worst
from mdplug.workflows.calibration_data import measure
from mdplug.workflows.dataset import read


@dataclass
class Round:
    """One round.

    Attributes:
        number: from 1. segments: of the walkers. selected, labelled, failed: structures.
        seen: of each label: sigma and error of its worst atoms (eV/A) before the model learnt it, score: the largest
            |error| / sigma, held: the bound held, alarm: the frame that stopped a walker.
        update: what training gave (see `Trained`), or None. threshold_eV_A, sigma_max_eV_A, factor: from then on.
        minutes: it took.
    """

    number: int
    segments: list[dict[str, Any]]
    selected: int
    labelled: int
    failed: int
    seen: list[dict[str, Any]]
    update: dict[str, Any] | None
    threshold_eV_A: float
    sigma_max_eV_A: float
    factor: float
    minutes: float

    @property
    def coverage(self) -> float:
        """Share of the labelled frames whose errors were within the bound."""
        return float(np.mean([row["held"] for row in self.seen])) if self.seen else float("nan")

    @property
    def late(self) -> int:
        """Alarms at which the true error was over the threshold already."""
        return sum(row["alarm"] and row["error_eV_A"] > row["threshold_eV_A"] for row in self.seen)

    def line(self) -> str:
        """For the terminal."""
        alarms = sum(one["status"] == "alarm" for one in self.segments)
        died = sum(one["status"] == "died" for one in self.segments)
        at = min(one["safe_ps"] for one in self.segments)
        text = f"round {self.number}: slowest walker at {at:.4g} ps, {alarms} alarms, {died} deaths, "
        text += f"{self.labelled} labels ({self.failed} failed), bound held in {self.coverage:.0%}"
        if self.update is not None:
            e = self.update
            text += f"; held-out force error {e['error_before']:.3f} -> {e['error_after']:.3f} eV/A"
            text += "" if e["accepted"] else " (refused)"
        return text + f", {self.minutes:.1f} min"


def judged(model: Path, labels: Path, factor: float, threshold_eV_A: float) -> list[dict[str, Any]]:
    """What a model had said of structures beside what their labels say.

    Args:
        labels: labelled extended XYZ. factor: half width of the bound in units of sigma.
    """
    made = mdplug.load(model)
    if not isinstance(made, Potential):
        raise InputError(f"{model} is an exported file; give a .safetensors model file")
    sigma, error, score = worst(measure(made, read([labels]).structures, PROBES, 0, silent), made)
    return [
        {
            "sigma_eV_A": float(s), "error_eV_A": float(e), "score": float(r), "held": bool(r <= factor),
            "alarm": bool(atoms.info.get("alarm", False)), "threshold_eV_A": threshold_eV_A, "factor": factor,
            "atoms": len(atoms), "walker": int(atoms.info.get("walker", -1)),
        }
        for atoms, s, e, r in zip(iread(labels, ":"), sigma, error, score, strict=True)
    ]  # fmt: skip


def text_of(record: dict[str, Any], rounds: Sequence[Round]) -> str:
    """The report in Markdown."""
    seen = [row for one in rounds for row in one.seen]
    alarms = [row for row in seen if row["alarm"]]
    deaths = sum(one["status"] == "died" for one in record["segments"])
    lines = [
        "# Active run",
        "",
        f"{record['ended']}. {len(rounds)} rounds, {record['labels_used']} labels, {record['minutes']:.1f} minutes.",
        f"Walkers at {', '.join(f'{t:.4g}' for t in record['walker_ps'])} ps.",
        "",
        f"Threshold of a force error: {record['threshold_eV_A']:.3g} eV/A. {len(alarms)} labelled alarms, of which "
        f"{sum(one.late for one in rounds)} came when the true error was over it already; {deaths} walkers died and "
        "were set back.",
    ]
    if seen:
        held = np.mean([row["held"] for row in seen])
        lines += ["", f"The bound on the largest error of a frame held in {held:.0%} of {len(seen)} labelled frames."]
    lines += [
        "",
        "| round | alarms | died | labels | failed | bound held | largest error eV/A | held-out error before, after | "
        "new held-out before, after | update | sigma limit eV/A | minutes |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in rounds:
        status = [segment["status"] for segment in one.segments]
        largest = max((row["error_eV_A"] for row in one.seen), default=float("nan"))
        e = one.update
        said = ["", "", "none"]
        if e is not None:
            said = [
                f"{e['error_before']:.3f}, {e['error_after']:.3f}",
                f"{e['new_before']:.3f}, {e['new_after']:.3f}",
                "accepted" if e["accepted"] else "refused",
            ]
        lines.append(
            f"| {one.number} | {status.count('alarm')} | {status.count('died')} | {one.labelled} | {one.failed} | "
            f"{one.coverage:.0%} | {largest:.2f} | {' | '.join(said)} | {one.sigma_max_eV_A:.3f} | {one.minutes:.1f} |"
        )
    lines += ["", "Errors: root mean square of force components on held-out labels, eV/A.", ""]
    lines += ["| walker | round | from ps | to ps | ended by | goes on from ps |", "|---|---|---|---|---|---|"]
    for s in sorted(record["segments"], key=lambda one: (one["walker"], one["round"])):
        lines.append(
            f"| {s['walker']} | {s['round']} | {s['begin_ps']:.4g} | {s['end_ps']:.4g} | {s['status']} | "
            f"{s['safe_ps']:.4g} |"
        )
    return "\n".join([*lines, "", "![](report.png)", ""])


def plot(path: Path, rounds: Sequence[Round]) -> None:
    """Sigma beside true errors of what was labelled; errors by round; walkers against labels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    seen = [row for one in rounds for row in one.seen]
    for alarm, name in ((False, "collected"), (True, "alarm")):
        chosen = [row for row in seen if row["alarm"] == alarm]
        if chosen:
            x, y = ([row[key] for row in chosen] for key in ("sigma_eV_A", "error_eV_A"))
            left.plot(x, y, ".", label=name)
    if seen:
        line = np.array(sorted(row["sigma_eV_A"] for row in seen))
        left.plot(line, rounds[-1].factor * line, "k-", lw=0.8, label="bound, at the end")
        left.axhline(rounds[-1].threshold_eV_A, color="k", ls=":", lw=0.8, label="threshold")
        left.set(xscale="log", yscale="log")
        left.legend(frameon=False, fontsize="small")
    left.set(xlabel="largest sigma of a frame / eV/Å", ylabel="largest force error / eV/Å")
    used = np.cumsum([one.selected for one in rounds])
    for key, name in (("error_after", "old, held out"), ("new_after", "new, held out")):
        values = [float("nan") if one.update is None else one.update[key] for one in rounds]
        middle.plot(used, values, ".-", label=name)
    middle.set(xlabel="labels", ylabel="RMS force error / eV/Å", ylim=(0, None))
    middle.legend(frameon=False, fontsize="small")
    for walker in sorted({one["walker"] for row in rounds for one in row.segments}):
        points = [
            (n, s["safe_ps"])
            for n, row in zip(used, rounds, strict=True)
            for s in row.segments
            if s["walker"] == walker
        ]
        right.plot(*zip(*points, strict=True), ".-", label=f"walker {walker}")
    right.set(xlabel="labels", ylabel="safe time / ps")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
