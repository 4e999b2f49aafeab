"""An upstream MACE checkpoint -> a model file; nothing of the checkpoint is run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

import mdplug
from mdplug.workflows._common import Config as BaseConfig
from mdplug.workflows._common import Progress, disk_errors, sha256, silent


class Config(BaseConfig):
    """Options of `mdplug convert`."""

    checkpoint: Path = Field(description="upstream .model file")
    output: Path = Field(description="model file to write, by habit NAME.safetensors")
    head: str | None = Field(None, description="keep this level of theory only")
    elements: list[str] = Field([], description="keep these elements only; may be repeated")


@dataclass
class Result:
    """The file written, and what it holds."""

    output: Path
    sha256: str
    architecture: str
    heads: str
    elements: int
    cutoff_A: float
    licence: str


def run(config: Config, *, progress: Progress = silent) -> Result:
    """Convert.

    Raises:
        ModelFileError: not such a checkpoint, or a kind that mdplug does not have.
        InputError: a head or element that it does not have.
    """
    from mdplug.potentials.convert.mace import convert

    progress(0, 2, f"reading {config.checkpoint}")
    with disk_errors(config.checkpoint):
        potential = convert(config.checkpoint, config.head, config.elements or None)
    progress(1, 2, f"writing {config.output}")
    with disk_errors(config.output):
        config.output.parent.mkdir(parents=True, exist_ok=True)
        mdplug.save(potential, config.output)
    progress(2, 2, "done")
    spec = potential.spec
    return Result(
        output=config.output,
        sha256=sha256(config.output),
        architecture=spec.architecture,
        heads=" ".join(spec.heads),
        elements=len(spec.species),
        cutoff_A=spec.cutoff,
        licence=spec.licence,
    )
