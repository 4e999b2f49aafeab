"""Structure files, read and checked: nothing that cannot be matter in Angstrom gets into a task."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mdplug.errors import InputError, MdplugError

if TYPE_CHECKING:
    from ase import Atoms

OVERLAP_A = 0.5  # no two nuclei of matter come closer (H2: 0.74 A)


def read_structures(path: Path) -> list[Atoms]:
    """Every frame of a structure file that ASE reads, checked.

    Raises:
        InputError: naming the file, the frame and the atom.
    """
    from ase.io import iread

    if not path.is_file():
        raise InputError(f"no structure file {path}; check the name")
    try:
        frames = list(iread(path, index=":"))
    except Exception as error:  # ASE's readers raise anything
        raise InputError(
            f"{path} cannot be read as a structure file ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        ) from error
    if not frames:
        raise InputError(f"{path} holds no structure; check the file")
    for number, atoms in enumerate(frames):
        check_structure(atoms, f"{path}" if len(frames) == 1 else f"{path} frame {number}")
    return frames


def check_structure(atoms: Atoms, where: str) -> None:
    """Refuse what cannot be matter in Angstrom.

    Raises:
        InputError: no atoms, unknown elements, NaN, a missing cell, overlapping atoms, or positions in other units.
    """
    from mdplug.pairs import pairs
    from mdplug.system import AtomicSystem

    try:
        system = AtomicSystem.from_ase(atoms)
        close = pairs(system, OVERLAP_A)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    if not close.n_pairs:
        return
    shortest = int(close.distances.argmin())
    i, j = (int(k) for k in close.index[:, shortest])
    distance = float(close.distances[shortest])
    if close.index[0].unique().numel() > max(1, len(atoms) // 2):
        raise InputError(
            f"{where}: most atoms are closer than {OVERLAP_A} A to another (atoms {i} and {j}: {distance:.3f}); are "
            "lengths in nm? mdplug reads Angstrom"
        )
    image = " (its own periodic image)" if i == j else ""
    raise InputError(f"{where}: atoms {i} and {j}{image} overlap, {distance:.3f} A apart; move or remove one of them")


def frames_of(paths: list[Path]) -> list[tuple[Path, int, Atoms | MdplugError]]:
    """(file, frame, atoms, or the error that stands in their place) of every frame of every file."""
    found: list[tuple[Path, int, Atoms | MdplugError]] = []
    for path in paths:
        try:
            found += [(path, k, atoms) for k, atoms in enumerate(read_structures(path))]
        except MdplugError as error:
            found.append((path, 0, error))
    return found
