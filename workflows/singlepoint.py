"""Energies, forces and stresses of many structures; one that fails does not stop the others."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from mdplug.errors import InputError, MdplugError
from mdplug.registry import resolve
from mdplug.units import GPA
from mdplug.workflows._common import (
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

if TYPE_CHECKING:
    from ase import Atoms


class Config(ModelConfig):
    """Options of `mdplug singlepoint`."""

    structures: list[Path] = Field(min_length=1, description="structure files, all frames of each")
    output: Path = Field(Path("singlepoint"), description="folder for the results")


@dataclass
class Result:
    """What came out.

    Attributes:
        rows: one a frame: file, frame, atoms, energy_eV, ... or error.
        extxyz, table, json: files written. failed: frames without a result.
        exit_code: 1 where something failed.
    """

    rows: list[dict[str, Any]]
    extxyz: Path
    table: Path
    json: Path
    failed: int = 0
    exit_code: int = field(default=0, repr=False)

    def __str__(self) -> str:
        lines = []
        for row in self.rows:
            name = f"{row['file']} [{row['frame']}]"
            if row["error"]:
                lines.append(f"{name}: {row['error']}")
            else:
                lines.append(f"{name}: {row['energy_eV']:.6f} eV, fmax {row['fmax_eV_A']:.4f} eV/A")
        return "\n".join(
            [*lines, f"{len(self.rows) - self.failed} done, {self.failed} failed; files in {self.table.parent}"]
        )


def one(atoms: Atoms) -> dict[str, Any]:
    """Numbers of a structure whose calculator is set."""
    forces = atoms.get_forces()
    row = {
        "atoms": len(atoms),
        "formula": atoms.get_chemical_formula(),
        "charge_e": atoms.info["charge"],
        "energy_eV": atoms.get_potential_energy(),
        "energy_eV_per_atom": atoms.get_potential_energy() / len(atoms),
        "fmax_eV_A": float(np.linalg.norm(forces, axis=1).max()),
    }
    if atoms.pbc.all():
        stress = atoms.get_stress()
        row |= {"volume_A3": atoms.get_volume(), "pressure_GPa": float(-stress[:3].mean() / GPA)}
    return row


def run(config: Config, *, progress: Progress = silent) -> Result:
    """Evaluate every frame of every file.

    Raises:
        InputError: the model or an option is wrong; or no file could be read at all.
        RunFolderError: the folder belongs to another run or cannot be written.
        Stopped: a signal; nothing is written then.
    """
    from ase.io import write

    from mdplug.engines.ase import Calculator

    frames = frames_of(config.structures)
    readable = [path for path, _, atoms in frames if not isinstance(atoms, MdplugError)]
    if not readable:
        raise InputError(str(frames[0][2]))
    potential = config.load_model()
    inputs = [*dict.fromkeys(readable), resolve(config.model)]
    with (
        catch_signals() as caught,
        torch_threads(config.threads),
        RunFolder(config.output, "singlepoint", config, inputs=inputs, may_change=("threads",)) as folder,
    ):
        calculator = Calculator(potential)
        rows: list[dict[str, Any]] = []
        text = io.StringIO()
        for k, (path, frame, atoms) in enumerate(frames):
            if caught.number is not None:
                raise Stopped(caught.number, f"stopped by {caught.name} after {k} of {len(frames)} structures")
            row: dict[str, Any] = {"file": str(path), "frame": frame, "error": ""}
            try:
                if isinstance(atoms, MdplugError):
                    raise atoms
                current = config.prepared(atoms)
                current.calc = calculator
                row |= one(current)
                current.info |= {"file": str(path), "units": "eV, A"}
                write(text, current, format="extxyz")
            except MdplugError as error:
                row["error"] = str(error)
            rows.append(row)
            progress(k + 1, len(frames), path.name)
        failed = sum(bool(row["error"]) for row in rows)
        write_atomic(folder / "results.extxyz", text.getvalue())
        write_atomic(folder / "results.csv", table_text(rows))
        write_atomic(folder / "results.json", json.dumps(rows, indent=1))
        folder.summary(structures=len(rows), failed=failed)
        return Result(
            rows, folder / "results.extxyz", folder / "results.csv", folder / "results.json", failed, int(failed > 0)
        )
