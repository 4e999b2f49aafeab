"""Molecular dynamics: NVE, NVT, NPT by OpenMM or ASE, from one structure file; the same call again continues.

The run folder holds config.yaml, topology.pdb, trajectory.xtc (or .dcd, .extxyz), log.csv, log.png, checkpoint.npz,
final.extxyz and summary.yaml.

A potential with members is watched (md_watch.py): log.csv has sigma_energy_eV (of the total energy), and
sigma_forces_max_eV_A with its atom; members.csv has the potential energy of each member and sigma_forces_eV_A.npy the
sigma of each atom, a row for each frame of the trajectory; events.csv says when the limit was passed; uncertain.extxyz
holds frames above it. With policy bias, potential_energy_eV holds bias_energy_eV; the average of a quantity without the
bias is that of exp(bias_log_weight) times it over that of exp(bias_log_weight), since the bias does not depend on time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mdplug.errors import InputError, SimulationError
from mdplug.registry import resolve
from mdplug.units import PS
from mdplug.workflows._bonds import bond_lengths, bonds_of, broken_bonds, made_whole
from mdplug.workflows._common import (
    Progress,
    RunFolder,
    Stopped,
    catch_signals,
    silent,
    torch_threads,
    write_atomic,
)
from mdplug.workflows._structures import read_structures
from mdplug.workflows.md_config import Config, Schedule
from mdplug.workflows.md_files import (
    Frame,
    Log,
    Trajectory,
    bare_frame,
    extxyz_text,
    kinetic_energies,
    plot_log,
    read_checkpoint,
    read_log,
    to_atoms,
    write_checkpoint,
)
from mdplug.workflows.md_start import minimised, turned
from mdplug.workflows.md_watch import Uncertain, Watch, rule_of

if TYPE_CHECKING:
    from ase import Atoms

    from mdplug.uncertainty import Uncertainty
    from mdplug.workflows.md_monitor import Probing

LOOK_S = 0.5  # between two looks at signals and at atoms that fly apart
NS_DAY = 86.4e-3  # ns/day of one fs/s
NO_MEAN = ("step", "time_ps", "sigma_atom")
# What a run that goes on may do otherwise: nothing that moves atoms.
MAY_CHANGE = (
    "time_ps",
    "threads",
    "policy",
    "sigma_max_eV_A",
    "sigma_max_eV",
    "distance_max",
    "collect_max",
    "collect_ps",
)


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
        watched: of an ensemble: "events" above the limit, frames "collected", "largest" disagreement at "largest_step",
            ...; empty without members.
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
    watched: dict[str, Any]


class Engine(Protocol):
    """What a run needs of an engine; see `OpenMMEngine`."""

    masses: np.ndarray
    freedom: int
    grid: int

    @property
    def step(self) -> int: ...
    def prepare(self) -> None: ...
    def advance(self, steps: int, probing: Probing | None = None) -> None: ...
    def uncertainty(self, probing: Probing | None) -> Uncertainty: ...
    def frame(self) -> Frame: ...
    def phase(self) -> tuple[np.ndarray, np.ndarray]: ...
    def box(self) -> np.ndarray | None: ...
    def save(self) -> dict[str, np.ndarray]: ...
    def load(self, arrays: dict[str, np.ndarray]) -> bool: ...


def run(config: Config, *, progress: Progress = silent) -> Result:
    """Run, or go on with, the MD that `config` describes.

    Raises:
        InputError: a structure, option or model that cannot be right.
        RunFolderError: a folder of another run, a full or read-only disk.
        SimulationError: the guard stopped the run; last_good.extxyz holds the last good frame.
        Uncertain: the policy stop ended it (a SimulationError, too).
        Stopped: a signal stopped it; the same call goes on.
    """
    atoms = config.prepared(read_structures(config.structure)[-1])
    inputs = [config.structure, resolve(config.model)]
    with (
        catch_signals() as caught,
        torch_threads(config.threads),
        RunFolder(config.output, "md", config, inputs=inputs, may_change=MAY_CHANGE) as folder,
    ):
        return _Run(config, atoms, folder, caught, progress)()


class _Run:
    def __init__(self, config: Config, atoms: Atoms, folder: RunFolder, caught: Any, progress: Progress):
        self.config, self.folder, self.caught, self.progress = config, folder, caught, progress
        self.schedule = Schedule.of(config)
        self.bonds = bonds_of(atoms)
        self.atoms, self.rotation = turned(made_whole(atoms, self.bonds))
        plain = self.potential = config.load_model()
        if (config.policy == "bias") != (config.bias_strength is not None):
            raise InputError("policy bias and bias_strength belong together; give both or none")
        if config.bias_strength is not None:
            from mdplug.biased import Biased

            self.potential = Biased.of(plain, config.bias_strength)
        self.rule = rule_of(config, self.potential)
        if self.rule is not None:
            self.schedule.look = self.rule.every
        self.checkpoint = folder / "checkpoint.npz"
        self.continued = self.checkpoint.exists()
        self.start = self.atoms
        if config.minimise and not self.continued:
            self.start = minimised(self.atoms, plain, config, self.caught, self._minimising)
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
        self.watch: Watch | None = None
        if self.rule is not None:
            watched = record.get("watch")
            self.watch = Watch(
                self.config, self.rule, self.potential, self.atoms, self.rotation, self.folder.path, watched
            )
        path = self.folder / f"trajectory.{self.config.format}"
        self.trajectory = Trajectory(path, self.atoms, self.rotation, **record["trajectory"])
        more = () if self.watch is None else self.watch.columns
        mass, freedom = float(self.engine.masses.sum()), self.engine.freedom
        self.log = Log(self.folder / "log.csv", record["log"]["size"], mass, freedom, more)
        try:
            if not self.continued:
                self._begin()
            speed = self._go()
            return self._finish(speed)
        except Uncertain as error:
            self.log.mark()
            self.folder.summary(steps=self.engine.step, stopped=str(error), watched=self.watched)
            raise
        finally:
            self.trajectory.close()
            self.log.close()
            if self.watch is not None:
                self.watch.close()

    def _begin(self) -> None:
        if not (self.atoms.pbc.any() and not self.atoms.pbc.all()):
            self._write_topology()
        self.engine.prepare()
        self._record(0)
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
        if self.watch is not None:
            record["watch"] = self.watch.mark()
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
                self.engine.advance(count, self._probing(step + count))
                step = self.engine.step
                self._check()
                self._record(step)
            except Uncertain:
                raise
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

    def _probing(self, step: int) -> Probing | None:
        return self.watch.monitor.probing(step) if self.watch is not None and self.schedule.looks(step) else None

    @property
    def watched(self) -> dict[str, Any]:
        return {} if self.watch is None else self.watch.summary()

    def _record(self, step: int) -> None:
        if self.watch is not None and self.schedule.looks(step):
            self.watch.look(self.engine)
        write, log = self.schedule.writes(step), self.schedule.logs(step)
        if not (write or log):
            return
        frame = self.engine.frame()
        if self.watch is not None:
            frame = self.watch.annotate(frame)
        if write:
            self.trajectory.write(frame)
            if self.watch is not None:
                self.watch.write(frame)
        if log:
            self.log.write(frame)

    def _show(self, step: int, steps_per_s: float) -> None:
        text = f"{steps_per_s * self.config.timestep_fs * NS_DAY:.3g} ns/day"
        row = self.log.last
        if row:
            text = f"{row['temperature_K']:.0f} K, {text}"
            if np.isfinite(row["density_g_cm3"]):
                text = f"{row['density_g_cm3']:.3f} g/cm3, {text}"
        if self.watch is not None and self.watch.text:
            text = f"{self.watch.text}, {text}"
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
        last = bare_frame(step, step * self.config.timestep_fs / PS, positions, velocities, box)
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
        means = {name: float(column[half:].mean()) for name, column in table.items() if name not in NO_MEAN}
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
            watched=self.watched,
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
            watched=self.watched,
            means_of_second_half={name: value for name, value in means.items() if np.isfinite(value)},
            files=["topology.pdb", result.trajectory.name, "log.csv", "log.png", "checkpoint.npz", "final.extxyz"],
        )
        return result
