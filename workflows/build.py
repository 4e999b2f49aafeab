"""Liquid boxes from names or SMILES with counts or concentrations: packed, periodic, with molecules and bonds."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from ase.io import iread, write
from pydantic import Field

from mdplug.errors import InputError, MissingExtraError
from mdplug.units import G_CM3_PER_AMU_A3, MOL_L_PER_A3, NM
from mdplug.workflows import _common as common
from mdplug.workflows._common import Progress, disk_errors, replacing, silent
from mdplug.workflows.clusters import molecule_groups
from mdplug.workflows.molecules import MOLECULES, SALTS, Molecule, Template, conformers, resolve

_AMOUNT = re.compile(r"^(?P<value>[0-9.]+(?:[eE][-+]?[0-9]+)?)\s*(?P<unit>mol/L|M|mol/kg|wt%|mol%)?$")
_KINDS = {None: "count", "mol/L": "molarity", "M": "molarity", "mol/kg": "molality", "wt%": "mass", "mol%": "mole"}


class Config(common.Config):
    """What to put into a box.

    ``composition`` is a list of ``what:amount``, separated by blanks or commas. ``what`` is a name (``EC``,
    ``LiPF6``, ``water``), a SMILES, or ``NAME=SMILES``. ``amount`` is a count (``20``), or for solvents ``wt%`` or
    ``mol%`` of the solvent, and for salts ``mol/L`` (of solution, at the given density) or ``mol/kg`` (of solvent).
    With ``n_atoms`` plain numbers are ratios and the box is made about that large; it is needed for ``wt%`` and
    ``mol%``.
    """

    composition: str
    density_g_cm3: float = Field(gt=0, le=25)
    output: Path = Path("box.xyz")
    n_atoms: int | None = Field(None, ge=3)
    seed: int = Field(1, ge=1)
    tolerance_A: float = Field(2.0, gt=0.5, le=5, description="smallest distance of atoms of different molecules")
    conformers: int = Field(3, ge=1, le=50, description="geometries of each flexible molecule that take turns")
    timeout_s: float = Field(300.0, gt=0)


@dataclass
class Result:
    """A packed box.

    Attributes:
        atoms: cubic and periodic, molecules whole; arrays ``mol_id`` (0, 1, ...), ``residue`` (name), ``mol_charge``
            (e, of the atom's molecule); info ``charge`` (e, of the box), ``spin``, ``bonds`` (pairs of atom indices).
        bonds: (n_bonds, 2) int.
        counts: molecules of each name.
        density_g_cm3, box_A: of the box.
        molarity_mol_L: of each name, as achieved.
        output, topology: the files written, None where there are none.
    """

    atoms: Atoms
    bonds: np.ndarray
    counts: dict[str, int]
    density_g_cm3: float
    box_A: float
    molarity_mol_L: dict[str, float]
    output: Path | None = None
    topology: Path | None = None


@dataclass(frozen=True)
class _Item:
    name: str
    molecules: tuple[Molecule, ...]
    value: float
    kind: str

    @property
    def templates(self) -> list[Template]:
        return [conformers(m, 1)[0] for m in self.molecules]

    @property
    def mass(self) -> float:
        return sum(t.mass for t in self.templates)

    @property
    def n_atoms(self) -> int:
        return sum(len(t.numbers) for t in self.templates)


def build(composition: str, *, density_g_cm3: float, **options: Any) -> Result:
    """A packed box without writing a file; ``options`` are the fields of ``Config``.

    Raises:
        InputError: unknown molecule, amounts that make no sense, or no packing at this density.
        MissingExtraError: RDKit or packmol is not installed.
    """
    config = Config(composition=composition, density_g_cm3=density_g_cm3, **options)
    counts = molecule_counts(config)
    atoms, bonds = _pack(config, counts)
    charge = int(atoms.info["charge"])
    if charge:
        text = ", ".join(f"{molecule.name}:{n}" for molecule, n in counts.items())
        warnings.warn(f"the box has a total charge of {charge:+d} e ({text}): add counter-ions", stacklevel=2)
    volume = atoms.get_volume()
    return Result(
        atoms=atoms,
        bonds=bonds,
        counts={molecule.name: n for molecule, n in counts.items()},
        density_g_cm3=float(atoms.get_masses().sum() / volume * G_CM3_PER_AMU_A3),
        box_A=float(atoms.cell.lengths()[0]),
        molarity_mol_L={molecule.name: float(n / volume * MOL_L_PER_A3) for molecule, n in counts.items()},
    )


def run(config: Config, *, progress: Progress = silent) -> Result:
    """Build a box and write it: extended XYZ, and a PDB with CONECT records beside it.

    Raises:
        RunFolderError: the files cannot be written.
        (and what ``build`` raises)
    """
    result = build(**config.model_dump())
    result.output, result.topology = config.output, config.output.with_suffix(".pdb")
    with disk_errors(config.output):
        config.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(config.output) as temporary:
        write(temporary, result.atoms, format="extxyz", write_results=False)
    with replacing(result.topology) as temporary:
        write_pdb(temporary, result.atoms, result.bonds)
    progress(1, 1, f"{len(result.atoms)} atoms, {result.density_g_cm3:.3f} g/cm3")
    return result


def parse_composition(text: str) -> list[_Item]:
    """The items of a composition.

    Raises:
        InputError: naming the item that cannot be read.
    """
    items: dict[str, _Item] = {}
    for part in text.replace(",", " ").split():
        what, colon, amount = part.rpartition(":")
        match = _AMOUNT.match(amount)
        if not colon or not what or match is None:
            raise InputError(f"composition item {part!r}: write name:amount, as in EC:20 or LiPF6:1mol/L")
        try:
            value = float(match["value"])
        except ValueError as error:
            raise InputError(f"composition item {part!r}: {match['value']!r} is not a number") from error
        name, equals, smiles = what.partition("=")
        # A SMILES such as C=O has an = of its own: NAME=SMILES is what is not a SMILES as a whole.
        if equals and re.fullmatch(r"[A-Za-z][A-Za-z0-9]{1,3}", name) and not _is_smiles(what):
            molecules: tuple[Molecule, ...] = (_named(name, smiles, part),)
        else:
            name, molecules = what, resolve(what)
        if name in items:
            raise InputError(f"composition names {name!r} twice")
        if value <= 0:
            raise InputError(f"composition item {part!r}: the amount must be positive")
        items[name] = _Item(name, molecules, value, _KINDS[match["unit"]])
    if not items:
        raise InputError("the composition is empty: write for example 'EC:20 DMC:20 LiPF6:4'")
    return list(items.values())


def _is_smiles(text: str) -> bool:
    from mdplug.workflows.molecules import parse_smiles

    return text in MOLECULES or text in SALTS or parse_smiles(text) is not None


def _named(name: str, smiles: str, part: str) -> Molecule:
    if not _is_smiles(smiles):
        raise InputError(f"composition item {part!r}: {smiles!r} is not a SMILES")
    return Molecule(name, smiles, name.upper()[:3])


def molecule_counts(config: Config) -> dict[Molecule, int]:
    """How many of each molecule or ion; the order is that of the composition.

    Raises:
        InputError: amounts that do not fit together, or a box too small to hold one of each.
    """
    items = parse_composition(config.composition)
    solvents = [i for i in items if i.kind in ("count", "mass", "mole")]
    dissolved = [i for i in items if i.kind in ("molarity", "molality")]
    kinds = {i.kind for i in solvents}
    if len(kinds) > 1 or not solvents:
        raise InputError(
            "amounts mix: give the solvents all as counts, all as wt% or all as mol%, and salts per litre or kg"
        )
    if kinds & {"mass", "mole"}:
        total = sum(i.value for i in solvents)
        if config.n_atoms is None:
            raise InputError("wt% and mol% need n_atoms, the size of the box")
        if abs(total - 100) > 0.5:
            raise InputError(f"the solvents add up to {total:g} %, not 100 %")
    moles = {i.name: i.value / i.mass if i.kind == "mass" else i.value for i in solvents}
    solvent_mass = sum(moles[i.name] * i.mass for i in solvents)
    # Concentrations per litre: c = n / V with V = (solvent + all salts) / density, linear in the salts' moles.
    fixed = {i.name: i.value * solvent_mass / 1000.0 for i in dissolved if i.kind == "molality"}
    per_litre = [i for i in dissolved if i.kind == "molarity"]
    mass = solvent_mass + sum(fixed[i.name] * i.mass for i in dissolved if i.name in fixed)
    share = sum(i.value * i.mass for i in per_litre) / (1000.0 * config.density_g_cm3)
    if share >= 1:
        raise InputError(f"{config.density_g_cm3:g} g/cm3 is less than the salts alone weigh")
    litres = mass / (1.0 - share) / (1000.0 * config.density_g_cm3)
    moles |= fixed | {i.name: i.value * litres for i in per_litre}
    if config.n_atoms is not None:
        factor = config.n_atoms / sum(moles[i.name] * i.n_atoms for i in items)
        moles = {name: value * factor for name, value in moles.items()}
    else:
        for i in solvents:
            if i.value != round(i.value):
                raise InputError(f"{i.name}:{i.value:g} is no whole number of molecules; ratios need n_atoms")
    counts: dict[Molecule, int] = {}
    for i in items:
        number = round(moles[i.name])
        if number < 1:
            raise InputError(f"the box is too small for one {i.name} ({moles[i.name]:.2f} asked for): raise the size")
        for molecule in i.molecules:
            counts[molecule] = counts.get(molecule, 0) + number
    return counts


def _pack(config: Config, counts: dict[Molecule, int]) -> tuple[Atoms, np.ndarray]:
    """Packed atoms and bonds, molecules in the order of ``counts``."""
    blocks: list[tuple[Template, int]] = []
    for molecule, number in counts.items():
        shapes = conformers(molecule, config.conformers, seed=config.seed)
        for k, shape in enumerate(shapes):
            share = number // len(shapes) + (k < number % len(shapes))
            if share:
                blocks.append((shape, share))
    mass = sum(shape.mass * n for shape, n in blocks)
    box = float((mass * G_CM3_PER_AMU_A3 / config.density_g_cm3) ** (1 / 3))
    longest = max(float(np.ptp(shape.positions, axis=0).max()) for shape, _ in blocks)
    if longest + config.tolerance_A > box:
        raise InputError(f"the box of {box:.1f} A is shorter than its molecules ({longest:.1f} A): add molecules")
    numbers = np.concatenate([np.tile(shape.numbers, n) for shape, n in blocks])
    sizes = [len(shape.numbers) for shape, n in blocks for _ in range(n)]
    positions = _packmol(config, blocks, box, len(numbers))
    atoms = Atoms(numbers, positions, cell=[box] * 3, pbc=True)
    atoms.set_array("mol_id", np.repeat(np.arange(len(sizes)), sizes))
    names = [shape.molecule.residue for shape, n in blocks for _ in range(n)]
    charges = [shape.charge for shape, n in blocks for _ in range(n)]
    atoms.set_array("residue", np.repeat(np.array(names), sizes))
    atoms.set_array("mol_charge", np.repeat(np.array(charges), sizes))
    found, start = [], 0
    for shape, n in blocks:
        for _ in range(n):
            found += [(start + a, start + b) for a, b in shape.bonds]
            start += len(shape.numbers)
    bonds = np.array(found, dtype=int).reshape(-1, 2)
    atoms.info = {"charge": int(sum(charges)), "spin": 1, "bonds": bonds.tolist()}
    return atoms, bonds


def packmol_path() -> Path:
    """The packmol program that belongs to this interpreter.

    Raises:
        MissingExtraError: it is not there.
    """
    for name in ("packmol", "packmol.exe"):
        path = Path(sys.executable).parent / name
        if path.exists():
            return path
    raise MissingExtraError(f"packmol is not beside {sys.executable}; install it with: pip install 'mdplug[build]'")


def _packmol(config: Config, blocks: list[tuple[Template, int]], box: float, n_atoms: int) -> np.ndarray:
    """(n, 3) positions by packmol (Martinez et al., J. Comput. Chem. 30, 2157 (2009)), periodic, molecules whole."""
    program = packmol_path()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Packmol meets its tolerance to 0.01 A; a little more is asked for, so that the tolerance itself holds.
        lines = [
            f"tolerance {config.tolerance_A + 0.02:.4f}",
            "filetype xyz",
            "output packed.xyz",
            f"seed {config.seed}",
        ]
        lines += [f"pbc {box:.6f} {box:.6f} {box:.6f}", "nloop 40"]
        for k, (shape, number) in enumerate(blocks):
            write(folder / f"{k}.xyz", shape.atoms(), format="xyz", fmt="%18.10f")
            lines += [f"structure {k}.xyz", f"  number {number}", "end structure"]
        (folder / "packmol.inp").write_text("\n".join(lines) + "\n")
        try:
            # Packmol reads its input twice: it needs a file, a pipe cannot be wound back.
            with (folder / "packmol.inp").open() as stdin:
                done = subprocess.run(
                    [str(program)], stdin=stdin, cwd=folder, capture_output=True, text=True, timeout=config.timeout_s
                )
        except subprocess.TimeoutExpired as error:
            raise InputError(_no_packing(config, f"not done after {config.timeout_s:g} s")) from error
        packed = folder / "packed.xyz"
        if done.returncode != 0 or "Success!" not in done.stdout or not packed.exists():
            raise InputError(_no_packing(config, "packmol gave up"))
        atoms = next(iread(packed, format="xyz"))
    expected = np.concatenate([np.tile(shape.numbers, n) for shape, n in blocks])
    if len(atoms) != n_atoms or (atoms.numbers != expected).any():
        raise InputError("packmol handed back other atoms than it was given")
    return atoms.positions


def _no_packing(config: Config, why: str) -> str:
    return (
        f"no packing at {config.density_g_cm3:g} g/cm3 with {config.tolerance_A:g} A between molecules ({why}): "
        "lower the density or the tolerance; NPT will find the density"
    )


def write_pdb(path: Path, atoms: Atoms, bonds: np.ndarray) -> None:
    """A PDB topology with one residue a molecule and CONECT records for every bond, as OpenMM and mdtraj read it."""
    from openmm import Vec3, unit
    from openmm.app import Element, PDBFile, Topology

    topology = Topology()
    chain = topology.addChain()
    nodes = []
    for group in molecule_groups(atoms):
        residue = topology.addResidue(str(atoms.arrays["residue"][group[0]]), chain)
        symbols = [chemical_symbols[z] for z in atoms.numbers[group]]
        for k, symbol in enumerate(symbols):
            # O, H1, H2: the names by which programs know water.
            number = symbols[: k + 1].count(symbol) if symbols.count(symbol) > 1 else ""
            nodes.append(topology.addAtom(f"{symbol}{number}", Element.getBySymbol(symbol), residue))
    for a, b in bonds:
        topology.addBond(nodes[a], nodes[b])
    lengths = atoms.cell.lengths() / NM
    topology.setPeriodicBoxVectors(
        [Vec3(*(lengths[k] * (k == j) for j in range(3))) for k in range(3)] * unit.nanometer
    )
    with path.open("w") as handle:
        PDBFile.writeFile(topology, (atoms.positions / NM) * unit.nanometer, handle, keepIds=False)
