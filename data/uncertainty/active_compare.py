"""Active selection against random selection at equal numbers of labels: learning curves on frames unlike the first.

    python data/uncertainty/active_compare.py FRAMES MODEL KNOWN POOL SEED OUTPUT

FRAMES: folder of active_frames.py. MODEL: potential trained on KNOWN (300 K). POOL: mixed (all of pool.extxyz, two
thirds of it at 300 K) or hot (600 K, 800 K and pressed frames alone, the hard case). Each update is that of
`mdplug active`: the body is trained on, members are drawn anew; random selection takes the same path with frames
drawn at random. A row of OUTPUT/curve.csv is a selection after an update; the same command goes on.
"""

import csv
import sys
from pathlib import Path

import numpy as np
from ase.io import read

import mdplug
from mdplug.workflows._common import silent, write_atomic
from mdplug.workflows.active_select import Posterior, force_rows, informative
from mdplug.workflows.active_update import as_new, fit_members, train_on
from mdplug.workflows.dataset import Loader, references_of
from mdplug.workflows.dataset import read as read_labels
from mdplug.workflows.journal import as_extxyz
from mdplug.workflows.trainer import predictions

BUDGETS = (10, 20, 40)
WEIGHT = 3.0
MEMBERS = 32


def errors(body, test):
    """Force RMSE, meV/A: of all, and of each config_type."""
    structures = read_labels([test]).structures
    model = mdplug.load(body)
    loader = Loader(structures, model.cutoff, references_of(model))
    squares = {}
    for chosen, (batch, out) in zip(loader.plan(), predictions(model, loader), strict=True):
        error = (out["forces"] - batch.forces).square().mean(dim=1).numpy()
        for place, k in enumerate(chosen):
            own = error[batch.system.system_index.numpy() == place]
            for kind in ("all", structures[k].kind):
                squares.setdefault(kind, []).append(own)
    return {kind: round(1e3 * float(np.sqrt(np.concatenate(v).mean())), 2) for kind, v in sorted(squares.items())}


def main(frames, model, known, which, seed, output):
    """The curves of one seed and pool."""
    output.mkdir(parents=True, exist_ok=True)
    pool = read(frames / "pool.extxyz", ":")
    if which == "hot":
        pool = [a for a in pool if a.info["config_type"] != "300K"]
    rows = []
    for selection in ("uncertain", "random"):
        body, taken, fitted = model, [], None
        rng = np.random.default_rng([seed, 11])
        rows.append({"selection": selection, "labels": 0, **errors(body, frames / "test.extxyz")})
        for budget in BUDGETS:
            folder = output / selection / f"{budget:03d}"
            folder.mkdir(parents=True, exist_ok=True)
            left = [k for k in range(len(pool)) if k not in taken]
            count = budget - len(taken)
            if selection == "random":
                chosen = [left[k] for k in rng.permutation(len(left))[:count]]
            else:
                if fitted is None:
                    fitted = fit_members(output, body, [known], MEMBERS, "laplace", seed, silent)
                found = force_rows(body, fitted.model, [pool[k] for k in left])
                picked, _ = informative(found, Posterior.load(fitted.posterior), count)
                chosen = [left[k] for k in picked]
            taken += chosen
            new = folder / "new.extxyz"
            if not new.exists():
                write_atomic(new, as_extxyz(as_new([pool[k] for k in taken], 0, WEIGHT)))
            trained = train_on(folder, body, known, new, {}, 1, seed, silent)
            body = trained.body
            if selection == "uncertain":
                fitted = fit_members(folder, body, [known, new], MEMBERS, "laplace", seed, silent)
            kinds = [pool[k].info["config_type"] for k in taken]
            rows.append(
                {"selection": selection, "labels": budget, **errors(body, frames / "test.extxyz")}
                | {f"taken_{kind}": kinds.count(kind) for kind in ("300K", "600K", "800K", "pressed")}
                | {"accepted": trained.accepted, "old_after": round(1e3 * trained.error_after, 2)}
            )
            print(which, seed, rows[-1], flush=True)
            with (output / "curve.csv").open("w") as file:
                writer = csv.DictWriter(file, list(max(rows, key=len)))
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    at, model, known, which, seed, output = sys.argv[1:]
    main(Path(at), Path(model), Path(known), which, int(seed), Path(output))
