"""What happens to a structure before its first step: turned to OpenMM's box, relaxed a little."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from mdplug.workflows._common import Caught, Stopped

if TYPE_CHECKING:
    from ase import Atoms

    from mdplug.workflows.md_config import Config

LARGEST_STEP_A = 0.2


def turned(atoms: Atoms) -> tuple[Atoms, np.ndarray]:
    """The atoms in OpenMM's orientation of the box, which XTC and PDB need too, and the rotation."""
    if not atoms.pbc.all():
        return atoms, np.eye(3)
    from mdplug.engines.openmm.topology import reduced_box

    box, rotation = reduced_box(atoms.cell.array)
    out = atoms.copy()
    out.set_cell(box)
    out.set_positions(atoms.positions @ rotation)
    return out, rotation


def minimised(
    atoms: Atoms, potential: Any, config: Config, caught: Caught, progress: Callable[[int, float], None]
) -> Atoms:
    """A relaxed copy; steps are short, so that no hard contact in a packed box throws atoms far.

    Raises:
        Stopped: a signal; nothing is kept.
    """
    from ase.optimize import LBFGS

    from mdplug.engines.ase import Calculator

    out: Atoms = atoms.copy()
    out.calc = Calculator(potential)
    optimiser = LBFGS(out, maxstep=LARGEST_STEP_A, logfile=os.devnull)
    for _ in optimiser.irun(fmax=config.minimise_fmax_eV_A, steps=config.minimise_steps):
        progress(optimiser.nsteps, float(np.linalg.norm(out.get_forces(), axis=1).max()))
        if caught.number is not None:
            raise Stopped(caught.number, f"stopped by {caught.name} while minimising; the same command starts again")
    out.calc = None
    return out
