"""Errors of a potential on labelled structures: tables, a parity plot, the worst structures by name."""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase.data import chemical_symbols
from ase.formula import Formula
from pydantic import Field

from mdplug.deployed import check_species
from mdplug.errors import InputError
from mdplug.potential import Model
from mdplug.spec import Spec
from mdplug.workflows._common import (
    ModelConfig,
    Progress,
    RunFolder,
    replacing,
    silent,
    torch_threads,
    write_atomic,
)
from mdplug.workflows.dataset import Labelled, Loader, read, references_of
from mdplug.workflows.trainer import predictions


class Config(ModelConfig):
    """Which model on which data."""

    data: tuple[Path, ...] = Field(description="labelled extended XYZ")
    splits: tuple[str, ...] = Field((), description="only structures whose info['split'] is one of these; default: all")
    exclude_kinds: tuple[str, ...] = Field(
        ("isolated_atom", "IsolatedAtom"), description="config_type of structures to leave out"
    )
    output: Path = Path("evaluate")
    outliers: int = Field(10, ge=0, description="how many of the worst structures to name")
    batch_pairs: int = Field(20000, ge=1)


@dataclass(frozen=True)
class Row:
    """Errors of one group; NaN where nothing in it has that label.

    Attributes:
        group: "all", "split:...", "kind:...", "element:...", "formula:...". n_structures, n_atoms: of the group.
    """

    group: str
    n_structures: int
    n_atoms: int
    energy_mae_meV_atom: float
    energy_rmse_meV_atom: float
    forces_mae_meV_A: float
    forces_rmse_meV_A: float
    rms_force_meV_A: float


@dataclass(frozen=True)
class Outlier:
    """A structure with a large error.

    Attributes:
        file, frame, kind: which. atom, element: the atom with the largest force error.
        force_error_meV_A: its norm. energy_error_meV_atom: of the structure.
    """

    file: str
    frame: int
    kind: str
    atom: int
    element: str
    force_error_meV_A: float
    energy_error_meV_atom: float


@dataclass
class Result:
    """Errors, first over everything, then by split, kind, element and (where few) formula; the worst structures."""

    table: list[Row]
    outliers: list[Outlier]
    notes: list[str]

    def __str__(self) -> str:
        """The table and the worst structures, for people."""
        lines = [f"{'':28}structures   atoms  energy MAE, RMSE meV/atom  forces MAE, RMSE meV/A"]
        for row in self.table:
            energy = f"{row.energy_mae_meV_atom:12.2f} {row.energy_rmse_meV_atom:12.2f}"
            forces = f"{row.forces_mae_meV_A:11.1f} {row.forces_rmse_meV_A:11.1f}"
            lines.append(f"{row.group:28}{row.n_structures:10d}{row.n_atoms:8d}{energy}{forces}")
        for o in self.outliers:
            lines.append(
                f"{o.file} frame {o.frame} ({o.kind}): force on atom {o.atom} ({o.element}) off by "
                f"{o.force_error_meV_A:.0f} meV/A, energy by {o.energy_error_meV_atom:.1f} meV/atom"
            )
        return "\n".join([*lines, *self.notes])

    def __getitem__(self, group: str) -> Row:
        return next(row for row in self.table if row.group == group)


def run(config: Config, *, progress: Progress = silent) -> Result:
    """Evaluate; writes errors.csv, errors.json, parity.png and summary.yaml.

    Raises:
        InputError: bad data, or an element that the model does not know (file, frame and atom are named).
    """
    data = read(config.data)
    chosen = [
        s
        for s in data.structures
        if (not config.splits or s.split in config.splits) and s.kind not in config.exclude_kinds
    ]
    if not chosen:
        found = sorted({s.split for s in data.structures})
        raise InputError(
            f"no structure of split {' or '.join(config.splits)} is in the data; it has: {', '.join(found)}"
        )
    notes = [*data.warnings]
    if len(chosen) < len(data.structures):
        notes.append(f"{len(chosen)} of {len(data.structures)} structures chosen by splits and exclude_kinds")
    inputs = [*config.data, *([Path(config.model)] if Path(config.model).is_file() else [])]
    with RunFolder(config.output, "evaluate", config, inputs=inputs, may_change=("threads",)) as folder:
        model = config.load_model()
        with torch_threads(1):
            energy, forces = _errors(config, model, chosen, progress)
        result = Result(_tables(chosen, energy, forces), _outliers(chosen, energy, forces, config.outliers), notes)
        text = io.StringIO()
        writer = csv.DictWriter(text, list(Row.__dataclass_fields__), lineterminator="\n")
        writer.writeheader()
        writer.writerows(vars(row) for row in result.table)
        write_atomic(folder / "errors.csv", text.getvalue())
        record = {
            "table": [vars(row) for row in result.table],
            "outliers": [vars(o) for o in result.outliers],
            "notes": notes,
        }
        write_atomic(folder / "errors.json", json.dumps(record, indent=1))
        parity(chosen, energy, forces, folder / "parity.png")
        folder.summary(**vars(result["all"]), notes=notes)
    return result


def check_known(structures: Sequence[Labelled], spec: Spec) -> None:
    """Refuse elements that a model does not know.

    Raises:
        InputError: naming file, frame and atom.
    """
    for s in structures:
        try:
            check_species(s.system.numbers, spec)
        except InputError as error:
            raise InputError(f"{s.where}: {error}") from error


def _errors(
    config: Config, model: Model, chosen: Sequence[Labelled], progress: Progress
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Predicted minus labelled: (S,) eV per atom (NaN: no label), and per structure (n, 3) eV/A."""
    check_known(chosen, model.spec)
    loader = Loader(chosen, model.cutoff, references_of(model), config.batch_pairs)
    energy: list[float] = []
    forces: list[np.ndarray] = []
    with ThreadPoolExecutor(config.threads or 1) as pool:
        for batch, out in predictions(model, loader, pool):
            off = ((out["energy"] - batch.energy) / batch.n_atoms).numpy(force=True)
            has = [s.forces is not None for s in chosen[len(forces) : len(forces) + len(off)]]
            labelled = np.isfinite([s.energy for s in chosen[len(energy) : len(energy) + len(off)]])
            energy += np.where(labelled, off, np.nan).tolist()
            difference = (out["forces"] - batch.forces).numpy(force=True)
            for part, known_forces in zip(
                np.split(difference, np.cumsum(batch.n_atoms.numpy())[:-1]), has, strict=True
            ):
                forces.append(part if known_forces else np.full_like(part, np.nan))
            progress(len(energy), len(chosen), "structures")
    return np.array(energy), forces


def _tables(chosen: Sequence[Labelled], energy: np.ndarray, forces: Sequence[np.ndarray]) -> list[Row]:
    members: dict[str, list[int]] = defaultdict(list)
    for k, s in enumerate(chosen):
        members["all"].append(k)
        members[f"split:{s.split}"].append(k)
        members[f"kind:{s.kind}"].append(k)
        members[f"formula:{_formula(s)}"].append(k)
    formulas = [group for group in members if group.startswith("formula:")]
    if len(formulas) > 40:  # every liquid cluster has one of its own
        for group in formulas:
            if len(members[group]) < max(2, 0.01 * len(chosen)):
                del members[group]
    labels = [np.full((s.n_atoms, 3), np.nan) if s.forces is None else s.forces.numpy() for s in chosen]
    rows = [
        _row(
            group, len(ks), energy[ks], np.concatenate([forces[k] for k in ks]), np.concatenate([labels[k] for k in ks])
        )
        for group, ks in members.items()
    ]
    numbers = np.concatenate([s.system.numbers.numpy() for s in chosen])
    every, label = np.concatenate(forces), np.concatenate(labels)
    for z in np.unique(numbers):
        with_it = sum(bool((s.system.numbers == z).any()) for s in chosen)
        # An energy has no element of its own.
        rows.append(
            _row(f"element:{chemical_symbols[z]}", with_it, np.zeros(0), every[numbers == z], label[numbers == z])
        )
    order = {"all": 0, "split": 1, "kind": 2, "element": 3, "formula": 4}
    return sorted(rows, key=lambda row: (order[row.group.split(":")[0]], row.group))


def _formula(s: Labelled) -> str:
    symbols = "".join(chemical_symbols[int(z)] for z in s.system.numbers)
    charge = round(float(s.system.total_charge[0]))
    return Formula(symbols).format("hill") + (f"({charge:+d})" if charge else "")


def _row(group: str, n: int, energy: np.ndarray, forces: np.ndarray, labels: np.ndarray) -> Row:
    def mean(values: np.ndarray) -> float:
        values = values[np.isfinite(values)]
        return float(values.mean()) if values.size else float("nan")

    return Row(
        group,
        n,
        len(forces),
        1e3 * mean(np.abs(energy)),
        1e3 * float(np.sqrt(mean(energy**2))),
        1e3 * mean(np.abs(forces)),
        1e3 * float(np.sqrt(mean(forces**2))),
        1e3 * float(np.sqrt(mean(labels**2))),
    )


def _outliers(
    chosen: Sequence[Labelled], energy: np.ndarray, forces: Sequence[np.ndarray], count: int
) -> list[Outlier]:
    found = []
    for s, e, f in zip(chosen, energy, forces, strict=True):
        size = np.nan_to_num(np.sqrt((f**2).sum(axis=1)))
        atom = int(size.argmax())
        symbol = chemical_symbols[int(s.system.numbers[atom])]
        found.append(Outlier(s.file, s.frame, s.kind, atom, symbol, 1e3 * float(size[atom]), 1e3 * float(e)))
    return sorted(found, key=lambda o: -o.force_error_meV_A)[:count]


def parity(chosen: Sequence[Labelled], energy: np.ndarray, forces: Sequence[np.ndarray], path: Path) -> None:
    """Predicted against labelled force components, and energy errors against sizes, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    with_forces = [(s.forces.numpy(), f) for s, f in zip(chosen, forces, strict=True) if s.forces is not None]
    if with_forces:
        label = np.concatenate([known.ravel() for known, _ in with_forces])
        error = np.concatenate([f.ravel() for _, f in with_forces])
        keep = np.random.default_rng(0).permutation(len(label))[:50000]
        left.plot(label[keep], (label + error)[keep], ".", markersize=1.5, alpha=0.4, rasterized=True)
        span = [float(label.min()), float(label.max())]
        left.plot(span, span, color="black", linewidth=0.8)
    left.set(xlabel="labelled force component / eV/Å", ylabel="predicted / eV/Å")
    for kind in sorted({s.kind for s in chosen}):
        ks = [k for k, s in enumerate(chosen) if s.kind == kind]
        right.plot([chosen[k].n_atoms for k in ks], 1e3 * energy[ks], ".", markersize=3, label=kind)
    right.axhline(0.0, color="black", linewidth=0.8)
    right.set(xlabel="atoms", ylabel="energy error / meV/atom")
    right.legend(fontsize=6, frameon=False, markerscale=2)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130)
