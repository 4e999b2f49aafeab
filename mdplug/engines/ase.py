"""ASE: `atoms.calc = mdplug.Calculator(potential)`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
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
from mdplug.uncertainty import Uncertainty, call_with_sigma, has_members, of_energies

if TYPE_CHECKING:
    from ase import Atoms

EXACT = (None, 0)  # probes: all there are; seed
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

    Where the potential has M members, every evaluation also gives their standard deviations (ddof = 1, as they are)
    "energy_sigma" (eV, of the total energy) and "energies_sigma" (per atom, eV), and "energy_members" (M totals, eV).
    "forces_sigma" (N,) eV/A, the root of the summed variances of the components, comes when it is asked for
    (`get_property("forces_sigma")`), at the cost of M - 1 more sets of forces, or estimated inside `probing`.

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
        self.has_members = has_members(self.potential)
        if self.has_members:
            self.implemented_properties += ["energy_sigma", "energies_sigma", "energy_members", "forces_sigma"]
        self.uncertainty: Uncertainty | None = None  # of the results
        self._probing: tuple[int | None, int] | None = None  # probes, seed
        self._probed: tuple[int | None, int] | None = None  # of the results
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
        pairs, probing = self._pairs.update(system), self._probing
        if probing is None and "forces_sigma" in (properties or ()):
            probing = EXACT
        if probing is None:
            out = call(self.potential, system, pairs)
        else:
            out = call_with_sigma(self.potential, system, pairs, *probing)
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
        if self.has_members:
            self.uncertainty = found = of_energies(out, system.system_index, 1)
            results["energy_sigma"] = float(found.energy)
            results["energies_sigma"] = found.atom_energy.cpu().numpy().astype(np.float64)
            results["energy_members"] = found.member_energy[:, 0].cpu().numpy() + total
            if found.forces is not None:
                results["forces_sigma"] = found.forces.cpu().numpy()
        self._probed = probing
        self.results = results

    @contextmanager
    def probing(self, probes: int | None, seed: int = 0) -> Iterator[None]:
        """Inside the block every evaluation also gives "forces_sigma", from so many random mixtures of members.

        Energy and forces stay the same to the last bit; each mixture costs one adjoint.

        Args:
            probes: mixtures; None: M - 1, exact. seed: of the mixtures.
        """
        self._probing = (probes, seed)
        if self._probed != self._probing:
            self.results.pop("forces_sigma", None)  # of others
        try:
            yield
        finally:
            self._probing = None

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
