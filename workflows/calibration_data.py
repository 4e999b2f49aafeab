"""Errors of an ensemble on labelled structures beside what its members say of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mdplug.calibration import Calibration
from mdplug.pairs import Pairs
from mdplug.potential import Potential
from mdplug.uncertainty import linearised, of_energies, uncertainty
from mdplug.workflows._common import Progress
from mdplug.workflows.dataset import Labelled, Loader, pair_vectors, references_of

BATCH_PAIRS = 20000


@dataclass(frozen=True)
class Measured:
    """By atom (n,) and by structure (s,).

    Attributes:
        members: how many. errors: length of the force error, eV/A. sigma: of forces, eV/A. number: atomic numbers.
        extra: {"distance": feature distance}, where there is one.
        group, structure: ints, of each atom.
        energy_errors, energy_sigma: eV per atom, of structures with an energy; energy_group: their trajectories.
    """

    members: int
    errors: np.ndarray
    sigma: np.ndarray
    number: np.ndarray
    extra: dict[str, np.ndarray]
    group: np.ndarray
    structure: np.ndarray
    energy_errors: np.ndarray
    energy_sigma: np.ndarray
    energy_group: np.ndarray

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """What a calibration of the force sigma takes."""
        return {"sigma": self.sigma, "number": self.number, **self.extra}

    def largest(self, made: Calibration) -> dict[str, np.ndarray]:
        """Largest raw and calibrated sigma, and distance, in each structure."""
        columns = {"sigma": self.sigma, "calibrated": made(**self.columns)}
        if "distance" in self.extra:
            columns["distance"] = self.extra["distance"]
        place = np.unique(self.structure, return_inverse=True)[1]
        out = {}
        for name, values in columns.items():
            out[name] = np.full(int(place.max()) + 1, -np.inf)
            np.maximum.at(out[name], place, values)
        return out

    def limits(self, made: Calibration) -> dict[str, float]:
        """What one known structure in a thousand passes: its largest calibrated sigma (eV/A) and feature distance."""
        names = {"calibrated": "sigma_max_eV_A", "distance": "distance_max"}
        largest = self.largest(made)
        return {name: float(np.quantile(largest[key], 0.999)) for key, name in names.items() if key in largest}


def measure(model: Potential, structures: Sequence[Labelled], probes: int, seed: int, progress: Progress) -> Measured:
    """Evaluate structures with forces and compare.

    Args:
        probes: random mixtures of members behind the force sigma of each structure.
    """
    loader = Loader(structures, model.cutoff, references_of(model), BATCH_PAIRS)
    groups = {name: k for k, name in enumerate(dict.fromkeys(s.group for s in structures))}
    atoms: dict[str, list[np.ndarray]] = {}
    energies: dict[str, list[np.ndarray]] = {}
    generator = torch.Generator().manual_seed(seed)
    plan, members, done = loader.plan(), 0, 0
    for chosen in plan:
        batch = loader.collate(chosen)
        found_pairs = Pairs(batch.pairs.index, batch.pairs.shifts, pair_vectors(batch))
        found = uncertainty(model, batch.system, found_pairs, probes=probes, generator=generator)
        out, pulled = linearised(model, batch.system, found_pairs)
        forces = pulled({"atom_energy": torch.ones_like(out["atom_energy"])})[0]
        members = found.members
        number = np.array(chosen)
        of_atom = batch.system.system_index.numpy()
        group = np.array([groups[structures[k].group] for k in chosen])
        assert found.forces is not None
        columns = {
            "errors": (forces - batch.forces).norm(dim=1),
            "sigma": found.forces,
            "number": batch.system.numbers,
            **({} if found.distance is None else {"distance": found.distance}),
        }
        for name, value in columns.items():
            atoms.setdefault(name, []).append(value.numpy().astype(float if name != "number" else int))
        atoms.setdefault("group", []).append(group[of_atom])
        atoms.setdefault("structure", []).append(number[of_atom])
        labelled = (batch.energy_weight > 0).numpy()
        energy = of_energies(out, batch.system.system_index, len(chosen)).member_energy.mean(dim=0)
        n = batch.n_atoms.numpy()
        for name, one in (
            ("errors", np.abs((energy - batch.energy).numpy()) / n),
            ("sigma", found.energy.numpy() / n),
            ("group", group),
        ):
            energies.setdefault(name, []).append(one[labelled])
        done += len(chosen)
        progress(done, len(structures), "structures")
    a = {name: np.concatenate(parts) for name, parts in atoms.items()}
    e = {name: np.concatenate(parts) for name, parts in energies.items()}
    extra = {name: a[name] for name in ("distance",) if name in a}
    return Measured(
        members, a["errors"], a["sigma"], a["number"], extra, a["group"], a["structure"],
        e["errors"], e["sigma"], e["group"],
    )  # fmt: skip
