"""What bench's records say: tables in Markdown, ratios against each peer, memory over size, a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mdplug.workflows.bench_peers import ENGINES

OURS = ("mdplug-ase", "mdplug-openmm")
Records = list[dict[str, Any]]


def measured(records: Records) -> Records:
    """Records of engines that took part."""
    return [r for r in records if "ms_per_step" in r]


def _rows(head: str, numbers: int, rows: list[list[str]]) -> str:
    """A Markdown table whose last columns are numbers."""
    columns = head.count("|") + 1
    rule = "|" + "---|" * (columns - numbers) + "---:|" * numbers
    return "\n".join([f"| {head} |", rule, *("| " + " | ".join(row) + " |" for row in rows)])


def table(records: Records) -> str:
    """Every engine, model and size; the last column is the time of mace-torch over the time of each."""
    base = {(r["model"], r["atoms"]): r["ms_per_step"] for r in measured(records) if r["what"] == "mace-torch"}
    rows = []
    for r in records:
        if r["what"] == "roofline":
            continue
        row = [str(r["model"]), r["what"], str(r["atoms"])]
        if "left_out" in r:
            rows.append([*row, "", f"left out: {r['left_out']}", *[""] * 9])
            continue
        of = base.get((r["model"], r["atoms"]))
        rows.append([
            *row, str(r["pairs"]), f"{r['ms_per_step']:.2f}", f"{r['min_ms']:.2f}", f"{r['max_ms']:.2f}",
            f"{r['outside_model_ms']:.2f}" if "outside_model_ms" in r else "",
            f"{1e3 * r['ms_per_step'] / r['atoms']:.1f}",
            f"{100 * r['fraction_of_limit']:.1f}" if "fraction_of_limit" in r else "", f"{r['peak_MiB']:.0f}",
            f"{r['time_to_first_force_s']:.1f}", f"{r['max_dF_eV_A']:.1e}",
            "" if of is None else f"{of / r['ms_per_step']:.2f}",
        ])  # fmt: skip
    return _rows(
        "model | engine | atoms | pairs | ms per step: median | min | max | outside the model | us per atom | "
        "% of the arithmetic limit | peak MiB | first force, s | max dF, eV/A | times mace-torch",
        12,
        rows,
    )


def ratios(records: Records) -> str:
    """Time of each peer over that of each of our engines, by model and size; "" if nothing is to compare."""
    taken = measured(records)
    peers = [e for e in ENGINES if e not in OURS and any(r["what"] == e for r in taken)]
    times = {(r["model"], r["atoms"], r["what"]): r["ms_per_step"] for r in taken}
    rows = []
    for r in taken:
        if r["what"] in OURS:
            of = [times.get((r["model"], r["atoms"], peer)) for peer in peers]
            if any(t is not None for t in of):
                rows.append([
                    str(r["model"]), r["what"], str(r["atoms"]),
                    *("" if t is None else f"{t / r['ms_per_step']:.2f}" for t in of),
                ])  # fmt: skip
    if not rows:
        return ""
    return _rows(" | ".join(["model", "ours", "atoms", *(f"{peer} / ours" for peer in peers)]), len(peers) + 1, rows)


def memory(records: Records, limit_mib: float = 8192.0) -> Records:
    """Memory over size of every engine and model that was measured at two sizes or more.

    Returns:
        records with "bytes_per_atom" (from the two largest sizes, "from_atoms") and "atoms_in_8_GiB", extrapolated
        along the same line: a figure to compare with, no measurement.
    """
    out = []
    taken = measured(records)
    for model, engine in dict.fromkeys((r["model"], r["what"]) for r in taken):
        some = sorted((r for r in taken if (r["model"], r["what"]) == (model, engine)), key=lambda r: r["atoms"])[-2:]
        if len(some) < 2:
            continue
        small, large = some
        slope = (large["peak_MiB"] - small["peak_MiB"]) / (large["atoms"] - small["atoms"])
        if slope <= 0:  # the peak is that of starting up
            continue
        room = (limit_mib - large["peak_MiB"]) / slope
        out.append({
            "what": "memory", "model": model, "engine": engine, "from_atoms": [small["atoms"], large["atoms"]],
            "bytes_per_atom": round(slope * 2**20), "atoms_in_8_GiB": max(int(large["atoms"] + room), 0),
        })  # fmt: skip
    return out


def memory_table(records: Records) -> str:
    """`memory` as Markdown; "" if there is none."""
    rows = [
        [
            str(r["model"]), r["engine"], "{} to {}".format(*r["from_atoms"]), f"{r['bytes_per_atom'] / 1000:.1f}",
            str(r["atoms_in_8_GiB"]),
        ]
        for r in memory(records)
    ]  # fmt: skip
    return (rows and _rows("model | engine | atoms | kB per atom | atoms in 8 GiB, extrapolated", 3, rows)) or ""


def machine(records: Records) -> str:
    """Measured rates of the machine, one line; "" if there are none."""
    some = [r for r in records if r["what"] == "roofline"]
    if not some:
        return ""
    gflops, copy = (np.median([r[key] for r in some]) for key in ("gflops", "copy_GB_s"))
    lead = f"{some[0]['dtype']}, {some[0]['device']}, threads: {some[0]['threads']}, in the same turns: "
    return f"{lead}matrix product {gflops:.0f} GFLOP/s, copy {copy:.1f} GB/s (medians)"


def report(records: Records) -> str:
    """Everything, for people."""
    parts = (table(records), ratios(records), memory_table(records), machine(records))
    return "\n\n".join(part for part in parts if part)


def plot(records: Records, path: Path) -> None:
    """Time per step over system size, a panel for each model."""
    from matplotlib.figure import Figure

    taken = measured(records)
    models = list(dict.fromkeys(r["model"] for r in taken))
    figure = Figure(figsize=(4.5 * max(len(models), 1), 4), layout="constrained")
    for panel, model in enumerate(models):
        axes = figure.add_subplot(1, len(models), panel + 1)
        for k, engine in enumerate(ENGINES):
            rows = sorted((r for r in taken if r["model"] == model and r["what"] == engine), key=lambda r: r["atoms"])
            if rows:
                middle = np.array([r["ms_per_step"] for r in rows])
                spread = np.abs(np.array([[r["min_ms"] for r in rows], [r["max_ms"] for r in rows]]) - middle)
                axes.errorbar([r["atoms"] for r in rows], middle, spread, marker="osD^v<>"[k], capsize=3, label=engine)
        axes.set(xscale="log", yscale="log", xlabel="atoms", ylabel="ms per step", title=Path(model).stem)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150, format="png")
