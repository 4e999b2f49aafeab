"""What an MD run writes: trajectory, log and checkpoint, cut back together to the last checkpoint on a restart."""

from __future__ import annotations

import io
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mdplug.errors import RunFolderError
from mdplug.units import AMU_A2_PER_FS2, BOLTZMANN, G_CM3_PER_AMU_A3, NM
from mdplug.workflows._common import disk_errors, replacing

if TYPE_CHECKING:
    from ase import Atoms


@dataclass
class Frame:
    """A moment of a run.

    Attributes:
        step: steps done. time_ps: time.
        positions: (N, 3) A, molecules whole. velocities: (N, 3) A/fs.
        box: (3, 3) A rows, or None.
        potential_energy, kinetic_energy: eV; the former with atomic reference energies.
        pressure_bar: (3, 3), virial + kinetic, or None.
        forces: (N, 3) eV/A.
        columns: more numbers for the log. arrays: more (N,) arrays for extxyz.
    """

    step: int
    time_ps: float
    positions: np.ndarray
    velocities: np.ndarray
    box: np.ndarray | None
    potential_energy: float
    kinetic_energy: float
    pressure_bar: np.ndarray | None
    forces: np.ndarray
    columns: dict[str, float] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def volume(self) -> float:
        """A^3; NaN without a box."""
        return float("nan") if self.box is None else float(abs(np.linalg.det(self.box)))


def kinetic_energies(masses: np.ndarray, velocities: np.ndarray) -> np.ndarray:
    """(N,) eV."""
    return 0.5 * AMU_A2_PER_FS2 * masses * (velocities**2).sum(axis=1)


def to_atoms(atoms: Atoms, frame: Frame, rotation: np.ndarray) -> Atoms:
    """A frame as ASE Atoms, turned back to the orientation of the input."""
    from ase import units
    from ase.calculators.singlepoint import SinglePointCalculator

    out: Atoms = atoms.copy()
    if frame.box is not None:
        out.set_cell(frame.box @ rotation.T)
    out.set_positions(frame.positions @ rotation.T)
    out.set_velocities(frame.velocities @ rotation.T / units.fs)
    out.info |= {"step": frame.step, "time_ps": frame.time_ps}
    for name, values in frame.arrays.items():
        out.set_array(name, values)
    out.calc = SinglePointCalculator(out, energy=frame.potential_energy, forces=frame.forces @ rotation.T)
    return out


def bare_frame(step: int, time_ps: float, positions: np.ndarray, velocities: np.ndarray, box: Any) -> Frame:
    """A frame without energies and forces."""
    nowhere, unknown = np.full_like(positions, np.nan), float("nan")
    return Frame(step, time_ps, positions, velocities, box, unknown, unknown, None, nowhere)


def extxyz_text(atoms: Atoms) -> str:
    """One frame of extended XYZ."""
    from ase.io import write

    text = io.StringIO()
    write(text, atoms, format="extxyz")
    return text.getvalue()


class AppendFile:
    """A file that only grows, and can be cut back to a size.

    Args:
        path: made where missing.
        size: bytes to keep.
    """

    def __init__(self, path: Path, size: int):
        self.path = path
        with disk_errors(path):
            # Unbuffered: what a full disk refuses must not come up again when the file is closed.
            self._file = path.open("r+b" if path.exists() else "w+b", buffering=0)
            if self._file.seek(0, os.SEEK_END) < size:
                raise RunFolderError(
                    f"{path} is shorter than its checkpoint says; remove the run folder and start again"
                )
            self._file.truncate(size)
            self._file.seek(size)

    def append(self, data: bytes) -> None:
        """Add bytes at the end."""
        with disk_errors(self.path):
            self._write(data)

    def _write(self, data: bytes) -> None:
        while data:
            data = data[self._file.write(data) :]

    def overwrite(self, offset: int, data: bytes) -> None:
        """Replace bytes in place."""
        with disk_errors(self.path):
            self._file.seek(offset)
            self._write(data)
            self._file.seek(0, os.SEEK_END)

    def sync(self) -> int:
        """Everything on disk; the size."""
        with disk_errors(self.path):
            os.fsync(self._file.fileno())
            return self._file.seek(0, os.SEEK_END)

    def close(self) -> None:
        """Close the file; nothing is written by this."""
        self._file.close()


class Trajectory:
    """Frames as XTC, DCD or extxyz, each appended whole.

    mdtraj encodes each frame into a temporary file, whose bytes are appended here: so a full disk is noticed, and the
    file can be cut between frames.
    """

    DCD_FRAMES = 8  # offset of the number of frames in the header

    def __init__(self, path: Path, atoms: Atoms, rotation: np.ndarray, size: int, frames: int):
        self.atoms, self.rotation, self.frames = atoms, rotation, frames
        self.format = path.suffix[1:]
        self._file = AppendFile(path, size)
        if self.format == "dcd" and frames:
            self._count_dcd()

    def write(self, frame: Frame) -> None:
        """Append a frame."""
        if self.format == "extxyz":
            self._file.append(extxyz_text(to_atoms(self.atoms, frame, self.rotation)).encode())
        else:
            with disk_errors(self._file.path), tempfile.TemporaryDirectory() as folder:
                one = Path(folder) / f"frame.{self.format}"
                (_encode_xtc if self.format == "xtc" else _encode_dcd)(one, frame)
                data = one.read_bytes()
            if self.format == "dcd":
                start = _dcd_header(data)
                data = data[start:] if self.frames else _undated(data[:start]) + data[start:]
            self._file.append(data)
        self.frames += 1
        if self.format == "dcd":
            self._count_dcd()

    def _count_dcd(self) -> None:
        self._file.overwrite(self.DCD_FRAMES, self.frames.to_bytes(4, "little"))

    def mark(self) -> dict[str, int]:
        """Size and frames, all on disk."""
        return {"size": self._file.sync(), "frames": self.frames}

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _encode_xtc(path: Path, frame: Frame) -> None:
    from mdtraj.formats import XTCTrajectoryFile

    box = np.zeros((3, 3)) if frame.box is None else frame.box / NM
    with XTCTrajectoryFile(str(path), "w") as file:
        file.write(
            (frame.positions[None] / NM).astype(np.float32),
            time=np.array([frame.time_ps], dtype=np.float32),
            step=np.array([frame.step], dtype=np.int32),
            box=box[None].astype(np.float32),
        )


def _encode_dcd(path: Path, frame: Frame) -> None:
    from mdtraj.formats import DCDTrajectoryFile
    from mdtraj.utils import box_vectors_to_lengths_and_angles

    cell = {}
    if frame.box is not None:
        sides = box_vectors_to_lengths_and_angles(*frame.box)
        cell = {"cell_lengths": np.array([sides[:3]]), "cell_angles": np.array([sides[3:]])}
    with DCDTrajectoryFile(str(path), "w") as file:
        file.write(frame.positions[None].astype(np.float32), **cell)


def _dcd_header(data: bytes) -> int:
    """Bytes before the first frame: three Fortran records."""
    at = 0
    for _ in range(3):
        at += int.from_bytes(data[at : at + 4], "little") + 8
    return at


def _undated(header: bytes) -> bytes:
    """Without the date in the title, so that the same run gives the same file."""
    title = 92 + 4 + 4  # after the first record, the second one's length and its number of lines
    stop = len(header) - 12 - 4
    return header[:title] + b"mdplug".ljust(stop - title) + header[stop:]


COLUMNS = (
    "step",
    "time_ps",
    "temperature_K",
    "potential_energy_eV",
    "kinetic_energy_eV",
    "total_energy_eV",
    "volume_A3",
    "density_g_cm3",
    "pressure_bar",
    *(f"pressure_{ij}_bar" for ij in ("xx", "yy", "zz", "yz", "xz", "xy")),
)


class Log:
    """log.csv: one row a moment; `COLUMNS` name the units.

    Args:
        path: the file. size: bytes to keep.
        mass: of all atoms, amu.
        freedom: degrees of freedom that carry the kinetic energy.
        more: columns that frames bring, besides `COLUMNS`.
    """

    def __init__(self, path: Path, size: int, mass: float, freedom: int, more: tuple[str, ...] = ()):
        self._file = AppendFile(path, size)
        self.mass, self.freedom = mass, max(freedom, 1)
        self.columns = (*COLUMNS, *more)
        self.last: dict[str, float] = {}
        if not size:
            self._file.append((",".join(self.columns) + "\n").encode())

    def write(self, frame: Frame) -> None:
        """Append a row."""
        self.last = row = self.row(frame) | frame.columns
        self._file.append((",".join(_text(name, row[name]) for name in self.columns) + "\n").encode())

    def row(self, frame: Frame) -> dict[str, float]:
        """The numbers of a frame, by column."""
        pressure = np.full((3, 3), np.nan) if frame.pressure_bar is None else frame.pressure_bar
        tensor = [pressure[i, j] for i, j in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1))]
        values = (
            frame.step,
            frame.time_ps,
            2.0 * frame.kinetic_energy / (self.freedom * BOLTZMANN),
            frame.potential_energy,
            frame.kinetic_energy,
            frame.potential_energy + frame.kinetic_energy,
            frame.volume,
            self.mass / frame.volume * G_CM3_PER_AMU_A3,
            float(np.trace(pressure) / 3.0),
            *(float(p) for p in tensor),
        )
        return dict(zip(COLUMNS, values, strict=True))

    def mark(self) -> dict[str, int]:
        """Size, all on disk."""
        return {"size": self._file.sync()}

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _text(name: str, value: float) -> str:
    if name == "step":
        return str(int(value))
    return f"{value:.8f}" if name.endswith("eV") else f"{value:.6g}"


def read_log(path: Path) -> dict[str, np.ndarray]:
    """Columns of a log.csv."""
    table = np.genfromtxt(path, delimiter=",", names=True, deletechars="", ndmin=1)
    return {name: np.atleast_1d(table[name]) for name in table.dtype.names or ()}


def plot_log(path: Path, table: dict[str, np.ndarray], title: str) -> None:
    """Temperature, energy, density, pressure and disagreement of members over time as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [("temperature_K", "temperature / K"), ("potential_energy_eV", "potential energy / eV")]
    panels.append(("total_energy_eV", "total energy / eV"))
    if np.isfinite(table["density_g_cm3"]).any():
        panels += [("density_g_cm3", "density / g cm$^{-3}$"), ("pressure_bar", "pressure / bar")]
    if "sigma_forces_max_eV_A" in table:
        panels.append(("sigma_forces_max_eV_A", "largest $\\sigma_F$ / eV Å$^{-1}$"))
        panels.append(("sigma_energy_eV", "$\\sigma_E$ / eV"))
    figure = Figure(figsize=(8, 1.9 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    time = table["time_ps"]
    for axis, (name, label) in zip(axes, panels, strict=True):
        values = table[name]
        axis.plot(time, values, lw=0.6, alpha=0.5 if len(time) > 200 else 1.0)
        if len(time) > 200:
            width = len(time) // 50
            mean = np.convolve(values, np.ones(width) / width, mode="valid")
            axis.plot(time[width // 2 : width // 2 + len(mean)], mean, lw=1.4)
        axis.set_ylabel(label)
        axis.ticklabel_format(useOffset=False)
    axes[0].set_title(title)
    axes[-1].set_xlabel("time / ps")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def write_checkpoint(path: Path, arrays: dict[str, np.ndarray], record: dict[str, Any]) -> None:
    """State of the engine and sizes of the files in one file, atomically."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        everything: dict[str, Any] = {**arrays, "record": np.frombuffer(json.dumps(record).encode(), dtype=np.uint8)}
        np.savez(file, **everything)


def read_checkpoint(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What `write_checkpoint` wrote.

    Raises:
        RunFolderError: damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
        return arrays, json.loads(arrays.pop("record").tobytes())
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise RunFolderError(f"{path} is damaged ({error}); remove the run folder and start again") from error
