"""Time potentials and engines: the same weights and atoms through mdplug and its peers, alternating in one run."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.build import molecule
from pydantic import Field
from scipy.spatial.transform import Rotation

import mdplug
from mdplug.artifact import read_spec
from mdplug.deployed import check_species
from mdplug.errors import InputError, MdplugError, ModelFileError, require
from mdplug.pairs import pairs
from mdplug.registry import resolve
from mdplug.system import AtomicSystem
from mdplug.units import G_CM3_PER_AMU_A3
from mdplug.workflows._common import Config as BaseConfig
from mdplug.workflows._common import Progress, RunFolder, Stopped, catch_signals, silent, write_atomic
from mdplug.workflows.bench_limit import limit_of
from mdplug.workflows.bench_models import RANDOM, describe
from mdplug.workflows.bench_peers import ENGINES, Engine, compact_of, missing, save_atoms
from mdplug.workflows.bench_report import OURS, Records, memory, plot, report
from mdplug.workflows.bench_worker import Worker

WRONG = 0.01  # of the rms force: no rounding, no table is that far off


def most_of_memory() -> float:
    """60 % of this machine's, in GiB."""
    return round(0.6 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)


class Config(BaseConfig):
    """Options of `mdplug bench`."""

    models: list[str] = Field(
        ["l0", "l1"],
        description=f"MACE with random weights (needs mdplug[mace]; {describe()}), or a model file, an upstream "
        "checkpoint, the name of a shipped model",
    )
    molecules: list[int] = Field([64], description="sizes, in water molecules at 1 g/cm3")
    engines: list[Engine] = Field(
        list(ENGINES), description="what to time; what is not installed is left out and said so"
    )
    output: Path = Field(Path("bench"), description="folder to write; the same command again continues")
    dtype: Literal["float32", "float64"] = Field("float32", description="width of the models")
    device: str = Field("cpu", description="cpu or cuda")
    threads: int = Field(1, ge=1, description="CPU threads of every engine")
    rounds: int = Field(5, ge=1, description="how often the engines take turns")
    steps: int = Field(10, ge=1, description="steps of one turn")
    turn_s: float = Field(
        10.0, gt=0, description="a turn ends early after so long; an engine whose one step would take longer, by what "
        "it took at the size before, is left out",
    )  # fmt: skip
    memory_GiB: float = Field(
        default_factory=most_of_memory, gt=0, description="an engine that needs more, or would by what it needed at "
        "the size before, is left out; default: 60 % of this machine's",
    )  # fmt: skip
    warmup: int = Field(5, ge=1, description="steps before the first turn, not counted")
    seed: int = Field(0, description="of weights, orientations and motion")
    patience_s: float = Field(3600.0, gt=0, description="longest wait for one answer (Symmetrix-XL compiles)")


@dataclass
class Result:
    """What was measured.

    Attributes:
        records: one per engine, model and size: "what", "model", "device", "dtype", "threads", "atoms", "pairs",
            "ms_per_step" (median), "min_ms", "max_ms", "us_per_atom", "steps", "outside_model_ms" (median; what a
            step of ours takes besides its model), "time_to_first_force_s" (from the start of the process), "start_MiB"
            (before the first forces), "peak_MiB", "max_dF_eV_A" against "reference",
            "rms_F_eV_A", "fraction_of_limit" (time of the fewest operations known at the machine's rate of multiplying
            matrices, over the time), "versions"; or "what", "model", "atoms" and "left_out" with the reason. Per model
            and size one more, "what": "roofline" with "gflops", "copy_GB_s" and, where counted, "mflop_per_atom".
        folder: holds bench.jsonl, bench.md, bench.png and summary.yaml.
    """

    records: list[dict[str, Any]]
    folder: Path

    def __str__(self) -> str:
        return "\n".join([*(json.dumps(one) for one in self.records), "", report(self.records)])


def water_box(molecules: int, seed: int = 0) -> Atoms:
    """Randomly turned water molecules on a slightly disturbed cubic lattice, 1 g/cm3."""
    rng = np.random.default_rng(seed)
    one = molecule("H2O")
    one.positions -= one.get_center_of_mass()
    edge = (molecules * one.get_masses().sum() * G_CM3_PER_AMU_A3) ** (1 / 3)
    side = int(np.ceil(molecules ** (1 / 3) - 1e-9))
    sites = np.array(list(np.ndindex(side, side, side)))[:molecules] * edge / side
    turns = Rotation.random(molecules, random_state=rng.integers(2**31)).as_matrix()
    positions = np.einsum("mij,aj->mai", turns, one.positions) + sites[:, None] + rng.normal(0, 0.1, (molecules, 1, 3))
    return Atoms(list(one.numbers) * molecules, positions.reshape(-1, 3), cell=[edge] * 3, pbc=True)


def motion(atoms: Atoms, frames: int, seed: int = 0) -> np.ndarray:
    """(frames, N, 3) A: all sway by half an Angstrom, so that pair lists age as in a liquid; molecules a little by
    themselves, lest they run into each other; atoms tremble."""
    rng = np.random.default_rng(seed)
    n = len(atoms) // 3
    turn = 2 * np.pi * (np.arange(frames)[:, None, None] / 150.0)
    phase = rng.uniform(0, 2 * np.pi, (1, n, 3))
    sway = 0.5 * np.sin(turn) + 0.05 * np.repeat(np.sin(turn + phase) - np.sin(phase), 3, axis=1)
    return atoms.positions + sway + rng.normal(0, 0.01, (frames, len(atoms), 3))


def weights(
    name: str, folder: Path, seed: int, setting: dict[str, Any], patience_s: float, check: Callable[[], None]
) -> tuple[Path, Path | None]:
    """(our model file, upstream checkpoint with the same weights or None); made in `folder` where they are not there.

    Args:
        name: of a random model, a shipped one, or a path. seed: of random weights.
        setting: "dtype", "threads", "memory_MiB". patience_s, check: as for Worker.
    """
    if name in RANDOM:
        require("mace", extra="mace")
        upstream = folder / f"{name}.model"
        if not upstream.exists():
            frame, part = folder / f"{name}.npz", folder / f"{name}.part"
            save_atoms(frame, water_box(64, seed))
            job = {"engine": "build", "model": name, "seed": seed, "structure": str(frame), "upstream": str(part)}
            with Worker({**setting, **job}, folder, patience_s, check) as worker:
                worker.ask()
            part.replace(upstream)
    elif (path := resolve(name)) and zipfile.is_zipfile(path):
        try:
            read_spec(path)
            return path, None
        except ModelFileError:
            upstream = path
    else:
        return path, None
    from mdplug.potentials.convert.mace import convert

    ours = folder / f"{upstream.stem}.safetensors"
    if not ours.exists():
        mdplug.save(convert(upstream), ours)
    return ours, upstream


def too_much(engine: str, model: str, atoms: int, known: Records, config: Config, factor: float = 1.0) -> str:
    """Why an engine is not tried at a size, judged by what it did at the next smaller one; empty if it is.

    Args:
        known: records so far. factor: how much more time and memory than in those is expected (2: float64).
    """
    smaller = [r for r in known if (r["what"], r["model"]) == (engine, model) and r["atoms"] < atoms]
    if not smaller:
        return ""
    last = max(smaller, key=lambda r: r["atoms"])
    if "left_out" in last:
        return last["left_out"]
    grown = factor * atoms / last["atoms"]
    seconds = 1e-3 * last["ms_per_step"] * grown
    gib = (last["start_MiB"] + max(last["peak_MiB"] - last["start_MiB"], 0.0) * grown) / 1024
    if seconds > config.turn_s:
        return f"a step would take about {seconds:.0f} s at {atoms} atoms (turn_s: {config.turn_s:g})"
    if gib > config.memory_GiB:
        return f"it would need about {gib:.0f} GiB at {atoms} atoms (memory_GiB: {config.memory_GiB:g})"
    return ""


class _Case:
    """One model at one size: starts the engines, checks their forces, lets them take turns.

    Args:
        name: of the model. molecules: size. folder: for scratch files. known: records of smaller sizes.
        progress, check: as for `run` and Worker.
    """

    def __init__(
        self, name: str, molecules: int, config: Config, folder: Path, known: Records, progress: Progress,
        check: Callable[[], None],
    ):  # fmt: skip
        self.name, self.config, self.folder, self.known, self.check = name, config, folder, known, check
        setting = {"device": config.device, "dtype": config.dtype, "threads": config.threads}
        limits = {"memory_MiB": 1024 * config.memory_GiB}
        ours, self.upstream = weights(name, folder, config.seed, setting | limits, config.patience_s, check)
        self.spec = read_spec(ours)
        atoms = water_box(molecules, config.seed)
        self.n_atoms, self.n_elements = len(atoms), len(np.unique(atoms.numbers))
        system = AtomicSystem.from_ase(atoms)
        check_species(system.numbers, self.spec)
        self.say = lambda done, text="": progress(done, config.rounds, f"{name}, {len(atoms)} atoms{text}")
        # The last two frames are for the forces alone: an engine may remember what it has seen.
        total = config.warmup + config.rounds * config.steps
        self.checked = [total, total + 1]
        save_atoms(folder / "box.npz", atoms)
        np.save(folder / "frames.npy", motion(atoms, total + 2, config.seed))
        head = self.spec.heads[0] if len(self.spec.heads) > 1 else None
        self.job = {
            "structure": str(folder / "box.npz"), "frames": str(folder / "frames.npy"), "model": str(ours),
            "upstream": str(self.upstream), "head": head, **setting, **limits,
        }  # fmt: skip
        n_pairs = pairs(system, self.spec.cutoff).n_pairs
        self.common: dict[str, Any] = {"model": name, **setting, "atoms": self.n_atoms, "pairs": n_pairs}
        self.workers: dict[str, Worker] = {}
        self.records: dict[str, dict[str, Any]] = {}

    def start(self, engine: str, **change: Any) -> Worker:
        """Its process, starting."""
        self.say(0, f": starting {engine}")
        return Worker({**self.job, "engine": engine, **change}, self.folder, self.config.patience_s, self.check)

    def forces(self, worker: Worker) -> np.ndarray:
        """(2, N, 3) eV/A, of frames that are for this alone."""
        kept = self.folder / "forces.npy"
        worker.ask({"frames": self.checked, "keep": str(kept), "at_most_s": math.inf})
        return np.load(kept)

    def reference(self) -> np.ndarray:
        """Forces in float64: of mace-torch where it has the weights and can be expected to cope, else ours."""
        judges = ["mdplug-ase"]
        if self.upstream is not None and not missing("mace-torch", self.config.device):
            judges.insert(0, "mace-torch")
            if too_much("mace-torch", self.name, self.n_atoms, self.known, self.config, factor=2.0):
                judges.pop(0)
        for judge in judges:
            try:
                with self.start(judge, dtype="float64") as worker:
                    worker.ask()
                    found = self.forces(worker)
            except MdplugError as error:
                if isinstance(error, Stopped) or judge == "mdplug-ase":
                    raise
            else:
                break
        self.common |= {"reference": f"{judge} float64", "rms_F_eV_A": float(np.sqrt((found**2).mean()))}
        return found

    def leave_out(self, engine: str, reason: str) -> None:
        """Record why it does not take part."""
        self.records[engine] = {"what": engine, "model": self.name, "atoms": self.n_atoms, "left_out": reason}
        if engine in self.workers:
            self.workers.pop(engine).kill()  # it may hold memory

    def enter(self, engine: Engine, expected: np.ndarray, stack: ExitStack) -> None:
        """Start an engine and compare its forces, or leave it out."""
        reason = missing(engine, self.config.device)
        if not reason and self.upstream is None and engine not in OURS:
            reason = "has no such weights"
        if reason or (reason := too_much(engine, self.name, self.n_atoms, self.known, self.config)):
            self.leave_out(engine, reason)
            return
        try:
            if engine == "symmetrix" and not compact_of(str(self.upstream)).exists():
                with self.start("compact", memory_MiB=1e6) as worker:  # of the conversion, not of the engine
                    worker.ask()
            self.workers[engine] = stack.enter_context(self.start(engine))
            first = self.workers[engine].ask()
            difference = float(np.abs(self.forces(self.workers[engine]) - expected).max())
        except MdplugError as error:
            if isinstance(error, Stopped):
                raise
            self.leave_out(engine, str(error))
            return
        if not difference < WRONG * self.common["rms_F_eV_A"]:  # NaN, too
            self.leave_out(engine, f"its forces are those of another function: off by {difference:.2g} eV/A")
            return
        self.records[engine] = {
            "what": engine, **self.common, "max_dF_eV_A": difference, "versions": first["versions"],
            "time_to_first_force_s": round(first["first_force_s"], 3), "start_MiB": round(first["start_MiB"], 1),
        }  # fmt: skip

    def turn(self, engine: str, begin: int, steps: int) -> list[tuple[float, float]]:
        """Milliseconds of its next steps, whole and inside the model; none, and it is left out, if it dies of them."""
        request = {"frames": list(range(begin, begin + steps)), "keep": None, "at_most_s": self.config.turn_s}
        try:
            said = self.workers[engine].ask(request)
        except MdplugError as error:
            if isinstance(error, Stopped):
                raise
            self.leave_out(engine, str(error))
            return []
        self.records[engine]["peak_MiB"] = round(said["peak_MiB"], 1)
        return list(zip(said["milliseconds"], said["inside_ms"], strict=True))

    def run(self) -> Records:
        """The records; first that of the machine."""
        expected, config = self.reference(), self.config
        rates: list[dict[str, float]] = []
        with ExitStack() as stack:
            for engine in config.engines:
                self.enter(engine, expected, stack)
            # The next frame of each: none is skipped, so that pair lists age as in a liquid.
            at = {one: len(self.turn(one, 0, config.warmup)) for one in list(self.workers)}
            times: dict[str, list[tuple[float, float]]] = {one: [] for one in at}
            roofline = stack.enter_context(self.start("roofline", memory_MiB=1e6))
            roofline.ask()
            for k in range(config.rounds):
                self.check()
                self.say(k)
                rates.append(roofline.ask({}))
                order = list(self.workers)
                shift = k % max(len(order), 1)
                for one in order[shift:] + order[:shift]:
                    some = self.turn(one, at[one], config.steps)
                    at[one] += len(some)
                    times[one] += some
            self.say(config.rounds)
        limit = {key: round(float(np.median([one[key] for one in rates])), 2) for key in rates[0]}
        mflop = limit_of(self.spec, self.common["pairs"] / self.n_atoms, self.n_elements)
        for one in self.workers:
            wholes = [whole for whole, _ in times[one]]
            ms, record = float(np.median(wholes)), self.records[one]
            if one in OURS:
                record["outside_model_ms"] = round(float(np.median([whole - part for whole, part in times[one]])), 4)
            record |= {"ms_per_step": round(ms, 4), "min_ms": round(min(wholes), 4), "max_ms": round(max(wholes), 4)}
            record |= {"us_per_atom": round(1e3 * ms / self.n_atoms, 3), "steps": len(wholes)}
            if mflop is not None:
                record["fraction_of_limit"] = float(f"{mflop * self.n_atoms / (ms * limit['gflops']):.3g}")
        setting = {key: self.common[key] for key in ("model", "device", "dtype", "threads", "atoms")}
        machine = {"what": "roofline", **setting, **limit}
        return [machine | ({} if mflop is None else {"mflop_per_atom": round(mflop, 3)}), *self.records.values()]


@contextmanager
def stoppable() -> Iterator[Callable[[], None]]:
    """A function that raises once a signal has asked for an end."""
    with catch_signals() as caught:

        def check() -> None:
            if caught.number is not None:
                raise Stopped(caught.number, f"stopped by {caught.name}; the same command goes on")

        yield check


def run(config: Config, *, progress: Progress = silent) -> Result:
    """Measure every model at every size; a model and size that are in the folder already are not measured again.

    Raises:
        InputError: no size, a model that does not know water.
        MissingExtraError: a random-weight model without mace-torch.
    """
    if not config.molecules or min(config.molecules) < 1:
        raise InputError(f"molecules must be sizes of at least 1, got {config.molecules}")
    with RunFolder(config.output, "bench", config, may_change=("models", "molecules")) as folder, stoppable() as check:
        log = folder / "bench.jsonl"
        known = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        done = {(r["model"], r["atoms"]) for r in known}
        scratch = folder / "work"
        scratch.mkdir(exist_ok=True)
        for name in config.models:
            for molecules in sorted(config.molecules):
                check()
                if (name, 3 * molecules) not in done:
                    known += _Case(name, molecules, config, scratch, known, progress, check).run()
                    write_atomic(log, "".join(json.dumps(one) + "\n" for one in known))
        write_atomic(folder / "bench.md", report(known) + "\n")
        plot(known, folder / "bench.png")
        folder.summary(records=known, memory=memory(known))
    return Result(known, config.output)
