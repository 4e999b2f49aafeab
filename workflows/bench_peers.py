"""One engine as a program of its own: mdplug's, or a peer with the same weights. Started by workflows/bench.py.

Peers change global state (mace-torch sets torch's default dtype), so each lives in its own process. It is told on
stdin, a JSON line each, which frames to evaluate, and answers on stdout with the milliseconds of each.
"""

from __future__ import annotations

import importlib.util
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

Step = Callable[[np.ndarray], tuple[float, np.ndarray]]
"""(N, 3) positions in A -> energy in eV, (N, 3) forces in eV/A."""

Engine = Literal["mdplug-ase", "mdplug-openmm", "mace-torch", "openmmml", "symmetrix"]
# What to import and which versions to state, by engine.
PACKAGES: dict[Engine, tuple[str, tuple[str, ...]]] = {
    "mdplug-ase": ("mdplug", ("mdplug", "torch", "ase")),
    "mdplug-openmm": ("openmm", ("mdplug", "torch", "openmm")),
    "mace-torch": ("mace", ("mace-torch", "torch", "e3nn", "ase")),
    "openmmml": ("openmmml", ("openmmml", "mace-torch", "torch", "openmm")),
    "symmetrix": ("symmetrix", ("symmetrix-xl", "ase")),
}
ENGINES: tuple[Engine, ...] = tuple(PACKAGES)
# Random-weight models: irreps between layers, cutoff in A, mean number of neighbours.
RANDOM: dict[str, tuple[str, float, float]] = {
    "l0": ("96x0e", 4.5, 40.0),
    "l1": ("128x0e+128x1o", 5.0, 54.0),
}


def installed(engine: Engine) -> bool:
    """Whether the engine's package is here; mace-torch is behind openmmml's MACE, too."""
    wanted = [PACKAGES[engine][0], *(["mace"] if engine in ("openmmml", "symmetrix") else [])]
    return all(importlib.util.find_spec(name) is not None for name in wanted)


def build(name: str, seed: int, frame: Any, path: Path) -> None:
    """Write an upstream checkpoint with random weights, scaled to a force of 1 eV/A (rms) in a frame.

    Args:
        name: of `RANDOM`. seed: of the weights. frame: ase.Atoms. path: file to write.
    """
    import mace  # noqa: F401  (before e3nn)
    import torch
    from e3nn import o3
    from mace import modules
    from mace.calculators import MACECalculator

    irreps, r_max, neighbours = RANDOM[name]
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(seed)
    model = modules.ScaleShiftMACE(
        r_max=r_max,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=3,
        interaction_cls=modules.blocks.RealAgnosticResidualInteractionBlock,
        interaction_cls_first=modules.blocks.RealAgnosticInteractionBlock,
        num_interactions=2,
        num_elements=2,
        hidden_irreps=o3.Irreps(irreps),
        MLP_irreps=o3.Irreps("16x0e"),
        atomic_energies=np.array([-13.6, -432.6]),
        avg_num_neighbors=neighbours,
        atomic_numbers=[1, 8],
        correlation=3,
        gate=torch.nn.functional.silu,
        atomic_inter_scale=1.0,
        atomic_inter_shift=0.0,
    )
    atoms = frame.copy()
    atoms.calc = MACECalculator(models=[model], device="cpu", default_dtype="float64")
    rms = float(np.sqrt((atoms.get_forces() ** 2).mean()))
    scale: Any = model.scale_shift.scale
    scale.fill_(float(f"{1.0 / rms:.3g}"))  # rounded: the same file on every machine
    torch.save(model, path)


def _atoms(job: dict[str, Any]) -> Any:
    from ase.io import read

    return read(job["structure"])


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


def _mdplug_ase(job: dict[str, Any]) -> Step:
    import mdplug

    return _through_ase(job, mdplug.Calculator(mdplug.load(job["model"], device=job["device"], dtype=job["dtype"])))


def _mdplug_openmm(job: dict[str, Any]) -> Step:
    import mdplug

    potential = mdplug.load(job["model"], device=job["device"], dtype=job["dtype"])
    return _through_openmm(job, mdplug.create_system(_topology(job), potential, remove_cm=False))


def _mace_torch(job: dict[str, Any]) -> Step:
    from mace.calculators import MACECalculator

    calculator = MACECalculator(model_paths=job["upstream"], device=job["device"], default_dtype=job["dtype"])
    return _through_ase(job, calculator)


def _openmmml(job: dict[str, Any]) -> Step:
    import mace  # noqa: F401  (before e3nn)
    from openmmml import MLPotential

    precision = {"float32": "single", "float64": "double"}[job["dtype"]]
    system = MLPotential("mace", modelPath=job["upstream"]).createSystem(
        _topology(job), removeCMMotion=False, precision=precision
    )
    return _through_openmm(job, system)


def _symmetrix(job: dict[str, Any]) -> Step:
    compact = Path(job["upstream"]).with_suffix(".json")
    if not compact.exists():  # by its own converter, which brings torch: kept out of this process
        code = "from symmetrix.cli.extract_mace import main; main()"
        arguments = ["--model", job["upstream"], "--output", str(compact.with_suffix(".part"))]
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=sys.stderr)
        compact.with_suffix(".part").replace(compact)
    from symmetrix import Symmetrix

    return _through_ase(job, Symmetrix(str(compact), dtype=job["dtype"]))


START: dict[str, Callable[[dict[str, Any]], Step]] = {
    "mdplug-ase": _mdplug_ase,
    "mdplug-openmm": _mdplug_openmm,
    "mace-torch": _mace_torch,
    "openmmml": _openmmml,
    "symmetrix": _symmetrix,
}


def peak_mib(device: str) -> float:
    """Most memory that this process has held: of the GPU, or resident."""
    if device != "cpu":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _versions(engine: Engine) -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES[engine][1]}


def serve(job: dict[str, Any], requests: Iterator[str], answers: IO[str]) -> None:
    """Start the engine, then answer requests {"frames": [k, ...], "keep": file or null} until they end.

    Args:
        job: {"engine", "structure", "frames", "model", "upstream", "device", "dtype", "threads"}.
        requests: JSON lines. answers: JSON lines go there.
    """

    def answer(**what: Any) -> None:
        answers.write(json.dumps(what) + "\n")
        answers.flush()

    if job["engine"] != "symmetrix":
        import torch

        torch.set_num_threads(job["threads"])
    step = START[job["engine"]](job)
    frames = np.load(job["frames"])
    answer(versions=_versions(job["engine"]))
    for line in requests:
        request = json.loads(line)
        milliseconds, forces = [], []
        for k in request["frames"]:
            begin = time.perf_counter()
            _, force = step(frames[k])
            milliseconds.append(1e3 * (time.perf_counter() - begin))
            forces.append(force)
        if request["keep"] is not None:
            np.save(request["keep"], np.array(forces, dtype=np.float64))
        answer(milliseconds=milliseconds, peak_MiB=peak_mib(job["device"]))


def main() -> None:
    """`python -m mdplug.workflows.bench_peers JOB.json`."""
    job = json.loads(Path(sys.argv[1]).read_text())
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    if job.get("build"):
        build(job["build"], job["seed"], _atoms(job), Path(job["upstream"]))
        return
    serve(job, iter(sys.stdin.readline, ""), answers)


if __name__ == "__main__":
    main()
