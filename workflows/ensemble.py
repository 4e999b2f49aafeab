"""Make an ensemble: several models as one file, or members that share the body of one trained model.

Members on one body cost as much as the model alone and leave its energies and forces as they are; several models
trained apart cost their number, and say more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

import mdplug
from mdplug.compose import Ensemble
from mdplug.errors import InputError
from mdplug.potential import Potential
from mdplug.potentials.members import SharedMembers, require_features
from mdplug.registry import resolve
from mdplug.workflows._common import Config as BaseConfig
from mdplug.workflows._common import Progress, disk_errors, provenance, sha256, short_name, silent, torch_threads
from mdplug.workflows.dataset import Dataset, Labelled, Loader, read, references_of
from mdplug.workflows.last_layer import Rows, assemble, feature_statistics, gather, members_of, typical_ratio


class Config(BaseConfig):
    """Options of `mdplug ensemble`."""

    models: tuple[Path, ...] = Field(description="model files; one: members on its body, from data; more: joined")
    output: Path = Field(Path("ensemble.safetensors"), description="model file to write")
    data: tuple[Path, ...] = Field((), description="labelled extended XYZ that the model was trained on")
    members: int = Field(32, ge=2, description="readouts on the body of one model")
    method: Literal["laplace", "pops"] = Field("laplace", description="how members are drawn")
    directions: int = Field(8, ge=1, description="random directions along which forces of a structure are used")
    max_structures: int = Field(4000, ge=1, description="of the training data, drawn at random")
    exclude_kinds: tuple[str, ...] = Field(
        ("isolated_atom", "IsolatedAtom"), description="config_type of structures to leave out"
    )
    seed: int = Field(0, ge=0, description="of structures, directions and members")
    threads: int | None = Field(None, ge=1, description="processor threads; default: all")

    @model_validator(mode="after")
    def _data_for_one(self) -> Config:
        if len(self.models) == 1 and not self.data:
            raise ValueError("one model needs data to draw members from; give data, or several models")
        if len(self.models) > 1 and self.data:
            raise ValueError("several models are joined as they are; leave data out")
        return self


@dataclass
class Result:
    """What was made.

    Attributes:
        model: the file. members: in it. kind: "shared body" or "joined". scale: what sigma was multiplied by to match
            force errors on held-out (else training) structures.
    """

    model: Path
    members: int
    kind: str
    scale: float = float("nan")


def run(config: Config, *, progress: Progress = silent) -> Result:
    """Make the file.

    Raises:
        InputError: models that do not go together, a model without features, no labels.
        ModelFileError: a file that cannot be read.
    """
    for path in config.data:
        if not path.is_file():
            raise InputError(f"no file {path}; check the name")
    with torch_threads(config.threads), disk_errors(config.output):
        made, result = _joined(config) if len(config.models) > 1 else _shared(config, progress)
        record = {**provenance(), "models": {p.name: sha256(Path(resolve(p))) for p in config.models}}
        if config.data:
            paths = [str(p) for p in config.data]
            record |= {"data_sha256": {short_name(p, paths): sha256(Path(p)) for p in paths}, "method": config.method}
            record |= {"seed": config.seed, "directions": config.directions, "sigma_scale": result.scale}
        made.spec = replace(made.spec, provenance={**made.spec.provenance, "ensemble": record})
        mdplug.save(made, config.output)
    return result


def _opened(path: Path, dtype: str | None, radial: str = "exact") -> Potential:
    model = mdplug.load(path, dtype=dtype, radial=radial)
    if not isinstance(model, Potential):
        raise InputError(f"{path} is an exported file; members need a .safetensors model file")
    return model


def _joined(config: Config) -> tuple[Potential, Result]:
    made = Ensemble.of([_opened(path, None).without_kernels() for path in config.models])
    made.spec = replace(made.spec, name=made.parts[0].spec.name)
    return made, Result(config.output, len(config.models), "joined")


def _shared(config: Config, progress: Progress) -> tuple[Potential, Result]:
    progress(0, 0, "reading labels")
    train, held = _chosen(read(config.data), config)
    settings = (config.members, config.method, config.directions, config.seed)
    made, scale, _ = shared_members(config.models[0], train, held, *settings, progress=progress)
    return made, Result(config.output, config.members, "shared body", scale)


def shared_members(
    path: Path,
    train: Sequence[Labelled],
    held: Sequence[Labelled],
    members: int,
    method: str,
    directions: int,
    seed: int,
    progress: Progress = silent,
) -> tuple[SharedMembers, float, Rows]:
    """Members on the body in a model file.

    Args:
        train: structures to fit to. held: those whose residuals set the scale of sigma; empty: `train`.
        members, method, directions, seed: as in `Config`.

    Returns:
        The potential, what sigma was multiplied by, and the equations of `train`.

    Raises:
        InputError: an exported file, a body without features.
    """
    body = _opened(path, None).without_kernels()
    require_features(body)
    fast = _opened(path, "float64", "tables")
    reference = references_of(body)
    species = body.spec.species
    loader = Loader(train, body.cutoff, reference)
    progress(0, 0, f"features of {len(train)} structures")
    statistics = feature_statistics(fast, loader, species)

    def shown(done: int, of: int) -> None:
        progress(done, of, f"slopes of features, {len(train)} structures")

    rows = gather(fast, loader, statistics, species, directions, seed, shown)
    found = members_of(rows, method, members, seed)
    judged = rows
    if held:
        judged = gather(fast, Loader(held, body.cutoff, reference), statistics, species, 4, seed + 1)
    scale = typical_ratio(found, judged)
    return assemble(body, statistics, found * scale), scale, rows


def _chosen(data: Dataset, config: Config) -> tuple[list[Labelled], list[Labelled]]:
    """Structures to fit to, and those of the split "valid"."""
    train, valid = ([s for s in data.only(split) if s.kind not in config.exclude_kinds] for split in ("train", "valid"))
    if not train:
        raise InputError("no structure of split 'train' in data; check split and exclude_kinds")
    order = np.random.default_rng(config.seed).permutation(len(train))[: config.max_structures]
    return [train[k] for k in np.sort(order)], valid[: config.max_structures]
