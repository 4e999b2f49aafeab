"""What a trajectory says: density, radial distribution, diffusion, broken bonds; each with its error."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field, field_validator

from mdplug.errors import InputError
from mdplug.workflows._common import Config as BaseConfig
from mdplug.workflows._common import Progress, disk_errors, provenance, replacing, sha256, silent, write_atomic
from mdplug.workflows.md_files import read_log
from mdplug.workflows.statistics import mean_of
from mdplug.workflows.trajectory import Msd, Rdf, broken_in, msd, rdf, read_frames


class Config(BaseConfig):
    """Options of `mdplug analyze`."""

    run_folder: Path = Field(description="folder that `mdplug md` wrote")
    output: Path | None = Field(None, description="folder for the results; default: RUN_FOLDER/analysis")
    density: bool = Field(False, description="density in g/cm3")
    rdf: list[str] = Field([], description="pair of elements, as Li-O; may be repeated")
    msd: list[str] = Field([], description="element or residue name, as Li or EC; may be repeated")
    start_ps: float | None = Field(None, ge=0, description="leave out what comes before, in ps; default: chosen")
    r_max_A: float | None = Field(None, gt=0, description="range of the RDF in A; default: half of the smallest box")
    bin_A: float = Field(0.05, gt=0, description="bin width of the RDF in A")
    between_molecules: bool = Field(False, description="RDF without pairs of one molecule")

    @field_validator("rdf")
    @classmethod
    def _pairs(cls, value: list[str]) -> list[str]:
        for one in value:
            if len([part for part in one.split("-") if part]) != 2:
                raise ValueError(f"write a pair as Li-O, not {one!r}")
        return value


@dataclass
class Result:
    """Everything that was asked for; prints as lines.

    Attributes:
        folder: where the files are. frames: in the trajectory. start_ps: what was left out before.
        density: of `statistics.Mean`, in g/cm3. rdf, msd: by name. broken: bonds that were ever broken, as atom pairs,
            with the frames in which they were.
    """

    folder: Path
    frames: int
    start_ps: float
    density: dict[str, float] = field(default_factory=dict)
    temperature_K: float = float("nan")
    pressure_bar: dict[str, float] = field(default_factory=dict)
    rdf: dict[str, Rdf] = field(default_factory=dict)
    msd: dict[str, Msd] = field(default_factory=dict)
    bonds: int = 0
    broken: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.frames} frames, from {self.start_ps:g} ps, {self.temperature_K:.1f} K"]
        if self.density:
            lines.append(
                f"density_g_cm3 {self.density['value']:.4f} +- {self.density['error']:.4f} "
                f"(blocks: {self.density['block_error']:.4f}, {self.density['n_effective']:.0f} independent values)"
            )
        for one in self.rdf.values():
            lines.append(
                f"rdf {one.pair}: first peak {one.peak_A:.3f} A (g = {one.peak:.2f}), minimum {one.minimum_A:.2f} A, "
                f"coordination number {one.coordination_number:.2f} +- {one.coordination_error:.2f}"
            )
        for two in self.msd.values():
            lines.append(
                f"diffusion {two.what}: {two.diffusion_m2_s:.3g} +- {two.diffusion_error_m2_s:.2g} m2/s "
                f"(fit {two.fit_ps[0]:g} to {two.fit_ps[1]:g} ps)"
            )
        lines.append(f"bonds broken: {len(self.broken)} of {self.bonds}" + (f" {self.broken}" if self.broken else ""))
        return "\n".join([*lines, f"files in {self.folder}"])


def run(config: Config, *, progress: Progress = silent) -> Result:
    """Analyse a run folder.

    Raises:
        InputError: not a run folder; no such element; a quantity that the run cannot give.
    """
    tasks = len(config.rdf) + len(config.msd) + 2
    progress(0, tasks, "reading")
    frames = read_frames(config.run_folder)
    log = read_log(config.run_folder / "log.csv")
    folder = config.output or config.run_folder / "analysis"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    periodic = frames.boxes is not None
    if (config.density or config.rdf) and not periodic:
        raise InputError(f"{config.run_folder} is an open system, which has no density and no RDF; leave them out")
    # Where the volume moves it is the slowest; else the energy says when the run has settled.
    watched = log["density_g_cm3"] if periodic and np.ptp(log["density_g_cm3"]) > 0 else log["potential_energy_eV"]
    begin = None if config.start_ps is None else int(np.searchsorted(log["time_ps"], config.start_ps - 1e-9))
    if begin is not None and begin > len(watched) - 2:
        raise InputError(f"start_ps={config.start_ps:g} leaves nothing of {log['time_ps'][-1]:g} ps; take less")
    mean = mean_of(watched, begin)
    start_ps = float(log["time_ps"][mean.start])
    result = Result(folder, len(frames.time_ps), start_ps, bonds=len(frames.bonds))
    result.temperature_K = float(log["temperature_K"][mean.start :].mean())
    if periodic:
        result.pressure_bar = asdict(mean_of(log["pressure_bar"], mean.start))
    if config.density:
        result.density = asdict(mean_of(log["density_g_cm3"], mean.start))
    progress(1, tasks, "bonds")
    result.broken = broken_in(frames)
    late = frames.after(start_ps)
    for k, name in enumerate(config.rdf):
        progress(2 + k, tasks, f"RDF {name}")
        result.rdf[name] = rdf(late, name, config.bin_A, config.r_max_A, config.between_molecules)
        _csv(
            folder / f"rdf-{name}.csv",
            {key: getattr(result.rdf[name], key) for key in ("r_A", "g", "g_error", "coordination")},
        )
    for k, name in enumerate(config.msd):
        progress(2 + len(config.rdf) + k, tasks, f"MSD {name}")
        result.msd[name] = msd(late, name)
        _csv(folder / f"msd-{name}.csv", {"lag_ps": result.msd[name].lag_ps, "msd_A2": result.msd[name].msd_A2})
    write_atomic(folder / "analysis.json", json.dumps(_record(config, result), indent=1))
    plot(folder / "analysis.png", result, log)
    progress(tasks, tasks, "done")
    return result


def _csv(path: Path, columns: dict[str, np.ndarray]) -> None:
    rows = zip(*columns.values(), strict=True)
    text = "\n".join([",".join(columns), *(",".join(f"{value:.8g}" for value in row) for row in rows)])
    write_atomic(path, text + "\n")


def _record(config: Config, result: Result) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items() if not isinstance(one, np.ndarray)}
        return None if isinstance(value, float) and not np.isfinite(value) else value

    numbers = {key: plain(value) for key, value in asdict(result).items() if key != "folder"}
    inputs = {name: sha256(config.run_folder / name) for name in ("log.csv", "topology.pdb")}
    return {**numbers, "inputs_sha256": inputs, **provenance()}


def plot(path: Path, result: Result, log: dict[str, np.ndarray]) -> None:
    """Everything in one picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = (["density"] if result.density else []) + [*result.rdf] + [*result.msd]
    if not panels:
        return
    figure = Figure(figsize=(7, 3.0 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, name in zip(axes, panels, strict=True):
        if name == "density":
            axis.plot(log["time_ps"], log["density_g_cm3"], lw=0.7)
            axis.axvspan(0, result.start_ps, color="0.9", label="left out")
            axis.axhline(result.density["value"], color="k", lw=1)
            axis.set(xlabel="time / ps", ylabel="density / g cm$^{-3}$")
        elif name in result.rdf:
            one = result.rdf[name]
            axis.plot(one.r_A, one.g, label=f"g, {name}")
            axis.plot(one.r_A, one.coordination, "--", label="neighbours")
            axis.axvline(one.minimum_A, color="0.7", lw=1)
            axis.set(xlabel="r / A", ylim=(0, max(1.1 * one.peak, 2.0)))
            axis.legend()
        else:
            two = result.msd[name]
            axis.plot(two.lag_ps, two.msd_A2, label=f"{name}: D = {two.diffusion_m2_s:.2g} m$^2$/s")
            axis.axvspan(*two.fit_ps, color="0.9")
            axis.set(xlabel="lag / ps", ylabel="MSD / A$^2$")
            axis.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
