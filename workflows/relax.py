"""Relax many structures: positions, or positions and cell at a pressure. The same call again goes on."""

from __future__ import annotations

import contextlib
import json
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from mdplug.errors import InputError, MdplugError, SimulationError
from mdplug.registry import resolve
from mdplug.units import GPA
from mdplug.workflows._common import (
    Caught,
    ModelConfig,
    Progress,
    RunFolder,
    Stopped,
    catch_signals,
    silent,
    table_text,
    torch_threads,
    write_atomic,
)
from mdplug.workflows._structures import frames_of
from mdplug.workflows.md_files import extxyz_text

if TYPE_CHECKING:
    from ase import Atoms

VOLUME_RANGE = (0.2, 5.0)  # of the start; a cell that leaves it is not relaxing but falling apart


class Config(ModelConfig):
    """Options of `mdplug relax`."""

    structures: list[Path] = Field(min_length=1, description="structure files, all frames of each")
    output: Path = Field(Path("relax"), description="folder for the results")
    cell: bool = Field(False, description="relax the cell too")
    pressure_GPa: float = Field(0.0, description="pressure in GPa, with cell")
    fmax_eV_A: float = Field(0.01, gt=0, description="converged below this force in eV/A (with cell: the strain's too)")
    max_steps: int = Field(
        500, ge=1, description="steps for each structure; more of them continue what did not converge"
    )
    optimiser: Literal["lbfgs", "fire"] = Field("lbfgs", description="lbfgs or fire")
    symmetry: bool = Field(False, description="keep the space group")
    symmetry_precision_A: float = Field(0.01, gt=0, description="tolerance of the space group in A")


@dataclass
class Result:
    """What came out.

    Attributes:
        rows: one a structure: file, frame, status (converged, not converged, failed), steps, fmax_eV_A, energies, ...
        table: results.csv. relaxed: all relaxed structures. exit_code: 1 where one did not converge or failed.
    """

    rows: list[dict[str, Any]]
    table: Path
    relaxed: Path
    exit_code: int = field(default=0, repr=False)

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            text = f"{row['file']} [{row['frame']}]: {row['status']}"
            if row.get("error"):
                text += f": {row['error']}"
            else:
                text += f" in {row['steps']} steps, fmax {row['fmax_eV_A']:.4f} eV/A"
                text += f", dE {row['dE_meV_per_atom']:.2f} meV/atom"
                if "dV_percent" in row:
                    text += f", dV {row['dV_percent']:+.2f} %, {row['space_group_before']} -> {row['space_group']}"
            lines.append(text)
        return "\n".join([*lines, f"files in {self.table.parent}"])


def run(config: Config, *, progress: Progress = silent) -> Result:
    """Relax every frame of every file; what fails is named in the table and does not stop the others.

    Raises:
        InputError: the model or an option is wrong.
        RunFolderError: the folder belongs to another run or cannot be written.
        Stopped: a signal; the same call goes on with the structures that are not done.
    """
    from threadpoolctl import threadpool_limits

    if config.pressure_GPa and not config.cell:
        raise InputError("pressure_GPa needs cell; a fixed cell has the pressure that it has")
    tasks = [
        (f"{k:05d}-{path.stem}", path, frame, atoms)
        for k, (path, frame, atoms) in enumerate(frames_of(config.structures))
    ]
    inputs = [path for path in dict.fromkeys(config.structures) if path.is_file()] + [resolve(config.model)]
    potential = config.load_model()
    with (
        catch_signals() as caught,
        torch_threads(config.threads),
        # Matrices of the optimisers are small: threads only stand in each other's way.
        threadpool_limits(1, user_api="blas"),
        RunFolder(config.output, "relax", config, inputs=inputs, may_change=("threads", "max_steps")) as folder,
    ):
        rows = []
        for k, (name, path, frame, atoms) in enumerate(tasks):
            progress(k, len(tasks), path.name)
            rows.append(_resumed(config, potential, folder, name, path, frame, atoms, caught))
            write_atomic(folder / "results.csv", table_text(rows))
        done = [folder / f"{name}.extxyz" for name, *_ in tasks]
        write_atomic(folder / "relaxed.extxyz", "".join(one.read_text() for one in done if one.exists()))
        counts = {s: sum(row["status"] == s for row in rows) for s in ("converged", "not converged", "failed")}
        folder.summary(**counts)
        progress(len(tasks), len(tasks), ", ".join(f"{n} {s}" for s, n in counts.items() if n))
        return Result(rows, folder / "results.csv", folder / "relaxed.extxyz", int(counts["converged"] < len(rows)))


def _resumed(
    config: Config,
    potential: Any,
    folder: RunFolder,
    name: str,
    path: Path,
    frame: int,
    atoms: Atoms | MdplugError,
    caught: Caught,
) -> dict[str, Any]:
    """The row of one structure: from an earlier call where it is done, else relaxed now."""
    from ase.io import read

    record, relaxed = folder / f"{name}.json", folder / f"{name}.extxyz"
    row: dict[str, Any] = {"file": str(path), "frame": frame, "status": "failed", "error": ""}
    if isinstance(atoms, MdplugError):
        return {**row, "error": str(atoms)}
    start, begun = atoms, 0
    if record.exists() and relaxed.exists():
        before: dict[str, Any] = json.loads(record.read_text())
        if before["status"] == "converged" or before["steps"] >= config.max_steps:
            return before
        last: Any = read(relaxed)
        start, begun = last, before["steps"]
    try:
        final, numbers = relax(config.prepared(start), potential, config, caught, begun=begun, original=atoms)
    except Stopped:
        raise
    except MdplugError as error:
        return {**row, "error": str(error)}
    row |= numbers
    write_atomic(relaxed, extxyz_text(final))
    write_atomic(record, json.dumps(row, indent=1))
    return row


def relax(
    atoms: Atoms,
    potential: Any,
    config: Config,
    caught: Caught | None = None,
    *,
    begun: int = 0,
    original: Atoms | None = None,
) -> tuple[Atoms, dict[str, Any]]:
    """One structure.

    Args:
        atoms: where to start; left as it is.
        potential: from `mdplug.load`.
        config: options; `structures` and `output` are not looked at.
        caught: signals that stop it.
        begun: steps that an earlier call did. original: where that one started.

    Returns:
        The relaxed atoms and the row of numbers.

    Raises:
        InputError: a cell to relax where there is none. SimulationError: it fell apart.
    """
    from ase.constraints import FixSymmetry
    from ase.filters import FrechetCellFilter
    from ase.optimize import FIRE, LBFGS

    from mdplug.engines.ase import Calculator

    if config.cell and not atoms.pbc.all():
        raise InputError("cell needs a structure that is periodic in three directions; leave it out")
    clock = time.perf_counter()
    calculator = Calculator(potential)
    first = atoms.copy() if original is None else config.prepared(original)
    first.calc = calculator
    energy_before = _enthalpy(first, config)
    work = atoms.copy()
    work.calc = calculator
    periodic = bool(work.pbc.all())
    group_before = space_group(first, config.symmetry_precision_A) if periodic else "-"
    if config.symmetry:
        if not periodic:
            raise InputError("symmetry needs a structure that is periodic in three directions; leave it out")
        with _quiet_spglib():
            work.set_constraint(FixSymmetry(work, symprec=config.symmetry_precision_A))
    target: Any = FrechetCellFilter(work, scalar_pressure=config.pressure_GPa * GPA) if config.cell else work
    optimiser = (LBFGS if config.optimiser == "lbfgs" else FIRE)(target, logfile=os.devnull)
    volume = first.get_volume() if periodic else 1.0
    converged, largest = False, float("inf")
    for done in optimiser.irun(fmax=config.fmax_eV_A, steps=config.max_steps - begun):
        converged = bool(done)
        if caught is not None and caught.number is not None:
            raise Stopped(caught.number, f"stopped by {caught.name}; the same command goes on")
        largest = float(np.linalg.norm(target.get_forces(), axis=1).max())
        if not np.isfinite(largest):
            raise SimulationError(f"forces are not finite after {optimiser.nsteps} steps; check the start or the model")
        if periodic and not VOLUME_RANGE[0] < work.get_volume() / volume < VOLUME_RANGE[1]:
            raise SimulationError(
                f"the cell went to {work.get_volume() / volume:.2f} times its volume in {optimiser.nsteps} steps; the "
                "model does not hold this structure together"
            )
    steps = begun + optimiser.nsteps
    work.set_constraint()
    energy = _enthalpy(work, config)
    row: dict[str, Any] = {
        "status": "converged" if converged else "not converged",
        "steps": steps,
        "atoms": len(work),
        "formula": work.get_chemical_formula(),
        "fmax_eV_A": largest,
        "energy_eV": work.get_potential_energy(),
        "dE_meV_per_atom": (energy - energy_before) / len(work) * 1e3,
        "rmsd_A": float(np.sqrt(((work.positions - first.positions) ** 2).sum(axis=1).mean())),
    }
    if periodic:
        row |= {
            "volume_A3": work.get_volume(),
            "dV_percent": 100.0 * (work.get_volume() / volume - 1.0),
            "pressure_GPa": float(-work.get_stress()[:3].mean() / GPA),
            "space_group_before": group_before,
            "space_group": space_group(work, config.symmetry_precision_A),
        }
    row["wall_s"] = round(time.perf_counter() - clock, 3)
    return work, row


def _enthalpy(atoms: Atoms, config: Config) -> float:
    """E + pV in eV: what a relaxation at a pressure makes smaller."""
    extra = config.pressure_GPa * GPA * atoms.get_volume() if config.cell else 0.0
    return float(atoms.get_potential_energy()) + extra


def space_group(atoms: Atoms, precision_A: float) -> str:
    """Symbol and number by pymatgen, as "Fm-3m (225)"."""
    from pymatgen.io.ase import AseAtomsAdaptor
    from pymatgen.symmetry.analyzer import SpacegroupAnalyzer

    structure = AseAtomsAdaptor.get_structure(atoms)
    with _quiet_spglib():
        analyzer = SpacegroupAnalyzer(structure, symprec=precision_A)
        return f"{analyzer.get_space_group_symbol()} ({analyzer.get_space_group_number()})"


@contextlib.contextmanager
def _quiet_spglib() -> Iterator[None]:
    """spglib warns at every call that its way to report errors will change; its callers know."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*OLD_ERROR_HANDLING", category=DeprecationWarning)
        yield
