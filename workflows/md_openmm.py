"""MD by OpenMM, for the md task."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openmm
from openmm import app, unit

from mdplug.deployed import head_of, reference_energy
from mdplug.engines.openmm import Simulation, check_ensemble, create_system, errors_of, plug_of, pressure_tensor_bar
from mdplug.engines.openmm.topology import box_A_of
from mdplug.errors import InputError, RunFolderError
from mdplug.system import AtomicSystem
from mdplug.units import KJ_MOL_PER_EV, NM, PS
from mdplug.workflows.md_files import Frame

if TYPE_CHECKING:
    from ase import Atoms

    from mdplug.uncertainty import Uncertainty
    from mdplug.workflows.md_config import Config
    from mdplug.workflows.md_monitor import Probing

_LENGTH, _VELOCITY, _ENERGY = unit.nanometer, unit.nanometer / unit.picosecond, unit.kilojoule_per_mole


class OpenMMEngine:
    """One Simulation.

    A checkpoint of OpenMM holds everything but the state of a Monte-Carlo barostat (its random numbers and its adapted
    step). With one, both are therefore set anew, from the seed and the step, at every multiple of `grid` steps: a run
    that was stopped there and one that was not go on alike.

    Attributes:
        step: steps done.
        grid: steps at multiples of which checkpoints are exact; 1 without a barostat.
        freedom: degrees of freedom.
    """

    def __init__(
        self,
        config: Config,
        atoms: Atoms,
        topology: app.Topology,
        bonds: list[tuple[int, int]],
        potential: Any,
        bad_frame: Path,
        grid: int,
    ):
        self.config, self.atoms = config, atoms
        nve, npt = config.ensemble == "nve", config.ensemble == "npt"
        remove_cm = not nve and len(atoms) > 1
        self.system = create_system(
            topology,
            potential,
            hydrogen_mass_amu=config.hydrogen_mass_amu,
            molecules=bonds,
            remove_cm=remove_cm,
            charge=atoms.info["charge"],
            spin=atoms.info["spin"],
            max_force_eV_A=config.max_force_eV_A,
            bad_frame=bad_frame,
        )
        if nve:
            self.integrator = openmm.VerletIntegrator(config.timestep_fs / PS)
        else:
            self.integrator = openmm.LangevinMiddleIntegrator(
                config.temperature_K, config.friction_per_ps, config.timestep_fs / PS
            )
        self.barostat = None
        if npt:
            self.barostat = openmm.MonteCarloBarostat(config.pressure_bar, config.temperature_K, config.barostat_steps)
            self.system.addForce(self.barostat)
        self.grid = grid if npt else 1
        check_ensemble(self.system, self.integrator, allow_non_conservative=config.allow_non_conservative)
        self._seed(0)
        self.simulation = Simulation(topology, self.system, self.integrator, *_platform(config))
        self.context = self.simulation.context
        self.plug = plug_of(self.system)
        self.masses = np.array([self.system.getParticleMass(i).value_in_unit(unit.dalton) for i in range(len(atoms))])
        self.freedom = 3 * len(atoms) - (3 if len(atoms) > 1 else 0)
        # OpenMM sums interaction energies; the log shows totals, as ASE does.
        state = AtomicSystem.from_ase(atoms)
        self.reference_energy = float(reference_energy(state, potential.spec, head_of(potential, state))[0])

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.context.getStepCount())

    def prepare(self) -> None:
        """Positions set, velocities drawn."""
        self.context.setPositions(self.atoms.positions / NM)
        with errors_of(self.system):  # OpenMM asks for forces here
            self.context.setVelocitiesToTemperature(self.config.temperature_K, self.config.seed)
        if len(self.atoms) > 1:
            velocities = self._state().getVelocities(asNumpy=True).value_in_unit(_VELOCITY)
            self.context.setVelocities(velocities - self.masses @ velocities / self.masses.sum())

    def advance(self, steps: int, probing: Probing | None = None) -> None:
        """Go on by so many steps; where they end, `uncertainty` and the next step share an evaluation."""
        self.simulation.step(steps)

    def uncertainty(self, probing: Probing | None) -> Uncertainty:
        """How far members disagree at the present positions; on forces too, with (probes, seed)."""
        with nullcontext() if probing is None else self.plug.probing(*probing):
            self._state(getEnergy=True)
        found = self.plug.uncertainty()
        assert found is not None
        return found

    def _state(self, **parts: bool) -> openmm.State:
        with errors_of(self.system):
            return self.context.getState(getPositions=True, getVelocities=True, **parts)

    def frame(self) -> Frame:
        """Where the run is; costs one evaluation at most, which the next step reuses."""
        state = self._state(getEnergy=True, getForces=True)
        periodic = self.plug.options["periodic"]
        return Frame(
            step=self.step,
            time_ps=self.step * self.config.timestep_fs / PS,
            positions=state.getPositions(asNumpy=True).value_in_unit(_LENGTH) * NM,
            velocities=state.getVelocities(asNumpy=True).value_in_unit(_VELOCITY) * (NM / PS),
            box=box_A_of(state) if periodic else None,
            potential_energy=state.getPotentialEnergy().value_in_unit(_ENERGY) / KJ_MOL_PER_EV + self.reference_energy,
            kinetic_energy=state.getKineticEnergy().value_in_unit(_ENERGY) / KJ_MOL_PER_EV,
            pressure_bar=pressure_tensor_bar(self.context) if periodic else None,
            forces=state.getForces(asNumpy=True).value_in_unit(_ENERGY / _LENGTH) / (KJ_MOL_PER_EV * NM),
        )

    def phase(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions (A) and velocities (A/fs), without an evaluation."""
        state = self._state()
        positions = state.getPositions(asNumpy=True).value_in_unit(_LENGTH) * NM
        return positions, state.getVelocities(asNumpy=True).value_in_unit(_VELOCITY) * (NM / PS)

    def box(self) -> np.ndarray | None:
        """(3, 3) A, or None."""
        return box_A_of(self.context) if self.plug.options["periodic"] else None

    def save(self) -> dict[str, np.ndarray]:
        """Everything to go on from here."""
        checkpoint = self.context.createCheckpoint()
        positions, velocities = self.phase()
        arrays = {
            "checkpoint": np.frombuffer(checkpoint, dtype=np.uint8),
            "platform": np.array(self.context.getPlatform().getName()),
            "step": np.array(self.step),
            "positions": positions,
            "velocities": velocities,
        }
        box = self.box()
        if box is not None:
            arrays["box"] = box
        if self.barostat is not None:
            self._reseed(checkpoint)
        return arrays

    def load(self, arrays: dict[str, np.ndarray]) -> bool:
        """Go on from what `save` gave.

        Returns:
            Whether it is exact: another platform or device takes positions and velocities, but not the random numbers.
        """
        if str(arrays["platform"]) == self.context.getPlatform().getName():
            try:
                self.context.loadCheckpoint(arrays["checkpoint"].tobytes())
            except openmm.OpenMMException:
                pass
            else:
                if self.barostat is not None:
                    self._reseed(arrays["checkpoint"].tobytes())
                return True
        if len(arrays["positions"]) != len(self.atoms):
            raise RunFolderError("the checkpoint has another number of atoms than the structure; start a new folder")
        if "box" in arrays:
            self.context.setPeriodicBoxVectors(*(arrays["box"] / NM))
        self.context.setPositions(arrays["positions"] / NM)
        self.context.setVelocities(arrays["velocities"] * (PS / NM))
        self.context.setStepCount(int(arrays["step"]))
        return False

    def _seed(self, step: int) -> None:
        numbers = np.random.default_rng((self.config.seed, step)).integers(1, 2**31 - 1, size=2)
        if self.config.ensemble != "nve":
            self.integrator.setRandomNumberSeed(int(numbers[0]))
        if self.barostat is not None:
            self.barostat.setRandomNumberSeed(int(numbers[1]))

    def _reseed(self, checkpoint: bytes) -> None:
        self._seed(self.step)
        self.context.reinitialize()
        self.context.loadCheckpoint(checkpoint)


def _platform(config: Config) -> tuple[openmm.Platform, dict[str, str]]:
    """The platform and its properties.

    On the CPU the Reference platform is the default: the potential takes all the time, and it works in double
    precision with one stream of random numbers, so runs repeat bit for bit.
    """
    name = config.platform or ("CUDA" if config.device.startswith("cuda") else "Reference")
    known = [openmm.Platform.getPlatform(i).getName() for i in range(openmm.Platform.getNumPlatforms())]
    if name not in known:
        raise InputError(f"OpenMM has no platform {name!r} here; it has: {', '.join(known)} (option platform)")
    properties = {}
    if name in ("CUDA", "OpenCL", "HIP"):
        properties["Precision"] = "mixed"
    if name == "CPU" and config.threads is not None:
        properties["Threads"] = str(config.threads)
    return openmm.Platform.getPlatformByName(name), properties
