"""GFN-xTB by tblite as an ASE calculator: energy, forces, charges, dipole, stress."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, all_changes

from mdplug.errors import InputError, SimulationError, require
from mdplug.units import BOHR, BOLTZMANN, HARTREE

METHODS = ("GFN2-xTB", "GFN1-xTB")


class XTB(Calculator):
    """GFN2-xTB or GFN1-xTB (Bannwarth et al., J. Chem. Theory Comput. 15, 1652 (2019)) by tblite.

    Total charge (e) and multiplicity 2S+1 are read from ``atoms.info["charge"]`` and ``atoms.info["spin"]``
    (default 1); an unknown charge is refused.

    Args:
        hamiltonian: ``"GFN2-xTB"`` or ``"GFN1-xTB"``.
        accuracy: tblite's SCF accuracy (1.0 is its default: energy to 1e-6 Hartree).
        electronic_temperature_K: Fermi smearing.
        max_iterations: SCF iterations before giving up.
        restart: start each SCF from the last density: faster in dynamics, but then a result depends on its history
            within the SCF accuracy.
    """

    implemented_properties = ["energy", "free_energy", "forces", "charges", "dipole", "stress"]

    def __init__(
        self,
        hamiltonian: str = "GFN2-xTB",
        *,
        accuracy: float = 1.0,
        electronic_temperature_K: float = 300.0,
        max_iterations: int = 250,
        restart: bool = False,
    ) -> None:
        super().__init__()
        if hamiltonian not in METHODS:
            raise InputError(f"hamiltonian {hamiltonian!r} is not one of {', '.join(METHODS)}")
        self.hamiltonian = hamiltonian
        self.accuracy = accuracy
        self.electronic_temperature_K = electronic_temperature_K
        self.max_iterations = max_iterations
        self.warm = restart
        self._last: tuple[Any, Any, tuple] | None = None

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Run one SCF with gradient.

        Raises:
            InputError: no ``charge`` in ``info``.
            SimulationError: the SCF did not converge.
        """
        super().calculate(atoms, list(properties), list(system_changes))
        if self.atoms is None:
            raise InputError("no atoms to calculate")
        atoms = self.atoms
        engine, previous, key = self._engine(atoms)
        library = require("tblite.exceptions", extra="label")
        try:
            result = engine.singlepoint(previous) if previous is not None else engine.singlepoint()
        except library.TBLiteRuntimeError as error:
            self._last = None
            reason = " ".join(str(error).split())
            raise SimulationError(f"{self.hamiltonian} failed for {atoms.get_chemical_formula()}: {reason}") from error
        energy = float(result.get("energy")) * HARTREE
        forces = -np.asarray(result.get("gradient")) * HARTREE / BOHR
        if not (np.isfinite(energy) and np.isfinite(forces).all()):
            self._last = None
            raise SimulationError(f"{self.hamiltonian} gave NaN for {atoms.get_chemical_formula()}")
        self._last = (engine, result, key) if self.warm else None
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}
        self.results["charges"] = np.asarray(result.get("charges"))
        if atoms.pbc.any():
            virial = np.asarray(result.get("virial")) * HARTREE
            self.results["stress"] = (0.5 * (virial + virial.T) / atoms.get_volume()).ravel()[[0, 4, 8, 5, 2, 1]]
        else:
            self.results["dipole"] = np.asarray(result.get("dipole")) * BOHR

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What changed since the last calculation; charge and spin count, which ASE does not look at."""
        changes = super().check_state(atoms, tol)
        if self.atoms is not None and any(atoms.info.get(k) != self.atoms.info.get(k) for k in ("charge", "spin")):
            changes.append("initial_charges")
        return changes

    def _engine(self, atoms: Atoms) -> tuple[Any, Any, tuple]:
        if "charge" not in atoms.info:
            formula = atoms.get_chemical_formula()
            raise InputError(f"the total charge of {formula} is unknown: set info['charge'] (e)")
        charge, spin = float(atoms.info["charge"]), int(atoms.info.get("spin", 1))
        electrons = round(float(atoms.numbers.sum()) - charge)
        if (electrons - (spin - 1)) % 2:
            raise InputError(
                f"{atoms.get_chemical_formula()} with charge {charge:g} has {electrons} electrons, which spin {spin} "
                "(2S+1) does not fit: set info['spin']"
            )
        periodic = bool(atoms.pbc.any())
        key = (tuple(atoms.numbers), charge, spin, tuple(atoms.pbc))
        positions = atoms.positions / BOHR
        lattice = np.asarray(atoms.cell) / BOHR if periodic else None
        if self._last is not None and self._last[2] == key:
            engine, previous, _ = self._last
            engine.update(positions, lattice)
            return engine, previous, key
        interface = require("tblite.interface", extra="label")
        engine = interface.Calculator(
            self.hamiltonian,
            atoms.numbers,
            positions,
            charge=charge,
            uhf=spin - 1,
            lattice=lattice,
            periodic=np.asarray(atoms.pbc) if periodic else None,
        )
        engine.set("verbosity", 0)
        engine.set("accuracy", self.accuracy)
        engine.set("temperature", self.electronic_temperature_K * BOLTZMANN / HARTREE)
        engine.set("max-iter", self.max_iterations)
        return engine, None, key
