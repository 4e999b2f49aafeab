"""AtomicSystem: one or several structures as a frozen record of tensors.

Conventions: positions and cells in Angstrom, cells as rows (a, b, c), float64 always (potentials narrow the pair
vectors, never the positions). A cell row may be zero only where `pbc` is False.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mdplug.errors import InputError

if TYPE_CHECKING:
    import ase

MAX_Z = 118
# Name -> (one row an atom or one a structure, the other dimensions, dtype).
_FIELDS: dict[str, tuple[bool, tuple[int, ...], torch.dtype]] = {
    "numbers": (True, (), torch.int64),
    "positions": (True, (3,), torch.float64),
    "cell": (False, (3, 3), torch.float64),
    "pbc": (False, (3,), torch.bool),
    "system_index": (True, (), torch.int64),
    "total_charge": (False, (), torch.float64),
    "total_spin": (False, (), torch.float64),
    "head": (False, (), torch.int64),
}


@dataclass(frozen=True)
class AtomicSystem:
    """N atoms in S structures.

    Attributes:
        numbers: (N,) int64 atomic numbers.
        positions: (N, 3) float64, A; wrapped or not.
        cell: (S, 3, 3) float64, A, rows are lattice vectors.
        pbc: (S, 3) bool.
        system_index: (N,) int64, sorted, structure of each atom.
        total_charge: (S,) float64, e.
        total_spin: (S,) float64, multiplicity 2S+1.
        head: (S,) int64, index of the level of theory in potentials that have several.

    Raises:
        InputError: for zero atoms, NaN, an unknown element, a periodic direction without a lattice vector, a flat
            cell, or arrays whose shapes disagree; the message names the atom.
    """

    numbers: Tensor
    positions: Tensor
    cell: Tensor
    pbc: Tensor
    system_index: Tensor
    total_charge: Tensor
    total_spin: Tensor
    head: Tensor

    def __post_init__(self) -> None:
        self._check(_FIELDS)

    def _check(self, names: Iterable[str]) -> None:
        """Check the tensors of these names, the others being known to be right and to fit."""
        n, s = self.numbers.shape[0] if self.numbers.dim() == 1 else -1, self.cell.shape[0]
        for name in names:
            per_atom, rest, dtype = _FIELDS[name]
            value, shape = getattr(self, name), (n if per_atom else s, *rest)
            if value.shape != shape or value.dtype != dtype:
                raise InputError(
                    f"{name} must have shape {shape} and dtype {dtype}, got {tuple(value.shape)} and {value.dtype}; "
                    "build the system with AtomicSystem.from_arrays"
                )
        if n <= 0:
            raise InputError("a system needs at least one atom, got none; check the input structure")
        if "positions" in names:
            self._check_positions()
        if "numbers" in names or "system_index" in names:
            self._check_atoms()
        if "cell" in names or "pbc" in names:
            self._check_cell()

    def _check_positions(self) -> None:
        if math.isfinite(float(self.positions.sum())):  # else: not finite, or no more than a sum that overflows
            return
        bad = ~torch.isfinite(self.positions).all(dim=1)
        if bool(bad.any()):
            atom = int(bad.nonzero()[0, 0])
            raise InputError(f"atom {atom} has a position that is not finite; repair the structure before running it")

    def _check_atoms(self) -> None:
        wrong = (self.numbers < 1) | (self.numbers > MAX_Z)
        if bool(wrong.any()):
            atom = int(wrong.nonzero()[0, 0])
            raise InputError(f"atom {atom} has atomic number {int(self.numbers[atom])}; give real elements (1-{MAX_Z})")
        if self.n_systems < 1 or int(self.system_index.min()) < 0 or int(self.system_index.max()) >= self.n_systems:
            raise InputError("system_index must lie in 0..S-1, S being the number of cells; rebuild the batch")
        if bool((self.system_index[1:] < self.system_index[:-1]).any()):
            raise InputError("atoms of one structure must be contiguous; sort them by system_index")

    def _check_cell(self) -> None:
        if not bool(torch.isfinite(self.cell).all()):
            raise InputError("the cell is not finite; repair the structure before running it")
        zero = (self.cell == 0).all(dim=2)
        missing = (self.pbc & zero).any(dim=1)
        if bool(missing.any()):
            raise InputError(
                f"structure {int(missing.nonzero()[0, 0])} is periodic but has no cell along a periodic direction; "
                "set its cell or switch pbc off"
            )
        filled = filled_cell(self.cell)
        # Volume relative to the product of lengths: scale-free measure of flatness.
        flat = torch.linalg.det(filled).abs() < 1e-6 * torch.linalg.vector_norm(filled, dim=2).prod(dim=1)
        flat = flat & self.pbc.any(dim=1)
        if bool(flat.any()):
            raise InputError(
                f"structure {int(flat.nonzero()[0, 0])} has a flat cell (linearly dependent lattice vectors); check it"
            )

    @property
    def n_atoms(self) -> int:
        """N, atoms of all structures."""
        return int(self.numbers.shape[0])

    @property
    def n_systems(self) -> int:
        """S, structures."""
        return int(self.cell.shape[0])

    @property
    def volume(self) -> Tensor:
        """(S,) volumes in A^3; NaN where a structure is not periodic in all three directions."""
        volume = torch.linalg.det(self.cell).abs()
        return torch.where(self.pbc.all(dim=1), volume, torch.full_like(volume, float("nan")))

    def to(self, device: torch.device | str) -> AtomicSystem:
        """The same system on another device."""
        return AtomicSystem(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def with_(self, **changes: Tensor) -> AtomicSystem:
        """A copy with some tensors replaced and, like a new one's, checked; cheap where these are positions alone."""
        if "numbers" in changes or (changes.keys() - _FIELDS.keys()):
            return replace(self, **changes)
        made = object.__new__(AtomicSystem)
        made.__dict__.update(self.__dict__)
        made.__dict__.update(changes)
        made._check(changes if made.n_systems == self.n_systems else _FIELDS)
        return made

    @classmethod
    def from_arrays(
        cls,
        numbers: Any,
        positions: Any,
        cell: Any = None,
        pbc: Any = False,
        *,
        charge: float = 0.0,
        spin: float = 1.0,
        head: int = 0,
        device: torch.device | str = "cpu",
    ) -> AtomicSystem:
        """One structure from arrays.

        Args:
            numbers: (N,) atomic numbers.
            positions: (N, 3) A.
            cell: (3, 3) rows in A, or None for an open system.
            pbc: bool or three of them.
            charge: total charge, e.
            spin: multiplicity 2S+1.
            head: index of the level of theory.
            device: torch device.
        """

        def f64(x: Any) -> Tensor:
            return torch.as_tensor(np.array(x, dtype=np.float64), device=device)

        number = torch.as_tensor(np.array(numbers, dtype=np.int64).reshape(-1), device=device)
        box = np.zeros((3, 3)) if cell is None else np.array(cell, dtype=np.float64)
        if box.shape != (3, 3):
            raise InputError(f"cell must have shape (3, 3), rows are lattice vectors in A, got {box.shape}")
        periodic = np.broadcast_to(np.array(pbc, dtype=bool), (3,)).copy()
        return cls(
            numbers=number,
            positions=f64(positions),
            cell=f64(box)[None],
            pbc=torch.as_tensor(periodic, device=device)[None],
            system_index=torch.zeros_like(number),
            total_charge=f64([charge]),
            total_spin=f64([spin]),
            head=torch.tensor([head], dtype=torch.int64, device=device),
        )

    @classmethod
    def from_ase(cls, atoms: ase.Atoms | Sequence[ase.Atoms], *, device: torch.device | str = "cpu") -> AtomicSystem:
        """From ASE Atoms, or a list of them as a batch; `info["charge"]` and `info["spin"]` are read."""
        from ase import Atoms

        if not isinstance(atoms, Atoms):
            return batch([cls.from_ase(one, device=device) for one in atoms])
        return cls.from_arrays(
            atoms.get_atomic_numbers(),
            atoms.get_positions(),
            atoms.cell.array,
            atoms.pbc,
            charge=float(atoms.info.get("charge", 0.0)),
            spin=float(atoms.info.get("spin", 1.0)),
            device=device,
        )

    @classmethod
    def from_pymatgen(cls, structure: Any, *, device: torch.device | str = "cpu") -> AtomicSystem:
        """From a pymatgen Structure or Molecule (ordered; oxidation states are ignored)."""
        lattice = getattr(structure, "lattice", None)
        charge = getattr(structure, "charge", 0.0) or 0.0
        return cls.from_arrays(
            [site.specie.Z for site in structure],
            structure.cart_coords,
            None if lattice is None else lattice.matrix,
            False if lattice is None else lattice.pbc,
            charge=float(charge),
            spin=float(getattr(structure, "spin_multiplicity", 1) or 1) if lattice is None else 1.0,
            device=device,
        )

    @classmethod
    def from_openmm(
        cls, topology: Any, positions_A: Any, box_A: Any = None, *, charge: float = 0.0, spin: float = 1.0
    ) -> AtomicSystem:
        """From an OpenMM topology, positions (N, 3) in A and box vectors (3, 3) in A (None: open)."""
        numbers = []
        for atom in topology.atoms():
            if atom.element is None:
                raise InputError(f"atom {atom.index} ({atom.name}) of the topology has no element; set it")
            numbers.append(atom.element.atomic_number)
        return cls.from_arrays(numbers, positions_A, box_A, box_A is not None, charge=charge, spin=spin)

    def to_ase(self) -> list[ase.Atoms]:
        """ASE Atoms, one a structure, with `info["charge"]` and `info["spin"]`."""
        from ase import Atoms

        result = []
        for s in range(self.n_systems):
            mask = self.system_index == s
            result.append(
                Atoms(
                    numbers=self.numbers[mask].cpu().numpy(),
                    positions=self.positions[mask].cpu().numpy(),
                    cell=self.cell[s].cpu().numpy(),
                    pbc=self.pbc[s].cpu().numpy(),
                    info={"charge": float(self.total_charge[s]), "spin": float(self.total_spin[s])},
                )
            )
        return result


def batch(systems: Iterable[AtomicSystem]) -> AtomicSystem:
    """Concatenate systems; their structures keep their order."""
    parts = list(systems)
    if not parts:
        raise InputError("cannot batch an empty list of systems; give at least one")
    offsets = np.cumsum([0] + [p.n_systems for p in parts])
    joined = {f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(AtomicSystem)}
    joined["system_index"] = torch.cat([p.system_index + int(o) for p, o in zip(parts, offsets, strict=False)])
    return AtomicSystem(**joined)


def filled_cell(cell: Tensor) -> Tensor:
    """(S, 3, 3) cells whose zero rows are replaced by unit vectors orthogonal to the others, so that they invert."""
    if not bool((cell == 0).all(dim=2).any()):
        return cell
    filled = cell.clone()
    for s in range(cell.shape[0]):
        missing = [k for k in range(3) if bool((cell[s, k] == 0).all())]
        # The right singular vectors of zero singular value span what the given rows leave out.
        _, _, vh = torch.linalg.svd(cell[s])
        for row, k in zip(vh[3 - len(missing) :], missing, strict=True):
            filled[s, k] = row
    return filled
