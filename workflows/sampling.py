"""What the sampling tasks of a recipe share: their common options, their starts, relaxation and dynamics."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.md.langevin import Langevin
from ase.units import fs as ase_fs
from pydantic import BaseModel, ConfigDict, Field

from mdplug.units import BOLTZMANN

CalculatorFactory = Callable[[], Calculator]


class BaseTask(BaseModel):
    """Options of every task."""

    model_config = ConfigDict(extra="forbid")
    name: str
    split: str = "train"
    valid_every: int = Field(0, ge=0, description="every n-th start goes to the split 'valid'; 0: none")
    fmax_eV_A: float = Field(15.0, gt=0, description="structures with a larger force are left out")


class DynamicsSettings(BaseModel):
    """Langevin dynamics from a start; its temperature is one of these."""

    model_config = ConfigDict(extra="forbid")
    temperatures_K: tuple[float, ...] = (300.0, 400.0, 500.0, 700.0)
    timestep_fs: float = Field(default=1.5, gt=0, le=3)
    steps: int = Field(default=30, ge=0)
    save_every: int = Field(default=10, ge=1)
    friction_1_fs: float = Field(default=0.02, gt=0)


@dataclass(frozen=True)
class Start:
    """One independent piece of a recipe: its task, its number in it, its id."""

    seed: int
    task: int
    index: int
    id: str

    def rng(self) -> np.random.Generator:
        """The generator of this start."""
        return np.random.default_rng([self.seed, int(hashlib.sha256(self.id.encode()).hexdigest()[:12], 16)])


def cluster_kind(atoms: Atoms) -> str:
    """solvent, cation, anion or salt: which of Li and P are there."""
    has_lithium, has_phosphorus = (atoms.numbers == 3).any(), (atoms.numbers == 15).any()
    return {(0, 0): "solvent", (1, 0): "cation", (0, 1): "anion", (1, 1): "salt"}[int(has_lithium), int(has_phosphorus)]


def relax(atoms: Atoms, calc: Calculator, steps: int, fmax: float = 0.5) -> None:
    """A bounded minimisation, in place."""
    if steps == 0 or len(atoms) == 1:
        return
    from ase.optimize import FIRE, LBFGS

    atoms.calc = calc
    # FIRE forgives the first contacts of a packed cluster; a molecule's own relaxation wants LBFGS.
    optimiser = (
        FIRE(atoms, logfile=os.devnull, maxstep=0.08, dt=0.2) if fmax > 0.1 else LBFGS(atoms, logfile=os.devnull)
    )
    optimiser.run(fmax=fmax, steps=steps)


def langevin(
    atoms: Atoms, calc: Calculator, settings: DynamicsSettings, temperature_K: float, rng: np.random.Generator
) -> Iterator[Atoms]:
    """Langevin dynamics; a copy every ``save_every`` steps."""
    if settings.steps == 0:
        yield atoms.copy()
        return
    atoms = atoms.copy()
    atoms.calc = calc
    state = np.random.RandomState(int(rng.integers(2**31)))
    spread = np.sqrt(atoms.get_masses() * BOLTZMANN * temperature_K)
    atoms.set_momenta(state.standard_normal((len(atoms), 3)) * spread[:, None])
    engine = Langevin(
        atoms,
        settings.timestep_fs * ase_fs,
        temperature_K=temperature_K,
        friction=settings.friction_1_fs / ase_fs,
        fixcm=False,
        rng=state,
    )
    for _ in range(settings.steps // settings.save_every):
        engine.run(settings.save_every)
        frame = atoms.copy()
        frame.calc = None
        del frame.arrays["momenta"]
        yield frame
