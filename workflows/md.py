"""Molecular dynamics: NVE, NVT, NPT by OpenMM or ASE, from one structure file; the same call again continues.

The run folder holds config.yaml, topology.pdb, trajectory.xtc (or .dcd, .extxyz), log.csv, log.png, checkpoint.npz,
final.extxyz and summary.yaml.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from pydantic import Field

from mdplug.errors import InputError, SimulationError
from mdplug.registry import resolve
from mdplug.units import PS
from mdplug.workflows._bonds import bond_lengths, bonds_of, broken_bonds, made_whole
from mdplug.workflows._common import (
    ModelConfig,
    Progress,
    RunFolder,
    Stopped,
    catch_signals,
    silent,
    torch_threads,
    write_atomic,
)
from mdplug.workflows._structures import read_structures
from mdplug.workflows.md_files import (
    Frame,
    Log,
    Trajectory,
    extxyz_text,
    kinetic_energies,
    plot_log,
    read_checkpoint,
    read_log,
    to_atoms,
    write_checkpoint,
)
from mdplug.workflows.md_start import minimised, turned

if TYPE_CHECKING:
    from ase import Atoms

LOOK_S = 0.5  # between two looks at signals and at atoms that fly apart
NS_DAY = 86.4e-3  # ns/day of one fs/s


class Config(ModelConfig):
    """Options of `mdplug md`."""

    structure: Path = Field(description="structure file: box.xyz of `mdplug build`, PDB, CIF, ... (last frame)")
    output: Path = Field(Path("md"), description="run folder")
    engine: Literal["openmm", "ase"] = Field("openmm", description="openmm or ase")
    ensemble: Literal["nve", "nvt", "npt"] = Field("nvt", description="nve, nvt or npt")
    temperature_K: float = Field(300.0, gt=0, description="temperature in K")
    pressure_bar: float = Field(1.0, description="pressure in bar (npt)")
    time_ps: float = Field(10.0, gt=0, description="total time in ps; a larger one continues a finished run")
    timestep_fs: float = Field(0.5, gt=0, le=10, description="time step in fs")
    friction_per_ps: float = Field(1.0, gt=0, description="friction of the Langevin thermostat in 1/ps")
    barostat_steps: int = Field(25, ge=1, description="steps between moves of OpenMM's Monte-Carlo barostat")
    hydrogen_mass_amu: float | None = Field(None, gt=0, description="heavier hydrogens in amu; default: real masses")
    seed: int = Field(1, ge=0, description="seed of velocities, thermostat and barostat")
    format: Literal["xtc", "dcd", "extxyz"] = Field("xtc", description="trajectory: xtc, dcd or extxyz")
    frame_ps: float = Field(0.05, gt=0, description="time between trajectory frames in ps")
    log_ps: float = Field(0.01, gt=0, description="time between log rows in ps")
    checkpoint_ps: float = Field(0.25, gt=0, description="time between checkpoints in ps")
    minimise: bool = Field(True, description="relax the positions first")
    minimise_steps: int = Field(200, ge=1, description="at most so many steps of it")
    minimise_fmax_eV_A: float = Field(0.1, gt=0, description="down to this force in eV/A")
    max_force_eV_A: float = Field(100.0, gt=0, description="a larger force in eV/A stops the run")
    max_atom_energy_eV: float = Field(10.0, gt=0, description="a larger kinetic energy of an atom in eV stops the run")
    platform: str | None = Field(None, description="OpenMM platform; default: Reference, or CUDA with device cuda")
    allow_non_conservative: bool = Field(False, description="NVE and NPT with forces that are no gradient")


@dataclass
class Result:
    """What a run gave.

    Attributes:
        folder: run folder. steps: done in all. time_ps: the same in ps.
        ns_per_day: speed of this call; NaN where nothing was left to do.
        temperature_K, density_g_cm3: means of the second half of the log; `mdplug analyze` gives errors.
        log: columns of log.csv. picture: the same drawn. trajectory: its file. frames: in it.
        bonds_broken: bonds of the topology that are stretched beyond 1.6 times their length at the start, at the end.
        continued: this call went on from a checkpoint.
    """

    folder: Path
    steps: int
    time_ps: float
    ns_per_day: float
    temperature_K: float
    density_g_cm3: float
    log: dict[str, np.ndarray]
    picture: Path
    trajectory: Path
    frames: int
    bonds_broken: int
    continued: bool


class Engine(Protocol):
    """What a run needs of an engine; see `OpenMMEngine`."""

    masses: np.ndarray
    freedom: int
    grid: int

    @property
    def step(self) -> int: ...
    def prepare(self) -> None: ...
    def advance(self, steps: int) -> None: ...
    def frame(self) -> Frame: ...
    def phase(self) -> tuple[np.ndarray, np.ndarray]: ...
    def box(self) -> np.ndarray | None: ...
    def save(self) -> dict[str, np.ndarray]: ...
    def load(self, arrays: dict[str, np.ndarray]) -> bool: ...


@dataclass
class _Schedule:
    """In steps."""

    total: int
    frame: int
    log: int
    checkpoint: int

    @classmethod
    def of(cls, config: Config) -> _Schedule:
        def steps(time_ps: float) -> int:
            return max(1, round(time_ps * PS / config.timestep_fs))

        checkpoint = steps(config.checkpoint_ps)
        if config.ensemble == "npt" and config.engine == "openmm":
            # The barostat starts to count anew at a checkpoint: with shorter intervals it would never move.
            checkpoint = -(-checkpoint // config.barostat_steps) * config.barostat_steps
        return cls(steps(config.time_ps), steps(config.frame_ps), steps(config.log_ps), checkpoint)

    def next_event(self, step: int) -> int:
        every = (self.frame, self.log, self.checkpoint)
        return min(self.total, *((step // n + 1) * n for n in every))


def run(config: Config, *, progress: Progress = silent) -> Result:
    """Run, or go on with, the MD that `config` describes.

    Raises:
        InputError: a structure, option or model that cannot be right.
        RunFolderError: a folder of another run, a full or read-only disk.
        SimulationError: the guard stopped the run; last_good.extxyz holds the last good frame.
        Stopped: a signal stopped it; the same call goes on.
    """
    atoms = config.prepared(read_structures(config.structure)[-1])
    inputs = [config.structure, resolve(config.model)]
    with (
        catch_signals() as caught,
        torch_threads(config.threads),
        RunFolder(config.output, "md", config, inputs=inputs, may_change=("time_ps", "threads")) as folder,
    ):
        return _Run(config, atoms, folder, caught, progress)()


class _Run:
    def __init__(self, config: Config, atoms: Atoms, folder: RunFolder, caught: Any, progress: Progress):
        self.config, self.folder, self.caught, self.progress = config, folder, caught, progress
        self.schedule = _Schedule.of(config)
        self.bonds = bonds_of(atoms)
        self.atoms, self.rotation = turned(made_whole(atoms, self.bonds))
        self.potential = config.load_model()
        self.checkpoint = folder / "checkpoint.npz"
        self.continued = self.checkpoint.exists()
        self.start = self.atoms
        if config.minimise and not self.continued:
            self.start = minimised(self.atoms, self.potential, config, self.caught, self._minimising)
        self.engine = self._engine()
        self.exact = True

    def _minimising(self, steps: int, fmax: float) -> None:
        self.progress(0, self.schedule.total, f"minimising, step {steps}, fmax {fmax:.2f} eV/A")

    def _engine(self) -> Engine:
        bad = self.folder / "stopped.extxyz"
        if self.config.engine == "ase":
            from mdplug.workflows.md_ase import AseEngine

            if self.config.format != "extxyz" and self.atoms.pbc.any() and not self.atoms.pbc.all():
                raise InputError("xtc and dcd know no cell that is periodic in part; use format extxyz")
            return AseEngine(self.config, self.start, self.potential, bad)
        from mdplug.workflows.md_openmm import OpenMMEngine

        return OpenMMEngine(
            self.config, self.start, self._topology(), self.bonds, self.potential, bad, self.schedule.checkpoint
        )

    def _topology(self) -> Any:
        from mdplug.engines.openmm.topology import topology_from_ase

        names = [str(name) for name in self.atoms.arrays["residue"]] if "residue" in self.atoms.arrays else None
        return topology_from_ase(self.atoms, self.bonds, names)

    def __call__(self) -> Result:
        record: dict[str, Any] = {"trajectory": {"size": 0, "frames": 0}, "log": {"size": 0}}
        if self.continued:
            arrays, record = read_checkpoint(self.checkpoint)
            self.exact = self.engine.load(arrays)
        path = self.folder / f"trajectory.{self.config.format}"
        self.trajectory = Trajectory(path, self.atoms, self.rotation, **record["trajectory"])
        self.log = Log(
            self.folder / "log.csv", record["log"]["size"], float(self.engine.masses.sum()), self.engine.freedom
        )
        try:
            if not self.continued:
                self._begin()
            speed = self._go()
            return self._finish(speed)
        finally:
            self.trajectory.close()
            self.log.close()

    def _begin(self) -> None:
        if not (self.atoms.pbc.any() and not self.atoms.pbc.all()):
            self._write_topology()
        self.engine.prepare()
        frame = self.engine.frame()
        self.trajectory.write(frame)
        self.log.write(frame)
        self._save()

    def _write_topology(self) -> None:
        import io

        from openmm import unit
        from openmm.app import PDBFile

        text = io.StringIO()
        PDBFile.writeFile(self._topology(), self.atoms.positions * unit.angstrom, text)
        write_atomic(self.folder / "topology.pdb", text.getvalue())

    def _save(self) -> None:
        record = {"trajectory": self.trajectory.mark(), "log": self.log.mark()}
        write_checkpoint(self.checkpoint, self.engine.save(), record)

    def _go(self) -> float:
        """Step to the end; ns/day of this call."""
        schedule, first, clock, chunk = self.schedule, self.engine.step, time.perf_counter(), 1
        saved = first
        good = (first, *self.engine.phase(), self.engine.box())
        while (step := self.engine.step) < schedule.total:
            if self.caught.number is not None:
                self._stop(saved)
            began = time.perf_counter()
            count = min(chunk, schedule.next_event(step) - step)
            try:
                self.engine.advance(count)
                step = self.engine.step
                self._check()
                self._record(step)
            except SimulationError as error:
                raise self._failed(error, good) from error
            good = (step, *self.engine.phase(), self.engine.box())
            if step % schedule.checkpoint == 0 or step == schedule.total:
                self._save()
                saved = step
            each = (time.perf_counter() - began) / count
            chunk = max(1, min(2 * chunk, int(LOOK_S / each)))
            self._show(step, (step - first) / (time.perf_counter() - clock))
        steps = self.engine.step - first
        return steps / (time.perf_counter() - clock) * self.config.timestep_fs * NS_DAY if steps else float("nan")

    def _record(self, step: int) -> None:
        write, log = step % self.schedule.frame == 0, step % self.schedule.log == 0 or step == self.schedule.total
        if not (write or log):
            return
        frame = self.engine.frame()
        if write:
            self.trajectory.write(frame)
        if log:
            self.log.write(frame)

    def _show(self, step: int, steps_per_s: float) -> None:
        text = f"{steps_per_s * self.config.timestep_fs * NS_DAY:.3g} ns/day"
        row = self.log.last
        if row:
            text = f"{row['temperature_K']:.0f} K, {text}"
            if np.isfinite(row["density_g_cm3"]):
                text = f"{row['density_g_cm3']:.3f} g/cm3, {text}"
        self.progress(step, self.schedule.total, text)

    def _check(self) -> None:
        """Refuse atoms that fly apart.

        Raises:
            SimulationError: naming them.
        """
        from mdplug.engines.openmm.guard import name_atoms

        positions, velocities = self.engine.phase()
        finite = np.isfinite(positions).all(axis=1) & np.isfinite(velocities).all(axis=1)
        if not finite.all():
            lost = np.flatnonzero(~finite)
            raise SimulationError(
                f"step {self.engine.step}: atom {name_atoms(lost, self.atoms.numbers)} is nowhere (NaN)"
            )
        energy = kinetic_energies(self.engine.masses, velocities)
        worst = int(energy.argmax())
        if energy[worst] > self.config.max_atom_energy_eV:
            fast = np.flatnonzero(energy > self.config.max_atom_energy_eV)
            fast = fast[np.argsort(-energy[fast])]
            raise SimulationError(
                f"step {self.engine.step}: atoms fly apart: {energy[worst]:.3g} eV of kinetic energy on atom "
                f"{name_atoms(fast, self.atoms.numbers)}, limit {self.config.max_atom_energy_eV:g}; relax first, "
                "shorten the time step, or use another model"
            )

    def _failed(
        self, error: SimulationError, good: tuple[int, np.ndarray, np.ndarray, np.ndarray | None]
    ) -> SimulationError:
        step, positions, velocities, box = good
        last = Frame(
            step, step * self.config.timestep_fs / PS, positions, velocities, box, float("nan"), float("nan"), None,
            np.full_like(positions, np.nan),
        )  # fmt: skip
        atoms = to_atoms(self.atoms, last, self.rotation)
        atoms.calc = None
        write_atomic(self.folder / "last_good.extxyz", extxyz_text(atoms))
        self.log.mark()
        return SimulationError(f"{error} (last good frame, step {step}: {self.folder / 'last_good.extxyz'})")

    def _stop(self, saved: int) -> None:
        step = self.engine.step
        if step % self.engine.grid == 0:
            if step != saved:
                self._save()
            saved = step
        raise Stopped(
            self.caught.number,
            f"stopped by {self.caught.name} at step {step}; the same command goes on from step {saved}",
        )

    def _finish(self, speed: float) -> Result:
        config, folder, step = self.config, self.folder, self.engine.step
        frame = self.engine.frame()
        write_atomic(folder / "final.extxyz", extxyz_text(to_atoms(self.atoms, frame, self.rotation)))
        table = read_log(folder / "log.csv")
        conditions = f"{config.ensemble.upper()} at {config.temperature_K:g} K"
        title = f"{config.structure.name}: {conditions} with {self.potential.spec.name}"
        plot_log(folder / "log.png", table, title)
        broken = broken_bonds(frame.positions, frame.box, self.bonds, bond_lengths(self.atoms, self.bonds))
        half = len(table["step"]) // 2
        means = {name: float(column[half:].mean()) for name, column in table.items() if name not in ("step", "time_ps")}
        result = Result(
            folder=folder.path,
            steps=step,
            time_ps=step * config.timestep_fs / PS,
            ns_per_day=speed,
            temperature_K=means["temperature_K"],
            density_g_cm3=means["density_g_cm3"],
            log=table,
            picture=folder / "log.png",
            trajectory=folder / f"trajectory.{config.format}",
            frames=self.trajectory.frames,
            bonds_broken=len(broken),
            continued=self.continued,
        )
        folder.summary(
            steps=step,
            time_ps=result.time_ps,
            ns_per_day=speed,
            atoms=len(self.atoms),
            frames=result.frames,
            bonds=len(self.bonds),
            bonds_broken=[[int(k) for k in self.bonds[b]] for b in broken],
            restart_exact=self.exact,
            means_of_second_half={name: value for name, value in means.items() if np.isfinite(value)},
            files=["topology.pdb", result.trajectory.name, "log.csv", "log.png", "checkpoint.npz", "final.extxyz"],
        )
        return result
