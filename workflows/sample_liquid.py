"""Clusters out of a liquid: dynamics of a packed box with a potential of ours, frames carved, variants of the pieces.

The potential that samples need not be the one that is trained: it only has to visit what a liquid visits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from pydantic import BaseModel, ConfigDict, Field

import mdplug
from mdplug.errors import InputError, SimulationError
from mdplug.workflows import clusters
from mdplug.workflows._common import torch_threads
from mdplug.workflows.sampling import BaseTask, DynamicsSettings, Start, cluster_kind, langevin, relax

LOST_EV_A = 60.0  # no liquid has such a force: the sampling potential has lost the box


class Box(BaseModel):
    """What `build` packs."""

    model_config = ConfigDict(extra="forbid")
    composition: str
    density_g_cm3: float = Field(gt=0, le=25)


class Liquid(BaseTask):
    """Clusters carved out of boxes that a given potential runs; boxes take turns with the starts.

    Of the clusters a share stays as it is (config_type liquid_md); the others are rattled atom by atom
    (liquid_rattled) or have their molecules moved rigidly (liquid_nudged).
    """

    kind: Literal["liquid"]
    model: str = Field(description="model file, by its path or beside the recipe; or the name of a shipped one")
    boxes: tuple[Box, ...] = Field(min_length=1)
    starts_each: int = Field(1, ge=1)
    relax_steps: int = Field(60, ge=0)
    dynamics: DynamicsSettings = DynamicsSettings(timestep_fs=0.5, steps=400, save_every=50)
    first_frame: int = Field(1, ge=0, description="frames before it are too near to the packing")
    per_frame: int = Field(4, ge=1)
    n_atoms: tuple[int, int] = (30, 61)
    ion_share: float = Field(0.5, ge=0, le=1, description="of the clusters have an ion in the middle")
    as_is_share: float = Field(0.5, ge=0, le=1)
    rattled_A: tuple[float, float] = (0.02, 0.07)
    nudged_A: tuple[float, float] = (0.05, 0.2)
    nudged_deg: tuple[float, float] = (2.0, 10.0)

    def starts(self) -> int:
        return self.starts_each * len(self.boxes)


def liquid(task: Liquid, start: Start, calculator: Any) -> Iterator[tuple[str, Atoms]]:
    """The clusters of one start; the labelling calculator takes no part."""
    from mdplug.workflows.build import build

    rng = start.rng()
    box = task.boxes[start.index % len(task.boxes)]
    packed = build(box.composition, density_g_cm3=box.density_g_cm3, seed=int(rng.integers(1, 2**30))).atoms
    temperature = float(rng.choice(task.dynamics.temperatures_K))
    n_atoms, share, missed = task.n_atoms, task.ion_share, 0
    with torch_threads(1):
        calc = _sampler(task.model)
        relax(packed, calc, task.relax_steps)
        for k, frame in enumerate(langevin(packed, calc, task.dynamics, temperature, rng)):
            largest = float(np.abs(calc.results["forces"]).max())
            if not largest < LOST_EV_A:
                raise SimulationError(f"{task.model} lost {box.composition} at {temperature:g} K: {largest:.3g} eV/A")
            if k < task.first_frame:
                continue
            for _ in range(task.per_frame):
                seed = int(rng.integers(2**31))
                try:
                    found = list(carve_clusters([frame], seed=seed, per_frame=1, n_atoms=n_atoms, ion_share=share))
                except InputError:  # a large cluster can meet its own image: a smaller one will be drawn elsewhere
                    missed += 1
                    continue
                for cluster in found:
                    yield _varied(task, cluster, rng)
    if missed > task.per_frame:
        raise InputError(f"{box.composition}: the box is too small for clusters of {n_atoms[1]} atoms; enlarge it")


def _varied(task: Liquid, cluster: Atoms, rng: np.random.Generator) -> tuple[str, Atoms]:
    if rng.random() < task.as_is_share:
        return "liquid_md", cluster
    if rng.random() < 0.5:
        return "liquid_rattled", clusters.rattle(cluster, rng.uniform(*task.rattled_A), rng)
    return "liquid_nudged", clusters.nudge(cluster, rng.uniform(*task.nudged_A), rng.uniform(*task.nudged_deg), rng)


@lru_cache(maxsize=2)
def _sampler(model: str) -> Calculator:
    from mdplug.engines.ase import Calculator as OurCalculator

    return OurCalculator(mdplug.load(model, device="cpu"))


def carve_clusters(
    frames: Iterable[Atoms],
    *,
    seed: int,
    per_frame: int = 4,
    n_atoms: tuple[int, int] = (30, 60),
    ion_share: float = 0.5,
    template: Atoms | None = None,
    source: str = "carved",
    split: str = "train",
) -> Iterator[Atoms]:
    """Clusters of whole molecules out of the frames of a liquid box, ready to be labelled.

    Args:
        frames: periodic frames with ``mol_id`` and ``mol_charge`` (as ``build`` writes them), or without, then
            ``template`` is the box they started from and lends both.
        seed: of the choice of centres and sizes.
        per_frame: clusters of each frame.
        n_atoms: smallest and largest size asked for.
        ion_share: this fraction of the clusters has a charged molecule in the middle, where there is one.
        template: see ``frames``.
        source: for ``info["source"]``.
        split: for ``info["split"]``.
    """
    rng = np.random.default_rng(seed)
    for k, frame in enumerate(frames):
        box = frame.copy()
        if template is not None:
            if len(template) != len(box) or (template.numbers != box.numbers).any():
                raise InputError(f"frame {k} does not have the atoms of the template")
            for name in ("mol_id", "mol_charge"):
                box.set_array(name, template.arrays[name])
        ids = np.unique(box.arrays["mol_id"]) if "mol_id" in box.arrays else np.zeros(0, dtype=int)
        if not len(ids) or "mol_charge" not in box.arrays:
            raise InputError(f"frame {k} has no mol_id and mol_charge: give the box it started from as template")
        ions = np.unique(box.arrays["mol_id"][box.arrays["mol_charge"] != 0])
        for _ in range(per_frame):
            middle = ions if len(ions) and rng.random() < ion_share else ids
            cluster = clusters.carve(box, int(rng.choice(middle)), int(rng.integers(n_atoms[0], n_atoms[1] + 1)))
            cluster.info |= {"group": f"{source}-{k:05d}", "source": source, "split": split}
            cluster.info["config_type"] = "carved_" + cluster_kind(cluster)
            yield cluster
