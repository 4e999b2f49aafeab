"""Molecules that liquids are built from: names, SMILES, charges, and geometries with bonds."""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from ase import Atoms

from mdplug.errors import InputError, require


@dataclass(frozen=True)
class Molecule:
    """One kind of molecule or ion.

    Attributes:
        name: what the user types, for example ``EC``.
        smiles: its SMILES, hydrogens implicit.
        residue: residue name of at most four letters for topologies.
        shape: ``"embed"`` for a geometry by RDKit, or ``"octahedral"``/``"tetrahedral"``/``"atom"`` for known ones.
        bond_A: central bond length of the known shapes (A).
    """

    name: str
    smiles: str
    residue: str
    shape: str = "embed"
    bond_A: float = 0.0


@dataclass(frozen=True)
class Template:
    """A geometry of one molecule.

    Attributes:
        molecule: its kind.
        numbers: (n,) atomic numbers.
        positions: (n, 3) A, centred on the centre of mass.
        bonds: pairs of atom indices.
        charge: total charge, e.
    """

    molecule: Molecule
    numbers: np.ndarray
    positions: np.ndarray
    bonds: tuple[tuple[int, int], ...]
    charge: int

    def atoms(self) -> Atoms:
        """The geometry as ASE atoms, with ``charge`` and ``spin`` (2S+1) in ``info``."""
        return Atoms(self.numbers, self.positions, info={"charge": self.charge, "spin": 1})

    @property
    def mass(self) -> float:
        """Mass in amu."""
        return float(self.atoms().get_masses().sum())


# P-F of PF6- in its alkali salts 1.59-1.61 A, B-F of BF4- 1.38-1.41 A (crystal structures; rounded).
_TABLE = (
    Molecule("EC", "O=C1OCCO1", "EC"),
    Molecule("PC", "CC1COC(=O)O1", "PC"),
    Molecule("FEC", "O=C1OCC(F)O1", "FEC"),
    Molecule("VC", "O=C1OC=CO1", "VC"),
    Molecule("DMC", "COC(=O)OC", "DMC"),
    Molecule("EMC", "CCOC(=O)OC", "EMC"),
    Molecule("DEC", "CCOC(=O)OCC", "DEC"),
    Molecule("EA", "CCOC(C)=O", "EA"),
    Molecule("MA", "COC(C)=O", "MA"),
    Molecule("GBL", "O=C1CCCO1", "GBL"),
    Molecule("ACN", "CC#N", "ACN"),
    Molecule("DME", "COCCOC", "DME"),
    Molecule("diglyme", "COCCOCCOC", "DGL"),
    Molecule("DOL", "C1COCO1", "DOL"),
    Molecule("THF", "C1CCOC1", "THF"),
    Molecule("DMSO", "CS(C)=O", "DMS"),
    Molecule("water", "O", "HOH"),
    Molecule("methanol", "CO", "MOH"),
    Molecule("ethanol", "CCO", "EOH"),
    Molecule("Li+", "[Li+]", "LI", "atom"),
    Molecule("Na+", "[Na+]", "NA", "atom"),
    Molecule("K+", "[K+]", "K", "atom"),
    Molecule("F-", "[F-]", "F", "atom"),
    Molecule("Cl-", "[Cl-]", "CL", "atom"),
    Molecule("PF6-", "F[P-](F)(F)(F)(F)F", "PF6", "octahedral", 1.60),
    Molecule("BF4-", "F[B-](F)(F)F", "BF4", "tetrahedral", 1.40),
    Molecule("FSI-", "O=S(=O)(F)[N-]S(=O)(=O)F", "FSI"),
    Molecule("TFSI-", "O=S(=O)(C(F)(F)F)[N-]S(=O)(=O)C(F)(F)F", "TFS"),
)
MOLECULES = {molecule.name: molecule for molecule in _TABLE}
_ALIASES = {"h2o": "water", "hoh": "water", "mecn": "ACN", "acetonitrile": "ACN", "meoh": "methanol", "etoh": "ethanol"}
_ALIASES |= {name.lower(): name for name in MOLECULES}
_CATIONS = {"Li": "Li+", "Na": "Na+", "K": "K+"}
_ANIONS = {"PF6": "PF6-", "BF4": "BF4-", "FSI": "FSI-", "TFSI": "TFSI-", "F": "F-", "Cl": "Cl-"}
SALTS = {c + a: (_CATIONS[c], _ANIONS[a]) for c in _CATIONS for a in _ANIONS}


def resolve(name: str) -> tuple[Molecule, ...]:
    """The molecule of a name or SMILES, or the ions of a salt such as ``LiPF6``.

    Names match without regard to case where that is unambiguous; what is no name is read as SMILES.

    Raises:
        InputError: neither a known name nor a SMILES; the nearest names are in the message.
    """
    salts = {salt.lower(): ions for salt, ions in SALTS.items()}
    if name in MOLECULES:
        return (MOLECULES[name],)
    if name.lower() in salts:
        return tuple(MOLECULES[ion] for ion in salts[name.lower()])
    if name.lower() in _ALIASES:
        return (MOLECULES[_ALIASES[name.lower()]],)
    if parse_smiles(name) is not None:
        return (Molecule(name, name, "MOL"),)
    known = [*MOLECULES, *SALTS]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(known[:12])}, ..."
    raise InputError(f"{name!r} is neither a known molecule nor a SMILES: {hint}")


def parse_smiles(smiles: str):
    """RDKit's molecule with explicit hydrogens, or None where the text is not a SMILES of one fragment or more."""
    chem = require("rdkit.Chem", extra="build")
    logger = require("rdkit.rdBase", extra="build")
    block = logger.BlockLogs()
    try:
        molecule = chem.MolFromSmiles(smiles)
    finally:
        del block
    return None if molecule is None or molecule.GetNumAtoms() == 0 else chem.AddHs(molecule)


@lru_cache(maxsize=256)
def conformers(molecule: Molecule, count: int = 1, seed: int = 1) -> tuple[Template, ...]:
    """Geometries of one molecule, the same for the same seed.

    Embedded by ETKDG (Riniker and Landrum, J. Chem. Inf. Model. 55, 2562 (2015)) and relaxed by MMFF94, or by UFF
    for molecules that MMFF94 has no parameters for; ions of known shape come as that shape, once.

    Raises:
        InputError: RDKit finds no geometry.
    """
    if molecule.shape != "embed":
        return (_known_shape(molecule),)
    all_chem = require("rdkit.Chem.AllChem", extra="build")
    chem = require("rdkit.Chem", extra="build")
    mol = parse_smiles(molecule.smiles)
    if mol is None:
        raise InputError(f"molecule {molecule.name!r}: {molecule.smiles!r} is not a SMILES")
    ids = list(all_chem.EmbedMultipleConfs(mol, numConfs=count, randomSeed=seed, numThreads=1))
    if not ids:
        raise InputError(
            f"molecule {molecule.name!r}: RDKit finds no geometry for {molecule.smiles!r}; check the SMILES"
        )
    if mol.GetNumAtoms() > 1:
        has_mmff = all_chem.MMFFHasAllMoleculeParams(mol)
        optimise = all_chem.MMFFOptimizeMoleculeConfs if has_mmff else all_chem.UFFOptimizeMoleculeConfs
        optimise(mol, numThreads=1, maxIters=2000)
    numbers = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()])
    bonds = tuple((b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in mol.GetBonds())
    charge = chem.GetFormalCharge(mol)
    return tuple(
        _centred(Template(molecule, numbers, mol.GetConformer(i).GetPositions().copy(), bonds, charge)) for i in ids
    )


def _known_shape(molecule: Molecule) -> Template:
    mol = parse_smiles(molecule.smiles)
    chem = require("rdkit.Chem", extra="build")
    symbols = [atom.GetAtomicNum() for atom in mol.GetAtoms()]
    if molecule.shape == "atom":
        directions: list[tuple[float, float, float]] = []
    elif molecule.shape == "octahedral":
        directions = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
    else:
        s = 1 / math.sqrt(3)
        directions = [(s, s, s), (s, -s, -s), (-s, s, -s), (-s, -s, s)]
    centre = max(range(len(symbols)), key=lambda i: mol.GetAtomWithIdx(i).GetDegree())
    positions = np.zeros((len(symbols), 3))
    ligands = [i for i in range(len(symbols)) if i != centre]
    for i, direction in zip(ligands, directions, strict=True):
        positions[i] = molecule.bond_A * np.array(direction)
    bonds = tuple((centre, i) for i in ligands)
    return Template(molecule, np.array(symbols), positions, bonds, chem.GetFormalCharge(mol))


def _centred(template: Template) -> Template:
    atoms = template.atoms()
    atoms.positions -= atoms.get_center_of_mass()
    return Template(template.molecule, template.numbers, atoms.positions, template.bonds, template.charge)
