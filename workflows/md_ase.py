"""MD by ASE, for the md task."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import units
from ase.md.verlet import VelocityVerlet

from mdplug.engines.ase import Calculator
from mdplug.errors import InputError, SimulationError
from mdplug.units import BAR, PS
from mdplug.workflows.md_files import Frame, extxyz_text, kinetic_energies

if TYPE_CHECKING:
    from ase import Atoms

    from mdplug.uncertainty import Uncertainty
    from mdplug.workflows.md_config import Config
    from mdplug.workflows.md_monitor import Probing

BAROSTAT_PS = 1.0  # response time of the cell


class AseEngine:
    """ASE dynamics: velocity Verlet (NVE), BAOAB Langevin (NVT), the same with a Langevin cell piston (NPT, isotropic).

    Attributes:
        grid: 1, a checkpoint is exact at any step.
        freedom: degrees of freedom.
    """

    grid = 1

    def __init__(self, config: Config, atoms: Atoms, potential: Any, bad_frame: Path):
        if config.hydrogen_mass_amu is not None:
            raise InputError("hydrogen_mass_amu works with engine openmm only; leave it out or change the engine")
        if config.platform is not None:
            raise InputError("platform works with engine openmm only; leave it out or change the engine")
        self.config, self.atoms, self.bad_frame = config, atoms.copy(), bad_frame
        self.atoms.calc = Calculator(potential)
        if config.ensemble != "nvt" and not potential.spec.conservative and not config.allow_non_conservative:
            raise InputError(
                f"the forces of {potential.spec.name!r} are not the gradient of its energy; run NVT, or allow it with "
                "allow_non_conservative"
            )
        self.masses = self.atoms.get_masses()
        self.step = 0
        self.limit = config.max_force_eV_A
        nve = config.ensemble == "nve"
        self.freedom = 3 * len(atoms) - (3 if nve and len(atoms) > 1 else 0)
        self._random = np.random.default_rng((config.seed, 1))
        self._dynamics: Any = None

    def prepare(self) -> None:
        """Velocities drawn."""
        config = self.config
        drawn = np.random.default_rng((config.seed, 0)).normal(size=(len(self.atoms), 3))
        velocities = np.sqrt(units.kB * config.temperature_K / self.masses)[:, None] * drawn
        if len(self.atoms) > 1:
            velocities -= self.masses @ velocities / self.masses.sum()
        self.atoms.set_velocities(velocities)
        self._check_forces()
        self._start()

    def _start(self) -> None:
        config, step = self.config, self.config.timestep_fs * units.fs
        if config.ensemble == "nve":
            self._dynamics = VelocityVerlet(self.atoms, step)
            return
        try:
            from ase.md.langevinbaoab import LangevinBAOAB
        except ImportError as error:
            raise InputError("NVT and NPT by ASE need a newer ASE (ase.md.langevinbaoab); upgrade ase") from error
        options: dict[str, Any] = {}
        if config.ensemble == "npt":
            tau = BAROSTAT_PS * PS * units.fs
            # The piston mass that ASE's own heuristic gives for this time, spelled out: the heuristic warns.
            mass = (tau / 4.0 / (1.66 * units.fs) * len(self.atoms) ** (1.0 / 6.0)) ** 2
            options = {"externalstress": -config.pressure_bar * BAR, "hydrostatic": True, "P_tau": tau, "P_mass": mass}
        self._dynamics = LangevinBAOAB(
            self.atoms,
            step,
            temperature_K=config.temperature_K,
            T_tau=PS * units.fs / config.friction_per_ps,
            rng=self._random,
            **options,
        )

    def advance(self, steps: int, probing: Probing | None = None) -> None:
        """Go on by so many steps, each checked.

        Args:
            probing: what `uncertainty` will be asked afterwards: the last step's forces share their evaluation with it.

        Raises:
            SimulationError: naming the atom.
        """
        for left in range(steps - 1, -1, -1):
            with nullcontext() if left or probing is None else self.atoms.calc.probing(*probing):
                self._dynamics.step()
            self.step += 1
            self._check_forces()

    def uncertainty(self, probing: Probing | None) -> Uncertainty:
        """How far members disagree at the present positions; on forces too, with (probes, seed)."""
        calculator = self.atoms.calc
        if probing is None:
            self.atoms.get_potential_energy()
        else:
            with calculator.probing(*probing):
                calculator.get_property("forces_sigma", self.atoms)
        return calculator.uncertainty

    def _check_forces(self) -> None:
        size = np.sqrt((self.atoms.get_forces() ** 2).sum(axis=1))
        if not size.max() <= self.limit:  # NaN fails too
            worst = int(np.argmax(np.where(np.isfinite(size), size, np.inf)))
            self.bad_frame.write_text(extxyz_text(self.atoms))
            raise SimulationError(
                f"step {self.step}: force of {size[worst]:.3g} eV/A, limit {self.limit:g}, on atom {worst} "
                f"({self.atoms.symbols[worst]}); relax the structure first, shorten the time step, or use another model"
            )

    def frame(self) -> Frame:
        """Where the run is."""
        positions, velocities = self.phase()
        pressure = None
        if self.atoms.pbc.all():
            momenta, volume = self.atoms.get_momenta(), self.atoms.get_volume()
            kinetic = (momenta.T / self.masses) @ momenta / volume
            pressure = (kinetic - self.atoms.get_stress(voigt=False)) / BAR
        return Frame(
            step=self.step,
            time_ps=self.step * self.config.timestep_fs / PS,
            positions=positions,
            velocities=velocities,
            box=self.box(),
            potential_energy=self.atoms.get_potential_energy(),
            kinetic_energy=float(kinetic_energies(self.masses, velocities).sum()),
            pressure_bar=pressure,
            forces=self.atoms.get_forces(),
        )

    def phase(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions (A) and velocities (A/fs)."""
        return self.atoms.get_positions(), self.atoms.get_velocities() * units.fs

    def box(self) -> np.ndarray | None:
        """(3, 3) A, or None."""
        return self.atoms.cell.array.copy() if self.atoms.pbc.all() else None

    def save(self) -> dict[str, np.ndarray]:
        """Everything to go on from here."""
        arrays = {
            "step": np.array(self.step),
            "positions": self.atoms.get_positions(),
            "momenta": self.atoms.get_momenta(),
            "cell": self.atoms.cell.array.copy(),
            "random": np.frombuffer(json.dumps(self._random.bit_generator.state).encode(), dtype=np.uint8),
        }
        if self.config.ensemble == "npt":
            arrays |= {"piston": np.array(self._dynamics.p_eps), "piston_force": np.array(self._dynamics.force_eps)}
        return arrays

    def load(self, arrays: dict[str, np.ndarray]) -> bool:
        """Go on from what `save` gave; exact."""
        self.step = int(arrays["step"])
        self.atoms.set_cell(arrays["cell"])
        self.atoms.set_positions(arrays["positions"])
        self.atoms.set_momenta(arrays["momenta"])
        self._random.bit_generator.state = json.loads(arrays["random"].tobytes())
        self._start()
        if self.config.ensemble == "npt":
            self._dynamics.p_eps = float(arrays["piston"])
            self._dynamics.force_eps = float(arrays["piston_force"])
        return True
