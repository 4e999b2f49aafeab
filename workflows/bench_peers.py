"""One engine as a program of its own: mdplug's, or a peer with the same weights. Started by workflows/bench.py.

Peers change global state (mace-torch sets torch's default dtype), so each lives in its own process. It is told on
stdin, a JSON line each, which frames to evaluate, and answers on stdout with the milliseconds of each.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np

Step = Callable[[np.ndarray], tuple[float, np.ndarray]]
"""(N, 3) positions in A -> energy in eV, (N, 3) forces in eV/A."""

Engine = Literal[
    "mdplug-ase", "mdplug-openmm", "mace-torch", "mace-torch-compile", "mace-torch-cueq", "openmmml", "symmetrix"
]
# What to import and which versions to state, by engine.
PACKAGES: dict[Engine, tuple[str, tuple[str, ...]]] = {
    "mdplug-ase": ("mdplug", ("mdplug", "torch", "ase")),
    "mdplug-openmm": ("openmm", ("mdplug", "torch", "openmm")),
    "mace-torch": ("mace", ("mace-torch", "torch", "e3nn", "ase")),
    "mace-torch-compile": ("mace", ("mace-torch", "torch", "e3nn", "ase")),
    "mace-torch-cueq": ("cuequivariance_torch", ("mace-torch", "cuequivariance-torch", "torch", "ase")),
    "openmmml": ("openmmml", ("openmmml", "mace-torch", "torch", "openmm")),
    "symmetrix": ("symmetrix", ("symmetrix-xl", "ase")),
}
ENGINES: tuple[Engine, ...] = tuple(PACKAGES)


def missing(engine: Engine, device: str) -> str:
    """Why an engine cannot take part here; empty if it can."""
    behind = ["mace"] if engine in ("openmmml", "symmetrix", "mace-torch-cueq") else []
    if any(importlib.util.find_spec(name) is None for name in (PACKAGES[engine][0], *behind)):
        return "not installed"
    if engine == "mace-torch-cueq" and device == "cpu":
        return "has no kernels for the CPU"
    if engine == "symmetrix" and device != "cpu":
        return "only its CPU backend is wired here"
    return ""


def save_atoms(path: Path, atoms: Any) -> None:
    """Write what workers start from. No format of ase.io: importing it would count in the time to the first forces."""
    np.savez(path, numbers=atoms.numbers, positions=atoms.positions, cell=atoms.cell.array, pbc=atoms.pbc)


def _atoms(job: dict[str, Any]) -> Any:
    from ase import Atoms

    with np.load(job["structure"]) as stored:
        return Atoms(**stored)


def _through_ase(job: dict[str, Any], calculator: Any) -> Step:
    atoms = _atoms(job)
    atoms.calc = calculator

    def step(positions: np.ndarray) -> tuple[float, np.ndarray]:
        atoms.set_positions(positions)
        return atoms.get_potential_energy(), atoms.get_forces()

    return step


def _through_openmm(job: dict[str, Any], system: Any) -> Step:
    import openmm

    from mdplug.units import KJ_MOL_PER_EV, NM

    platform = openmm.Platform.getPlatformByName("CPU" if job["device"] == "cpu" else "CUDA")
    options = {"Threads": str(job["threads"])} if job["device"] == "cpu" else {}
    context = openmm.Context(system, openmm.VerletIntegrator(0.0005), platform, options)

    def step(positions: np.ndarray) -> tuple[float, np.ndarray]:
        context.setPositions(positions / NM)
        state = context.getState(getEnergy=True, getForces=True)
        energy = state.getPotentialEnergy()._value / KJ_MOL_PER_EV
        return energy, state.getForces(asNumpy=True)._value / (KJ_MOL_PER_EV * NM)

    return step


def _topology(job: dict[str, Any]) -> Any:
    from mdplug.engines.openmm.topology import topology_from_ase

    return topology_from_ase(_atoms(job))


def _load(job: dict[str, Any]) -> Any:
    import mdplug

    model = mdplug.load(job["model"], device=job["device"], dtype=job["dtype"], head=job["head"])
    inside.watch(model)
    return model


def _mdplug_ase(job: dict[str, Any]) -> Step:
    import mdplug

    return _through_ase(job, mdplug.Calculator(_load(job)))


def _mdplug_openmm(job: dict[str, Any]) -> Step:
    import mdplug

    return _through_openmm(job, mdplug.create_system(_topology(job), _load(job), remove_cm=False))


def _mace_torch(job: dict[str, Any], **options: Any) -> Step:
    from mace.calculators import MACECalculator

    if job["head"] is not None:
        options["head"] = job["head"]
    calculator = MACECalculator(
        model_paths=job["upstream"], device=job["device"], default_dtype=job["dtype"], **options
    )
    return _through_ase(job, calculator)


def _mace_torch_compile(job: dict[str, Any]) -> Step:
    return _mace_torch(job, compile_mode="default")


def _mace_torch_cueq(job: dict[str, Any]) -> Step:
    return _mace_torch(job, enable_cueq=True)


def _openmmml(job: dict[str, Any]) -> Step:
    import mace  # noqa: F401  (before e3nn)
    from openmmml import MLPotential

    precision = {"float32": "single", "float64": "double"}[job["dtype"]]
    system = MLPotential("mace", modelPath=job["upstream"]).createSystem(
        _topology(job), removeCMMotion=False, precision=precision
    )
    return _through_openmm(job, system)


def compact_of(upstream: str | Path) -> Path:
    """Where Symmetrix-XL's form of a checkpoint lies."""
    return Path(upstream).with_suffix(".json")


def _symmetrix(job: dict[str, Any]) -> Step:
    from symmetrix import Symmetrix

    return _through_ase(job, Symmetrix(str(compact_of(job["upstream"])), dtype=job["dtype"], head=job["head"]))


START: dict[str, Callable[[dict[str, Any]], Step]] = {
    "mdplug-ase": _mdplug_ase,
    "mdplug-openmm": _mdplug_openmm,
    "mace-torch": _mace_torch,
    "mace-torch-compile": _mace_torch_compile,
    "mace-torch-cueq": _mace_torch_cueq,
    "openmmml": _openmmml,
    "symmetrix": _symmetrix,
}


def peak_mib(device: str) -> float:
    """Most memory that this process has held: of the GPU, or resident."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    with contextlib.suppress(OSError):  # Linux; what getrusage says there includes the parent that started us
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    # In KiB, but in bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def guard(limit_mib: float) -> None:
    """End this process with a word on stderr once it holds more memory than that, before the machine suffers."""

    def watch() -> None:
        while peak_mib("cpu") < limit_mib:
            time.sleep(0.05)
        sys.stderr.write(f"it needs more than {limit_mib / 1024:.1f} GiB\n")
        sys.stderr.flush()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Inside:
    """Seconds spent in a model itself: its local part with the adjoint, where that is written out, else all of it.

    What an engine's step takes besides is the MD loop's own: checks, pair list, conversions, the engine.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def watch(self, model: Any) -> None:
        """Count in every model of the same class: an engine may hold a copy."""
        from mdplug.deployed import Deployed

        if getattr(model, "has_written_adjoint", False):
            owner, name = type(model), "local_with_gradient"
        else:
            owner, name = (Deployed if hasattr(model, "local") else type(model)), "forward"
        inner = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            try:
                return inner(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - begin

        setattr(owner, name, counted)


inside = Inside()


def timed(jobs: Iterable[Callable[[], Any]], at_most_s: float) -> tuple[list[float], list[Any]]:
    """Milliseconds and results of one after the other; no further one once `at_most_s` have passed."""
    milliseconds, results = [], []
    start = time.perf_counter()
    for one in jobs:
        begin = time.perf_counter()
        results.append(one())
        end = time.perf_counter()
        milliseconds.append(1e3 * (end - begin))
        if end - start > at_most_s:
            break
    return milliseconds, results


def _versions(engine: Engine) -> dict[str, str]:
    found = {name: metadata.version(name) for name in PACKAGES[engine][1]}
    if "mdplug" in found:
        from mdplug.kernels import instruction_set

        found["kernels"] = instruction_set() or "plain torch"
    return found


Answer = Callable[..., None]
"""Takes what to say by keyword."""


def serve(job: dict[str, Any], requests: Iterator[dict[str, Any]], answer: Answer) -> None:
    """Start the engine, then answer requests {"frames": [k, ...], "keep": file or null, "at_most_s"} until they end.

    Args:
        job: {"engine", "structure", "frames", "model", "upstream", "head", "device", "dtype", "threads", "started"};
            the last is the time.time() at which this process was asked for.
    """
    if job["engine"] != "symmetrix":
        import torch

        torch.set_num_threads(job["threads"])
    if job["engine"] == "roofline":
        from mdplug.workflows.bench_limit import rates

        measure = rates(job["dtype"], job["device"])
        answer()
        for _ in requests:
            answer(**measure())
        return
    step = START[job["engine"]](job)
    frames = np.load(job["frames"])
    start = peak_mib(job["device"])
    step(frames[0])
    answer(first_force_s=time.time() - job["started"], start_MiB=start, versions=_versions(job["engine"]))
    for request in requests:

        def one(k: int) -> tuple[np.ndarray, float]:
            inside.seconds = 0.0
            forces = step(frames[k])[1]
            return forces, 1e3 * inside.seconds

        milliseconds, results = timed((partial(one, k) for k in request["frames"]), request["at_most_s"])
        if request["keep"] is not None:
            np.save(request["keep"], np.array([forces for forces, _ in results], dtype=np.float64))
        answer(milliseconds=milliseconds, inside_ms=[ms for _, ms in results], peak_MiB=peak_mib(job["device"]))


def be_worker(serve: Callable[[dict[str, Any], Iterator[dict[str, Any]], Answer], None]) -> None:
    """The main function of a process that bench_worker.Worker started: job in a file, requests on stdin."""
    job = json.loads(Path(sys.argv[1]).read_text())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def answer(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    guard(job["memory_MiB"])
    serve(job, map(json.loads, iter(sys.stdin.readline, "")), answer)


def _prepare(job: dict[str, Any]) -> None:
    if job["engine"] == "build":
        from mdplug.workflows.bench_models import build

        build(job["model"], job["seed"], _atoms(job), Path(job["upstream"]))
        return
    from symmetrix.cli.extract_mace import main

    path = compact_of(job["upstream"])
    sys.argv = ["extract", "--model", job["upstream"], "--output", str(path.with_suffix(".part"))]
    main()
    path.with_suffix(".part").replace(path)


def _prepare_or_serve(job: dict[str, Any], requests: Iterator[dict[str, Any]], answer: Answer) -> None:
    if job["engine"] in ("build", "compact"):
        _prepare(job)
        answer()
        return
    serve(job, requests, answer)


if __name__ == "__main__":
    be_worker(_prepare_or_serve)
