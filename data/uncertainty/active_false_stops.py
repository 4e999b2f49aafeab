"""How often would `mdplug active` stop a good model for nothing? From a trajectory that no limit stopped.

    python data/uncertainty/active_false_stops.py RUN MODEL DATA OUTPUT

RUN: folder of `mdplug active` or `mdplug md` with trajectory.extxyz of a box; MODEL: the ensemble; DATA: its labels.
Members and limit are those of round 0 of `mdplug active`. Prints how often sigma passes limits (the default, parts of
it), and the true errors, on clusters cut around the worst atom, of the frames with the largest sigma and of others.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from ase.io import read

import mdplug
from mdplug.calibration import Calibration
from mdplug.pairs import pairs
from mdplug.system import AtomicSystem
from mdplug.uncertainty import uncertainty
from mdplug.uncertainty_statistics import AdaptiveConformal
from mdplug.workflows._common import silent
from mdplug.workflows.active import BEYOND, ROOM, WINDOW
from mdplug.workflows.active_carve import to_label, with_molecules
from mdplug.workflows.active_update import PROBES, body_of, fit_members, write_known
from mdplug.workflows.md_monitor import FORCES
from mdplug.workflows.xtb import XTB

REPLAY, LABELS, CLUSTER_ATOMS = 1000, 12, 45


def main(run, model, data, output):
    """All of it."""
    output.mkdir(parents=True, exist_ok=True)
    if not (output / "ensemble.safetensors").exists():
        write_known([data], REPLAY, 1, output / "known.extxyz")
        body_of(model, output / "body.safetensors")
        fitted = fit_members(output, output / "body.safetensors", [output / "known.extxyz"], 32, "bootstrap", 1, silent)
        (output / "fitted.json").write_text(json.dumps({k: v for k, v in vars(fitted).items() if isinstance(v, list)}))
    fitted = json.loads((output / "fitted.json").read_text())
    factor = AdaptiveConformal(0.95, fitted["scores"], window=WINDOW).factor
    factor = min(factor, BEYOND * max(fitted["scores"]))
    limit = ROOM * max(fitted["sigma"])
    ensemble = mdplug.load(output / "ensemble.safetensors")
    calibrated = Calibration.from_dict(ensemble.spec.calibration[FORCES])
    path = next(p for p in (run / "round-01/walker-0/md/trajectory.extxyz", run / "trajectory.extxyz") if p.exists())
    frames = read(path, ":")
    generator = torch.Generator().manual_seed(0)
    sigma, worst = [], []
    for atoms in frames:
        system = AtomicSystem.from_ase(atoms)
        found = uncertainty(ensemble, system, pairs(system, ensemble.cutoff), probes=PROBES, generator=generator)
        columns = {"sigma": found.forces, "distance": found.distance, "number": system.numbers}
        values = calibrated(**{k: v.numpy() for k, v in columns.items()})
        sigma.append(float(values.max()))
        worst.append(int(values.argmax()))
    sigma = np.array(sigma)
    ns = frames[-1].info["time_ps"] / 1000
    print(
        f"{len(frames)} frames, {1000 * ns:.3g} ps; sigma of a frame, quantiles 5 50 95 100 %:",
        np.round(np.quantile(sigma, [0.05, 0.5, 0.95, 1.0]), 3),
        f"factor {factor:.3g}, default limit {limit:.3g} eV/A",
    )
    for part in (1.0, 0.8, 0.6, 0.5):
        above = sigma > part * limit
        stops = int((above[1:] & ~above[:-1]).sum() + above[0])
        print(
            f"limit {part * limit:.3f} eV/A (threshold {part * limit * factor:.2f}): above in {above.mean():.2%} of "
            f"frames, {stops} stops, {stops / ns:.0f} per ns; at most {poisson(stops) / ns:.0f} (95 %)"
        )
    calculator, truth = mdplug.Calculator(ensemble), XTB()
    order = np.argsort(-sigma)
    rng = np.random.default_rng(0)
    for name, chosen in (("largest", order[:LABELS]), ("random", rng.choice(order, LABELS, replace=False))):
        errors = []
        for k in chosen:
            cut = to_label(with_molecules(frames[k]), worst[k], CLUSTER_ATOMS)
            cut.calc = truth
            forces = cut.get_forces()
            cut.calc = calculator
            errors.append(float(np.linalg.norm(cut.get_forces() - forces, axis=1).max()))
        print(f"{name} sigma {np.round(sigma[chosen], 2).tolist()}: true errors eV/A {np.round(errors, 2).tolist()}")


def poisson(count):
    """One-sided 95 % bound on the mean of a Poisson count."""
    from scipy.stats import chi2

    return 0.5 * float(chi2.ppf(0.95, 2 * count + 2))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:5]))
