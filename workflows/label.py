"""Reference labels for structures: energy, forces, charges and dipole by GFN-xTB or any ASE calculator.

``run`` labels structure files, or the structures that a recipe samples. The same call again continues.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError
from pydantic import Field, model_validator

from mdplug.errors import InputError, MdplugError, SimulationError
from mdplug.workflows import _common as common
from mdplug.workflows._common import Progress, RunFolder, Stopped, catch_signals, disk_errors, sha256, silent
from mdplug.workflows._structures import read_structures
from mdplug.workflows.journal import Journal, Outcome
from mdplug.workflows.sample import Recipe, structures
from mdplug.workflows.sampling import Start
from mdplug.workflows.xtb import XTB

RECIPES = (".yaml", ".yml")


class Config(common.Config):
    """What to label and how."""

    inputs: tuple[Path, ...] = Field(min_length=1, description="structure files, or one sampling recipe (.yaml)")
    output: Path = Path("labels")
    method: Literal["xtb", "ase"] = "xtb"
    hamiltonian: str = "GFN2-xTB"
    accuracy: float = Field(1.0, gt=0)
    electronic_temperature_K: float = Field(300.0, ge=0)
    max_iterations: int = Field(250, ge=1)
    calculator: str | None = Field(None, description="for method 'ase': import path 'module:factory'")
    calculator_kwargs: dict[str, Any] = {}
    charge: float | None = Field(None, description="total charge (e) of frames that do not say theirs")
    spin: int | None = Field(None, ge=1, description="multiplicity 2S+1 of frames that do not say theirs; default 1")
    fmax_eV_A: float | None = Field(None, gt=0, description="labels with a larger force are left out and counted")
    workers: int = Field(1, ge=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        if len(self.inputs) > 1 and any(path.suffix in RECIPES for path in self.inputs):
            raise ValueError("give structure files or one recipe, not both")
        if (self.method == "ase") != (self.calculator is not None):
            raise ValueError("method 'ase' needs calculator 'module:factory', and only it takes one")
        return self


@dataclass
class Result:
    """Where the labels are and how many.

    Attributes:
        labels: ``labels.extxyz``, in the order of the input or recipe.
        failed: ``failed.extxyz``: structures without a label, the reason in ``info["error"]``.
        n_labelled, n_failed, n_left_out: counts; left out are those over the force limit.
        n_new: labels computed by this call.
        sha256: of ``labels.extxyz``.
        wall_s: seconds of this call.
    """

    labels: Path
    failed: Path
    n_labelled: int
    n_failed: int
    n_left_out: int
    n_new: int
    sha256: str
    wall_s: float


@dataclass(frozen=True)
class _Frame:
    """A frame of a structure file as a unit of work."""

    id: str
    atoms: Atoms


def label(atoms: Atoms, calculator: Calculator, method: str) -> Atoms:
    """A copy of ``atoms`` with its labels.

    ``info``: REF_energy (eV, total), method, and where the calculator has them REF_dipole (e A, not for periodic
    structures) and REF_stress (eV/A^3, 3x3, periodic structures alone).
    ``arrays``: REF_forces (eV/A), REF_charges (e, where the calculator has them).

    Raises:
        SimulationError: the calculation did not converge.
    """
    out = atoms.copy()
    if isinstance(calculator, Calculator):
        calculator.reset()  # ASE's cache does not look at the charge in info
    out.calc = calculator
    energy = float(out.get_potential_energy())
    arrays = {"REF_forces": out.get_forces()}
    extra: dict[str, np.ndarray] = {}
    wanted: list[tuple[str, Callable[[], Any], dict[str, np.ndarray]]] = [("REF_charges", out.get_charges, arrays)]
    if out.pbc.any():
        wanted.append(("REF_stress", lambda: out.get_stress(voigt=False), extra))
    else:
        wanted.append(("REF_dipole", out.get_dipole_moment, extra))
    for name, getter, place in wanted:
        try:
            place[name] = np.asarray(getter(), dtype=float)
        except (PropertyNotImplementedError, NotImplementedError):
            continue
    out.calc = None
    out.info |= {"REF_energy": energy, "method": method} | extra
    for name, values in arrays.items():
        out.set_array(name, values)
    return out


class _Labeller:
    """Labels units of work; made once in every worker process."""

    def __init__(self, config: Config, recipe: Recipe | None) -> None:
        self.config = config
        self.recipe = recipe
        self.calculator = self._make(restart=False)
        self.method = config.hamiltonian if config.method == "xtb" else str(config.calculator)

    def _make(self, restart: bool) -> Calculator:
        config = self.config
        if config.method == "xtb":
            return XTB(
                config.hamiltonian,
                accuracy=config.accuracy,
                electronic_temperature_K=config.electronic_temperature_K,
                max_iterations=config.max_iterations,
                restart=restart,
            )
        return load_factory(str(config.calculator))(**config.calculator_kwargs)

    def __call__(self, unit: Start | _Frame) -> Outcome:
        outcome = Outcome(unit.id)
        for atoms in self._structures(unit, outcome):
            limit = atoms.info.pop("fmax_eV_A", self.config.fmax_eV_A)
            try:
                done = label(atoms, self.calculator, self.method)
            except Exception as error:  # a calculator that is not ours may raise anything
                ours = self.config.method == "xtb" or isinstance(error, MdplugError)
                if ours and not isinstance(error, SimulationError):
                    raise
                outcome.failed.append(_with_error(atoms, error))
                continue
            if limit is not None and np.sqrt((done.arrays["REF_forces"] ** 2).sum(axis=1).max()) > limit:
                outcome.left_out += 1
            else:
                outcome.labelled.append(done)
        return outcome

    def _structures(self, unit: Start | _Frame, outcome: Outcome) -> Iterator[Atoms]:
        if isinstance(unit, _Frame):
            yield unit.atoms
            return
        if self.recipe is None:
            raise InputError(f"start {unit.id!r} has no recipe")
        last = Atoms()
        try:
            for atoms in structures(self.recipe, unit, lambda: self._make(restart=True)):
                last = atoms.copy()
                atoms.info["source"] = self.recipe.name
                yield atoms
        except SimulationError as error:
            # The dynamics of this start broke: what it gave so far stays, the last structure goes aside.
            outcome.failed.append(_with_error(last, error))


def _with_error(atoms: Atoms, error: Exception) -> Atoms:
    out = atoms.copy()
    out.info["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300].replace('"', "'")
    return out


def load_factory(path: str) -> Callable[..., Calculator]:
    """The object at ``module:name``.

    Raises:
        InputError: no such module or name.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"calculator {path!r} cannot be imported ({error}); give 'module:factory'") from error


def read_frames(config: Config) -> list[_Frame]:
    """Every frame of the input files with its charge and spin.

    Raises:
        InputError: naming the file and frame: not matter, or a charge that nobody says.
    """
    frames: list[_Frame] = []
    for path in config.inputs:
        for i, atoms in enumerate(read_structures(path)):
            where = f"{path} frame {i}"
            charge = atoms.info.get("charge", config.charge)
            if charge is None:
                raise InputError(
                    f"{where}: its total charge is unknown; set charge=... in its comment line or --charge"
                )
            atoms.calc = None
            atoms.info |= {"charge": charge, "spin": atoms.info.get("spin", config.spin or 1)}
            unit = f"{path.stem}-{i:06d}"
            atoms.info.setdefault("group", unit)
            atoms.info.setdefault("source", path.name)
            frames.append(_Frame(f"{len(frames):06d}-{unit}", atoms))
    return frames


_LABELLER: _Labeller | None = None


def _start_worker(config: Config, recipe: Recipe | None) -> None:
    global _LABELLER
    parent = multiprocessing.parent_process()
    if parent is not None:
        # A pool's workers would wait for ever for a parent that was killed.
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    _LABELLER = _Labeller(config, recipe)


def _end_with(process: Any) -> None:
    process.join()
    os._exit(1)


def _work(unit: Start | _Frame) -> Outcome:
    from threadpoolctl import threadpool_limits

    if _LABELLER is None:
        raise InputError("the worker was not started")
    with threadpool_limits(1):
        return _LABELLER(unit)


def run(config: Config, *, progress: Progress = silent) -> Result:
    """Label everything; continue where an earlier call of the same configuration stopped.

    Args:
        config: what and how.
        progress: called with (units done, units in all, a line of text) after every unit.

    Raises:
        InputError: a bad recipe, structure or calculator.
        RunFolderError: the output folder belongs to another run or cannot be written.
        Stopped: by Ctrl-C or SIGTERM, after the structure at hand.
    """
    began = time.monotonic()
    recipe = Recipe.read(config.inputs[0]) if config.inputs[0].suffix in RECIPES else None
    units: list[Any] = list(recipe.starts()) if recipe is not None else list(read_frames(config))
    inputs = (*config.inputs, *(recipe.models() if recipe is not None else ()))
    with (
        catch_signals() as caught,
        RunFolder(config.output, "label", config, inputs=inputs, may_change=("workers",)) as folder,
    ):
        journal = Journal(folder.path)
        ids = [unit.id for unit in units]
        before = journal.total("labelled", ids)
        todo = [unit for unit in units if unit.id not in journal.done]
        try:
            with closing(_outcomes(config, recipe, todo)) as outcomes:
                for outcome in outcomes:
                    with disk_errors(folder.path):
                        journal.add(outcome)
                    text = f"{journal.total('labelled', ids)} labels, {journal.total('failed', ids)} failed"
                    progress(len(journal.done), len(units), text)
                    if caught.number is not None and len(journal.done) < len(units):
                        raise Stopped(caught.number, f"stopped by {caught.name} ({text}); the same command goes on")
            journal.finish(ids)
        finally:
            journal.close()
        result = Result(
            labels=folder / "labels.extxyz",
            failed=folder / "failed.extxyz",
            n_labelled=journal.total("labelled", ids),
            n_failed=journal.total("failed", ids),
            n_left_out=journal.total("left_out", ids),
            n_new=journal.total("labelled", ids) - before,
            sha256=sha256(folder / "labels.extxyz"),
            wall_s=time.monotonic() - began,
        )
        folder.summary(**vars(result))
    return result


def _outcomes(config: Config, recipe: Recipe | None, todo: list[Any]) -> Generator[Outcome, None, None]:
    if config.workers == 1 or len(todo) <= 1:
        from threadpoolctl import threadpool_limits

        labeller = _Labeller(config, recipe)
        with threadpool_limits(1):
            yield from map(labeller, todo)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        config.workers, mp_context=context, initializer=_start_worker, initargs=(config, recipe)
    ) as pool:
        queue = iter(todo)
        pending = _submit(pool, islice(queue, 4 * config.workers))
        try:
            while pending:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
                pending |= _submit(pool, islice(queue, len(finished)))
        finally:
            for future in pending:
                future.cancel()


def _submit(pool: ProcessPoolExecutor, units: Iterable[Any]) -> set[Future]:
    # Signals reach the whole group, and the parent decides: workers, which start here, inherit that they do not listen.
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        return {pool.submit(_work, unit) for unit in units}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
