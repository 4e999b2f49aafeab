"""The dynamics of an active run: a walker goes on until it is done, alarmed or dead; then short runs look around.

This is all that `active` knows of `md`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.io import read

from mdplug.errors import SimulationError
from mdplug.workflows import md
from mdplug.workflows._common import Progress, write_atomic
from mdplug.workflows._structures import OVERLAP_A
from mdplug.workflows.md_watch import Uncertain

BACK_PS = 0.05  # a walker that died goes on from so long before, at least
LAST_WORDS = 3  # frames before a death that may be labelled
SANE = 10.0  # a frame whose sigma is so many times the limit is no structure to learn from


@dataclass
class Segment:
    """A piece of a walker's trajectory.

    Attributes:
        walker, round: whose, when. status: done, alarm (members disagreed) or died (atoms flew apart).
        begin_ps, end_ps: of the walker's time: `end_ps` is the last frame that was safe, from which it goes on.
        alarm_ps: of the frame above the limit, or of the death. atom, sigma_eV_A: where and how much members disagreed.
        text: what the run said.
    """

    walker: int
    round: int
    status: Literal["done", "alarm", "died"]
    begin_ps: float
    end_ps: float
    alarm_ps: float
    atom: int
    sigma_eV_A: float
    text: str


@dataclass
class Candidate:
    """A frame that might be labelled.

    Attributes:
        atoms: with the molecules of its walker. atom: the most uncertain one. sigma_eV_A: of it; NaN: unknown.
        walker: whose. alarm: this frame raised an alarm.
    """

    atoms: Atoms
    atom: int
    sigma_eV_A: float
    walker: int
    alarm: bool = False


def run_segment(
    folder: Path, start: Path, options: dict[str, Any], walker: int, number: int, begin_ps: float, until_ps: float,
    progress: Progress,
) -> Segment:  # fmt: skip
    """Run a walker from a safe frame; continues, and once ended says the same again.

    Args:
        folder: of the run, md/ and safe.extxyz go into it. options: of `mdplug md`, with the model and its limit.

    Raises:
        Stopped: a signal.
    """
    record = folder / "segment.json"
    if record.exists():
        return Segment(**json.loads(record.read_text()))
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / "md"
    given = {**options, "structure": start, "output": place, "time_ps": until_ps - begin_ps, "policy": "stop"}
    if begin_ps > 0:
        given["minimise"] = False
    config = md.Config.read(given=given)
    atom, sigma, status, text, alarm = -1, float("nan"), "done", "", until_ps
    try:
        md.run(config, progress=progress)
        safe, end = last_of(place / "final.extxyz"), until_ps
    except Uncertain as error:
        status, text = "alarm", str(error)
        atom, sigma = int(error.reading.atom), float(error.reading.value)
        alarm = begin_ps + float(last_of(place / "uncertain.extxyz").info["time_ps"])
        good = place / "last_good.extxyz"
        safe = last_of(good if good.exists() else start)
        end = begin_ps + (float(safe.info["time_ps"]) if good.exists() else 0.0)
    except SimulationError as error:
        status, text = "died", str(error)
        frames = _trajectory(place)
        alarm = begin_ps + frames[-1][0] if frames else begin_ps
        early = [one for one in frames if one[0] <= frames[-1][0] - BACK_PS] if frames else []
        end, safe = (begin_ps + early[-1][0], early[-1][1]) if early else (begin_ps, last_of(start))
    safe.calc = None
    safe.info.pop("step", None)
    safe.info.pop("time_ps", None)
    write_atomic(folder / "safe.extxyz", md.extxyz_text(safe))
    found = Segment(walker, number, status, begin_ps, end, alarm, atom, sigma, text)  # type: ignore[arg-type]
    write_atomic(record, json.dumps(asdict(found), indent=1))
    return found


def look_around(
    folder: Path, options: dict[str, Any], number: int, seed: int, time_ps: float, apart_ps: float, progress: Progress
) -> None:
    """Short runs from the safe frame of a segment, each with velocities of its own, that collect uncertain frames.

    They may leave known ground, and break: what they give is labelled or thrown away, and no walker goes on from it.
    """
    for k in range(number):
        done = folder / f"around-{k}.done"
        if done.exists():
            continue
        own = np.random.SeedSequence((seed, k)).generate_state(1)
        given = {
            **options, "structure": folder / "safe.extxyz", "output": folder / f"around-{k}", "time_ps": time_ps,
            "policy": "collect", "collect_ps": apart_ps, "minimise": False, "format": "extxyz",
            "frame_ps": apart_ps, "seed": int(own[0] >> 1),
        }  # fmt: skip
        with contextlib.suppress(SimulationError):
            md.run(md.Config.read(given=given), progress=progress)
        write_atomic(done, "")


def uncertain_frames(folder: Path, segment: Segment, limit: float) -> Iterator[Candidate]:
    """The frame of the alarm, or the last before a death, and those that were collected around it."""
    if segment.status == "alarm":
        atoms = last_of(folder / "md" / "uncertain.extxyz")
        yield Candidate(_bare(atoms), segment.atom, segment.sigma_eV_A, segment.walker, True)
    elif segment.status == "died":
        for _, atoms in _trajectory(folder / "md")[-LAST_WORDS:]:
            sigma = atoms.arrays["sigma_forces_eV_A"]
            if _apart(atoms):
                yield Candidate(_bare(atoms), int(sigma.argmax()), float(sigma.max()), segment.walker)
    for path in sorted(folder.glob("around-*/uncertain.extxyz")):
        for atoms in read(path, ":"):
            sigma = atoms.arrays["sigma_forces_eV_A"]
            if sigma.max() <= SANE * limit and _apart(atoms):
                yield Candidate(_bare(atoms), int(sigma.argmax()), float(sigma.max()), segment.walker)


def all_frames(folder: Path, segment: Segment, rng: np.random.Generator) -> Iterator[Candidate]:
    """Every frame that a walker and the runs around it wrote; the atom in the middle is drawn at random."""
    for place in (folder / "md", *sorted(p for p in folder.glob("around-*") if p.is_dir())):
        for _, atoms in _trajectory(place):
            if _apart(atoms):
                yield Candidate(_bare(atoms), int(rng.integers(len(atoms))), float("nan"), segment.walker)


def last_of(path: Path) -> Atoms:
    """The last frame of a file."""
    return read(path, -1)


def _bare(atoms: Atoms) -> Atoms:
    out = atoms.copy()
    out.calc = None
    return out


def _trajectory(place: Path) -> list[tuple[float, Atoms]]:
    """(ps, frame) of a run that writes extended XYZ."""
    path = place / "trajectory.extxyz"
    if not path.exists() or not path.stat().st_size:
        return []
    return [(float(atoms.info["time_ps"]), atoms) for atoms in read(path, ":")]


def _apart(atoms: Atoms) -> bool:
    from mdplug.pairs import pairs
    from mdplug.system import AtomicSystem

    return bool(np.isfinite(atoms.positions).all()) and not pairs(AtomicSystem.from_ase(atoms), OVERLAP_A).n_pairs
