"""The dynamics of an active run: a walker goes on until it is done, alarmed or dead; then short runs look around.

This is all that `active` knows of `md`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.io import read

from mdplug.errors import SimulationError
from mdplug.workflows import md
from mdplug.workflows._common import Progress, write_atomic
from mdplug.workflows._structures import OVERLAP_A
from mdplug.workflows.journal import as_extxyz
from mdplug.workflows.md_watch import Uncertain

BACK_PS = 0.05  # a walker that was stopped goes on from a frame so long before; twice as long if that did not help
LAST_WORDS = 3  # frames before a death: around the first of them is looked
SANE = 3.0  # a frame whose sigma is so many times the limit is no structure to learn from
MOST = 200  # frames of a trajectory that are looked at


@dataclass
class Segment:
    """A piece of a walker's trajectory.

    Attributes:
        walker, round: whose, when. status: done, alarm (members disagreed) or died (atoms flew apart).
        begin_ps, end_ps: of the walker's time; it ended with an alarm, with its death, or as planned.
        safe_ps: of the frame from which the walker goes on. atom, sigma_eV_A: where and how much members disagreed.
        text: what the run said.
    """

    walker: int
    round: int
    status: Literal["done", "alarm", "died"]
    begin_ps: float
    end_ps: float
    safe_ps: float
    atom: int
    sigma_eV_A: float
    text: str


@dataclass
class Track:
    """Where a walker has been.

    Attributes:
        frames: (ps, frame) that stand. furthest_ps: it ever came. tries: in vain to get beyond.
    """

    frames: list[tuple[float, Atoms]] = field(default_factory=list)
    furthest_ps: float = 0.0
    tries: int = 0

    def extend(self, segment: Segment, found: list[tuple[float, Atoms]], start: Atoms) -> Atoms:
        """Take in a segment, its frames timed from its beginning; sets `safe_ps` and returns the frame to go on from.

        That is a frame some time before the alarm: what made members disagree had begun by then. A walker that comes
        no further goes back twice as far each time.
        """
        kept = [one for one in self.frames if one[0] <= segment.begin_ps + 1e-9]
        new = [(segment.begin_ps + t, atoms) for t, atoms in found]
        self.frames = kept + [one for one in new if not kept or one[0] > kept[-1][0] + 1e-9]
        if segment.status == "done":
            segment.safe_ps = segment.end_ps
            return self.frames[-1][1]
        self.tries = self.tries + 1 if segment.end_ps <= self.furthest_ps + BACK_PS else 0
        self.furthest_ps = max(self.furthest_ps, segment.end_ps)
        latest = segment.end_ps - BACK_PS * 2 ** min(self.tries, 20)
        self.frames = [one for one in self.frames if one[0] <= latest + 1e-9]
        segment.safe_ps, safe = self.frames[-1] if self.frames else (0.0, start)
        return safe


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
        folder: of the run; md/ and near.extxyz, the last frame before an alarm, go into it. options: of `mdplug md`,
            with the model and its limit.

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
    atom, sigma, status, text, end = -1, float("nan"), "done", "", until_ps
    near = last_of(start)
    try:
        md.run(config, progress=progress)
    except Uncertain as error:
        status, text = "alarm", str(error)
        atom, sigma = int(error.reading.atom), float(error.reading.value)
        end = begin_ps + float(last_of(place / "uncertain.extxyz").info["time_ps"])
        if (place / "last_good.extxyz").exists():
            near = last_of(place / "last_good.extxyz")
    except SimulationError as error:
        status, text = "died", str(error)
        frames = trajectory_of(folder)
        if frames:
            end, near = begin_ps + frames[-1][0], frames[max(0, len(frames) - LAST_WORDS)][1]
    write_start(folder / "near.extxyz", near)
    found = Segment(walker, number, status, begin_ps, end, begin_ps, atom, sigma, text)  # type: ignore[arg-type]
    write_atomic(record, json.dumps(asdict(found), indent=1))
    return found


def write_start(path: Path, atoms: Atoms) -> None:
    """A frame as a structure to start from."""
    out = _bare(atoms)
    for key in ("step", "time_ps"):
        out.info.pop(key, None)
    write_atomic(path, as_extxyz([out]))


def look_around(
    folder: Path, options: dict[str, Any], number: int, seed: int, time_ps: float, apart_ps: float, progress: Progress
) -> None:
    """Short runs from the last frame before an alarm, each with velocities of its own, that collect uncertain frames.

    They may leave known ground, and break: what they give is labelled or thrown away, and no walker goes on from it.
    """
    for k in range(number):
        done = folder / f"around-{k}.done"
        if done.exists():
            continue
        own = np.random.SeedSequence((seed, k)).generate_state(1)
        given = {
            **options, "structure": folder / "near.extxyz", "output": folder / f"around-{k}", "time_ps": time_ps,
            "policy": "collect", "collect_ps": apart_ps, "minimise": False, "format": "extxyz",
            "frame_ps": apart_ps, "seed": int(own[0] >> 1),
        }  # fmt: skip
        with contextlib.suppress(SimulationError):
            md.run(md.Config.read(given=given), progress=progress)
        write_atomic(done, "")


def uncertain_frames(folder: Path, segment: Segment, limit: float) -> Iterator[Candidate]:
    """The frame of the alarm, then those that were collected around it, then what led there."""
    if segment.status == "alarm":
        atoms = last_of(folder / "md" / "uncertain.extxyz")
        yield Candidate(_bare(atoms), segment.atom, segment.sigma_eV_A, segment.walker, True)
    found = [atoms for path in sorted(folder.glob("around-*/uncertain.extxyz")) for atoms in read(path, ":")]
    for place in _places(folder):
        found += [atoms for _, atoms in _spread(_trajectory(place))]
    for atoms in found:
        sigma = atoms.arrays["sigma_forces_eV_A"]
        if sigma.max() <= SANE * limit and _apart(atoms):
            yield Candidate(_bare(atoms), int(sigma.argmax()), float(sigma.max()), segment.walker)


def all_frames(folder: Path, segment: Segment, rng: np.random.Generator) -> Iterator[Candidate]:
    """Every frame that a walker and the runs around it wrote; the atom in the middle is drawn at random."""
    for place in _places(folder):
        for _, atoms in _spread(_trajectory(place)):
            if _apart(atoms):
                yield Candidate(_bare(atoms), int(rng.integers(len(atoms))), float("nan"), segment.walker)


def _places(folder: Path) -> list[Path]:
    return [folder / "md", *sorted(p for p in folder.glob("around-*") if p.is_dir())]


def _spread(frames: list[tuple[float, Atoms]]) -> list[tuple[float, Atoms]]:
    if len(frames) <= MOST:
        return frames
    return [frames[k] for k in np.linspace(0, len(frames) - 1, MOST).astype(int)]


def last_of(path: Path) -> Atoms:
    """The last frame of a file."""
    found: Any = read(path, -1)
    return found


def _bare(atoms: Atoms) -> Atoms:
    out = atoms.copy()
    out.calc = None
    return out


def trajectory_of(folder: Path) -> list[tuple[float, Atoms]]:
    """(ps, frame) of the run of a segment, timed from its beginning."""
    return _trajectory(folder / "md")


def _trajectory(place: Path) -> list[tuple[float, Atoms]]:
    path = place / "trajectory.extxyz"
    if not path.exists() or not path.stat().st_size:
        return []
    return [(float(atoms.info["time_ps"]), atoms) for atoms in read(path, ":")]


def _apart(atoms: Atoms) -> bool:
    from mdplug.pairs import pairs
    from mdplug.system import AtomicSystem

    return bool(np.isfinite(atoms.positions).all()) and not pairs(AtomicSystem.from_ase(atoms), OVERLAP_A).n_pairs
