"""What stops a run: numbers that left the physical world.

OpenMM turns NaN forces into silent ones on GPU platforms and reads a wrongly shaped energy as -1, so everything is
checked here, and the offending frame is kept.
"""

from pathlib import Path

import numpy as np

from mdplug.errors import SimulationError

NAMED = 5  # atoms that a message lists


def name_atoms(atoms: np.ndarray, numbers: np.ndarray) -> str:
    """ "3 (O), 17 (Li)": the first few of the given atoms, with their elements."""
    from ase.data import chemical_symbols

    listed = ", ".join(f"{int(a)} ({chemical_symbols[int(numbers[a])]})" for a in atoms[:NAMED])
    return listed + (f" and {len(atoms) - NAMED} more" if len(atoms) > NAMED else "")


def check_positions(positions: np.ndarray, box: np.ndarray | None, numbers: np.ndarray, when: str) -> None:
    """Refuse positions (N, 3) or a box (3, 3) that are not finite.

    Raises:
        SimulationError: naming the atoms.
    """
    if not np.isfinite(positions).all():
        lost = np.flatnonzero(~np.isfinite(positions).all(axis=1))
        raise SimulationError(
            f"{when}: position not finite for atom {name_atoms(lost, numbers)}; shorten the time step or relax first"
        )
    if box is not None and not np.isfinite(box).all():
        raise SimulationError(f"{when}: the box is not finite; check the barostat and the pressure")


def check_result(
    energy: float, forces: np.ndarray | None, numbers: np.ndarray, max_force_eV_A: float, when: str
) -> None:
    """Refuse an energy (eV) or forces (N, 3; eV/A) that are not finite, misshaped or too large.

    Raises:
        SimulationError: naming the atoms.
    """
    if not np.isfinite(energy):
        raise SimulationError(f"{when}: the model's energy is {energy}; it has left what it was trained on")
    if forces is None:
        return
    if forces.shape != (len(numbers), 3):
        raise SimulationError(f"{when}: the model returned forces of shape {forces.shape}, not {(len(numbers), 3)}")
    if np.vdot(forces, forces) < max_force_eV_A**2:  # what passes here passes below; NaN does not
        return
    size = np.sqrt((forces * forces).sum(axis=1))
    lost = np.flatnonzero(~np.isfinite(size))
    if len(lost):
        raise SimulationError(f"{when}: force not finite on atom {name_atoms(lost, numbers)}")
    worst = int(size.argmax())
    if size[worst] > max_force_eV_A:
        above = np.flatnonzero(size > max_force_eV_A)
        above = above[np.argsort(-size[above])]
        raise SimulationError(
            f"{when}: force of {size[worst]:.3g} eV/A, limit {max_force_eV_A:g}, on atom {name_atoms(above, numbers)}; "
            "relax the structure first, shorten the time step, or use another model"
        )


Frame = tuple[str, np.ndarray, np.ndarray, np.ndarray | None]  # label, numbers, positions A, box A


def write_frames(path: str | Path, frames: list[Frame]) -> None:
    """Write labelled frames as extxyz, atomically; positions that are not finite are written as they are."""
    from ase import Atoms
    from ase.io import write

    images = [
        Atoms(numbers, positions, cell=box, pbc=box is not None, info={"mdplug_frame": label})
        for label, numbers, positions, box in frames
    ]
    target = Path(path)
    temporary = target.with_name(target.name + ".part")
    write(temporary, images, format="extxyz")
    temporary.replace(target)
