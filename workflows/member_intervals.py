"""Intervals of what `analyze` computes: from one run by reweighting to members, or from a run of each member."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from mdplug.errors import InputError
from mdplug.workflows.intervals import Intervals, combine_runs
from mdplug.workflows.md_files import read_log
from mdplug.workflows.reweighting import Reweighting, Transform, average, dof_of
from mdplug.workflows.trajectory import BLOCKS, Frames, Msd, RdfFrames, first_shell, vertex

MEMBERS = "members.csv"
"""Beside the trajectory, a row for each of its frames: time_ps, member_0_eV, member_1_eV, ... (potential energies)."""


class Quantity(NamedTuple):
    """An average over frames, or a function of averages."""

    name: str
    series: np.ndarray  # (F,) or (F, M)
    transform: Transform | None = None


def read_members(folder: Path, frames: Frames) -> np.ndarray | None:
    """(F, K) eV: potential energy of each frame by each member; None where the run wrote none.

    Raises:
        InputError: rows or columns that are not those of this trajectory.
    """
    path = folder / MEMBERS
    if not path.is_file():
        return None
    try:
        table = read_log(path)
        times = table["time_ps"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{path} cannot be read ({' '.join(str(error).split())[:200]})") from error
    names = [f"member_{k}_eV" for k in range(len(table) - 1)]
    if len(names) < 2 or any(name not in table for name in names):
        raise InputError(f"{path} has columns {', '.join(table)}; it must have time_ps, member_0_eV, member_1_eV, ...")
    step_ps = frames.time_ps[1] if len(frames.time_ps) > 1 else 1.0
    if len(times) != len(frames.time_ps) or np.abs(times - frames.time_ps).max() > 0.1 * step_ps:
        raise InputError(f"{path} has {len(times)} rows, which are not the {len(frames.time_ps)} frames beside it")
    return np.stack([table[name] for name in names], axis=1)


def run_options(folder: Path) -> dict[str, Any]:
    """The run's config.yaml.

    Raises:
        InputError: unreadable.
    """
    try:
        return dict(yaml.safe_load((folder / "config.yaml").read_text()))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"{folder / 'config.yaml'} cannot be read ({' '.join(str(error).split())[:200]})") from error


def reweighting_of(folder: Path, frames: Frames, start_ps: float) -> Reweighting | str | None:
    """From the members' energies of a run after `start_ps`; a text says why there is none, None: no members.

    Raises:
        InputError: as `read_members`.
    """
    energies = read_members(folder, frames)
    if energies is None:
        return None
    options = run_options(folder)
    if options.get("ensemble", "nvt") == "nve":
        return "members' energies not used: reweighting needs a thermostat, and this run is NVE"
    found = Reweighting(energies[frames.time_ps >= start_ps - 1e-9], float(options["temperature_K"]))
    return found if found.method else str(found)


def frame_density(frames: Frames, log: dict[str, np.ndarray]) -> np.ndarray:
    """(F,) g/cm3 from the boxes of the frames: the log may have rows at other times."""
    assert frames.boxes is not None
    mass = float((log["density_g_cm3"] * log["volume_A3"]).mean())
    return mass / np.abs(np.linalg.det(frames.boxes))


def rdf_quantities(each: RdfFrames, curve: np.ndarray) -> Iterator[Quantity]:
    """Curves and first shell of an RDF, the shell being where `curve` (B,) has it."""
    peak, minimum = first_shell(curve)
    name = f"rdf {each.pair}"
    yield Quantity(f"{name} g", each.g)
    yield Quantity(f"{name} coordination", each.running)
    yield Quantity(f"{name} peak", each.g[:, peak])
    if 0 < peak < len(curve) - 1:
        near = slice(peak - 1, peak + 2)
        yield Quantity(f"{name} peak_A", each.g[:, near], lambda three: vertex(each.r_A[near], three, 1))
    yield Quantity(f"{name} coordination_number", each.running[:, minimum])


def by_reweighting(
    reweighting: Reweighting, density: np.ndarray | None, rdfs: Sequence[RdfFrames]
) -> dict[str, Intervals]:
    """Intervals from one run, by name of the quantity."""
    quantities = [] if density is None else [Quantity("density_g_cm3", density)]
    for each in rdfs:
        quantities += rdf_quantities(each, each.g.mean(axis=0))
    return {one.name: reweighting.intervals(one.series, transform=one.transform) for one in quantities}


def by_runs(
    densities: Sequence[dict[str, float]], rdfs: Sequence[Sequence[RdfFrames]], msds: Sequence[Sequence[Msd]],
) -> dict[str, Intervals]:  # fmt: skip
    """Intervals from a run of each member, by name of the quantity.

    Args:
        densities: of each run, as `statistics.Mean`, or none.
        rdfs, msds: of each run, the same pairs and particles in the same order.
    """
    found = {}
    if densities:
        columns = np.array([(one["value"], one["error"], one["n_effective"]) for one in densities]).T
        found["density_g_cm3"] = combine_runs(columns[0], columns[1], dof_of(columns[2]))
    for same in zip(*rdfs, strict=True):
        bins = min(len(one.r_A) for one in same)
        cut = [RdfFrames(one.pair, one.r_A[:bins], one.g[:, :bins], one.running[:, :bins]) for one in same]
        curve = np.mean([one.g.mean(axis=0) for one in cut], axis=0)
        for each in zip(*(rdf_quantities(one, curve) for one in cut), strict=True):
            value, error, dof = zip(*(average(one.series, one.transform) for one in each), strict=True)
            found[each[0].name] = combine_runs(np.array(value), np.array(error), np.array(dof))
    for group in zip(*msds, strict=True):
        values = [one.diffusion_m2_s for one in group]
        errors = [one.diffusion_error_m2_s for one in group]
        found[f"diffusion_m2_s {group[0].what}"] = combine_runs(values, errors, BLOCKS - 1)
    return found
