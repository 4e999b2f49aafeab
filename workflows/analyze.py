"""What trajectories say: density, radial distribution, diffusion, broken bonds; each with its error.

Of an ensemble also with intervals that hold the differences between its members: from one run of their mean with the
members' energies beside the trajectory (members.csv), or from several runs, one with each member.
"""

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
from mdplug.workflows.intervals import Intervals
from mdplug.workflows.md_files import read_log
from mdplug.workflows.member_intervals import (
    MEMBERS,
    by_reweighting,
    by_runs,
    frame_density,
    reweighting_of,
    run_options,
)
from mdplug.workflows.reweighting import Reweighting
from mdplug.workflows.statistics import mean_of
from mdplug.workflows.trajectory import Msd, Rdf, RdfFrames, broken_in, msd, rdf, rdf_frames, read_frames


class Config(BaseConfig):
    """Options of `mdplug analyze`."""

    run_folder: list[Path] = Field(min_length=1, description="folder that `mdplug md` wrote; several: one a member")
    output: Path | None = Field(None, description="folder for the results; default: analysis in (several: beside) it")
    density: bool = Field(False, description="density in g/cm3")
    rdf: list[str] = Field([], description="pair of elements, as Li-O; may be repeated")
    msd: list[str] = Field([], description="element or residue name, as Li or EC; may be repeated")
    start_ps: float | None = Field(None, ge=0, description="leave out what comes before, in ps; default: chosen")
    r_max_A: float | None = Field(None, gt=0, description="range of the RDF in A; default: half of the smallest box")
    bin_A: float = Field(0.05, gt=0, description="bin width of the RDF in A")
    between_molecules: bool = Field(False, description="RDF without pairs of one molecule")

    @field_validator("run_folder", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | Path) else value

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
        members: how intervals over the members of an ensemble were found, or why not; empty: one run of one potential.
        intervals: of those, by quantity: density_g_cm3, rdf Li-O peak, rdf Li-O g, diffusion_m2_s Li, ...
        runs: where several were given, the result of each; then only this, `members` and `intervals` are filled.
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
    members: str = ""
    intervals: dict[str, Intervals] = field(default_factory=dict)
    runs: list[Result] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join([*(self._of_runs() if self.runs else self._of_one()), f"files in {self.folder}"])

    def _of_runs(self) -> list[str]:
        each = [f"{k}: {line}" for k, one in enumerate(self.runs) for line in one._of_one()]
        return [*each, *self._of_members()]

    def _of_members(self) -> list[str]:
        scalars = {name: one for name, one in self.intervals.items() if np.ndim(one.value) == 0}
        return [*([self.members] if self.members else []), *(f"  {name} {one}" for name, one in scalars.items())]

    def _of_one(self) -> list[str]:
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
        return [*lines, *self._of_members()]


@dataclass
class _One:
    """A run and its RDFs frame by frame."""

    result: Result
    rdfs: list[RdfFrames]


def run(config: Config, *, progress: Progress = silent) -> Result:
    """Analyse a run folder, or several of the members of an ensemble.

    Raises:
        InputError: not a run folder; no such element; a quantity that the run cannot give; runs that differ in more
            than the potential.
    """
    folders = config.run_folder
    if len(folders) > 1:
        _same_but_for_the_potential(folders)
    inside = folders[0] / "analysis" if len(folders) == 1 else folders[0].parent / "analysis"
    folder = config.output or inside
    each = []
    for k, path in enumerate(folders):

        def of_all(done: int, total: int, text: str, k: int = k) -> None:
            progress(k * total + done, len(folders) * total, text)

        into = folder if len(folders) == 1 else folder / f"{k}-{path.resolve().name}"
        each.append(_analysed(config, path, into, of_all))
    if len(folders) == 1:
        return each[0].result
    result = Result(folder, sum(one.result.frames for one in each), max(one.result.start_ps for one in each))
    result.runs = [one.result for one in each]
    result.members = f"intervals from {len(each)} runs, taken for one with each member of an ensemble:"
    densities = [one.result.density for one in each] if config.density else []
    result.intervals = by_runs(densities, [one.rdfs for one in each], [[*one.result.msd.values()] for one in each])
    for k, name in enumerate(config.rdf):
        bins = len(result.intervals[f"rdf {name} g"].value)
        _csv(folder / f"rdf-{name}.csv", {"r_A": each[0].rdfs[k].r_A[:bins], **_curves(result.intervals, name)})
    write_atomic(folder / "analysis.json", json.dumps(_record(result, folders), indent=1))
    return result


def _same_but_for_the_potential(folders: list[Path]) -> None:
    every = [run_options(path) for path in folders]
    for path, options in zip(folders, every, strict=True):
        if (path / MEMBERS).is_file():
            raise InputError(f"{path} is a run of the mean of an ensemble ({MEMBERS}), not of a member; give it alone")
        for key in ("structure", "ensemble", "temperature_K", "pressure_bar"):
            if options.get(key) != every[0].get(key):
                raise InputError(
                    f"{path} has {key} {options.get(key)}, {folders[0]} has {every[0].get(key)}: runs of the members "
                    "of an ensemble differ in the potential only"
                )
    aside = ("output", "seed", "time_ps", "threads")
    potentials = [{key: value for key, value in options.items() if key not in aside} for options in every]
    for k, options in enumerate(potentials):
        if options in potentials[:k]:
            first = folders[potentials.index(options)]
            raise InputError(f"{first} and {folders[k]} are runs of the same potential; give one run of each member")


def _analysed(config: Config, path: Path, folder: Path, progress: Progress) -> _One:
    tasks = len(config.rdf) + len(config.msd) + 2
    progress(0, tasks, "reading")
    frames = read_frames(path)
    log = read_log(path / "log.csv")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    periodic = frames.boxes is not None
    if (config.density or config.rdf) and not periodic:
        raise InputError(f"{path} is an open system, which has no density and no RDF; leave them out")
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
    rdfs = []
    for k, name in enumerate(config.rdf):
        progress(2 + k, tasks, f"RDF {name}")
        rdfs.append(rdf_frames(late, name, config.bin_A, config.r_max_A, config.between_molecules))
        result.rdf[name] = rdf(rdfs[-1])
    for k, name in enumerate(config.msd):
        progress(2 + len(config.rdf) + k, tasks, f"MSD {name}")
        result.msd[name] = msd(late, name)
        _csv(folder / f"msd-{name}.csv", {"lag_ps": result.msd[name].lag_ps, "msd_A2": result.msd[name].msd_A2})
    reweighting = reweighting_of(path, frames, start_ps) if len(config.run_folder) == 1 else None
    result.members = "" if reweighting is None else str(reweighting)
    if isinstance(reweighting, Reweighting):
        density = frame_density(late, log) if config.density else None
        result.intervals = by_reweighting(reweighting, density, rdfs)
    for name, one in result.rdf.items():
        columns = {key: getattr(one, key) for key in ("r_A", "g", "g_error", "coordination")}
        more = _curves(result.intervals, name) if result.intervals else {}
        _csv(folder / f"rdf-{name}.csv", {**columns, **{f"members_{key}": value for key, value in more.items()}})
    write_atomic(folder / "analysis.json", json.dumps(_record(result, [path]), indent=1))
    plot(folder / "analysis.png", result, log)
    progress(tasks, tasks, "done")
    return _One(result, rdfs)


def _curves(intervals: dict[str, Intervals], pair: str) -> dict[str, np.ndarray]:
    """Columns of an RDF over members: value and half-widths."""
    out: dict[str, np.ndarray] = {}
    for key in ("g", "coordination"):
        one = intervals[f"rdf {pair} {key}"]
        out |= {key: one.value, f"{key}_statistical": one.statistical, f"{key}_model": one.model}
        out[f"{key}_total"] = one.total
    return out


def _csv(path: Path, columns: dict[str, np.ndarray]) -> None:
    rows = zip(*columns.values(), strict=True)
    text = "\n".join([",".join(columns), *(",".join(f"{value:.8g}" for value in row) for row in rows)])
    write_atomic(path, text + "\n")


def _record(result: Result, folders: list[Path]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(one) for key, one in value.items() if not isinstance(one, np.ndarray)}
        if isinstance(value, list):
            return [plain(one) for one in value]
        if isinstance(value, Path):
            return str(value)
        return None if isinstance(value, float) and not np.isfinite(value) else value

    scalars = {name: one for name, one in result.intervals.items() if np.ndim(one.value) == 0}
    numbers = {key: plain(value) for key, value in asdict(result).items() if key not in ("folder", "runs")}
    numbers["intervals"] = {
        name: {**plain(asdict(one)), "members": plain(one.members.tolist())} for name, one in scalars.items()
    }
    if result.runs:
        numbers["runs"] = [str(one.folder) for one in result.runs]
    names = ("log.csv", "topology.pdb", MEMBERS)
    inputs = {name if len(folders) == 1 else str(path / name): path / name for path in folders for name in names}
    hashes = {key: sha256(path) for key, path in inputs.items() if path.is_file()}
    return {**numbers, "inputs_sha256": hashes, **provenance()}


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
            if band := result.intervals.get(f"rdf {name} g"):
                low, high = band.value - band.total, band.value + band.total
                axis.fill_between(one.r_A, low, high, alpha=0.3, label=f"members, {100 * band.level:g} %")
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
