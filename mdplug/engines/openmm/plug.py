"""A potential as an openmm.PythonForce: one callable that contexts, copies and threads share.

OpenMM hands over positions in nm and a reduced box; the callable converts, asks for pairs, calls the deployed
potential and hands back kJ/mol. Energies are interaction energies summed in float64: a float32 total has an ulp of
several kJ/mol at a few hundred molecules, and Monte-Carlo barostats would act on that noise.
"""

import hashlib
import pickle
import threading
import uuid
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import openmm
import torch
from openmm import app

from mdplug.deployed import call, check_species, deploy
from mdplug.engines.openmm.guard import check_positions, check_result, write_frames
from mdplug.engines.openmm.source import ModelFile, model_of, open_model
from mdplug.errors import InputError
from mdplug.pairs import PairList, Pairs
from mdplug.potential import Model
from mdplug.spec import Spec
from mdplug.system import AtomicSystem
from mdplug.uncertainty import Uncertainty, call_with_sigma, has_members, of_energies
from mdplug.units import KJ_MOL_PER_EV, NM

PREFIX = "mdplug-force-"  # of the names of our forces; what follows finds the callable
MEMO = 2  # a barostat move asks for the old, the trial and again the old box
LISTS = 4  # pair lists kept: the current box, a trial box, another context

_living: "weakref.WeakValueDictionary[str, Plug]" = weakref.WeakValueDictionary()


def _name(said: str) -> str:
    """A name that no living callable has; a file's is the same in every run, so that written systems are."""
    token = hashlib.sha256(said.encode()).hexdigest()[:16]
    return _name(said + " again") if token in _living else token


def _equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    # To the last bit, and a small part of the time of np.array_equal.
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and one.tobytes() == other.tobytes()


class Plug:
    """The callable inside a PythonForce.

    Attributes:
        options: what `force` was asked for.
        numbers: (n,) atomic numbers of the atoms it acts on.
        evaluations: how often the model has been run.
        memo_hits: how often a stored result was handed out instead.
        error: the exception that stopped the last evaluation, or None.
        last: the newest result: "positions" (n, 3) A and "box" (3, 3) A or None that it is of; "energy" eV (float),
            "forces" (n, 3) eV/A or None, "virial" (3, 3) eV or None, and what else the potential returns, as tensors.
    """

    def __init__(self, source: Model | ModelFile, options: dict[str, Any]):
        """Args: the potential or its file, and {numbers, charge, spin, periodic, skin_A, max_force_eV_A, bad_frame}."""
        self._begin(options, source)
        try:
            self._pickled = pickle.dumps(source)
        except Exception:  # a compiled module: runs, but cannot be written
            self._pickled = b""
        said = repr((source, sorted(options.items()))) if isinstance(source, ModelFile) else uuid.uuid4().hex
        self.token = _name(said)

    def _begin(self, options: dict[str, Any], source: Model | ModelFile | None) -> None:
        self.options = options
        self.numbers = np.array(options["numbers"], dtype=np.int64)
        self.evaluations = 0
        self.memo_hits = 0
        self.error: BaseException | None = None
        self.last: dict[str, Any] | None = None
        self._source = source
        self._wants_forces = True
        self._probing: tuple[int | None, int] | None = None  # probes, seed
        self._known: tuple[AtomicSystem, np.ndarray | None] | None = None
        self._lock = threading.Lock()
        self._memo: deque[dict[str, Any]] = deque(maxlen=MEMO)
        self._lists: deque[PairList] = deque(maxlen=LISTS)

    @cached_property
    def potential(self) -> Model:
        """The potential; a callable that came out of a pickle opens it at its first use."""
        source = pickle.loads(self._pickled) if self._source is None else self._source
        return open_model(source) if isinstance(source, ModelFile) else source

    @cached_property
    def _deployed(self) -> Model:
        return deploy(self.potential)

    @cached_property
    def _device(self) -> torch.device:
        for tensor in (*self.potential.parameters(), *self.potential.buffers()):
            return tensor.device
        return torch.device("cpu")

    @property
    def conservative(self) -> bool:
        """Forces are exactly -dE/dx."""
        return self.potential.spec.conservative

    @contextmanager
    def energy_only(self) -> Iterator[None]:
        """Inside the block no forces are computed (they read as zero): about half the cost of an energy.

        OpenMM itself never says that it wants an energy alone; use this around `getState(getEnergy=True)`, never
        around steps.
        """
        self._wants_forces = False
        try:
            yield
        finally:
            self._wants_forces = True

    @contextmanager
    def probing(self, probes: int | None, seed: int = 0) -> Iterator[None]:
        """Inside the block evaluations also measure how far members disagree on forces; see `uncertainty`.

        Energy and forces stay the same to the last bit: `getState(getEnergy=True)` in here shares its evaluation with
        the step that follows, and each mixture costs one adjoint more. Args: see `uncertainty.call_with_sigma`.
        """
        self._probing = (probes, seed)
        try:
            yield
        finally:
            self._probing = None

    def uncertainty(self) -> Uncertainty | None:
        """How far members disagree at the positions of `last`, on forces too if that came from inside `probing`.

        None: nothing has been evaluated, or the potential has no members.
        """
        if self.last is None or not has_members(self.potential):
            return None
        index = torch.zeros(len(self.numbers), dtype=torch.int64, device=self._device)
        return of_energies(self.last, index, 1)

    def __call__(self, state: openmm.State) -> tuple[float, np.ndarray]:
        """What OpenMM calls: energy in kJ/mol and forces (n, 3) in kJ/mol/nm.

        Raises:
            RuntimeError: anything that went wrong; the original is kept in `error` (see `errors_of`).
        """
        try:
            positions = np.empty((len(self.numbers), 3))
            state._getVectorAsNumpy(openmm.State.Positions, positions)
            positions *= NM
            box = np.array(state.getPeriodicBoxVectors()._value) * NM if self.options["periodic"] else None
            result = self.result(positions, box, when=f"step {state.getStepCount()}", forces=self._wants_forces)
            forces = result["forces"]
            if forces is None:
                return result["energy"] * KJ_MOL_PER_EV, np.zeros_like(positions)
            return result["energy"] * KJ_MOL_PER_EV, forces * (KJ_MOL_PER_EV * NM)
        except BaseException as error:
            self.error = error
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    def result(
        self, positions: np.ndarray, box: np.ndarray | None, *, when: str = "now", forces: bool = True
    ) -> dict[str, Any]:
        """Evaluate, or find in the memo, positions (n, 3) and a box (3, 3), both in A; see `last`.

        Raises:
            SimulationError: the guard's refusals.
        """
        with self._lock:
            for known in reversed(self._memo):
                same = _equal(known["positions"], positions) and _equal(known["box"], box)
                same = same and self._probing in (None, known["probing"])
                if same and (known["forces"] is not None or not forces):
                    self.memo_hits += 1
                    self.last = known
                    return known
        try:
            try:
                system = self._system(positions, box)
            except InputError:
                check_positions(positions, box, self.numbers, when)  # says it with the step and the elements
                raise
            result = self._evaluate(system, forces)
            check_result(result["energy"], result["forces"], self.numbers, self.options["max_force_eV_A"], when)
        except Exception as error:
            try:
                self._save(positions, box)
            except OSError as reason:  # a full or read-only disk must not hide what went wrong
                error.add_note(f"the offending frame could not be saved: {reason}")
            raise
        result |= {"positions": positions, "box": box, "probing": self._probing}
        with self._lock:
            self._memo.append(result)
            self.last = result
        return result

    def _evaluate(self, system: AtomicSystem, forces: bool) -> dict[str, Any]:
        pairs = self._pairs(system)
        with self._lock:
            self.evaluations += 1
        if self._probing is None:
            result: dict[str, Any] = dict(call(self._deployed, system, pairs, forces))
        else:
            result = dict(call_with_sigma(self._deployed, system, pairs, *self._probing))
        result["energy"] = float(result["energy"])
        result["forces"] = result["forces"].cpu().numpy() if forces else None
        result["virial"] = result["virial"][0].cpu().numpy() if forces else None
        return result

    def _system(self, positions: np.ndarray, box: np.ndarray | None) -> AtomicSystem:
        """The atoms at these positions; of the last system, what has not changed."""
        if self._known is None:
            system = AtomicSystem.from_arrays(
                self.numbers, positions, box, box is not None,
                charge=self.options["charge"], spin=self.options["spin"], device=self._device,
            )  # fmt: skip
        else:
            system, around = self._known
            tensors = {"positions": torch.from_numpy(positions.copy()).to(self._device)}
            if box is not None and not _equal(box, around):
                tensors["cell"] = torch.from_numpy(box[None].copy()).to(self._device)
            system = system.with_(**tensors)
        self._known = (system, box)
        return system

    def _pairs(self, system: AtomicSystem) -> Pairs:
        """By a stored list that holds for this system, else by a new one."""
        with self._lock:
            for k, candidate in enumerate(self._lists):
                found = candidate.reuse(system)
                if found is not None:
                    del self._lists[k]  # the newest stands last: the oldest is dropped first
                    self._lists.append(candidate)
                    return found
        new = PairList(self.potential.spec.cutoff, skin=self.options["skin_A"])
        found = new.update(system)
        with self._lock:
            self._lists.append(new)
        return found

    def _save(self, positions: np.ndarray, box: np.ndarray | None) -> None:
        if self.options["bad_frame"] is not None:
            good = [("last good", self.numbers, one["positions"], one["box"]) for one in list(self._memo)[-1:]]
            write_frames(self.options["bad_frame"], [*good, ("offending", self.numbers, positions, box)])

    def __reduce__(self) -> tuple[Any, ...]:
        if not self._pickled:
            raise InputError(
                f"potential {self.potential.spec.name!r} is compiled code in memory and cannot be written; "
                "give force() the path of its file instead"
            )
        return _restore, (self.token, self._pickled, self.options)


def _restore(token: str, pickled: bytes, options: dict[str, Any]) -> Plug:
    """The living callable of that token, or a new one.

    Nothing is opened here: an exception while OpenMM reads a pickle would end the process.
    """
    plug = _living.get(token)
    if plug is None:
        plug = Plug.__new__(Plug)
        plug._begin(options, None)
        plug._pickled, plug.token = pickled, token
        _living[token] = plug
    return plug


def force(
    topology: app.Topology,
    potential: Model | str | Path,
    *,
    atoms: Iterable[int] | None = None,
    charge: float = 0.0,
    spin: float = 1.0,
    periodic: bool | str = "auto",
    skin_A: float = 1.0,
    max_force_eV_A: float = 1e4,
    bad_frame: str | Path | None = None,
) -> openmm.PythonForce:
    """A potential as an OpenMM force.

    Args:
        topology: elements of the atoms; its box says whether the system is periodic.
        potential: what `mdplug.load` gives, any Potential, or a model file. A system with a file's potential is
            written (XML) with the file's path and hash; one built in memory is written whole. Either way by pickle,
            as OpenMM does: read such XML only from those you trust.
        atoms: indices it acts on; None: all.
        charge: total charge of these atoms, e.
        spin: multiplicity 2S+1 of these atoms.
        periodic: True, False, or "auto": as the topology.
        skin_A: extra range of the stored pair list.
        max_force_eV_A: a larger force stops the run.
        bad_frame: extxyz file for the last good and the offending frame when a run is stopped.

    Raises:
        InputError: an element the potential does not know, an atom without element or out of range, OpenMM too old.
    """
    model, file = model_of(potential)
    chosen, numbers = chosen_atoms(topology, atoms, model.spec)
    everywhere = is_periodic(topology, periodic)
    if atoms is not None and not everywhere and topology.getPeriodicBoxVectors() is not None:
        raise InputError(
            "a force on some atoms of a periodic system must be periodic too (OpenMM's GPU platforms misplace the "
            "atoms otherwise); leave periodic at 'auto'"
        )
    options = {
        "numbers": tuple(numbers),
        "charge": float(charge),
        "spin": float(spin),
        "periodic": everywhere,
        "skin_A": float(skin_A),
        "max_force_eV_A": float(max_force_eV_A),
        "bad_frame": None if bad_frame is None else str(bad_frame),
    }
    plug = Plug(file or model, options)
    _living[plug.token] = plug
    result = openmm.PythonForce(plug)
    result.setName(PREFIX + plug.token)
    result.setUsesPeriodicBoundaryConditions(options["periodic"])
    if atoms is not None:
        if not hasattr(result, "setParticles"):
            raise InputError(f"atoms= needs OpenMM 8.6 or later, this is {openmm.__version__}; upgrade openmm")
        result.setParticles(chosen)
    return result


def chosen_atoms(topology: app.Topology, atoms: Iterable[int] | None, spec: Spec) -> tuple[list[int], list[int]]:
    """Indices and atomic numbers of the atoms a force acts on.

    Raises:
        InputError: none, twice the same, out of range, without element, or one that the potential does not know.
    """
    listed = list(topology.atoms())
    chosen = list(range(len(listed))) if atoms is None else [int(a) for a in atoms]
    if not chosen:
        raise InputError("no atoms to act on; give a topology with atoms, or atoms= with at least one index")
    if len(set(chosen)) != len(chosen) or min(chosen) < 0 or max(chosen) >= len(listed):
        raise InputError(f"atoms= must be different indices in 0..{len(listed) - 1}")
    for a in chosen:
        if listed[a].element is None:
            raise InputError(f"atom {a} ({listed[a].name}) of the topology has no element; set it, or leave it out")
    numbers = [listed[a].element.atomic_number for a in chosen]
    # Atoms outside the subset may be of any kind: they read as one that is known, so that messages keep the index.
    every = torch.full((len(listed),), spec.species[0] if spec.species else 1, dtype=torch.int64)
    every[chosen] = torch.tensor(numbers)
    check_species(every, spec)
    return chosen, numbers


def is_periodic(topology: app.Topology, periodic: bool | str) -> bool:
    """What `periodic` = True, False or "auto" means for this topology.

    Raises:
        InputError: something else.
    """
    if periodic not in (True, False, "auto"):
        raise InputError(f"periodic must be True, False or 'auto', got {periodic!r}")
    return topology.getPeriodicBoxVectors() is not None if periodic == "auto" else bool(periodic)


def plugs_of(thing: Any) -> list[Plug]:
    """The callables inside a force, System, Context or Simulation (also inside CustomCVForces)."""
    if isinstance(thing, Plug):
        return [thing]
    if isinstance(thing, app.Simulation):
        return plugs_of(thing.system)
    if isinstance(thing, openmm.Context):
        return plugs_of(thing.getSystem())
    if isinstance(thing, openmm.System):
        return [plug for one in thing.getForces() for plug in plugs_of(one)]
    if isinstance(thing, openmm.CustomCVForce):
        inner = [thing.getCollectiveVariable(k) for k in range(thing.getNumCollectiveVariables())]
        return [plug for one in inner for plug in plugs_of(one)]
    name = thing.getName()
    if name.startswith(PREFIX) and name.removeprefix(PREFIX) in _living:
        return [_living[name.removeprefix(PREFIX)]]
    return []


def plug_of(thing: Any) -> Plug:
    """The one callable inside a force, System, Context or Simulation.

    Raises:
        InputError: none, or several.
    """
    found = plugs_of(thing)
    if len(found) != 1:
        raise InputError(f"found {len(found)} mdplug forces in this {type(thing).__name__}, expected one")
    return found[0]
