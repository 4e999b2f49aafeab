"""Labelled structures: reading extended XYZ, checking the labels, statistics, batches with their pairs ready."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor

from mdplug.errors import InputError
from mdplug.pairs import Pairs, pairs
from mdplug.potential import Model
from mdplug.system import AtomicSystem, batch

ENERGY, FORCES, STRESS, VIRIALS = "REF_energy", "REF_forces", "REF_stress", "REF_virials"
# Outside this range of rms forces (eV/A) no thermal or strained structure lies; kJ/mol/nm and kcal/mol/A do.
PLAUSIBLE_FORCE = (1e-4, 15.0)
# Fitted energy of a hydrogen atom, if the unit were hartree; in eV it is -10 to -17, -1 to -4 if referred to atoms.
HYDROGEN_HARTREE = (-0.75, -0.35)


@dataclass(frozen=True)
class Labelled:
    """One structure with its labels; what is missing is None (energy: NaN).

    Attributes:
        system: the structure. energy: eV, total. forces: (n, 3) eV/A. stress: (3, 3) eV/A^3, = dE/dstrain / V.
        weight: of its terms in the loss. kind: config_type. group: what it descends from. split: train, valid, ...
        file, frame: where it comes from.
    """

    system: AtomicSystem
    energy: float
    forces: Tensor | None
    stress: Tensor | None
    weight: float
    kind: str
    group: str
    split: str
    file: str
    frame: int

    @property
    def n_atoms(self) -> int:
        """Atoms."""
        return self.system.n_atoms

    @property
    def where(self) -> str:
        """File and frame, for messages."""
        return f"{self.file} frame {self.frame}"


@dataclass(frozen=True)
class Dataset:
    """Structures and what was noticed while they were read.

    Attributes:
        structures: all frames. hashes: {file name: sha256}. counts: {what: how many}. warnings: one line each.
    """

    structures: tuple[Labelled, ...]
    hashes: dict[str, str]
    counts: dict[str, int]
    warnings: tuple[str, ...] = ()

    def only(self, split: str) -> list[Labelled]:
        """The structures of one split."""
        return [s for s in self.structures if s.split == split]


def read(paths: Sequence[Path], *, default_split: str = "train") -> Dataset:
    """Read labelled extended XYZ files.

    Keys: info REF_energy (eV, total), REF_stress (eV/A^3) or REF_virials (eV), charge, spin, config_type,
    config_weight, split, group; arrays REF_forces (eV/A).

    Raises:
        InputError: no file, no frame, no label, labels that are not finite, zero everywhere, or in a wrong unit; the
            message names the file and, where there is one, the frame.
    """
    from ase.io import iread

    if not paths:
        raise InputError("no labelled structures are given; name at least one extended XYZ file")
    found: list[Labelled] = []
    hashes: dict[str, str] = {}
    seen: Counter[str] = Counter()
    for path in paths:
        try:
            hashes[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
            frames = list(iread(path, index=":", format="extxyz"))
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; give a labelled extended XYZ file") from error
        except Exception as error:  # ASE's reader raises anything
            raise InputError(f"{path} is not extended XYZ ({' '.join(str(error).split())}); label it again") from error
        if not frames:
            raise InputError(f"{path} holds no structure; label some first")
        for i, atoms in enumerate(frames):
            seen.update(atoms.info.keys() | atoms.arrays.keys())
            found.append(_labelled(atoms, path, i, default_split))
    counts = {
        "structures": len(found),
        "atoms": sum(s.n_atoms for s in found),
        "energies": sum(np.isfinite(s.energy) for s in found),
        "forces": sum(s.forces is not None for s in found),
        "stresses": sum(s.stress is not None for s in found),
    }
    if counts["energies"] == 0 and counts["forces"] == 0:
        other = ", ".join(sorted(k for k in seen if "energy" in k.lower() or "force" in k.lower())) or "none"
        raise InputError(f"{paths[0]} has no labels: {ENERGY} or {FORCES} are wanted, energy-like keys there: {other}")
    return Dataset(tuple(found), hashes, counts, tuple(_check_labels(found, str(paths[0]))))


def _labelled(atoms: Atoms, path: Path, frame: int, default_split: str) -> Labelled:
    where = f"{path} frame {frame}"
    try:
        system = AtomicSystem.from_ase(atoms)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    info = atoms.info
    energy = info.get(ENERGY)
    if energy is None and atoms.calc is not None and "energy" in atoms.calc.results and FORCES not in atoms.arrays:
        raise InputError(
            f"{where} has 'energy' but no {ENERGY}; rename the key, so that its level of theory is certain"
        )
    if energy is not None and not np.isfinite(energy):
        raise InputError(f"{where}: {ENERGY} is not finite; label it again or remove it")
    forces = None
    if FORCES in atoms.arrays:
        values = np.asarray(atoms.arrays[FORCES], dtype=np.float64)
        if values.shape != (len(atoms), 3):
            raise InputError(f"{where}: {FORCES} has shape {values.shape}, {(len(atoms), 3)} is wanted")
        if not np.isfinite(values).all():
            atom = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
            raise InputError(f"{where}: the force on atom {atom} is not finite; label it again or remove it")
        forces = torch.from_numpy(values)
    weight = float(info.get("config_weight", 1.0))
    if not weight >= 0:
        raise InputError(f"{where}: config_weight must not be negative, got {weight}")
    return Labelled(
        system, float("nan") if energy is None else float(energy), forces, _stress(info, system, where), weight,
        str(info.get("config_type", "unnamed")), str(info.get("group", f"{path.name}-{frame}")),
        str(info.get("split", default_split)), path.name, frame,
    )  # fmt: skip


def _stress(info: dict[str, Any], system: AtomicSystem, where: str) -> Tensor | None:
    key = STRESS if STRESS in info else VIRIALS if VIRIALS in info else None
    if key is None:
        return None
    values = np.asarray(info[key], dtype=np.float64).reshape(-1)
    if values.size == 6:  # Voigt: xx yy zz yz xz xy
        xx, yy, zz, yz, xz, xy = values
        values = np.array([xx, xy, xz, xy, yy, yz, xz, yz, zz])
    if values.size != 9 or not np.isfinite(values).all():
        raise InputError(f"{where}: {key} needs 6 (Voigt) or 9 finite numbers, got {values.size}")
    volume = float(system.volume[0])
    if not np.isfinite(volume):
        raise InputError(f"{where} has {key} but is not periodic in three directions; remove the key or set the cell")
    tensor = torch.from_numpy(values.reshape(3, 3).copy())
    return tensor if key == STRESS else -tensor / volume


def _check_labels(found: Sequence[Labelled], where: str) -> Iterator[str]:
    forces = [s.forces for s in found if s.forces is not None and s.n_atoms > 1]
    if forces:
        rms = float(torch.cat(forces).square().mean().sqrt())
        if rms == 0:
            raise InputError(f"{where}: every force is zero; these are not labels, label the structures again")
        if not PLAUSIBLE_FORCE[0] < rms < PLAUSIBLE_FORCE[1]:
            raise InputError(
                f"{where}: rms force {rms:.3g} is not one in eV/A (kcal/mol/A or kJ/mol/nm?); convert {FORCES} to eV/A"
            )
        n_zero = sum(bool((f == 0).all()) for f in forces)
        if n_zero:
            yield f"{n_zero} structures have forces that are all exactly zero"
    energies = np.array([s.energy for s in found if np.isfinite(s.energy)])
    if energies.size and not energies.any():
        raise InputError(f"{where}: every energy is zero; these are not labels, label the structures again")
    if energies.size:
        fit = fit_reference_energies(found)
        hydrogen = fit.values.get("H")
        if hydrogen is not None and HYDROGEN_HARTREE[0] < hydrogen < HYDROGEN_HARTREE[1] and fit.determined("H"):
            raise InputError(
                f"{where}: fitted energy of a hydrogen atom is {hydrogen:.3f}; {ENERGY} seems to be in hartree, "
                "convert it to eV"
            )
    for name, n in (
        ("energy", sum(not np.isfinite(s.energy) for s in found)),
        ("forces", len(found) - len([s for s in found if s.forces is not None])),
    ):
        if n:
            yield f"{n} of {len(found)} structures have no {name}"


@dataclass(frozen=True)
class ReferenceEnergies:
    """Atomic reference energies by least squares.

    Attributes:
        values: {symbol: eV}. rank: of the composition matrix. confounded: elements whose values the compositions leave
            open (the minimum-norm choice was taken). residual_meV_per_atom: rms of what is left.
    """

    values: dict[str, float]
    rank: int
    confounded: tuple[str, ...]
    residual_meV_per_atom: float

    def determined(self, symbol: str) -> bool:
        """Whether the data fix this element's value."""
        return symbol not in self.confounded

    def describe(self) -> str:
        """One line."""
        text = f"reference energies by least squares: rank {self.rank} of {len(self.values)} elements, rest "
        text += f"{self.residual_meV_per_atom:.1f} meV/atom"
        if self.confounded:
            text += f"; {' '.join(self.confounded)} always come in the same ratio, minimum-norm values taken"
        return text


def fit_reference_energies(structures: Sequence[Labelled]) -> ReferenceEnergies:
    """Least squares of total energies per atom on compositions; minimum norm where they leave a choice."""
    used = [s for s in structures if np.isfinite(s.energy)]
    if not used:
        raise InputError("no structure has an energy, so reference energies cannot be fitted; give them")
    species = sorted({int(z) for s in structures for z in s.system.numbers.unique()})
    counts = np.array([[int((s.system.numbers == z).sum()) for z in species] for s in used], dtype=np.float64)
    n = counts.sum(axis=1)
    a, b = counts / n[:, None], np.array([s.energy for s in used]) / n
    values, _, rank, _ = np.linalg.lstsq(a, b, rcond=1e-8)
    _, singular, vt = np.linalg.svd(a, full_matrices=True)
    kernel = vt[int((singular > 1e-8 * singular[0]).sum()) :]
    symbols = [chemical_symbols[z] for z in species]
    confounded = tuple(
        x for x, k in zip(symbols, range(len(species)), strict=True) if np.abs(kernel[:, k]).max(initial=0) > 1e-6
    )
    residual = float(np.sqrt(np.mean((a @ values - b) ** 2))) * 1e3
    return ReferenceEnergies(
        {x: float(v) for x, v in zip(symbols, values, strict=True)}, int(rank), confounded, residual
    )


@dataclass(frozen=True)
class Batch:
    """Structures put together, with labels as tensors; a missing label is 0 with weight 0.

    Attributes:
        system, pairs: what a potential takes.
        energy: (S,) eV, interaction part. forces: (N, 3) eV/A. stress: (S, 3, 3) eV/A^3. n_atoms: (S,).
        energy_weight, forces_weight, stress_weight: (S,) weight of each structure's terms.
    """

    system: AtomicSystem
    pairs: Pairs
    energy: Tensor
    forces: Tensor
    stress: Tensor
    n_atoms: Tensor
    energy_weight: Tensor
    forces_weight: Tensor
    stress_weight: Tensor


def references_of(model: Model) -> dict[str, float]:
    """{symbol: eV} of a model's level of theory for `Loader`; zero where it holds none."""
    known = model.spec.atomic_energies.get(model.spec.heads[model.head or 0], {})
    return dict.fromkeys(chemical_symbols, 0.0) | known


def pair_vectors(batch: Batch) -> Tensor:
    """(E, 3) float64 A, r_j - r_i + shift, of the pairs of a batch, which holds them as indices alone."""
    system, index = batch.system, batch.pairs.index
    cell = system.cell[system.system_index[index[0]]]
    shift = torch.bmm(batch.pairs.shifts.to(cell.dtype).unsqueeze(1), cell).squeeze(1)
    return system.positions[index[1]] - system.positions[index[0]] + shift


@dataclass
class Loader:
    """Batches of structures whose pair lists are found once and kept (labelled structures do not move).

    Args:
        structures: the data. cutoff: A. reference: {symbol: eV}, taken off the energies.
        batch_pairs: pairs per batch at most (a single larger structure makes a batch of its own).
    """

    structures: Sequence[Labelled]
    cutoff: float
    reference: dict[str, float]
    batch_pairs: int = 20000
    _index: list[Tensor] = field(default_factory=list, repr=False)
    _shifts: list[Tensor] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        for s in self.structures:
            try:
                found = pairs(s.system, self.cutoff)
            except InputError as error:
                raise InputError(f"{s.where}: {error}") from error
            self._index.append(found.index.to(torch.int32))
            self._shifts.append(found.shifts.to(torch.int16))
        self.n_pairs = np.array([i.shape[1] for i in self._index], dtype=np.int64)
        self.interaction = [
            s.energy - sum(self.reference[chemical_symbols[int(z)]] for z in s.system.numbers) for s in self.structures
        ]

    def statistics(self) -> dict[str, float]:
        """mean_neighbours, rms_force (eV/A) and mean_interaction_energy (eV/atom): what normalises a network."""
        counts = torch.cat([torch.bincount(i[0].long(), minlength=1) for i in self._index])
        counts = counts[counts > 0]
        forces = [s.forces for s in self.structures if s.forces is not None and s.n_atoms > 1]
        per_atom = [e / s.n_atoms for e, s in zip(self.interaction, self.structures, strict=True) if np.isfinite(e)]
        return {
            "mean_neighbours": float(counts.double().mean()) if len(counts) else 1.0,
            "rms_force": float(torch.cat(forces).square().mean().sqrt()) if forces else 1.0,
            "mean_interaction_energy": float(np.mean(per_atom)) if per_atom else 0.0,
        }

    def plan(self, seed: int | None = None) -> list[list[int]]:
        """Indices of each batch: in order, or shuffled by `seed`; structures of a like size go together."""
        n = len(self.structures)
        order = np.arange(n) if seed is None else np.random.default_rng(seed).permutation(n)
        if seed is not None:
            # Within windows of some batches sort by size: atoms with many neighbours then pad no small molecules.
            window = max(1, int(4 * self.batch_pairs * n / max(1, int(self.n_pairs.sum()))))
            order = np.concatenate([w[np.argsort(self.n_pairs[w])] for w in np.split(order, range(window, n, window))])
        plan: list[list[int]] = []
        room = 0
        for k in order:
            size = int(self.n_pairs[k])
            if not plan or size > room:
                plan.append([])
                room = self.batch_pairs
            plan[-1].append(int(k))
            room -= size
        if seed is not None:
            plan = [plan[k] for k in np.random.default_rng([seed, 1]).permutation(len(plan))]
        return plan

    def collate(self, chosen: Sequence[int]) -> Batch:
        """Put structures together."""
        parts = [self.structures[k] for k in chosen]
        system = batch([p.system for p in parts])
        n_atoms = torch.tensor([p.n_atoms for p in parts], dtype=torch.int64)
        offsets = torch.repeat_interleave(
            torch.cumsum(n_atoms, 0) - n_atoms, torch.tensor([self._index[k].shape[1] for k in chosen])
        )
        index = torch.cat([self._index[k] for k in chosen], dim=1).to(torch.int64) + offsets
        shifts = torch.cat([self._shifts[k] for k in chosen]).to(torch.int64)
        energy = torch.tensor([self.interaction[k] for k in chosen], dtype=torch.float64)
        weight = torch.tensor([p.weight for p in parts], dtype=torch.float64)
        has = {
            "energy": torch.isfinite(energy),
            "forces": torch.tensor([p.forces is not None for p in parts]),
            "stress": torch.tensor([p.stress is not None for p in parts]),
        }
        zero = torch.zeros(3, 3, dtype=torch.float64)
        return Batch(
            system=system,
            pairs=Pairs(index, shifts, torch.zeros(0, 3, dtype=torch.float64)),
            energy=torch.nan_to_num(energy),
            forces=torch.cat([torch.zeros_like(p.system.positions) if p.forces is None else p.forces for p in parts]),
            stress=torch.stack([zero if p.stress is None else p.stress for p in parts]),
            n_atoms=n_atoms,
            energy_weight=weight * has["energy"],
            forces_weight=weight * has["forces"],
            stress_weight=weight * has["stress"],
        )
