"""Train a potential on labelled structures.

`run` reads labelled extended XYZ, builds or loads a potential of any registered architecture, and writes
model.safetensors (averaged weights, best on the validation data), learning_curve.csv and .png, and summary.yaml. The
same call again continues.
"""

from __future__ import annotations

import copy
import csv
import io
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

import mdplug
from mdplug.errors import InputError
from mdplug.potential import Potential
from mdplug.registry import architecture, architectures
from mdplug.spec import Spec
from mdplug.workflows._common import (
    Config as BaseConfig,
)
from mdplug.workflows._common import (
    Progress,
    RunFolder,
    provenance,
    replacing,
    short_name,
    silent,
    torch_threads,
    write_atomic,
)
from mdplug.workflows.bayes import BayesConfig, Problem, WholeModel, finish, sample
from mdplug.workflows.bayes import Result as BayesResult
from mdplug.workflows.bayes_last_layer import LastLayer
from mdplug.workflows.bayes_posterior import Noise
from mdplug.workflows.dataset import Dataset, Labelled, Loader, fit_reference_energies, read
from mdplug.workflows.loss import LossConfig
from mdplug.workflows.trainer import Budget, OptimiserConfig, Trainer

DRAW_EVERY_S = 30.0


class Config(BaseConfig):
    """What to train on what, and how."""

    data: tuple[Path, ...] = Field(description="labelled extended XYZ; info['split'] 'train' and 'valid' are used")
    valid_data: tuple[Path, ...] = Field((), description="every structure of these is for validation")
    valid_fraction: float = Field(0.05, ge=0, lt=1, description="held back by group where no split says valid")
    exclude_kinds: tuple[str, ...] = Field(
        ("isolated_atom", "IsolatedAtom"), description="config_type of structures to leave out"
    )
    kind_weights: dict[str, float] = Field({}, description="factors on the weights of structures, by config_type")
    fmax_eV_A: float | None = Field(None, gt=0, description="structures with a larger force are left out")
    output: Path = Path("train")
    name: str = Field("model", description="name of the potential")
    start: Path | None = Field(None, description="model file to go on from, instead of architecture, cutoff and model")
    architecture: str | None = Field(None, description="registered name (mace, lj, ...)")
    cutoff_A: float | None = Field(None, gt=0)
    model: dict[str, Any] = Field({}, description="hyper-parameters of the architecture")
    dtype: Literal["float32", "float64"] = "float32"
    reference_energies_eV: dict[str, float] | Literal["fit"] = Field("fit", description="by element, or least squares")
    level_of_theory: str = "unknown"
    licence: str = "unknown"
    cite: tuple[str, ...] = Field((), description="what a user of the weights should cite")
    loss: LossConfig = LossConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    batch_pairs: int = Field(20000, ge=1, description="atom pairs per batch")
    epochs: int = Field(200, ge=1)
    max_minutes: float | None = Field(None, gt=0, description="the schedule then spans this time")
    patience: int | None = Field(None, ge=1, description="stop after so many epochs without a better validation loss")
    seed: int = 0
    threads: int = Field(default_factory=lambda: os.cpu_count() or 1, ge=1, description="parts of a batch at a time")
    bayes: BayesConfig | None = Field(
        None, description="sample the posterior of the weights instead: an ensemble file; {} takes every default"
    )

    @model_validator(mode="after")
    def _one_beginning(self) -> Config:
        if self.start is not None and (self.architecture or self.cutoff_A or self.model):
            raise ValueError("start brings architecture, cutoff_A and model with it; give one or the other")
        if self.start is None and not (self.architecture and self.cutoff_A):
            raise ValueError("give architecture and cutoff_A, or start (a model file)")
        if self.bayes is not None and self.bayes.last_layer and self.start is None:
            raise ValueError("bayes.last_layer samples readouts of a trained model; give start")
        return self


@dataclass
class Result:
    """Where the model is and how good.

    Attributes:
        model: model.safetensors. best_epoch: of the weights in it. errors: row of the learning curve at that epoch.
        n_train, n_valid: structures. stopped: why, if before the last epoch. notes: what was noticed in the data.
    """

    model: Path
    best_epoch: int
    errors: dict[str, float]
    n_train: int
    n_valid: int
    stopped: str
    notes: list[str]

    def __str__(self) -> str:
        """What was reached, for people."""
        e = self.errors
        text = f"{self.model}: epoch {self.best_epoch}, on {self.n_valid} validation structures "
        if not self.n_valid:
            text = f"{self.model}: epoch {self.best_epoch}, on the training structures "
        text += f"energy MAE {e['energy_mae_meV_atom']:.2f} meV/atom, forces MAE {e['forces_mae_meV_A']:.1f} meV/A"
        return text + (f"; stopped: {self.stopped}" if self.stopped else "")


def run(config: Config, *, progress: Progress = silent) -> Result | BayesResult:
    """Train, or continue training.

    Raises:
        InputError: bad data or options. RunFolderError: the folder is of another run, or cannot be written.
        ModelFileError: `start` cannot be read.
    """
    inputs = [*config.data, *config.valid_data, *([config.start] if config.start else [])]
    for path in inputs:
        if not path.is_file():
            raise InputError(f"no file {path}; check the name")
    with (
        RunFolder(config.output, "train", config, inputs=inputs, may_change=("threads",)) as folder,
        torch_threads(1),
    ):
        setup = _prepare(config, folder, progress)
        if config.bayes is not None:
            return _sample(config, config.bayes, setup, folder, progress)
        return _train(config, setup, folder, progress)


@dataclass
class Setup:
    """What training and sampling begin with.

    Attributes:
        train, valid: structures. loader, held: their batches; None without validation structures.
        potential: untrained or loaded, to be trained. make: the same for the k-th of several chains.
        notes: what was noticed. record: provenance of what will be made.
    """

    train: list[Labelled]
    valid: list[Labelled]
    loader: Loader
    held: Loader | None
    potential: Potential
    make: Callable[[int], Potential]
    notes: list[str]
    record: dict[str, Any]


def _prepare(config: Config, folder: RunFolder, progress: Progress) -> Setup:
    progress(0, 0, "reading labels")
    train, valid, notes = split(config)
    if config.start is not None:
        potential = _loaded(config).without_kernels().requires_grad_(True).train()
        reference = dict(potential.spec.atomic_energies.get(potential.spec.heads[potential.head or 0], {}))
    else:
        reference, note = _reference(config, train)
        notes.append(note)
    _check_known(train + valid, reference)
    progress(0, 0, f"finding pairs of {len(train)} structures")
    cutoff = float(config.cutoff_A or 0.0) if config.start is None else potential.cutoff
    loader = Loader(train, cutoff, reference, config.batch_pairs)

    def make(chain: int) -> Potential:
        if config.start is not None:
            return copy.deepcopy(potential)
        return _untrained(config, loader, reference, torch.Generator().manual_seed(config.seed + chain))

    if config.start is None:
        potential = make(0)
    held = Loader(valid, potential.cutoff, reference, config.batch_pairs) if valid else None
    n_parameters = sum(p.numel() for p in potential.parameters())
    notes.append(f"{n_parameters} parameters; statistics of the labels: {loader.statistics()}")
    for note in notes:
        progress(0, 0, note)
    record = {
        **provenance(),
        "data_sha256": {short_name(name, folder.hashes): digest for name, digest in folder.hashes.items()},
        "seed": config.seed,
        "n_train": len(train),
        "n_valid": len(valid),
    }
    return Setup(train, valid, loader, held, potential, make, notes, record)


def _loaded(config: Config) -> Potential:
    loaded = mdplug.load(config.start or "", dtype=config.dtype, radial="exact")
    if not isinstance(loaded, Potential):
        raise InputError(f"{config.start} is an exported file; training starts from a .safetensors model file")
    return loaded


def _sample(config: Config, bayes: BayesConfig, setup: Setup, folder: RunFolder, progress: Progress) -> BayesResult:
    shown = (setup.valid or setup.train)[: bayes.probe_structures]
    probed = Loader(shown, setup.loader.cutoff, setup.loader.reference, config.batch_pairs)
    energies, forces = config.loss.energy > 0, config.loss.forces > 0
    problem: Problem
    if bayes.last_layer:
        progress(0, 0, "features of every structure, pulled back to the positions")
        problem = LastLayer(_loaded(config), setup.loader, probed, bayes, config.seed, energies, forces)
    else:
        noise = Noise.of(setup.loader, bayes, energies, forces)
        problem = WholeModel(setup.make, setup.loader, probed, noise, bayes, config.seed)
    chains = sample(problem, bayes, folder, config.seed, config.threads, progress)
    held = setup.held if setup.held is not None else setup.loader
    return finish(problem, bayes, chains, held, config.name, setup.record, folder, setup.notes)


def _train(config: Config, setup: Setup, folder: RunFolder, progress: Progress) -> Result:
    potential, record, notes = setup.potential, setup.record, setup.notes
    trainer = Trainer(
        potential, setup.loader, setup.held, config.loss, config.optimiser,
        Budget(config.epochs, config.max_minutes, config.patience), config.seed, folder / "checkpoint.pt",
        config.threads,
    )  # fmt: skip

    def after_epoch(trainer: Trainer) -> None:
        state = trainer.state
        best = trainer.with_weights(trainer.best)
        best.spec = replace(
            best.spec,
            name=config.name,
            dtype=config.dtype,
            provenance=record | {"epoch": state.best_epoch, "of_epochs": state.epoch, "steps": state.step},
        )
        mdplug.save(best, folder / "model.safetensors")
        rows = state.history
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(folder / "learning_curve.csv", text.getvalue())
        if time.monotonic() - drawn[0] > DRAW_EVERY_S:
            plot(rows, folder / "learning_curve.png")
            drawn[0] = time.monotonic()

    drawn = [time.monotonic()]
    trainer.run(progress, after_epoch)
    state = trainer.state
    plot(state.history, folder / "learning_curve.png")
    result = Result(
        folder / "model.safetensors", state.best_epoch, state.history[state.best_epoch - 1],
        len(setup.train), len(setup.valid), state.stopped, notes,
    )  # fmt: skip
    folder.summary(**vars(result))
    return result


def split(config: Config) -> tuple[list[Labelled], list[Labelled], list[str]]:
    """Training and validation structures, and notes with every count."""
    data = read(config.data)
    extra = read(config.valid_data) if config.valid_data else Dataset((), {}, {})
    notes = [f"{', '.join(f'{n} {what}' for what, n in data.counts.items())}", *data.warnings, *extra.warnings]
    splits = Counter(s.split for s in data.structures)
    notes.append("splits: " + ", ".join(f"{n} {name}" for name, n in sorted(splits.items())))
    train, left_out = _wanted(data.only("train"), config)
    valid, left_out_too = _wanted([*data.only("valid"), *extra.structures], config)
    if left_out + left_out_too:
        notes.append(f"{left_out + left_out_too} structures left out by exclude_kinds and fmax_eV_A")
    if not valid and config.valid_fraction > 0:
        groups = sorted({s.group for s in train})
        order = np.random.default_rng(config.seed).permutation(len(groups))
        held = {groups[k] for k in order[: round(config.valid_fraction * len(groups))]}
        valid, train = [s for s in train if s.group in held], [s for s in train if s.group not in held]
    if not train:
        raise InputError(
            f"no structure is left to train on (splits found: {dict(splits)}); check split and exclude_kinds"
        )
    notes.append(f"{len(train)} structures to train on, {len(valid)} for validation")
    return train, valid, notes


def _wanted(structures: Sequence[Labelled], config: Config) -> tuple[list[Labelled], int]:
    kept = []
    for s in structures:
        too_large = (
            config.fmax_eV_A is not None
            and s.forces is not None
            and float(s.forces.square().sum(dim=1).max()) > config.fmax_eV_A**2
        )
        if s.kind in config.exclude_kinds or too_large:
            continue
        factor = config.kind_weights.get(s.kind, 1.0)
        kept.append(replace(s, weight=s.weight * factor))
    return kept, len(structures) - len(kept)


def _reference(config: Config, train: list[Labelled]) -> tuple[dict[str, float], str]:
    if isinstance(config.reference_energies_eV, dict):
        given = dict(config.reference_energies_eV)
        return given, "reference energies as given"
    fit = fit_reference_energies(train)
    return fit.values, fit.describe()


def _check_known(structures: Sequence[Labelled], reference: dict[str, float]) -> None:
    from ase.data import chemical_symbols

    for s in structures:
        for z in s.system.numbers.unique().tolist():
            if chemical_symbols[z] not in reference:
                raise InputError(
                    f"{s.where} holds {chemical_symbols[z]}, for which there is no reference energy; add it to "
                    "reference_energies_eV or leave the structure out"
                )


def _untrained(config: Config, loader: Loader, reference: dict[str, float], generator: torch.Generator) -> Potential:
    known = architectures()
    if config.architecture not in known:
        raise InputError(f"no architecture {config.architecture!r}; known: {', '.join(known)}")
    from ase.data import atomic_numbers

    path = known[config.architecture]
    spec = Spec(
        name=config.name,
        architecture=path,
        config=config.model,
        cutoff=float(config.cutoff_A or 0.0),
        species=tuple(sorted(atomic_numbers[symbol] for symbol in reference)),
        dtype=config.dtype,
        level_of_theory={"default": config.level_of_theory},
        atomic_energies={"default": reference},
        licence=config.licence,
        cite=config.cite,
    )
    try:
        potential = architecture(path, config.name).untrained(spec, loader.statistics(), generator)
    except KeyError as error:
        raise InputError(f"architecture {config.architecture!r} needs the option {error} in model; give it") from error
    return potential.to(getattr(torch, config.dtype)).train()


def plot(rows: Sequence[dict[str, float]], path: Path) -> None:
    """Learning curve as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    step = [row["step"] for row in rows]
    panels = (
        ("loss", (("train_loss", "training"), ("valid_loss", "validation"))),
        ("energy error / meV/atom", (("energy_mae_meV_atom", "MAE"), ("energy_rmse_meV_atom", "RMSE"))),
        ("force error / meV/Å", (("forces_mae_meV_A", "MAE"), ("forces_rmse_meV_A", "RMSE"))),
    )
    for axes, (label, curves) in zip(figure.subplots(1, 3), panels, strict=True):
        for key, name in curves:
            axes.plot(step, [row[key] for row in rows], marker=".", label=name)
        axes.set(xlabel="step", ylabel=label, yscale="log")
        axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
