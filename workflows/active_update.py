"""What new labels change: the body is trained on, its members drawn anew, sigma calibrated again; worse is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from ase.io import iread

import mdplug
from mdplug.calibration import Calibration
from mdplug.errors import InputError
from mdplug.potential import Potential
from mdplug.potentials.members import SharedMembers
from mdplug.spec import Spec
from mdplug.workflows import train
from mdplug.workflows._common import Progress, provenance, write_atomic
from mdplug.workflows.active_select import Posterior
from mdplug.workflows.calibrate import ENERGY, FORCES
from mdplug.workflows.calibration_data import Measured, measure
from mdplug.workflows.calibration_fits import FEWEST, fit_environment, fit_scale
from mdplug.workflows.dataset import Labelled, Loader, read, references_of
from mdplug.workflows.ensemble import shared_members
from mdplug.workflows.journal import as_extxyz
from mdplug.workflows.trainer import DivergedError, predictions

PROBES = 16  # random mixtures of members behind a force sigma
DIRECTIONS = 8  # random directions for the forces of a structure, in the fit of members
HELD_MOST = 300  # held-out structures that are looked at
HELD_FMAX_EV_A = 10.0  # and that dynamics can meet: sigma is calibrated for these
HELD_SHARE = 0.15  # of the groups, where no structure is of the split "valid"
EVERY_HELD = 5  # every fifth new label is held out, too
WORSE = 1.05  # largest ratio of the new to the old force error on held-out structures
GENTLER = 0.25  # of the learning rate, for the second try
STEPS = 800  # of the optimiser in an update, about; epochs follow
BATCHES = 12  # of an epoch, about
BATCH_PAIRS = (1000, 8000)
OPTIMISER = {"learning_rate": 0.003, "warm_up_steps": 20, "ema_decay": 0.98}


# --- data


def write_known(paths: Sequence[Path], replay: int, seed: int, output: Path) -> None:
    """The labels that the model was trained on, with a split for each: all held-out ones, `replay` of the others.

    Held out are those of the split "valid" without huge forces; without such a split, whole groups drawn at random.

    Raises:
        InputError: no labels, or nothing to hold out.
    """
    structures = read(paths).structures
    frames = [atoms for path in paths for atoms in iread(path, ":", format="extxyz")]
    rng = np.random.default_rng([seed, 1])
    usable = [k for k, s in enumerate(structures) if s.n_atoms > 1 and s.forces is not None]
    old = [k for k in usable if structures[k].split == "train"]
    held = [k for k in usable if structures[k].split == "valid"]
    if not held:
        groups = sorted({structures[k].group for k in old})
        drawn = {groups[g] for g in rng.permutation(len(groups))[: max(1, round(HELD_SHARE * len(groups)))]}
        held = [k for k in old if structures[k].group in drawn]
        old = [k for k in old if structures[k].group not in drawn]
    held = [k for k in held if _largest_force(structures[k]) <= HELD_FMAX_EV_A]
    if not old or not held:
        raise InputError("the data are of one group, so nothing can be held out; set info['split'] of some to valid")
    out = []
    for split, chosen, most in (("train", old, replay), ("valid", held, HELD_MOST)):
        for k in np.sort(rng.permutation(chosen)[:most]):
            atoms = frames[k]
            atoms.calc = None
            atoms.info |= {"split": split, "group": structures[k].group}
            out.append(atoms)
    write_atomic(output, as_extxyz(out))


def _largest_force(structure: Labelled) -> float:
    return float("nan") if structure.forces is None else float(structure.forces.norm(dim=1).max())


def as_new(labelled: Sequence[Atoms], before: int, weight: float) -> list[Atoms]:
    """New labels with what training reads of them.

    Args:
        before: labels that came earlier. weight: in the loss, beside 1 of the old ones.
    """
    out = []
    for k, atoms in enumerate(labelled):
        one = atoms.copy()
        one.info |= {"config_type": "active", "config_weight": weight}
        one.info["split"] = "valid" if (before + k + 1) % EVERY_HELD == 0 else "train"
        out.append(one)
    return out


# --- the body


@dataclass
class Trained:
    """What came of training on.

    Attributes:
        body: the model file to go on with. accepted: it is the new one. learning_rate: of the last try.
        error_before, error_after: root mean square force error on held-out old labels, eV/A, of the last try.
        new_before, new_after: the same on the new labels that were held out; NaN where there are none.
    """

    body: Path
    accepted: bool
    learning_rate: float
    error_before: float
    error_after: float
    new_before: float
    new_after: float


def force_error(body: Path, structures: Sequence[Labelled]) -> float:
    """Root mean square error of force components, eV/A; NaN without structures."""
    if not structures:
        return float("nan")
    model = _opened(body)
    errors = [
        (out["forces"] - batch.forces).numpy().ravel()
        for batch, out in predictions(model, Loader(structures, model.cutoff, references_of(model)))
    ]
    return float(np.sqrt(np.mean(np.concatenate(errors) ** 2)))


def _opened(path: Path) -> Potential:
    model = mdplug.load(path)
    if not isinstance(model, Potential):
        raise InputError(f"{path} is an exported file; give a .safetensors model file")
    return model


def train_on(
    folder: Path, body: Path, known: Path, new: Path, options: dict[str, Any], threads: int, seed: int,
    progress: Progress,
) -> Trained:  # fmt: skip
    """Train a body on old and new labels; a result that is worse on held-out old ones is refused, after a gentler try.

    Args:
        folder: of the runs; continues. known, new: labelled extended XYZ with splits. options: of `mdplug train`.
    """
    held = [s for s in read([known]).structures if s.split == "valid"]
    fresh = [s for s in read([new]).structures if s.split == "valid"]
    before, new_before = force_error(body, held), force_error(body, fresh)
    spec = _opened(body).spec
    settings = {**_size([known, new], spec), **options}
    optimiser = {**OPTIMISER, **settings.pop("optimiser", {})}
    after = new_after = rate = float("nan")
    for number, factor in enumerate((1.0, GENTLER), 1):
        rate = factor * optimiser["learning_rate"]
        config = train.Config.read(
            given={
                "data": (known, new), "start": body, "output": folder / f"train-{number}", "name": spec.name,
                "dtype": spec.dtype, "exclude_kinds": (), "valid_fraction": 0.0, "seed": seed, "threads": threads,
                **settings, "optimiser": {**optimiser, "learning_rate": rate},
            }
        )  # fmt: skip
        try:
            made = train.run(config, progress=progress).model
        except DivergedError:
            after = new_after = float("inf")
            continue
        after, new_after = force_error(made, held), force_error(made, fresh)
        if after <= WORSE * before:
            return Trained(made, True, rate, before, after, new_before, new_after)
    return Trained(body, False, rate, before, after, new_before, new_after)


def _size(data: Sequence[Path], spec: Spec) -> dict[str, Any]:
    """Batches and epochs that make about `STEPS` steps."""
    structures = [s for s in read(data).structures if s.split == "train"]
    pairs = int(Loader(structures, spec.cutoff, dict.fromkeys(chemical_symbols, 0.0)).n_pairs.sum())
    batch = int(np.clip(pairs / BATCHES, *BATCH_PAIRS))
    return {"batch_pairs": batch, "epochs": max(5, round(STEPS / max(1.0, pairs / batch)))}


# --- members and their calibration


@dataclass
class Fitted:
    """Members on a body, calibrated.

    Attributes:
        model: the file. posterior: of its readout. scores: largest |error| / sigma in each held-out structure.
        sigma: largest sigma in each, eV/A. error: largest force error in each, eV/A.
    """

    model: Path
    posterior: Path
    scores: list[float]
    sigma: list[float]
    error: list[float]


def fit_members(
    folder: Path, body: Path, data: Sequence[Path], members: int, method: str, seed: int, progress: Progress
) -> Fitted:
    """Draw members from all labels and calibrate their sigma with the errors on held-out ones, old and new.

    Args:
        method: how members are drawn, see `last_layer.members_of`.

    Raises:
        InputError: a body without features, too few held-out structures.
    """
    structures = read(data).structures
    old, held = [s for s in structures if s.split == "train"], [s for s in structures if s.split == "valid"]
    made, scale, rows = shared_members(body, old, held, members, method, DIRECTIONS, seed, progress)
    found = measure(made, held, PROBES, seed, progress)
    # Of what the model says of an atom, what dynamics sees at no cost; |F| is not asked.
    distance = {"distance": found.extra["distance"]}
    forces = fit_environment(
        found.errors, found.sigma, components=3, quantity=FORCES, group=found.structure, element=found.number,
        extra=distance,
    )  # fmt: skip
    record: dict[str, Any] = {FORCES: forces.to_dict(), "probes": PROBES, **found.limits(forces)}
    if len(found.energy_errors) >= FEWEST:
        record[ENERGY] = fit_scale(
            found.energy_errors, found.energy_sigma, components=1, quantity=ENERGY, group=found.energy_group
        ).to_dict()
    made.spec = replace(made.spec, calibration=record)
    mdplug.save(made, folder / "ensemble.safetensors")
    Posterior.of(rows, scale).save(folder / "posterior.npz")
    sigma, error, scores = worst(found, made)
    return Fitted(
        folder / "ensemble.safetensors", folder / "posterior.npz", scores.tolist(), sigma.tolist(), error.tolist()
    )


def worst(found: Measured, model: Potential) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each structure: largest calibrated sigma and force error, eV/A, and the largest |error| / sigma.

    Args:
        found: of what `model` says.
    """
    sigma = Calibration.from_dict(model.spec.calibration[FORCES])(**found.columns)
    place = np.unique(found.structure, return_inverse=True)[1]
    out = []
    for values in (sigma, found.errors, found.errors / np.maximum(sigma, 1e-12)):
        largest = np.zeros(int(place.max()) + 1)
        np.maximum.at(largest, place, values)
        out.append(largest)
    return out[0], out[1], out[2]


def with_limit(model: Path, sigma_max_eV_A: float, record: dict[str, Any], output: Path) -> None:
    """A copy of an ensemble that says up to which force sigma it is good, and where it comes from."""
    made = mdplug.load(model, radial="exact")
    if not isinstance(made, Potential):
        raise InputError(f"{model} is an exported file; give a .safetensors model file")
    plain = made.without_kernels()
    plain.spec = replace(
        plain.spec,
        calibration={**plain.spec.calibration, "sigma_max_eV_A": sigma_max_eV_A},
        provenance={**plain.spec.provenance, "active": {**provenance(), **json.loads(json.dumps(record))}},
    )
    mdplug.save(plain, output)


def body_of(model: Path, output: Path) -> None:
    """Write the body of an ensemble to a file of its own.

    Raises:
        InputError: not an ensemble on one body.
    """
    made = mdplug.load(model, radial="exact")
    plain = made.without_kernels() if isinstance(made, Potential) else made
    if not isinstance(plain, SharedMembers):
        raise InputError(
            f"{model} is no ensemble on one body, which is what can be trained on; make one with `mdplug ensemble "
            "MODEL --data LABELS`"
        )
    body: Any = plain.parts[0]
    mdplug.save(body, output)
