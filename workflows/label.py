"""Reference labels for structures: energy, forces, charges and dipole by GFN-xTB or any ASE calculator.

``run`` labels structure files, or the structures that a recipe samples. The same call again continues.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError
from ase.io import iread, write
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mdplug.errors import InputError, MdplugError, RunFolderError, SimulationError
from mdplug.workflows.sample import Recipe, Start, structures
from mdplug.workflows.xtb import XTB


class Config(BaseModel):
    """What to label and how.

    Either ``inputs`` (structure files that ASE reads) or ``recipe`` (a YAML file) is given.
    """

    model_config = ConfigDict(extra="forbid")
    inputs: tuple[Path, ...] = ()
    recipe: Path | None = None
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
    def _one_source(self) -> Config:
        if bool(self.inputs) == (self.recipe is not None):
            raise ValueError("give either structure files or a recipe")
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


@dataclass
class _Outcome:
    id: str
    labelled: list[Atoms] = field(default_factory=list)
    failed: list[Atoms] = field(default_factory=list)
    left_out: int = 0


@dataclass(frozen=True)
class _Frame:
    """A frame of a structure file as a unit of work."""

    id: str
    atoms: Atoms


def label(atoms: Atoms, calculator: Calculator, method: str) -> Atoms:
    """A copy of ``atoms`` with its labels.

    ``info``: REF_energy (eV, total), REF_dipole (e A, where the calculator has it), method.
    ``arrays``: REF_forces (eV/A), REF_charges (e, where the calculator has them).

    Raises:
        SimulationError: the calculation did not converge.
    """
    out = atoms.copy()
    out.calc = calculator
    energy = float(out.get_potential_energy())
    arrays = {"REF_forces": out.get_forces()}
    extra = {}
    for name, getter, place in (
        ("REF_charges", out.get_charges, arrays),
        ("REF_dipole", out.get_dipole_moment, extra),
    ):
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

    def __call__(self, unit: Start | _Frame) -> _Outcome:
        outcome = _Outcome(unit.id)
        for atoms in self._structures(unit, outcome):
            limit = atoms.info.pop("fmax_eV_A", self.config.fmax_eV_A)
            try:
                done = label(atoms, self.calculator, self.method)
            except MdplugError as error:
                outcome.failed.append(_with_error(atoms, error))
                continue
            except Exception as error:  # a calculator that is not ours may raise anything
                if self.config.method == "xtb":
                    raise
                outcome.failed.append(_with_error(atoms, error))
                continue
            if limit is not None and np.sqrt((done.arrays["REF_forces"] ** 2).sum(axis=1).max()) > limit:
                outcome.left_out += 1
            else:
                outcome.labelled.append(done)
        return outcome

    def _structures(self, unit: Start | _Frame, outcome: _Outcome) -> Iterator[Atoms]:
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


def read_recipe(path: Path) -> Recipe:
    """A recipe from YAML.

    Raises:
        InputError: not there, not YAML, or with keys that a recipe does not have.
    """
    try:
        return Recipe.model_validate(yaml.safe_load(path.read_text()))
    except OSError as error:
        raise InputError(f"recipe {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InputError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"recipe {path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def read_frames(config: Config) -> list[_Frame]:
    """Every frame of the input files with its charge and spin.

    Raises:
        InputError: naming the file and frame: unreadable, empty, NaN positions, or a charge that nobody says.
    """
    frames: list[_Frame] = []
    for path in config.inputs:
        try:
            found = list(iread(path, index=":"))
        except Exception as error:  # ASE's readers raise anything
            raise InputError(f"{path} cannot be read as a structure file: {' '.join(str(error).split())}") from error
        if not found:
            raise InputError(f"{path} holds no frame")
        for i, atoms in enumerate(found):
            where = f"{path} frame {i}"
            if len(atoms) == 0:
                raise InputError(f"{where} has no atoms")
            if not np.isfinite(atoms.positions).all():
                atom = int(np.flatnonzero(~np.isfinite(atoms.positions).all(1))[0])
                raise InputError(f"{where}: the position of atom {atom} is not finite")
            charge = atoms.info.get("charge", config.charge)
            if charge is None:
                raise InputError(f"{where}: its total charge is unknown; set charge=... in its comment line or --charge")
            atoms.calc = None
            atoms.info |= {"charge": charge, "spin": atoms.info.get("spin", config.spin or 1)}
            unit = f"{path.stem}-{i:06d}"
            atoms.info.setdefault("group", unit)
            atoms.info.setdefault("source", path.name)
            frames.append(_Frame(f"{len(frames):06d}-{unit}", atoms))
    return frames


class _Store:
    """Append-only files of a run: labels and failures, and a ledger that says how far each is whole.

    A unit of work is written, flushed to the disk, and only then entered in the ledger with the ends of both files; on
    opening, whatever lies beyond the last whole ledger line is cut off.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder = folder
        self.done: dict[str, dict[str, Any]] = {}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._check(folder / "run.json", identity)
            self.ends = {"labels": 0, "failed": 0}
            whole = 0
            ledger = folder / "ledger.jsonl"
            if ledger.exists():
                for line in ledger.read_bytes().splitlines(keepends=True):
                    if not line.endswith(b"\n"):
                        break
                    entry = json.loads(line)
                    entry["begin"] = dict(self.ends)
                    self.ends = entry["ends"]
                    self.done[entry["id"]] = entry
                    whole += len(line)
            self.files = {name: self._open(folder / f"{name}.partial.extxyz", end) for name, end in self.ends.items()}
            self.ledger = self._open(ledger, whole)
        except OSError as error:
            raise RunFolderError(f"{folder} cannot be written: {error.strerror}; give another --output") from error

    def _check(self, path: Path, identity: dict[str, Any]) -> None:
        text = json.dumps(identity, indent=1, sort_keys=True)
        if not path.exists():
            if (self.folder / "ledger.jsonl").exists() or (self.folder / "labels.extxyz").exists():
                raise RunFolderError(f"{self.folder} holds files but no run.json: give an empty --output")
            _write_atomic(path, text)
        elif path.read_text() != text:
            old = json.loads(path.read_text())
            changed = [k for k in identity if old.get(k) != identity[k]]
            raise RunFolderError(
                f"{self.folder} belongs to another run ({', '.join(changed)} differ): give another --output"
            )

    @staticmethod
    def _open(path: Path, end: int) -> io.BufferedRandom:
        path.touch()
        handle = path.open("r+b")
        handle.truncate(end)
        handle.seek(end)
        return handle

    def add(self, outcome: _Outcome) -> None:
        """Write one finished unit."""
        begin = dict(self.ends)
        for name, frames in (("labels", outcome.labelled), ("failed", outcome.failed)):
            if frames:
                self.files[name].write(as_extxyz(frames))
                self.files[name].flush()
                os.fsync(self.files[name].fileno())
                self.ends[name] = self.files[name].tell()
        counts = {"labelled": len(outcome.labelled), "failed": len(outcome.failed), "left_out": outcome.left_out}
        entry = {"id": outcome.id, "ends": dict(self.ends)} | counts
        self.ledger.write(json.dumps(entry).encode() + b"\n")
        self.ledger.flush()
        os.fsync(self.ledger.fileno())
        self.done[outcome.id] = entry | {"begin": begin}

    def finish(self, order: list[str]) -> str:
        """Write both files in the order of the units, and the hash of the labels."""
        digest = hashlib.sha256()
        for name in ("labels", "failed"):
            target = self.folder / f"{name}.extxyz"
            temporary = target.with_suffix(".tmp")
            with temporary.open("wb") as out:
                for unit in order:
                    entry = self.done[unit]
                    self.files[name].seek(entry["begin"][name])
                    block = self.files[name].read(entry["ends"][name] - entry["begin"][name])
                    out.write(block)
                    if name == "labels":
                        digest.update(block)
                out.flush()
                os.fsync(out.fileno())
            temporary.replace(target)
        return digest.hexdigest()

    def close(self) -> None:
        for handle in (*self.files.values(), self.ledger):
            handle.close()

    def total(self, key: str) -> int:
        return sum(entry[key] for entry in self.done.values())


def as_extxyz(frames: list[Atoms]) -> bytes:
    """Frames as extended XYZ text."""
    text = io.StringIO()
    write(text, frames, format="extxyz", write_results=False)
    return text.getvalue().encode()


def _write_atomic(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


_LABELLER: _Labeller | None = None


def _start_worker(config: Config, recipe: Recipe | None) -> None:
    global _LABELLER
    parent = multiprocessing.parent_process()
    if parent is not None:
        # A pool's workers would wait for ever for a parent that was killed.
        watch = threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True)
        watch.start()
    os.environ["OMP_NUM_THREADS"] = "1"
    _LABELLER = _Labeller(config, recipe)


def _work(unit: Start | _Frame) -> _Outcome:
    from threadpoolctl import threadpool_limits

    if _LABELLER is None:
        raise InputError("the worker was not started")
    with threadpool_limits(1):
        return _LABELLER(unit)


def run(config: Config, *, progress: Callable[[int, int, str], None] | None = None) -> Result:
    """Label everything; continue where an earlier call of the same configuration stopped.

    Args:
        config: what and how.
        progress: called with (units done, units in all, a line of text) after every unit.

    Raises:
        InputError: a bad recipe, structure or calculator.
        RunFolderError: the output folder belongs to another run or cannot be written.
    """
    began = time.monotonic()
    recipe = read_recipe(config.recipe) if config.recipe is not None else None
    units: list[Any] = list(recipe.starts()) if recipe is not None else list(read_frames(config))
    identity = config.model_dump(mode="json", exclude={"output", "workers", "inputs", "recipe"})
    identity["recipe"] = recipe.model_dump(mode="json") if recipe is not None else None
    identity["inputs"] = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in config.inputs}
    store = _Store(config.output, json.loads(json.dumps(identity)))
    todo = [unit for unit in units if unit.id not in store.done]
    before = store.total("labelled")
    try:
        for outcome in _outcomes(config, recipe, todo):
            store.add(outcome)
            if progress is not None:
                text = f"{store.total('labelled')} labels, {store.total('failed')} failed"
                progress(len(store.done), len(units), text)
        sha256 = store.finish([unit.id for unit in units])
    except OSError as error:
        raise RunFolderError(f"{config.output} cannot be written: {error.strerror}") from error
    finally:
        store.close()
    result = Result(
        labels=config.output / "labels.extxyz",
        failed=config.output / "failed.extxyz",
        n_labelled=store.total("labelled"),
        n_failed=store.total("failed"),
        n_left_out=store.total("left_out"),
        n_new=store.total("labelled") - before,
        sha256=sha256,
        wall_s=time.monotonic() - began,
    )
    summary = {k: str(v) if isinstance(v, Path) else v for k, v in vars(result).items()}
    _write_atomic(config.output / "summary.yaml", yaml.safe_dump(summary, sort_keys=False))
    return result


def _outcomes(config: Config, recipe: Recipe | None, todo: list[Any]) -> Iterator[_Outcome]:
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
        pending = {pool.submit(_work, unit) for unit in islice(queue, 4 * config.workers)}
        try:
            while pending:
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
                pending |= {pool.submit(_work, unit) for unit in islice(queue, len(finished))}
        finally:
            for future in pending:
                future.cancel()
