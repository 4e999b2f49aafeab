"""What works on this machine and in this environment, and why not. Every line is tried, not looked up."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mdplug.errors import MdplugError
from mdplug.workflows._common import Config as BaseConfig
from mdplug.workflows._common import Progress, silent


class Config(BaseConfig):
    """Options of `mdplug doctor`: none."""


@dataclass
class Check:
    """One line. `works` is None for what is not here and not needed."""

    name: str
    works: bool | None
    text: str


@dataclass
class Result:
    """All checks; exit code 1 where something that every user needs does not work."""

    checks: list[Check]
    exit_code: int = field(default=0, repr=False)

    def __str__(self) -> str:
        mark = {True: "ok ", False: "NO ", None: "-  "}
        return "\n".join(f"{mark[one.works]} {one.name:<22} {one.text}" for one in self.checks)


class Absent(Exception):
    """Not here; the text says what it would be for and how to get it."""


def run(config: Config, *, progress: Progress = silent) -> Result:
    """Try everything."""
    result = Result([])
    for k, (name, needed, check) in enumerate(CHECKS):
        progress(k, len(CHECKS), name)
        works: bool | None = True
        try:
            text = check()
        except Absent as absent:
            works, text = None, str(absent)
        except Exception as error:  # whatever fails is the answer
            works, text = False, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        result.checks.append(Check(name, works, text))
        if needed and not works:
            result.exit_code = 1
    progress(len(CHECKS), len(CHECKS), "done")
    return result


def _python() -> str:
    import mdplug

    return f"{sys.version.split()[0]}, mdplug {mdplug.__version__}"


def _torch() -> str:
    import torch

    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        built = "built without CUDA" if torch.version.cuda is None else "sees no device"
        raise Absent(f"this torch is {built}; potentials run on the CPU")
    left = float((torch.ones(8, device="cuda") * 2).sum())
    if left != 16:
        raise RuntimeError(f"a sum on the GPU gave {left}")
    from mdplug.kernels import triton

    reason = triton.why_not()
    return f"{torch.cuda.get_device_name(0)}; " + (f"plain torch, {reason}" if reason else "operators in Triton")


_PLATFORM = """
import sys, openmm
platform = openmm.Platform.getPlatformByName(sys.argv[1])
system = openmm.System()
system.addParticle(1.0)
context = openmm.Context(system, openmm.VerletIntegrator(0.001), platform)
context.setPositions([(0.0, 0.0, 0.0)])
context.getIntegrator().step(1)
"""


def _platforms() -> str:
    import openmm

    found = []
    for k in range(openmm.Platform.getNumPlatforms()):
        name = openmm.Platform.getPlatform(k).getName()
        # A driver that is not right may end the process, so each platform is tried in one of its own.
        done = subprocess.run(
            [sys.executable, "-c", _PLATFORM, name], capture_output=True, text=True, timeout=120, check=False
        )
        why = (done.stderr.strip() or "no message").splitlines()[-1][:80]
        found.append(name if done.returncode == 0 else f"{name} (fails: {why})")
    if "Reference" not in found:
        raise RuntimeError(", ".join(found))
    return f"{openmm.__version__}: {', '.join(found)}"


def _dimer_md(path: Path) -> float:
    """Energy of an argon dimer after a few steps of OpenMM with a potential from a file."""
    from ase import Atoms

    import mdplug
    from mdplug.engines.openmm import Simulation, plug_of
    from mdplug.engines.openmm.topology import topology_from_ase
    from mdplug.potentials.pair import LennardJones
    from mdplug.units import NM

    mdplug.save(LennardJones.new(0.0104, 3.4, 8.0), path)
    atoms = Atoms("Ar2", [[0, 0, 0], [3.8, 0, 0]])
    import openmm

    system = mdplug.create_system(topology_from_ase(atoms), path)
    simulation = Simulation(
        topology_from_ase(atoms),
        system,
        openmm.VerletIntegrator(0.001),
        openmm.Platform.getPlatformByName("Reference"),
    )
    simulation.context.setPositions(atoms.positions / NM)
    simulation.step(3)
    last = plug_of(system).last
    return float("nan") if last is None else float(last["energy"])


def _python_force() -> str:
    with tempfile.TemporaryDirectory() as folder:
        energy = _dimer_md(Path(folder) / "lj.safetensors")
    if not -0.0104 <= energy < -0.009:
        raise RuntimeError(f"an argon dimer by PythonForce has {energy} eV")
    return "a potential runs in OpenMM"


def _torch_force() -> str:
    import openmm
    import torch

    try:
        import openmmtorch
    except ImportError as error:
        raise Absent("openmmtorch is not installed; PythonForce is used instead (extra torchforce)") from error
    pair = f"torch {torch.__version__}, OpenMM {openmm.__version__}"
    torch_ok = torch.__version__.startswith("2.9.")
    openmm_ok = tuple(int(x) for x in openmm.__version__.split(".")[:2]) < (8, 6)
    if not (torch_ok and openmm_ok):
        raise RuntimeError(f"openmmtorch needs torch 2.9 and OpenMM below 8.6, here: {pair}; use PythonForce")
    return f"{openmmtorch.__name__} with {pair}"


def _imports(module: str, extra: str, use: str) -> Callable[[], str]:
    def check() -> str:
        from importlib import import_module, metadata, util

        if util.find_spec(module.partition(".")[0]) is None:
            raise Absent(f"not installed; for {use}: pip install 'mdplug[{extra}]'")
        import_module(module)
        names = metadata.packages_distributions().get(module.partition(".")[0], [module])
        return f"{metadata.version(names[0])}, for {use}"

    return check


def _packmol() -> str:
    beside = Path(sys.executable).with_name("packmol")
    program = str(beside) if beside.exists() else shutil.which("packmol")
    if program is None:
        raise Absent("not found beside the interpreter or on the path; for build: pip install 'mdplug[build]'")
    done = subprocess.run([program], input="", capture_output=True, text=True, timeout=30, check=False)
    if "PACKMOL" not in (done.stdout + done.stderr).upper():
        raise RuntimeError(f"{program} does not run as packmol")
    return "runs, for build"


def _compiler() -> str:
    program = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if program is None:
        raise Absent("no C++ compiler; not needed, the portable path runs")
    version = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    return version.splitlines()[0] if version else Path(program).name


def _native() -> str:
    from mdplug import kernels

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the line below says the same
        reason = kernels.why_not()
    if reason:
        raise Absent(f"potentials run in plain torch, several times slower: {reason}")
    return f"{kernels.instruction_set()} build"


def _shipped() -> str:
    from ase import Atoms

    import mdplug
    from mdplug.registry import SHIPPED

    try:
        potential = mdplug.load(SHIPPED[0])
    except MdplugError as error:
        raise RuntimeError(f"{SHIPPED[0]} does not load: {error}") from error
    # The bond of dihydrogen is not what it is for, water is.
    atoms = Atoms("OH2", [[0, 0, 0.119], [0, 0.763, -0.477], [0, -0.763, -0.477]])
    atoms.calc = mdplug.Calculator(potential)
    atoms.get_forces()
    clock = time.perf_counter()
    for _ in range(5):
        atoms.positions += 1e-4
        forces = atoms.get_forces()
    if not np.isfinite(forces).all() or np.abs(forces.sum(axis=0)).max() > 1e-3:
        raise RuntimeError("its forces on water do not add up")
    return f"{SHIPPED[0]} loads and runs ({(time.perf_counter() - clock) / 5 * 1e3:.0f} ms for a water molecule)"


CHECKS: tuple[tuple[str, bool, Callable[[], str]], ...] = (
    ("python", True, _python),
    ("torch", True, _torch),
    ("cuda", False, _cuda),
    ("OpenMM platforms", True, _platforms),
    ("OpenMM PythonForce", True, _python_force),
    ("OpenMM TorchForce", False, _torch_force),
    ("native operators", False, _native),
    ("shipped model", True, _shipped),
    ("ase", True, _imports("ase", "dev", "ASE runs and files")),
    ("mdtraj", True, _imports("mdtraj", "dev", "trajectories")),
    ("pymatgen", True, _imports("pymatgen.core", "dev", "space groups")),
    ("openmm-ml", False, _imports("openmmml", "openmmml", "mixed ML/MM systems")),
    ("tblite", False, _imports("tblite", "label", "label")),
    ("rdkit", False, _imports("rdkit", "build", "build")),
    ("packmol", False, _packmol),
    ("mace-torch", False, _imports("mace", "mace", "comparisons")),
    ("C++ compiler", False, _compiler),
)
