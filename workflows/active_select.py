"""Which frames to label: those that together lower most what the error of all forces met in dynamics may be.

The readout of a potential has a Gaussian posterior (see `last_layer`), which says what squared error to expect of the
forces of every candidate. A label shrinks it, for all of them; frames are taken one by one, each for the greatest fall
of the mean over all candidates, given those before it (D. Cohn, Z. Ghahramani, M. Jordan, J. Artif. Intell. Res. 4, 129
(1996); V-optimal design by greedy steps). What is uncertain counts, and what is met often; what was said before does
not count twice, so that the choice is diverse. No chance takes part: of frames that say the same the first is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase import Atoms

import mdplug
from mdplug.errors import InputError
from mdplug.potential import Potential
from mdplug.potentials.members import SharedMembers
from mdplug.system import AtomicSystem
from mdplug.workflows._common import replacing
from mdplug.workflows.dataset import Labelled, Loader, references_of
from mdplug.workflows.last_layer import FeatureStatistics, Rows, gather

DIRECTIONS = 8  # random directions that stand for the forces of a frame


@dataclass(frozen=True)
class Posterior:
    """What the labels leave open of the readout.

    Attributes:
        root: (D, D), root root^T the covariance of the weights, in the units of `last_layer.Rows`. noise: eV/A, of a
            force component.
    """

    root: np.ndarray
    noise: float

    @classmethod
    def of(cls, rows: Rows, scale: float) -> Posterior:
        """From the equations of the labels.

        Args:
            scale: what sigma was multiplied by to match errors.
        """
        x = rows.x * (np.sqrt(rows.weight) / rows.noise)[:, None]
        gram = x.T @ x
        ridge = 1e-9 * np.trace(gram) / len(gram) + 1e-6
        values, vectors = np.linalg.eigh(gram + ridge * np.eye(len(gram)))
        noise = float(rows.noise[rows.of_forces][0]) if rows.of_forces.any() else 1.0
        return cls(scale * vectors / np.sqrt(np.maximum(values, 1e-14 * values.max())), noise)

    def save(self, path: Path) -> None:
        """Write it, atomically."""
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, root=self.root, noise=self.noise)

    @classmethod
    def load(cls, path: Path) -> Posterior:
        """From `save`."""
        with np.load(path) as saved:
            return cls(saved["root"], float(saved["noise"]))


def unlabelled(frames: Sequence[Atoms]) -> list[Labelled]:
    """Frames as structures whose forces are unknown: zero."""
    return [
        Labelled(
            AtomicSystem.from_ase(atoms), float("nan"), torch.zeros(len(atoms), 3, dtype=torch.float64), None, 1.0,
            "candidate", str(k), "candidate", "candidates", k,
        )
        for k, atoms in enumerate(frames)
    ]  # fmt: skip


def force_rows(body: Path, ensemble: Path, frames: Sequence[Atoms]) -> list[np.ndarray]:
    """(DIRECTIONS, D) of each frame: how its forces hang on the weights, so that rows^T rows is that of all components.

    Args:
        body: model file of the body of `ensemble`, whose feature statistics are used.
    """
    fast, made = mdplug.load(body, dtype="float64", radial="tables"), mdplug.load(ensemble, radial="exact")
    model = made.without_kernels() if isinstance(made, Potential) else made
    if not isinstance(fast, Potential) or not isinstance(model, SharedMembers):
        raise InputError(f"{ensemble} is no ensemble on one body; make one with `mdplug ensemble`")
    own = {name: getattr(model, name).double().cpu().numpy() for name in ("centre", "scale", "centre_of", "whiten")}
    loader = Loader(unlabelled(frames), fast.cutoff, references_of(fast))
    found = gather(fast, loader, FeatureStatistics(**own), fast.spec.species, DIRECTIONS, 0)
    x = found.x * np.sqrt(found.weight)[:, None]
    return [x[found.of_forces & (found.structure == k)] for k in range(len(frames))]


def informative(
    rows: Sequence[np.ndarray], posterior: Posterior, count: int, first: Sequence[int] = ()
) -> tuple[list[int], list[float]]:
    """Frames that together say most of all frames.

    Args:
        rows: of each frame, see `force_rows`. count: how many to take, `first` included. first: taken before others.

    Returns:
        Their indices in the order of choice, and by how much each lowers the expected squared error of force
        components, summed over all frames, given those before it, eV^2/A^2.
    """
    shaped = [x @ posterior.root for x in rows]
    covariance = np.eye(posterior.root.shape[0])
    wanted = np.add.reduce([a.T @ a for a in shaped])
    unit = posterior.noise**2

    def step(a: np.ndarray) -> np.ndarray:
        """What a label takes off the covariance."""
        through = covariance @ a.T
        taken: np.ndarray = through @ np.linalg.solve(unit * np.eye(len(a)) + a @ through, through.T)
        return taken

    def gain(k: int) -> float:
        return float(np.sum(wanted * step(shaped[k])))

    chosen: list[int] = []
    gains: list[float] = []
    left = list(range(len(rows)))
    queue = list(dict.fromkeys(first))
    while left and len(chosen) < count:
        best = queue.pop(0) if queue else max(left, key=gain)  # the first of equals
        gains.append(gain(best))
        covariance = covariance - step(shaped[best])
        chosen.append(best)
        left.remove(best)
    return chosen, gains
