"""Were unsafe frames caught in time? Labels, afterwards, of what a finished `mdplug active` run of an open system kept.

    python data/uncertainty/active_check.py RUN [EVERY]

Every frame (or every EVERY-th) of every segment, those that were taken back included, is labelled by GFN2-xTB and
compared with the model that ran it; likewise the frames that raised alarms. Prints one JSON line.
"""

import json
import sys
from pathlib import Path

import numpy as np
from ase.io import read

import mdplug
from mdplug.errors import SimulationError
from mdplug.workflows.xtb import XTB


def true_error(atoms, calculator, truth):
    """Largest force error of an atom, eV/A; infinite where the truth does not converge."""
    one = atoms.copy()
    one.calc = calculator
    forces = one.get_forces()
    one.calc = truth
    try:
        return float(np.linalg.norm(one.get_forces() - forces, axis=1).max())
    except SimulationError:
        return float("inf")


def main(run, every):
    """All segments."""
    report = json.loads((run / "report.json").read_text())
    truth = XTB()
    kept, alarms, firsts = [], [], 0
    for one in report["segments"]:
        number = one["round"]
        folder = run / f"round-{number:02d}" / f"walker-{one['walker']}" / "md"
        model = mdplug.Calculator(mdplug.load(run / f"round-{number - 1:02d}" / "model.safetensors"))
        path = folder / "trajectory.extxyz"
        if path.exists() and path.stat().st_size:
            kept += [true_error(atoms, model, truth) for atoms in read(path, f"::{every}")]
        if one["status"] == "alarm":
            alarms.append(true_error(read(folder / "uncertain.extxyz", -1), model, truth))
            firsts += alarms[-1] <= report["threshold_eV_A"]
    limit = report["threshold_eV_A"]
    kept, alarms = np.array(kept), np.array(alarms)
    found = {
        "run": run.name, "ended": report["ended"], "walker_ps": report["walker_ps"], "threshold_eV_A": limit,
        "rounds": len(report["rounds"]), "labels": report["labels_used"],
        "frames_below_the_limit": len(kept), "of_these_over_the_threshold": int((kept > limit).sum()),
        "their_largest_error_eV_A": float(kept.max()), "their_median_error_eV_A": float(np.median(kept)),
        "alarms": len(alarms), "alarms_in_time": int(firsts),
        "alarm_errors_eV_A": [round(float(e), 3) for e in alarms],
        "died": sum(one["status"] == "died" for one in report["segments"]),
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1)
