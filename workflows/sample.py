"""Structures to label: molecules and clusters from short dynamics, distortions, close contacts, broken bonds.

A recipe is a list of tasks; a task is a number of starts; a start is one independent piece of work with a seed of its
own, so that starts can run in any order and in any process and give the same structures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from ase import Atoms
from pydantic import Field

from mdplug.errors import InputError
from mdplug.registry import resolve as resolve_model
from mdplug.workflows import clusters
from mdplug.workflows._common import Config
from mdplug.workflows.molecules import Template, conformers, resolve
from mdplug.workflows.sample_liquid import Liquid, liquid
from mdplug.workflows.sampling import (
    BaseTask,
    CalculatorFactory,
    DynamicsSettings,
    Start,
    cluster_kind,
    langevin,
    relax,
)


class IsolatedAtoms(BaseTask):
    """Free atoms and ions: ``symbols`` maps for example ``Li+`` to [charge, 2S+1]."""

    kind: Literal["atoms"]
    species: dict[str, tuple[int, int]]

    def starts(self) -> int:
        return 1


class Molecules(BaseTask):
    """Single molecules: dynamics from thermal geometries of several conformers, and distortions of its frames."""

    kind: Literal["molecules"]
    molecules: tuple[str, ...]
    starts_each: int = Field(10, ge=1)
    dynamics: DynamicsSettings = DynamicsSettings()
    resampled: int = Field(1, ge=0, description="harmonic thermal geometries for each frame of dynamics")
    rattled_A: tuple[float, ...] = ()

    def starts(self) -> int:
        return self.starts_each * len(self.molecules)


class Clusters(BaseTask):
    """Dense clusters of whole molecules: short relaxation, dynamics, and one-label variations of its frames."""

    kind: Literal["clusters"]
    count: int = Field(ge=1)
    n_atoms: tuple[int, int] = (25, 60)
    solvents: dict[str, float] = Field(description="name: weight; molecules of a cluster are drawn from it")
    kinds: tuple[int, int] = Field((1, 3), description="how many of the solvents one cluster mixes, at most")
    ions: tuple[tuple[float, dict[str, int]], ...] = Field(((1.0, {}),), description="[weight, {ion: count}] ...")
    contact: tuple[float, float] = Field((0.78, 0.95), description="contacts over sums of contact radii when packed")
    relax_steps: int = Field(8, ge=0)
    dynamics: DynamicsSettings = DynamicsSettings()
    resampled: int = 1
    nudged: int = 0
    scaled: tuple[float, ...] = Field((), description="factors between centres of mass, one drawn for each frame")

    def starts(self) -> int:
        return self.count


class Contacts(BaseTask):
    """Two molecules pushed together, one chosen pair of atoms at a chosen distance."""

    kind: Literal["contacts"]
    molecules: tuple[str, ...]
    count: int = Field(ge=1)
    each: int = Field(4, ge=1)
    distances_A: tuple[float, float] = (1.2, 2.2)
    temperature_K: float = 300.0

    def starts(self) -> int:
        return self.count


class Bonds(BaseTask):
    """Every bond of a molecule scanned from compressed to broken."""

    kind: Literal["bonds"]
    molecules: tuple[str, ...]
    factors: tuple[float, ...] = (0.75, 0.8, 0.86, 0.93, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6)
    temperature_K: float = 300.0

    def starts(self) -> int:
        return len(self.molecules)


Task = Annotated[IsolatedAtoms | Molecules | Clusters | Contacts | Bonds | Liquid, Field(discriminator="kind")]


class Recipe(Config):
    """What to sample. The same recipe and seed give the same structures."""

    name: str
    seed: int
    tasks: tuple[Task, ...]
    first_starts: int | None = Field(None, ge=1, description="only so many of the starts, a fair part of every task")

    @classmethod
    def read(cls, file: Path | None = None, given: Mapping[str, Any] | None = None) -> Self:
        """See `read_config`; model files are looked for beside the recipe first."""
        recipe = super().read(file, given)
        for task in recipe.tasks:
            if isinstance(task, Liquid) and file is not None and (file.parent / task.model).is_file():
                task.model = str(file.parent / task.model)
        return recipe

    def models(self) -> tuple[Path, ...]:
        """Files of the potentials that sample."""
        return tuple(sorted({resolve_model(task.model) for task in self.tasks if isinstance(task, Liquid)}))

    def starts(self) -> list[Start]:
        """All starts: free atoms first, then an order shuffled by the seed: any part of a run is fair to the whole."""
        found = [
            Start(self.seed, t, i, f"{task.name}-{i:05d}")
            for t, task in enumerate(self.tasks)
            for i in range(task.starts())
        ]
        shuffled = np.random.default_rng(self.seed).permutation(len(found))
        order = sorted(shuffled, key=lambda k: self.tasks[found[k].task].kind != "atoms")
        return [found[k] for k in order[: self.first_starts]]


def structures(recipe: Recipe, start: Start, calculator: CalculatorFactory) -> Iterator[Atoms]:
    """The structures of one start, unlabelled, with config_type, group and split in ``info``.

    Args:
        recipe: the recipe the start comes from.
        start: which.
        calculator: makes the calculator that drives relaxation and dynamics.
    """
    task = recipe.tasks[start.task]
    held = task.valid_every and start.index % task.valid_every == 0
    tags = {"group": start.id, "split": "valid" if held else task.split, "fmax_eV_A": task.fmax_eV_A}
    maker: Callable[..., Iterable[tuple[str, Atoms]]] = _MAKERS[task.kind]
    for config_type, atoms in maker(task, start, calculator):
        atoms.calc = None
        atoms.info = {"charge": atoms.info["charge"], "spin": atoms.info.get("spin", 1)} | tags
        atoms.info["config_type"] = config_type
        yield atoms


def _isolated(task: IsolatedAtoms, start: Start, calculator: CalculatorFactory) -> Iterator[tuple[str, Atoms]]:
    for name, (charge, spin) in task.species.items():
        yield "isolated_atom", Atoms(name.strip("+-0123456789"), info={"charge": charge, "spin": spin})


def _molecules(task: Molecules, start: Start, calculator: CalculatorFactory) -> Iterator[tuple[str, Atoms]]:
    rng, calc = start.rng(), calculator()
    name = task.molecules[start.index % len(task.molecules)]
    modes = _draw_modes(name, rng, calculator)
    temperature = float(rng.choice(task.dynamics.temperatures_K))
    atoms = modes.sample(temperature, rng)
    for frame in langevin(atoms, calc, task.dynamics, temperature, rng):
        yield "molecule", frame
        for _ in range(task.resampled):
            out = frame.copy()
            out.positions = modes.resample_in_place(frame.positions, 1.5 * temperature, rng)
            yield "molecule", out
        for sigma in task.rattled_A:
            yield "molecule_rattled", clusters.rattle(frame, sigma * rng.uniform(0.3, 1.0), rng)


def _clusters(task: Clusters, start: Start, calculator: CalculatorFactory) -> Iterator[tuple[str, Atoms]]:
    rng, calc = start.rng(), calculator()
    temperature = float(rng.choice(task.dynamics.temperatures_K))
    modes = [_draw_modes(name, rng, calculator) for name in _composition(task, rng)]
    scale = rng.uniform(*task.contact)
    atoms = clusters.aggregate([m.sample(temperature, rng) for m in modes], rng, scale=scale)
    relax(atoms, calc, task.relax_steps)
    kind = cluster_kind(atoms)
    yield kind, atoms.copy()
    for frame in langevin(atoms, calc, task.dynamics, temperature, rng):
        yield kind, frame
        for _ in range(task.resampled):
            yield kind, _resampled(frame, modes, temperature, rng)
        for _ in range(task.nudged):
            moved = clusters.nudge(frame, rng.uniform(0.02, 0.25), rng.uniform(2, 20), rng)
            yield kind + "_nudged", _resampled(moved, modes, temperature, rng)
        if task.scaled:
            factor = float(rng.choice(task.scaled))
            yield kind + "_scaled", _resampled(clusters.scale_centres(frame, factor), modes, temperature, rng)


def _contacts(task: Contacts, start: Start, calculator: CalculatorFactory) -> Iterator[tuple[str, Atoms]]:
    rng = start.rng()
    for _ in range(task.each):
        first, second = (
            _draw_modes(str(rng.choice(task.molecules)), rng, calculator).sample(task.temperature_K, rng)
            for _ in range(2)
        )
        # Elements first, then an atom of it: rare elements meet as often as hydrogens.
        i, j = (int(rng.choice(np.flatnonzero(m.numbers == rng.choice(np.unique(m.numbers))))) for m in (first, second))
        yield "contact", clusters.close_contact(first, second, i, j, rng.uniform(*task.distances_A), rng)


def _bonds(task: Bonds, start: Start, calculator: CalculatorFactory) -> Iterator[tuple[str, Atoms]]:
    rng = start.rng()
    name = task.molecules[start.index]
    template = _template(name, 0)
    for bond in template.bonds:
        for factor in task.factors:
            modes = _draw_modes(name, rng, calculator)
            atoms = modes.sample(task.temperature_K, rng)
            yield "bond", clusters.stretch_bond(atoms, template.bonds, bond, factor * rng.uniform(0.98, 1.02))


_MAKERS: dict[str, Callable[..., Any]] = {
    "atoms": _isolated,
    "molecules": _molecules,
    "clusters": _clusters,
    "contacts": _contacts,
    "bonds": _bonds,
    "liquid": liquid,
}


def _composition(task: Clusters, rng: np.random.Generator) -> list[str]:
    """Names of a cluster's molecules, in a random order of placing."""
    target = int(rng.integers(task.n_atoms[0], task.n_atoms[1] + 1))
    names = list(task.solvents)
    weights = np.array([task.solvents[n] for n in names])
    number = min(int(rng.integers(task.kinds[0], task.kinds[1] + 1)), len(names))
    kinds = [names[k] for k in rng.choice(len(names), size=number, replace=False, p=weights / weights.sum())]
    ion_weights = np.array([w for w, _ in task.ions])
    ions = task.ions[int(rng.choice(len(task.ions), p=ion_weights / ion_weights.sum()))][1]
    drawn = [ion for ion, count in ions.items() for _ in range(count)]
    size = sum(len(_template(n, 0).numbers) for n in drawn)
    smallest = min(len(_template(n, 0).numbers) for n in kinds)
    target = max(target, size + smallest)  # at least one solvent molecule
    while size + smallest <= target:
        name = str(rng.choice(kinds))
        n = len(_template(name, 0).numbers)
        if size + n <= target:
            drawn.append(name)
            size += n
    return [drawn[k] for k in rng.permutation(len(drawn))]


def _resampled(frame: Atoms, modes: Sequence[clusters.Modes], temperature: float, rng: np.random.Generator) -> Atoms:
    out = frame.copy()
    for group, mode in zip(clusters.molecule_groups(frame), modes, strict=True):
        out.positions[group] = mode.resample_in_place(frame.positions[group], temperature, rng)
    return out


CONFORMERS = 4


@lru_cache(maxsize=256)
def _template(name: str, conformer: int) -> Template:
    found = resolve(name)
    if len(found) != 1:
        raise InputError(f"{name!r} is a salt: name its ions {' and '.join(m.name for m in found)} one by one")
    shapes = conformers(found[0], CONFORMERS, seed=11)
    return shapes[conformer % len(shapes)]


_MODES: dict[tuple[Any, ...], clusters.Modes] = {}


def _draw_modes(name: str, rng: np.random.Generator, calculator: CalculatorFactory) -> clusters.Modes:
    """Minimum and modes of a random conformer, kept for the life of the process."""
    conformer = int(rng.integers(CONFORMERS))
    calc = calculator()
    key = (name, conformer, type(calc), getattr(calc, "hamiltonian", ""))
    if key not in _MODES:
        atoms = _template(name, conformer).atoms()
        atoms.set_array("mol_id", np.zeros(len(atoms), dtype=int))
        relax(atoms, calc, 200, fmax=0.02)

        def forces(probe: Atoms) -> np.ndarray:
            probe.calc = calc
            return probe.get_forces()

        atoms.calc = None
        _MODES[key] = clusters.harmonic_modes(atoms, forces)
    return _MODES[key]
