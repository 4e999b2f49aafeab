"""A model file -> TorchScript that runs with torch alone, or with torch and mdplug's native operators."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from mdplug.errors import InputError
from mdplug.workflows._common import Config as BaseConfig
from mdplug.workflows._common import Progress, disk_errors, sha256, silent


class Config(BaseConfig):
    """Options of `mdplug export`."""

    model: Path = Field(description="model file, or the name of a shipped one")
    output: Path = Field(description="file to write, by habit NAME.pt")
    target: Literal["portable", "native", "lammps"] = Field(
        "portable",
        description="who will run it: portable, torch alone; native, mdplug's operator library, too: faster on a CPU",
    )
    dtype: Literal["float32", "float64"] | None = Field(None, description="width; default: as trained")
    radial: Literal["exact", "tables"] | None = Field(
        None, description="radial functions; default: exact in float64, tables in float32"
    )
    species: list[str] = Field(
        [], description="elements it is for, by symbol, the option once for each; default: all that the model knows"
    )


@dataclass
class Result:
    """The file written."""

    output: Path
    sha256: str


def run(config: Config, *, progress: Progress = silent) -> Result:
    """Export.

    Raises:
        InputError: no such model, or options that do not fit it or this machine.
    """
    from ase.data import atomic_numbers

    from mdplug.export import export

    unknown = [symbol for symbol in config.species if symbol not in atomic_numbers]
    if unknown:
        raise InputError(f"species: {unknown[0]!r} is not an element; give symbols such as H or Li")
    species = [atomic_numbers[symbol] for symbol in config.species] or None
    progress(0, 1, f"compiling {config.model}")
    with disk_errors(config.output):
        config.output.parent.mkdir(parents=True, exist_ok=True)
        path = export(
            config.model, config.output, config.target, dtype=config.dtype, radial=config.radial, species=species
        )
    progress(1, 1, "done")
    return Result(path, sha256(path))
