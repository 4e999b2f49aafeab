"""Run folders as `md` writes them, from given frames."""

from pathlib import Path

import mdtraj
import numpy as np
import yaml
from ase import Atoms

from mdplug.engines.openmm.topology import topology_from_ase
from mdplug.workflows.md_files import COLUMNS, Frame, Trajectory


def folder_of(path: Path, atoms: Atoms, positions, boxes=None, bonds=None, frame_ps=0.1, density=None, **options):
    """A run folder from frames (F, N, 3) in boxes (F, 3, 3); `options` go into config.yaml."""
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump({"frame_ps": frame_ps, **options}))
    topology = mdtraj.Topology.from_openmm(topology_from_ase(atoms, bonds))
    start = mdtraj.Trajectory(atoms.positions[None] / 10, topology)
    if atoms.pbc.all():
        start.unitcell_vectors = atoms.cell.array[None] / 10
    start.save_pdb(str(path / "topology.pdb"))
    trajectory = Trajectory(path / "trajectory.xtc", atoms, np.eye(3), 0, 0)
    cell = atoms.cell.array if atoms.pbc.all() else None
    for k, now in enumerate(positions):
        box = cell if boxes is None else boxes[k]
        trajectory.write(Frame(k, k * frame_ps, now, now * 0, box, 0.0, 0.0, None, now))
    trajectory.close()
    table = np.zeros((len(positions), len(COLUMNS)))
    table[:, 0], table[:, 1], table[:, 2] = np.arange(len(positions)), np.arange(len(positions)) * frame_ps, 300.0
    table[:, COLUMNS.index("density_g_cm3")] = 1.0 if density is None else density
    table[:, COLUMNS.index("volume_A3")] = 0.0 if boxes is None else np.linalg.det(boxes)
    write_log(path, table)
    return path


def write_log(path: Path, table: np.ndarray) -> None:
    """log.csv of a run folder."""
    np.savetxt(path / "log.csv", table, delimiter=",", header=",".join(COLUMNS), comments="")
