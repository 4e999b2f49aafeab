"""Options of `mdplug md`, and what happens at which step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from mdplug.units import PS
from mdplug.workflows._common import ModelConfig


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
    sigma_max_eV_A: float | None = Field(
        None, gt=0, description="largest disagreement of an ensemble on the force of an atom, in eV/A; default: the "
        "model file's, if it says one",
    )  # fmt: skip
    sigma_max_eV: float | None = Field(None, gt=0, description="instead: on the energy of an atom, in eV")
    distance_max: float | None = Field(None, gt=0, description="instead: distance of an atom from the training data")
    policy: Literal["warn", "stop", "collect", "bias"] = Field(
        "warn", description="above the limit: warn, stop (exit code 3), or collect frames into uncertain.extxyz; bias: "
        "run on energies with a bias of bias_strength, and warn",
    )  # fmt: skip
    sigma_every: int = Field(20, ge=1, description="steps between looks at the disagreement, besides log and frames")
    sigma_probes: int = Field(2, ge=1, description="random mixtures of members in a look; near the limit all are used")
    bias_strength: float | None = Field(
        None, description="policy bias: energy is lowered by this times the disagreement on each atom's energy"
    )
    collect_max: int = Field(100, ge=1, description="collect at most so many frames")
    collect_ps: float = Field(0.1, ge=0, description="collect frames that are so far apart in ps")
    platform: str | None = Field(None, description="OpenMM platform; default: Reference, or CUDA with device cuda")
    allow_non_conservative: bool = Field(False, description="NVE and NPT with forces that are no gradient")


@dataclass
class Schedule:
    """In steps; `look` at the disagreement of members, where there are any."""

    total: int
    frame: int
    log: int
    checkpoint: int
    look: int | None = None

    @classmethod
    def of(cls, config: Config) -> Schedule:
        """What the options ask for."""

        def steps(time_ps: float) -> int:
            return max(1, round(time_ps * PS / config.timestep_fs))

        checkpoint = steps(config.checkpoint_ps)
        if config.ensemble == "npt" and config.engine == "openmm":
            # The barostat starts to count anew at a checkpoint: with shorter intervals it would never move.
            checkpoint = -(-checkpoint // config.barostat_steps) * config.barostat_steps
        return cls(steps(config.time_ps), steps(config.frame_ps), steps(config.log_ps), checkpoint)

    def next_event(self, step: int) -> int:
        """The first step after this one at which something is to be done."""
        every = (self.frame, self.log, self.checkpoint, *(() if self.look is None else (self.look,)))
        return min(self.total, *((step // n + 1) * n for n in every))

    def writes(self, step: int) -> bool:
        """Whether a frame of the trajectory belongs to this step."""
        return step % self.frame == 0

    def logs(self, step: int) -> bool:
        """Whether a row of the log belongs to this step."""
        return step % self.log == 0 or step == self.total

    def looks(self, step: int) -> bool:
        """Whether members are compared at this step."""
        return self.look is not None and (step % self.look == 0 or self.writes(step) or self.logs(step))
