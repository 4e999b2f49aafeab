"""ASE: `atoms.calc = mdplug.Calculator(potential)`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ase.calculators.calculator import Calculator as AseCalculator
from ase.calculators.calculator import all_changes

from mdplug.deployed import call, check_species, deploy
from mdplug.pairs import PairList
from mdplug.potential import Model, device_of
from mdplug.system import AtomicSystem

if TYPE_CHECKING:
    from ase import Atoms

_INFO = ("charge", "spin")
_VOIGT = [0, 4, 8, 5, 2, 1]  # xx yy zz yz xz xy in a flat matrix
_ARRAYS = ("positions", "numbers", "initial_charges", "initial_magmoms")


def _same(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    # To the last bit, and a small part of the time of np.array_equal.
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and one.tobytes() == other.tobytes()


class Calculator(AseCalculator):
    """An ASE calculator around a potential.

    Energies are totals (atomic reference energies included, float64). One evaluation gives every property: "energy",
    "free_energy" (the same), "forces" (eV/A), "energies" (per atom, eV), "stress" (eV/A^3, Voigt order xx yy zz yz xz
    xy, tension positive; only with three periodic directions) and, where the potential has them, "charges" (e).
    `atoms.info["charge"]` (e) and `atoms.info["spin"]` (2S+1) are read.

    It has no options: dtype, device and head belong to `mdplug.load`.

    Args:
        potential: what `mdplug.load` gives, a Potential or a Deployed one; or a file or model name, loaded as is.
    """

    def __init__(self, potential: Model | str | Path):
        super().__init__()
        if isinstance(potential, str | Path):
            from mdplug.artifact import load

            potential = load(potential)
        self.potential = deploy(potential)
        self.spec = self.potential.spec
        self.device = device_of(self.potential)
        self.implemented_properties = ["energy", "free_energy", "forces", "energies", "stress"]
        if "charge" in self.spec.outputs:
            self.implemented_properties.append("charges")
        self._pairs = PairList(self.spec.cutoff)
        self._known: tuple[tuple[Any, ...], bytes, AtomicSystem, np.ndarray, float, float] | None = None
        if not self.spec.conservative:
            warnings.warn(
                f"potential {self.spec.name!r} is not conservative: its forces are not the slope of its energy",
                stacklevel=2,
            )

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What differs from the atoms of the results, to the last bit: ASE's names, and charge and spin of `info`."""
        mine = self.atoms
        if mine is None or len(mine) != len(atoms):
            return list(all_changes)
        changes = [key for key in _ARRAYS if not _same(mine.arrays.get(key), atoms.arrays.get(key))]
        if not _same(mine.cell.array, atoms.cell.array):
            changes.append("cell")
        if not _same(mine.pbc, atoms.pbc):
            changes.append("pbc")
        return changes + [key for key in _INFO if mine.info.get(key) != atoms.info.get(key)]

    def calculate(self, atoms: Atoms | None = None, properties: Any = None, system_changes: Any = all_changes) -> None:
        """Fill `results`.

        Raises:
            InputError: NaN positions, an element the potential does not know, a periodic direction without a cell.
        """
        if atoms is not None:
            self.atoms = atoms.copy()
        current: Any = self.atoms
        system, reference, total, volume = self._system(current)
        out = call(self.potential, system, self._pairs.update(system))
        energy = float(out["energy"]) + total
        results = {
            "energy": energy,
            "free_energy": energy,
            "energies": out["atom_energy"].cpu().numpy() + reference,
            "forces": out["forces"].cpu().numpy(),
        }
        if current.pbc.all():
            results["stress"] = out["virial"].cpu().numpy().reshape(9)[_VOIGT] / -volume
        if "charge" in out:
            results["charges"] = out["charge"].cpu().numpy().astype(np.float64)
        self.results = results

    def _system(self, atoms: Atoms) -> tuple[AtomicSystem, np.ndarray, float, float]:
        """The system, reference energy of each atom (N,) and their sum in eV, volume in A^3.

        What has not changed since the last one is taken from there.
        """
        key = (atoms.numbers.tobytes(), atoms.pbc.tobytes(), *(atoms.info.get(name) for name in _INFO))
        cell = atoms.cell.array.tobytes()
        if self._known is not None and key == self._known[0]:
            _, box, system, reference, total, volume = self._known
            changed = {"positions": self._tensor(atoms.positions)}
            if cell != box:
                changed["cell"] = self._tensor(atoms.cell.array[None])
                volume = float(abs(np.linalg.det(atoms.cell.array)))
            system = system.with_(**changed)
        else:
            system = AtomicSystem.from_ase(atoms, device=self.device)
            check_species(system.numbers, self.spec)
            table = self.spec.atomic_energies.get(self.spec.heads[self.potential.head or 0], {})
            reference = np.array([table.get(symbol, 0.0) for symbol in atoms.get_chemical_symbols()])
            total, volume = float(reference.sum()), float(abs(np.linalg.det(atoms.cell.array)))
        self._known = (key, cell, system, reference, total, volume)
        return system, reference, total, volume

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(array, dtype=np.float64)).to(self.device)

    def todict(self, skip_default: bool = True) -> dict[str, Any]:
        """What ASE's writers store about the calculator."""
        return {"potential": self.spec.name}
