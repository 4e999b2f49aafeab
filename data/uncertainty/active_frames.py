"""Labelled frames for the study of active learning: small molecules and clusters by GFN2-xTB dynamics.

    python data/uncertainty/active_frames.py FOLDER

Writes train.extxyz (300 K), pool.extxyz (mostly 300 K, some 600 and 800 K, some compressed) and test.extxyz (600 and
800 K, and compressed, of trajectories of their own). Each trajectory is a group; a file that is there is kept.
"""

import sys
from pathlib import Path

import numpy as np
from ase.io import read, write

from mdplug.workflows.clusters import aggregate, scale_centres
from mdplug.workflows.label import label
from mdplug.workflows.molecules import conformers, resolve
from mdplug.workflows.sampling import DynamicsSettings, langevin, relax
from mdplug.workflows.xtb import XTB

SYSTEMS = ("EC", "DMC", "EC water", "DMC water", "water water water water")
FMAX_EV_A = 30.0
# role, temperature in K, frames, steps of 1 fs between them
TRAJECTORIES = (
    ("train", 300.0, 36, 15),
    ("pool", 300.0, 80, 15),
    ("pool", 600.0, 14, 25),
    ("pool", 800.0, 14, 25),
    ("test", 600.0, 14, 25),
    ("test", 800.0, 14, 25),
)
SETTLE = 150  # steps before the first frame
PRESSED = (0.75, 0.95)  # of the distances of molecules (a lone molecule: 0.93 to 0.98 of all)


def start(system, seed):
    """A cluster at a minimum."""
    rng = np.random.default_rng(seed)
    molecules = [conformers(resolve(name)[0], 1, seed)[0].atoms() for name in system.split()]
    atoms = aggregate(molecules, rng)
    relax(atoms, XTB(restart=True), 200, 0.15)
    atoms.calc = None
    return atoms


def pressed(atoms, rng):
    """A frame with its molecules closer together; a lone molecule shrunk."""
    if len(np.unique(atoms.arrays["mol_id"])) > 1:
        return scale_centres(atoms, rng.uniform(*PRESSED))
    out = atoms.copy()
    out.positions = out.positions.mean(axis=0) + rng.uniform(0.93, 0.98) * (out.positions - out.positions.mean(axis=0))
    return out


def frames(system, role, temperature_K, count, apart, seed):
    """Labelled frames of one trajectory, every seventh (hot and pool: every third) also pressed."""
    rng = np.random.default_rng(seed)
    settings = DynamicsSettings(timestep_fs=1.0, steps=SETTLE + count * apart, save_every=apart)
    plain = XTB()
    found = []
    group = f"{system.replace(' ', '+')}-{role}-{temperature_K:.0f}"
    kept = list(langevin(start(system, seed), XTB(restart=True), settings, temperature_K, rng))[-count:]
    for k, atoms in enumerate(kept):
        wanted = [(f"{temperature_K:.0f}K", atoms)]
        if role == "test" or (role == "pool" and temperature_K == 300.0 and k % 5 == 0):
            wanted.append(("pressed", pressed(atoms, rng)))
        for kind, one in wanted:
            one.info |= {"group": group, "config_type": kind, "system": system.replace(" ", "+"), "split": role}
            done = label(one, plain, "GFN2-xTB")
            if np.linalg.norm(done.arrays["REF_forces"], axis=1).max() < FMAX_EV_A:
                found.append(done)
    return found


def main(folder):
    """Everything."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list] = {}
    for s, system in enumerate(SYSTEMS):
        for k, (role, temperature_K, count, apart) in enumerate(TRAJECTORIES):
            path = folder / f"part-{s}-{k}.extxyz"
            if not path.exists():
                made = frames(system, role, temperature_K, count, apart, 1000 * s + k)
                temporary = path.with_suffix(".tmp")
                write(temporary, made, format="extxyz", write_results=False)
                temporary.rename(path)
                print(path, len(made), flush=True)
            parts.setdefault(role, []).extend(read(path, ":"))
    for role, all_frames in parts.items():
        write(folder / f"{role}.extxyz", all_frames, format="extxyz", write_results=False)
        print(role, len(all_frames))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
