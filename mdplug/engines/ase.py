"""ASE: `atoms.calc = mdplug.Calculator(potential)`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.calculators.calculator import Calculator as AseCalculator
from ase.calculators.calculator import all_changes
from ase.stress import full_3x3_to_voigt_6_stress

from mdplug.deployed import deploy, evaluate
from mdplug.pairs import PairList
from mdplug.potential import Model, device_of
from mdplug.system import AtomicSystem

if TYPE_CHECKING:
    from ase import Atoms

_INFO = ("charge", "spin")


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
        if not self.spec.conservative:
            warnings.warn(
                f"potential {self.spec.name!r} is not conservative: its forces are not the slope of its energy",
                stacklevel=2,
            )

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """ASE's changes, and those of charge and spin in `atoms.info`, which ASE does not look at."""
        changes: list[str] = super().check_state(atoms, tol)
        if self.atoms is not None:
            changes += [key for key in _INFO if self.atoms.info.get(key) != atoms.info.get(key)]
        return changes

    def calculate(self, atoms: Atoms | None = None, properties: Any = None, system_changes: Any = all_changes) -> None:
        """Fill `results`.

        Raises:
            InputError: NaN positions, an element the potential does not know, a periodic direction without a cell.
        """
        super().calculate(atoms, properties or ["energy"], system_changes)
        current: Any = self.atoms
        system = AtomicSystem.from_ase(current, device=self.device)
        out = evaluate(self.potential, system, self._pairs.update(system))
        energy = float(out.energy[0])
        results = {
            "energy": energy,
            "free_energy": energy,
            "energies": out.atom_energy.cpu().numpy().astype(np.float64) + self._atomic_energies(current),
        }
        if out.forces is not None:
            results["forces"] = out.forces.cpu().numpy()
        if out.stress is not None and current.pbc.all():
            results["stress"] = full_3x3_to_voigt_6_stress(out.stress[0].cpu().numpy())
        if "charge" in out.extras:
            results["charges"] = out.extras["charge"].cpu().numpy().astype(np.float64)
        self.results = results

    def _atomic_energies(self, atoms: Atoms) -> np.ndarray:
        table = self.spec.atomic_energies.get(self.spec.heads[self.potential.head or 0], {})
        return np.array([table.get(symbol, 0.0) for symbol in atoms.get_chemical_symbols()])

    def todict(self, skip_default: bool = True) -> dict[str, Any]:
        """What ASE's writers store about the calculator."""
        return {"potential": self.spec.name}
