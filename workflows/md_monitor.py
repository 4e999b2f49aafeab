"""When the members of a potential disagree too much: decisions, from what an engine says about a step.

Nothing in here knows an engine or a file. A run that goes on after a restart decides alike: probes are drawn from
(seed, step), and `State` is all there is to remember.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mdplug.errors import InputError

if TYPE_CHECKING:  # nothing heavy: the command line's help imports this
    from mdplug.potential import Model
    from mdplug.spec import Spec
    from mdplug.uncertainty import Uncertainty

Probing = tuple[int | None, int]  # random mixtures of members (None: all, exact), and their seed
Signal = Literal["forces", "energy", "distance"]
UNITS = {"forces": "eV/A", "energy": "eV", "distance": "times its spread"}
FORCES = "forces_eV_A"  # key of `Spec.calibration`
NEAR = 0.8  # of the limit: from here on estimates are checked exactly; below it an event is over
EXACT: Probing = (None, 0)
FALSE_ALARM = 0.05  # of a look at which all sigmas equal the limit


# --- what the model file knows


def calibrated(
    spec: Spec, signal: Signal, sigma: np.ndarray, numbers: np.ndarray, distance: np.ndarray | None = None
) -> np.ndarray:
    """(N,) as the model file's calibration corrects it: the one place where that enters.

    A calibration that asks for more than sigma, element and feature distance is left aside.

    Args:
        spec: of the model; `Spec.calibration`. sigma: (N,) in `UNITS`. numbers: (N,) atomic numbers. distance: (N,)
            feature distance, where the model knows one.
    """
    made = _calibration(json.dumps(spec.calibration.get(FORCES))) if signal == "forces" else None
    columns = {"sigma": sigma, "number": numbers, **({} if distance is None else {"distance": distance})}
    if made is None or not set(made.columns) <= set(columns):
        return sigma
    return np.asarray(made(**columns))


@lru_cache(maxsize=4)
def _calibration(record: str) -> Any:
    from mdplug.calibration import Calibration

    return None if record == "null" else Calibration.from_dict(json.loads(record))


@lru_cache(maxsize=8)
def alarm_factor(members: int, atoms: int, components: int = 3) -> float:
    """By how much the largest of N sigmas from few members may pass the limit; see `trigger_factor`."""
    from mdplug.uncertainty_statistics import trigger_factor

    return trigger_factor(members, atoms, FALSE_ALARM, components)


def limit_of(spec: Spec) -> float | None:
    """The largest force sigma, eV/A, that the model file says it is good for; None: it says nothing."""
    value = spec.calibration.get("sigma_max_eV_A")
    return None if value is None else float(value)


# --- decisions


@dataclass(frozen=True)
class Rule:
    """What is watched.

    Attributes:
        signal: of each atom: "forces" (sigma of its force, eV/A), "energy" (sigma of its energy, eV), "distance" (of
            its features, 1: as far out as the training data).
        limit: of it, in the same unit; None: nothing is decided.
        every: steps between looks. probes: random mixtures of members, for forces. seed: of them.
    """

    signal: Signal = "forces"
    limit: float | None = None
    every: int = 20
    probes: int = 2
    seed: int = 1


@dataclass(frozen=True)
class Reading:
    """The atom with the largest signal at a step.

    Attributes:
        step: of the run. signal, limit: as in `Rule`. atom: index. value: its signal. exact: not estimated.
        above: the limit is passed (see `alarm_factor`). new: and was not at the look before.
    """

    step: int
    signal: Signal
    atom: int
    value: float
    limit: float | None
    exact: bool
    above: bool
    new: bool


@dataclass
class State:
    """What a monitor remembers; JSON. largest: the largest value, at largest_step."""

    inside: bool = False
    looks: int = 0
    rechecks: int = 0
    events: int = 0
    collected: int = 0
    collected_step: int | None = None
    largest: float = 0.0
    largest_step: int = 0


class Monitor:
    """Decides at each look whether members disagree too much.

    An estimate from few probes that comes near the limit is replaced by the exact value, from all members, before
    anything is decided: chance in the probes stops no run. An event ends when the signal falls below `NEAR` of it.

    Args:
        rule: what is watched. model: with members. numbers: (N,) atomic numbers. state: of an earlier part of the run.

    Raises:
        InputError: the model does not give that signal.
    """

    def __init__(self, rule: Rule, model: Model, numbers: np.ndarray, state: State | None = None):
        from mdplug.uncertainty import has_forces_of_members

        self.rule, self.spec, self.numbers = rule, model.spec, numbers
        self.state = State() if state is None else state
        self.by_forces = has_forces_of_members(model)
        if rule.signal == "forces" and rule.limit is not None and not self.by_forces:
            raise InputError(
                f"potential {model.spec.name!r} is an exported file, which knows no forces of members; give the "
                "model file (.safetensors), or a limit of energies (sigma_max_eV)"
            )
        if rule.signal == "distance" and "feature_distance" not in model.spec.outputs:
            raise InputError(
                f"potential {model.spec.name!r} knows no distance from its training data; give another limit"
            )

    def probing(self, step: int) -> Probing | None:
        """What a look at a step asks the engine for."""
        if not self.by_forces:
            return None
        drawn = np.random.SeedSequence((self.rule.seed, 2, step)).generate_state(1, np.uint64)
        return self.rule.probes, int(drawn[0] >> np.uint64(1))

    def values(self, found: Uncertainty) -> np.ndarray:
        """(N,) the signal."""
        of: Any = {"forces": found.forces, "energy": found.atom_energy, "distance": found.distance}
        return of[self.rule.signal].cpu().numpy().astype(np.float64)

    def look(self, step: int, ask: Callable[[Probing | None], Uncertainty]) -> tuple[Reading | None, Uncertainty]:
        """Measure and judge a step.

        Args:
            ask: what the engine knows of its present positions.

        Returns:
            None without the signal (forces of an exported file that nobody limits); and what the engine said.
        """
        rule, state, probing = self.rule, self.state, self.probing(step)
        found = ask(probing)
        state.looks += 1
        if rule.signal == "forces" and found.forces is None:
            return None, found
        exact = rule.signal != "forces" or rule.probes >= found.members - 1
        if not exact and self._worst(found)[1] >= NEAR:
            state.rechecks += 1
            found, exact = ask(EXACT), True
        atom, part = self._worst(found)
        value = float(self._calibrated(found, self.values(found))[atom])
        above = part > 1.0
        reading = Reading(step, rule.signal, atom, value, rule.limit, exact, above, above and not state.inside)
        state.inside = above or (state.inside and part >= NEAR)
        state.events += reading.new
        if not value <= state.largest:
            state.largest, state.largest_step = value, step
        return reading, found

    def _worst(self, found: Uncertainty) -> tuple[int, float]:
        """The atom with the largest signal, and that over the limit."""
        sigma = self.values(found)
        if self.rule.signal != "distance":  # which no sample of members blurs
            components = 3 if self.rule.signal == "forces" else 1
            sigma = sigma / alarm_factor(found.members, len(self.numbers), components)
        sigma = np.where(np.isfinite(sigma), self._calibrated(found, sigma), np.inf)
        atom = int(sigma.argmax())
        return atom, float(sigma[atom]) / self.rule.limit if self.rule.limit else 0.0

    def _calibrated(self, found: Uncertainty, sigma: np.ndarray) -> np.ndarray:
        return calibrated(self.spec, self.rule.signal, sigma, self.numbers, distance_of(found))


def distance_of(found: Uncertainty) -> np.ndarray | None:
    """(N,) feature distance, or None."""
    return None if found.distance is None else found.distance.cpu().numpy().astype(np.float64)
