"""Time uncertainties in MD: a model alone, as the body of an ensemble, watched, and as several models, in turns.

Everything goes through OpenMM in one process, on the same frames. One turn is as many steps as lie between two looks at
the members' forces, so that its mean is the amortised cost.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field

import mdplug
from mdplug.errors import InputError
from mdplug.workflows._common import Config as BaseConfig
from mdplug.workflows._common import Progress, provenance, silent, torch_threads, write_atomic
from mdplug.workflows.bench import motion, water_box
from mdplug.workflows.md_config import Config as MdConfig

DEFAULT = MdConfig.model_fields


class Config(BaseConfig):
    """Options of `mdplug bench-uncertainty`."""

    model: str = Field(description="model file with features, as MACE's, or the name of a shipped one")
    output: Path = Field(Path("bench-uncertainty.jsonl"), description="file to write, one JSON line for each variant")
    molecules: int = Field(64, ge=1, description="water molecules")
    members: list[int] = Field([8, 32], description="members on one body")
    models: int = Field(4, ge=2, description="independent models")
    every: int = Field(DEFAULT["sigma_every"].default, ge=1, description="steps between looks, as in mdplug md")
    probes: int = Field(DEFAULT["sigma_probes"].default, ge=1, description="random mixtures in a look, as in mdplug md")
    dtype: Literal["float32", "float64"] = Field("float32", description="width of the models")
    threads: int = Field(1, ge=1, description="CPU threads")
    rounds: int = Field(8, ge=1, description="how often the variants take turns")
    seed: int = Field(0, ge=0, description="of orientations, motion and the members' weights")


@dataclass
class Result:
    """What was measured.

    Attributes:
        records: one for each variant: "what", "members", "ms_per_step" (median over turns of their mean), "min_ms",
            "max_ms", "ratio" (median over rounds of the time over that of "body" in the same round), "ratio_low" and
            "ratio_high" (its quartiles), "model", "atoms", "every", "probes", "dtype", "threads", "versions".
    """

    records: list[dict[str, Any]]

    def __str__(self) -> str:
        return "\n".join(json.dumps(one) for one in self.records)


class _Variant:
    """A potential in a Context of OpenMM; energy sigma at every step, that of forces once a turn."""

    def __init__(self, potential: Any, atoms: Any, config: Config, sigma: bool, probes: int | None):
        import openmm

        from mdplug.engines.openmm import create_system, plug_of
        from mdplug.engines.openmm.topology import topology_from_ase

        system = create_system(topology_from_ase(atoms), potential, remove_cm=False)
        platform = openmm.Platform.getPlatformByName("Reference")
        self.context = openmm.Context(system, openmm.VerletIntegrator(0.0005), platform)
        self.plug, self.sigma, self.probes = plug_of(system), sigma, probes

    def turn(self, frames: np.ndarray) -> float:
        """Milliseconds of a step, over these frames."""
        begin = time.perf_counter()
        for k, frame in enumerate(frames):
            self.context.setPositions(frame)
            if self.probes is not None and k == 0:
                with self.plug.probing(self.probes, k):
                    self.context.getState(getEnergy=True)
            self.context.getState(getEnergy=True, getForces=True)
            if self.sigma:
                self.plug.uncertainty()
        return 1e3 * (time.perf_counter() - begin) / len(frames)


def shared(body: Any, members: int, seed: int, atoms: Any) -> Any:
    """Members on one body, with random weights."""
    import torch

    from mdplug.deployed import evaluate
    from mdplug.potentials.members import SharedMembers
    from mdplug.system import AtomicSystem

    features = evaluate(body, AtomicSystem.from_ase(atoms), forces=False).extras.get("features")
    if features is None:
        raise InputError(f"potential {body.spec.name!r} gives no features; give a MACE model")
    made = SharedMembers.of(body, members, features.shape[1])
    with torch.no_grad():
        made.weight.normal_(0.0, 0.01, generator=torch.Generator().manual_seed(seed))
    return made.requires_grad_(False).eval()


def run(config: Config, *, progress: Progress = silent) -> Result:
    """Measure.

    Raises:
        InputError: a model without features, or that does not know water.
    """
    from mdplug.compose import Ensemble
    from mdplug.units import NM

    def load() -> Any:
        return mdplug.load(config.model, dtype=config.dtype)

    atoms = water_box(config.molecules, config.seed)
    frames = motion(atoms, (config.rounds + 1) * config.every, config.seed) / NM
    with torch_threads(config.threads):
        body = load()
        variants: dict[str, tuple[int, _Variant]] = {"body": (1, _Variant(body, atoms, config, False, None))}
        for members in config.members:
            made = shared(body, members, config.seed, atoms)
            variants[f"shared-{members}, sigma of energies"] = members, _Variant(made, atoms, config, True, None)
            watched = _Variant(made, atoms, config, True, config.probes)
            variants[f"shared-{members}, sigma of forces too"] = members, watched
        deep = Ensemble.of([load() for _ in range(config.models)])  # the time does not depend on the weights
        variants[f"models-{config.models}"] = config.models, _Variant(deep, atoms, config, True, None)
        times: dict[str, list[float]] = {name: [] for name in variants}
        for k in range(config.rounds + 1):
            progress(k, config.rounds + 1, f"{len(atoms)} atoms")
            for name, (_, variant) in variants.items():
                ms = variant.turn(frames[k * config.every : (k + 1) * config.every])
                if k:  # the first is for pair lists, tables and caches
                    times[name].append(ms)
    common = {"model": Path(config.model).stem, "atoms": len(atoms), "every": config.every, "probes": config.probes}
    common |= {"dtype": config.dtype, "threads": config.threads, "versions": provenance()["versions"]}
    records = []
    for name, (members, _) in variants.items():
        ratios = np.array(times[name]) / np.array(times["body"])
        low, middle, high = (float(f"{q:.4g}") for q in np.percentile(ratios, [25, 50, 75]))
        record: dict[str, Any] = {"what": name, "members": members}
        for key, pick in (("ms_per_step", np.median), ("min_ms", min), ("max_ms", max)):
            record[key] = round(float(pick(times[name])), 4)
        records.append(record | {"ratio": middle, "ratio_low": low, "ratio_high": high} | common)
    write_atomic(config.output, "".join(json.dumps(one) + "\n" for one in records))
    return Result(records)
