"""Options and result of `mdplug active`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mdplug.workflows._common import ModelConfig

# What a run that goes on may do otherwise: end later or earlier.
MAY_CHANGE = ("time_ps", "budget_labels", "rounds", "max_hours", "threads")


class Config(ModelConfig):
    """Options and result of `mdplug active`."""

    structures: tuple[Path, ...] = Field(min_length=1, description="structure files; every frame is a walker")
    data: tuple[Path, ...] = Field(min_length=1, description="labelled extended XYZ that the model was trained on")
    output: Path = Field(Path("active"), description="run folder")
    label: str = Field("xtb", description="what makes labels: xtb, or an ASE calculator as module:factory")
    label_options: dict[str, Any] = Field({}, description="further options of `mdplug label`")
    time_ps: float = Field(10.0, gt=0, description="time of each walker in ps")
    temperature_K: float = Field(300.0, gt=0, description="temperature in K")
    ensemble: Literal["nve", "nvt", "npt"] = Field("nvt", description="nve, nvt or npt")
    md_options: dict[str, Any] = Field({}, description="further options of `mdplug md`")
    walkers: int = Field(1, ge=1, description="walkers of each structure, with velocities of their own")
    threshold_eV_A: float | None = Field(
        None, gt=0, description="largest error of a force in eV/A that is put up with; default: 1.5 times the largest "
        "that held-out labels leave possible",
    )  # fmt: skip
    level: float = Field(0.95, gt=0.5, lt=1, description="probability that the bound on a frame's errors holds")
    budget_labels: int = Field(200, ge=1, description="labels in all")
    labels_per_round: int = Field(10, ge=1, description="labels between two updates")
    rounds: int = Field(50, ge=1, description="updates in all")
    max_hours: float | None = Field(None, gt=0, description="wall-clock time in all")
    cluster_atoms: int = Field(60, ge=2, description="size of the clusters that are labelled")
    around: int = Field(4, ge=0, description="short runs from each safe frame that look for more uncertain frames")
    around_ps: float = Field(0.2, gt=0, description="time of each in ps")
    selection: Literal["uncertain", "random"] = Field(
        "uncertain", description="random: any frames of the dynamics, for comparison"
    )
    new_weight: float = Field(3.0, gt=0, description="weight of a new label in training, beside 1 of an old one")
    replay: int = Field(1000, ge=1, description="old training structures in an update, drawn at random")
    training: dict[str, Any] = Field({}, description="options of `mdplug train` for updates")
    seed: int = Field(1, ge=0, description="of everything drawn")


@dataclass
class Result:
    """What came of it; prints as lines.

    Attributes:
        folder: run folder. model: the last ensemble, calibrated. labels: all new ones. report: for people.
        rounds: updates made. labels_used: of the budget. finished: every walker ran its time. ended: why it ended.
        walker_ps: time of each walker.
    """

    folder: Path
    model: Path
    labels: Path
    report: Path
    rounds: int
    labels_used: int
    finished: bool
    ended: str
    walker_ps: list[float]

    @property
    def exit_code(self) -> int:
        """3: budgets ended before the walkers did."""
        return 0 if self.finished else 3

    def __str__(self) -> str:
        """For people."""
        times = ", ".join(f"{t:.4g}" for t in self.walker_ps)
        return (
            f"{self.ended}: {self.rounds} rounds, {self.labels_used} labels, walkers at {times} ps\n"
            f"model: {self.model}\nlabels: {self.labels}\nreport: {self.report}"
        )
