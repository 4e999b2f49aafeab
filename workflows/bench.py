"""Time potentials and engines: the same weights and atoms through mdplug and its peers, alternating in one run."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from ase import Atoms
from ase.build import molecule
from ase.io import write
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
from mdplug.workflows.bench_peers import ENGINES, RANDOM, Engine, installed

OURS = ("mdplug-ase", "mdplug-openmm")


class Config(BaseConfig):
    """Options of `mdplug bench`."""

    models: list[str] = Field(
        ["l0", "l1"],
        description="l0: MACE with 96 channels, L=0, 4.5 A; l1: 128 channels, L=1, 5 A (random weights, need "
        "mdplug[mace]); else a model file, an upstream checkpoint, or the name of a shipped model",
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
    warmup: int = Field(5, ge=1, description="steps before the first turn, not counted")
    seed: int = Field(0, description="of weights, orientations and motion")
    patience_s: float = Field(3600.0, gt=0, description="longest wait for one answer (Symmetrix-XL compiles)")


@dataclass
class Result:
    """What was measured.

    Attributes:
        records: one per engine, model and size: "what", "model", "device", "dtype", "threads", "atoms", "pairs",
            "ms_per_step" (median), "min_ms", "max_ms", "peak_MiB", "max_dF_eV_A" against "reference", "rms_F_eV_A",
            "versions"; or "what", "model", "atoms" and "left_out" with the reason.
        folder: holds bench.jsonl, bench.md, bench.png and summary.yaml.
    """

    records: list[dict[str, Any]]
    folder: Path

    def __str__(self) -> str:
        return "\n".join([*(json.dumps(one) for one in self.records), "", table(self.records)])


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
    """(frames, N, 3) A: molecules sway by half an Angstrom, atoms tremble, so that pair lists age as in a liquid."""
    rng = np.random.default_rng(seed)
    n = len(atoms) // 3
    turn = 2 * np.pi * (np.arange(frames)[:, None, None] / 150.0)
    phase = rng.uniform(0, 2 * np.pi, (1, n, 3))
    sway = np.repeat(0.5 * (np.sin(turn + phase) - np.sin(phase)), 3, axis=1)
    return atoms.positions + sway + rng.normal(0, 0.01, (frames, len(atoms), 3))


class Worker:
    """One engine in its own process (see bench_peers.py).

    Args:
        job: what `serve` takes. folder: for its log. patience_s: longest wait for an answer.
        check: called every second of waiting; may raise.

    Raises:
        MdplugError: from `ask`, if the process has died or does not answer in time.
    """

    def __init__(self, job: dict[str, Any], folder: Path, patience_s: float, check: Callable[[], None] = lambda: None):
        self.what, self._patience, self._check = job["engine"], patience_s, check
        name = f"{job['engine']}-{job['dtype']}"
        self._log = folder / f"{name}.log"
        path = folder / f"{name}.job.json"
        write_atomic(path, json.dumps(job))
        threads = str(job["threads"])
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OPENMM_CPU_THREADS": threads,
        }  # fmt: skip
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mdplug.workflows.bench_peers", str(path)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment,
                start_new_session=True,  # Ctrl-C is for us: a worker that dies of it would read as a failed engine
            )  # fmt: skip
        self._buffer = b""

    def ask(self, request: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request (None: only wait for the first word) and wait for the answer."""
        assert self._process.stdin is not None
        if request is not None:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        return json.loads(self._line())

    def _line(self) -> bytes:
        stream = self._process.stdout
        assert stream is not None
        until = time.monotonic() + self._patience
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                if not selector.select(min(1.0, self._patience)):
                    self._check()
                    if time.monotonic() > until:
                        raise MdplugError(f"{self.what} did not answer within {self._patience:g} s; see {self._log}")
                    continue
                more = os.read(stream.fileno(), 65536)
                if not more:
                    self._process.wait()
                    said = self._log.read_text(errors="replace").strip().splitlines() or ["no message"]
                    raise MdplugError(f"{self.what} stopped: {said[-1].strip()}; see {self._log}")
                self._buffer += more
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()


def _weights(name: str, config: Config, folder: Path) -> tuple[Path, Path | None]:
    """(our model file, upstream checkpoint with the same weights or None)."""
    if name in RANDOM:
        require("mace", extra="mace")
        upstream = folder / f"{name}.model"
        if not upstream.exists():
            frame, part = folder / f"{name}.extxyz", folder / f"{name}.part"
            write(frame, water_box(64, config.seed))
            job = {"build": name, "seed": config.seed, "structure": str(frame), "upstream": str(part)}
            write_atomic(folder / f"{name}.build.json", json.dumps(job))
            command = [sys.executable, "-m", "mdplug.workflows.bench_peers", str(folder / f"{name}.build.json")]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                raise MdplugError(f"mace-torch could not build {name}: {done.stderr.strip().splitlines()[-1]}")
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


def _measure(
    name: str, molecules: int, config: Config, folder: Path, progress: Progress, check: Callable[[], None]
) -> list[dict[str, Any]]:
    """Records of one model at one size."""
    ours, upstream = _weights(name, config, folder)
    spec = read_spec(ours)
    atoms = water_box(molecules, config.seed)
    system = AtomicSystem.from_ase(atoms)
    check_species(system.numbers, spec)
    total = config.warmup + config.rounds * config.steps
    write(folder / "box.extxyz", atoms)
    # The last two are for the forces alone: an engine may remember what it has seen.
    np.save(folder / "frames.npy", motion(atoms, total + 2, config.seed))
    job = {
        "structure": str(folder / "box.extxyz"), "frames": str(folder / "frames.npy"), "model": str(ours),
        "upstream": str(upstream), "device": config.device, "dtype": config.dtype, "threads": config.threads,
    }  # fmt: skip
    common = {
        "model": name, "device": config.device, "dtype": config.dtype, "threads": config.threads,
        "atoms": len(atoms), "pairs": pairs(system, spec.cutoff).n_pairs,
    }  # fmt: skip
    kept, checked = folder / "forces.npy", [total, total + 1]
    judge: Engine = "mace-torch" if upstream is not None and installed("mace-torch") else "mdplug-ase"
    progress(0, config.rounds, f"{name}, {len(atoms)} atoms: reference forces of {judge} in float64")
    with Worker({**job, "engine": judge, "dtype": "float64"}, folder, config.patience_s, check) as worker:
        worker.ask()
        worker.ask({"frames": checked, "keep": str(kept)})
        expected = np.load(kept)
    common |= {"reference": f"{judge} float64", "rms_F_eV_A": float(np.sqrt((expected**2).mean()))}

    records: dict[Engine, dict[str, Any]] = {}
    with ExitStack() as stack:
        workers: dict[Engine, Worker] = {}
        engine: Engine
        for engine in config.engines:
            records[engine] = {"what": engine, "model": name, "atoms": len(atoms)}
            if not installed(engine):
                records[engine]["left_out"] = "not installed"
                continue
            if upstream is None and engine not in OURS:
                records[engine]["left_out"] = "has no such weights"
                continue
            progress(0, config.rounds, f"{name}, {len(atoms)} atoms: starting {engine}")
            worker = stack.enter_context(Worker({**job, "engine": engine}, folder, config.patience_s, check))
            try:
                versions = worker.ask()["versions"]
                worker.ask({"frames": checked, "keep": str(kept)})
                difference = float(np.abs(np.load(kept) - expected).max())
                worker.ask({"frames": list(range(config.warmup)), "keep": None})
            except Stopped:
                raise
            except MdplugError as error:
                records[engine]["left_out"] = str(error)
                continue
            workers[engine] = worker
            records[engine] |= {**common, "max_dF_eV_A": difference, "versions": versions, "times": []}
        order = list(workers)
        for turn in range(config.rounds):
            check()
            progress(turn, config.rounds, f"{name}, {len(atoms)} atoms")
            first = config.warmup + turn * config.steps
            for engine in order[turn % len(order) :] + order[: turn % len(order)]:
                said = workers[engine].ask({"frames": list(range(first, first + config.steps)), "keep": None})
                records[engine]["times"] += said["milliseconds"]
                records[engine]["peak_MiB"] = round(said["peak_MiB"], 1)
        progress(config.rounds, config.rounds, f"{name}, {len(atoms)} atoms")
    for record in records.values():
        if "times" in record:
            times = record.pop("times")
            record["ms_per_step"] = round(float(np.median(times)), 4)
            record["min_ms"], record["max_ms"] = round(min(times), 4), round(max(times), 4)
            record["steps"] = len(times)
    return list(records.values())


def table(records: list[dict[str, Any]]) -> str:
    """The records as a Markdown table; the last column is the time of mace-torch over the time of each."""
    base = {(r["model"], r["atoms"]): r["ms_per_step"] for r in records if r["what"] == "mace-torch" and "pairs" in r}
    lines = [
        "| model | atoms | pairs | engine | ms per step: median | min | max | us per atom | peak MiB | max dF, eV/A | "
        "times mace-torch |",
        "|---|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for r in records:
        if "left_out" in r:
            lines.append(f"| {r['model']} | {r['atoms']} | | {r['what']} | left out: {r['left_out']} | | | | | | |")
            continue
        of = base.get((r["model"], r["atoms"]))
        ratio = "" if of is None else f"{of / r['ms_per_step']:.2f}"
        lines.append(
            f"| {r['model']} | {r['atoms']} | {r['pairs']} | {r['what']} | {r['ms_per_step']:.2f} | {r['min_ms']:.2f} "
            f"| {r['max_ms']:.2f} | {1e3 * r['ms_per_step'] / r['atoms']:.1f} | {r['peak_MiB']:.0f} "
            f"| {r['max_dF_eV_A']:.1e} | {ratio} |"
        )
    return "\n".join(lines)


def plot(records: list[dict[str, Any]], path: Path) -> None:
    """Time per step over system size, a panel for each model."""
    from matplotlib.figure import Figure

    measured = [r for r in records if "left_out" not in r]
    models = list(dict.fromkeys(r["model"] for r in measured))
    figure = Figure(figsize=(4.5 * max(len(models), 1), 4), layout="constrained")
    for panel, model in enumerate(models):
        axes = figure.add_subplot(1, len(models), panel + 1)
        for k, engine in enumerate(ENGINES):
            rows = sorted(
                (r for r in measured if r["model"] == model and r["what"] == engine), key=lambda r: r["atoms"]
            )
            if rows:
                middle = np.array([r["ms_per_step"] for r in rows])
                spread = np.abs(np.array([[r["min_ms"] for r in rows], [r["max_ms"] for r in rows]]) - middle)
                axes.errorbar([r["atoms"] for r in rows], middle, spread, marker="osD^v"[k], capsize=3, label=engine)
        axes.set(xscale="log", yscale="log", xlabel="atoms", ylabel="ms per step", title=Path(model).stem)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150, format="png")


@contextmanager
def _stoppable() -> Iterator[Callable[[], None]]:
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
    with RunFolder(config.output, "bench", config, may_change=("models", "molecules")) as folder, _stoppable() as check:
        log = folder / "bench.jsonl"
        known = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        done = {(r["model"], r["atoms"]) for r in known}
        scratch = folder / "work"
        scratch.mkdir(exist_ok=True)
        for name in config.models:
            for molecules in sorted(config.molecules):
                check()
                if (name, 3 * molecules) not in done:
                    known += _measure(name, molecules, config, scratch, progress, check)
                    write_atomic(log, "".join(json.dumps(one) + "\n" for one in known))
        write_atomic(folder / "bench.md", table(known) + "\n")
        plot(known, folder / "bench.png")
        folder.summary(records=known)
    return Result(known, config.output)
