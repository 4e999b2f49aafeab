"""The watch on an MD run whose potential has members: files, and the policy where they disagree too much."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mdplug.errors import InputError, SimulationError
from mdplug.units import BOLTZMANN, PS
from mdplug.workflows._common import write_atomic
from mdplug.workflows.md_files import Frame, bare_frame, extxyz_text, to_atoms
from mdplug.workflows.md_monitor import UNITS, Monitor, Reading, Rule, Signal, State, calibrated, distance_of, limit_of
from mdplug.workflows.md_watch_files import LaterFile, Rows

if TYPE_CHECKING:  # nothing heavy: the command line's help imports this
    from ase import Atoms

    from mdplug.potential import Model
    from mdplug.uncertainty import Uncertainty
    from mdplug.workflows.md import Engine
    from mdplug.workflows.md_config import Config

SANE = 10.0  # times the limit: what disagrees more is broken, and no structure to learn from


class Uncertain(SimulationError):
    """The policy `stop` ended a run; the command line exits with 3.

    Attributes:
        reading: what was seen. folder: the run's; `last_good.extxyz` is the last frame below the limit,
            `uncertain.extxyz` ends with the frame above it, and the checkpoint is where it was.
    """

    exit_code = 3

    def __init__(self, message: str, reading: Reading, folder: Path):
        super().__init__(message)
        self.reading, self.folder = reading, folder


def rule_of(config: Config, model: Model) -> Rule | None:
    """What the options ask for; None: a model without members, and nothing asked of them.

    Raises:
        InputError: a policy without a limit, several limits, or members where there are none.
    """
    given: dict[Signal, float | None] = {
        "forces": config.sigma_max_eV_A, "energy": config.sigma_max_eV, "distance": config.distance_max,
    }  # fmt: skip
    limits = {signal: limit for signal, limit in given.items() if limit is not None}
    if "member_atom_energy" not in model.spec.outputs:
        if limits or config.policy != "warn":
            raise InputError(
                f"potential {model.spec.name!r} has no members that could disagree; give an ensemble, or leave policy "
                "and limits out"
            )
        return None
    if len(limits) > 1:
        raise InputError("give one limit: sigma_max_eV_A (forces), sigma_max_eV (energies) or distance_max")
    if not limits and (known := limit_of(model.spec)) is not None:
        limits = {"forces": known}
    if not limits and config.policy in ("stop", "collect"):
        raise InputError(f"policy {config.policy} needs a limit, and the model file has none; give sigma_max_eV_A")
    signal: Signal
    limit: float | None
    signal, limit = next(iter(limits.items()), ("forces", None))
    return Rule(signal, limit, config.sigma_every, config.sigma_probes, config.seed)


@dataclass
class Marks:
    """Where its files end; JSON."""

    events: int = 0
    members: int = 0
    uncertain: int = 0
    sigma: dict[str, int] = field(default_factory=lambda: {"size": 0, "rows": 0})


class Watch:
    """The watch on a run: `look` where the schedule says so, then `annotate` what is written there.

    Args:
        config: of the run. rule: see `rule_of`. model: the potential that runs. atoms: of the run. rotation: of its
            frames against the input. folder: of the run. record: what `mark` gave; None: a new run.

    Attributes:
        columns: of log.csv that frames get.
    """

    def __init__(
        self, config: Config, rule: Rule, model: Model, atoms: Atoms, rotation: np.ndarray, folder: Path,
        record: dict[str, Any] | None,
    ):  # fmt: skip
        record = record or {"state": {}, "marks": {}}
        marks = Marks(**record["marks"])
        self.config, self.rule, self.atoms, self.rotation, self.folder = config, rule, atoms, rotation, folder
        self.monitor = Monitor(rule, model, atoms.numbers, State(**record["state"]))
        self.biased = "bias_energy" in model.spec.outputs
        self.columns: tuple[str, ...] = ("sigma_energy_eV", "sigma_forces_max_eV_A", "sigma_atom")
        if self.biased:
            self.columns += ("bias_energy_eV", "bias_log_weight")
        self.reading: Reading | None = None
        self.found: Uncertainty | None = None
        self._safe: tuple[Any, ...] | None = None
        self._events = LaterFile(folder / "events.csv", marks.events)
        self._members = LaterFile(folder / "members.csv", marks.members)
        self._uncertain = LaterFile(folder / "uncertain.extxyz", marks.uncertain)
        unit = "forces_eV_A" if self.monitor.by_forces else "energy_eV"
        self._sigma = Rows(folder / f"sigma_{unit}.npy", width=len(atoms), **marks.sigma)

    def mark(self) -> dict[str, Any]:
        """All of it on disk; what a checkpoint needs."""
        files = (self._events.sync(), self._members.sync(), self._uncertain.sync())
        return {"state": asdict(self.monitor.state), "marks": asdict(Marks(*files, self._sigma.mark()))}

    def close(self) -> None:
        """Close the files."""
        for one in (self._events, self._members, self._uncertain, self._sigma):
            one.close()

    @property
    def text(self) -> str:
        """For the line of progress."""
        one = self.reading
        if one is None:
            return ""
        if one.signal == "distance":
            return f"distance {one.value:.3g}"
        return f"sigma {one.value:.3g} {UNITS[one.signal]}"

    def look(self, engine: Engine) -> None:
        """Measure, judge and act.

        Raises:
            Uncertain: by the policy `stop`.
        """
        self.reading, self.found = self.monitor.look(engine.step, engine.uncertainty)
        one = self.reading
        if one is None or not one.above:
            self._safe = (engine.step, *engine.phase(), engine.box())
            return
        if one.new:
            self._record(one)
        if self.config.policy == "stop":
            self._stop(one, engine)
        elif self.config.policy == "collect":
            self._collect(one, engine)
        elif one.new:
            warnings.warn(self._said(one), stacklevel=2)

    def annotate(self, frame: Frame) -> Frame:
        """The frame with what was seen at its step, as columns of the log and arrays."""
        found = self.found
        assert found is not None
        unknown = float("nan")
        columns = {"sigma_energy_eV": float(found.energy), "sigma_forces_max_eV_A": unknown, "sigma_atom": unknown}
        arrays = {"sigma_energy_eV": found.atom_energy.cpu().numpy().astype(np.float64)}
        if found.forces is not None:
            raw = found.forces.cpu().numpy().astype(np.float64)
            forces = calibrated(self.monitor.spec, "forces", raw, self.atoms.numbers, distance_of(found))
            arrays["sigma_forces_eV_A"] = forces
            columns |= {"sigma_forces_max_eV_A": float(forces.max()), "sigma_atom": float(forces.argmax())}
        if self.biased:
            assert found.bias is not None
            bias = float(found.bias)
            beta = unknown if self.config.ensemble == "nve" else 1.0 / (BOLTZMANN * self.config.temperature_K)
            columns |= {"bias_energy_eV": bias, "bias_log_weight": beta * bias}
        return replace(frame, columns=columns, arrays=arrays)

    def write(self, frame: Frame) -> None:
        """What belongs to a trajectory frame: a row of sigmas, and one of the members' energies."""
        found = self.found
        assert found is not None
        self._sigma.write(next(reversed(frame.arrays.values())))
        if self.biased:  # its frames are not those of the members' mean, which reweighting starts from
            return
        members = found.member_energy[:, 0].cpu().numpy()
        members = members - members.mean() + frame.potential_energy  # with its reference energies
        if not self._members.size:
            names = ("time_ps", *(f"member_{k}_eV" for k in range(len(members))))
            self._members.append(",".join(names) + "\n")
        self._members.append(",".join([f"{frame.time_ps:.10g}", *(f"{e:.8f}" for e in members)]) + "\n")

    def summary(self) -> dict[str, Any]:
        """For summary.yaml."""
        rule, state = self.rule, asdict(self.monitor.state)
        known = {name: state[name] for name in ("looks", "rechecks", "events", "collected", "largest", "largest_step")}
        return {"policy": self.config.policy, "signal": rule.signal, "limit": rule.limit, **known}

    # --- policies

    def _said(self, one: Reading) -> str:
        what = {"forces": "members disagree on the force", "energy": "members disagree on the energy"}
        said = what.get(one.signal, "far from the training data are the features")
        return (
            f"step {one.step}: {said} of atom {one.atom} ({self.atoms.symbols[one.atom]}) by {one.value:.3g} "
            f"{UNITS[one.signal]}, limit {one.limit:g}"
        )

    def _record(self, one: Reading) -> None:
        if not self._events.size:
            self._events.append("step,time_ps,signal,atom,element,value,limit,exact\n")
        element = self.atoms.symbols[one.atom]
        time_ps = f"{one.step * self.config.timestep_fs / PS:.10g}"
        self._events.append(
            f"{one.step},{time_ps},{one.signal},{one.atom},{element},{one.value:.6g},{one.limit:g},{int(one.exact)}\n"
        )

    def _keep(self, engine: Engine) -> None:
        """The present frame, with its sigmas, at the end of uncertain.extxyz."""
        frame = self.annotate(engine.frame())
        self._uncertain.append(extxyz_text(to_atoms(self.atoms, frame, self.rotation)))

    def _collect(self, one: Reading, engine: Engine) -> None:
        state, limit = self.monitor.state, one.limit or 0.0
        apart = round(self.config.collect_ps * PS / self.config.timestep_fs)
        soon = state.collected_step is not None and one.step - state.collected_step < apart
        if soon or state.collected >= self.config.collect_max or not one.value <= SANE * limit:
            return
        self._keep(engine)
        state.collected += 1
        state.collected_step = one.step

    def _stop(self, one: Reading, engine: Engine) -> None:
        self._keep(engine)
        text = f"{self._said(one)}; the run was stopped"
        if self._safe is not None:
            step, *rest = self._safe
            atoms = to_atoms(self.atoms, bare_frame(step, step * self.config.timestep_fs / PS, *rest), self.rotation)
            atoms.calc = None
            write_atomic(self.folder / "last_good.extxyz", extxyz_text(atoms))
            text += f" (last frame below it, step {step}: {self.folder / 'last_good.extxyz'})"
        self.mark()
        raise Uncertain(text, one, self.folder)
