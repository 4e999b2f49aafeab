"""Trajectories of run folders and what is computed from them: RDF, mean squared displacement, broken bonds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mdplug.errors import InputError
from mdplug.units import M2_S, NM, PS
from mdplug.workflows._bonds import bond_vectors, broken_bonds
from mdplug.workflows.statistics import spread

BLOCKS = 4  # parts of a trajectory whose scatter gives an error


@dataclass
class Rdf:
    """A radial distribution function.

    Attributes:
        pair: as asked. r_A, g, coordination: curves. peak_A, peak: first maximum. minimum_A: what follows it.
        coordination_number: neighbours up to the minimum. *_error: standard errors from blocks of the trajectory.
    """

    pair: str
    r_A: np.ndarray
    g: np.ndarray
    g_error: np.ndarray
    coordination: np.ndarray
    peak_A: float
    peak: float
    minimum_A: float
    coordination_number: float
    coordination_error: float


@dataclass
class RdfFrames:
    """A radial distribution function in each frame.

    Attributes:
        pair: as asked. r_A: (B,) middles of the bins. g: (F, B). running: (F, B) neighbours of an atom of the first
            element up to the end of the bin.
    """

    pair: str
    r_A: np.ndarray
    g: np.ndarray
    running: np.ndarray


@dataclass
class Msd:
    """Mean squared displacement and self-diffusion coefficient.

    Attributes:
        what: as asked. lag_ps, msd_A2: the curve. diffusion_m2_s: slope / 6 between `fit_ps`, its error from blocks of
            the trajectory; without the correction for the size of the box.
    """

    what: str
    lag_ps: np.ndarray
    msd_A2: np.ndarray
    diffusion_m2_s: float
    diffusion_error_m2_s: float
    fit_ps: tuple[float, float]


@dataclass
class Frames:
    """A trajectory in A and ps: molecules by residue, bonds by the topology."""

    positions: np.ndarray  # (F, N, 3)
    boxes: np.ndarray | None  # (F, 3, 3)
    time_ps: np.ndarray
    topology: Any  # of mdtraj
    reference: np.ndarray  # (bonds,) lengths in topology.pdb

    @property
    def bonds(self) -> list[tuple[int, int]]:
        return [(one.atom1.index, one.atom2.index) for one in self.topology.bonds]

    def after(self, start_ps: float) -> Frames:
        """The later part."""
        keep = self.time_ps >= start_ps - 1e-9
        boxes = None if self.boxes is None else self.boxes[keep]
        return Frames(self.positions[keep], boxes, self.time_ps[keep], self.topology, self.reference)

    def atoms(self, name: str) -> list[list[int]]:
        """Atoms of an element, one a group; or of the residues of that name, each a group.

        Raises:
            InputError: neither.
        """
        by_element = [[atom.index] for atom in self.topology.atoms if atom.element.symbol == name]
        groups = by_element or [[a.index for a in r.atoms] for r in self.topology.residues if r.name == name]
        if not groups:
            elements = sorted({atom.element.symbol for atom in self.topology.atoms})
            residues = sorted({residue.name for residue in self.topology.residues})
            raise InputError(f"no element or residue {name!r}; there are {' '.join(elements)} and {' '.join(residues)}")
        return groups


def read_frames(folder: Path) -> Frames:
    """The trajectory of a run folder.

    Raises:
        InputError: no topology, no trajectory, or an unreadable one.
    """
    import mdtraj

    found = [folder / f"trajectory.{kind}" for kind in ("xtc", "dcd", "extxyz")]
    found = [path for path in found if path.is_file()]
    if not found or not (folder / "topology.pdb").is_file():
        raise InputError(f"{folder} holds no topology.pdb and trajectory; give a folder that `mdplug md` wrote")
    try:
        start = mdtraj.load(str(folder / "topology.pdb"))
        frame_ps = float(yaml.safe_load((folder / "config.yaml").read_text())["frame_ps"])
        if found[0].suffix == ".extxyz":
            from ase.io import read

            images: Any = read(found[0], index=":")
            positions = np.stack([one.positions for one in images])
            boxes = np.stack([one.cell.array for one in images]) if images[0].pbc.all() else None
        else:
            trajectory = mdtraj.load(str(found[0]), top=start.topology)
            positions = trajectory.xyz.astype(np.float64) * NM
            boxes = trajectory.unitcell_vectors
            boxes = None if boxes is None or not np.any(boxes) else boxes.astype(np.float64) * NM
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise InputError(f"{found[0]} cannot be read ({' '.join(str(error).split())[:200]})") from error
    bonds = [(one.atom1.index, one.atom2.index) for one in start.topology.bonds]
    cell = None if start.unitcell_vectors is None else start.unitcell_vectors[0].astype(np.float64) * NM
    vectors = bond_vectors(start.xyz[0].astype(np.float64) * NM, cell, np.full(3, cell is not None), bonds)
    time = np.arange(len(positions)) * frame_ps
    return Frames(positions, boxes, time, start.topology, np.linalg.norm(vectors, axis=1))


def broken_in(frames: Frames) -> dict[str, int]:
    """{"i-j": frames} of bonds that are broken in some frame."""
    counts: dict[str, int] = {}
    for k, positions in enumerate(frames.positions):
        box = None if frames.boxes is None else frames.boxes[k]
        for b in broken_bonds(positions, box, frames.bonds, frames.reference):
            i, j = frames.bonds[b]
            counts[f"{i}-{j}"] = counts.get(f"{i}-{j}", 0) + 1
    return counts


def rdf_frames(
    frames: Frames, pair: str, bin_A: float = 0.05, r_max_A: float | None = None, between_molecules: bool = False
) -> RdfFrames:
    """g(r) of a pair of elements in each frame, with the running number of neighbours of the first.

    Raises:
        InputError: no such element, or a range beyond half the box.
    """
    import mdtraj

    first, second = (np.concatenate(frames.atoms(name)) for name in pair.split("-"))
    i, j = (part.ravel() for part in np.meshgrid(first, second, indexing="ij"))
    keep = i != j
    if between_molecules:
        residue = np.array([atom.residue.index for atom in frames.topology.atoms])
        keep &= residue[i] != residue[j]
    pairs = np.stack((i[keep], j[keep]), axis=1)
    boxes = frames.boxes
    if boxes is None or not len(pairs):
        raise InputError(f"no pairs {pair} to count")
    half = float(0.5 / np.linalg.norm(np.linalg.inv(boxes), axis=1).max())
    r_max = half if r_max_A is None else r_max_A
    if r_max > half + 1e-6:
        raise InputError(f"r_max_A={r_max:g} is beyond half of the smallest box, {half:.2f} A; take less")
    edges = np.arange(0.0, r_max + 1e-9, bin_A)
    trajectory = mdtraj.Trajectory(frames.positions.astype(np.float32) / NM, frames.topology)
    trajectory.unitcell_vectors = boxes.astype(np.float32) / NM
    counts = np.empty((len(frames.positions), len(edges) - 1))
    step = max(1, 4_000_000 // len(pairs))
    for k in range(0, len(counts), step):
        distances = mdtraj.compute_distances(trajectory[k : k + step], pairs) * NM
        for row, values in enumerate(distances):
            counts[k + row] = np.histogram(values, edges)[0]
    shells = 4.0 / 3.0 * np.pi * (edges[1:] ** 3 - edges[:-1] ** 3)
    g = counts * np.abs(np.linalg.det(boxes))[:, None] / (len(pairs) * shells)
    return RdfFrames(pair, 0.5 * (edges[1:] + edges[:-1]), g, np.cumsum(counts, axis=1) / len(first))


def rdf(each: RdfFrames) -> Rdf:
    """The mean over frames, and its first shell."""
    r, g, running = each.r_A, each.g, each.running
    mean = g.mean(axis=0)
    peak, minimum = first_shell(mean)
    blocks = [block for block in np.array_split(np.arange(len(g)), BLOCKS) if len(block)]
    return Rdf(
        pair=each.pair,
        r_A=r,
        g=mean,
        g_error=np.array([g[block].mean(axis=0) for block in blocks]).std(axis=0, ddof=1) / np.sqrt(len(blocks))
        if len(blocks) > 1
        else np.full_like(mean, np.nan),
        coordination=running.mean(axis=0),
        peak_A=vertex(r, mean, peak),
        peak=float(mean[peak]),
        minimum_A=float(r[minimum]),
        coordination_number=float(running[:, minimum].mean()),
        coordination_error=spread(np.array([running[block, minimum].mean() for block in blocks])),
    )


def first_shell(g: np.ndarray) -> tuple[int, int]:
    """Bins of the first maximum and of the minimum behind it, on a lightly smoothed curve."""
    smooth = np.convolve(g, (0.25, 0.5, 0.25), mode="same")
    above = np.flatnonzero(smooth > max(1.0, 0.3 * smooth.max()))
    if not len(above):
        return int(g.argmax()), len(g) - 1
    # The first peak ends where g falls below one.
    begin = int(above[0])
    end = begin + int(np.argmax(smooth[begin:] < 1.0)) if (smooth[begin:] < 1.0).any() else len(g)
    peak = begin + int(g[begin : max(end, begin + 1)].argmax())
    # The lowest point within four bins on either side ends the shell: counting noise makes no minimum of its own.
    for k in range(end, len(g)):
        if smooth[k] <= smooth[max(begin, k - 4) : k + 5].min():
            return peak, k
    return peak, len(g) - 1


def vertex(r: np.ndarray, g: np.ndarray, k: int) -> float:
    """Position of a maximum between bins, by a parabola."""
    if not 0 < k < len(g) - 1:
        return float(r[k])
    left, here, right = g[k - 1 : k + 2]
    bend = left - 2 * here + right
    return float(r[k] + (0.5 * (left - right) / bend * (r[1] - r[0]) if bend < 0 else 0.0))


def unwrapped(frames: Frames, groups: list[list[int]]) -> np.ndarray:
    """(F, G, 3) A: paths of atoms, or of centres of mass of molecules, without jumps and without drift.

    Displacements between frames, each to the nearest image, are added up, which stays right when the box changes.
    """
    masses = np.array([atom.element.mass for atom in frames.topology.atoms])
    steps = np.diff(frames.positions, axis=0)
    if frames.boxes is not None:
        boxes = frames.boxes[1:]
        fractional = np.einsum("fni,fij->fnj", steps, np.linalg.inv(boxes))
        steps -= np.einsum("fni,fij->fnj", np.round(fractional), boxes)
    steps -= (masses @ steps)[:, None] / masses.sum()
    paths = np.zeros((len(frames.positions), len(groups), 3))
    for k, group in enumerate(groups):
        weight = masses[group] / masses[group].sum()
        paths[1:, k] = np.cumsum(np.einsum("n,fni->fi", weight, steps[:, group]), axis=0)
    return paths


def squared_displacement(paths: np.ndarray) -> np.ndarray:
    """(F/2,) A^2: mean over particles and time origins."""
    lags = np.arange(max(2, len(paths) // 2))
    return np.array([((paths[lag:] - paths[: len(paths) - lag]) ** 2).sum(axis=2).mean() for lag in lags])


def msd(frames: Frames, what: str) -> Msd:
    """Mean squared displacement; D from its slope between a fifth and all of the longest lag of a block.

    Raises:
        InputError: no such particles, or too few frames.
    """
    paths = unwrapped(frames, frames.atoms(what))
    if len(paths) < 5 * BLOCKS:
        raise InputError(f"{len(paths)} frames are too few for diffusion; run longer or write frames more often")
    step_ps = float(frames.time_ps[1] - frames.time_ps[0])
    blocks = np.array_split(paths, BLOCKS)
    last = min(len(block) for block in blocks) // 2
    fit = (max(1, last // 5), max(last, 2))

    def slope(curve: np.ndarray) -> float:
        lag = np.arange(fit[0], fit[1] + 1)
        lag = lag[lag < len(curve)]
        return float(np.polyfit(lag * step_ps * PS, curve[lag], 1)[0]) / 6.0 / M2_S

    curve = squared_displacement(paths)
    each = np.array([slope(squared_displacement(block)) for block in blocks])
    return Msd(
        what=what,
        lag_ps=np.arange(len(curve)) * step_ps,
        msd_A2=curve,
        diffusion_m2_s=slope(curve),
        diffusion_error_m2_s=spread(each),
        fit_ps=(fit[0] * step_ps, fit[1] * step_ps),
    )
