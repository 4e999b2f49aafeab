"""Linear readouts on the features of a trained potential, fitted in closed form: members that share one body.

The residuals of a potential on its labels are regressed on its features, energies and forces together, and members are
drawn from what the labels leave open. Forces enter as their components along random directions of all atoms of a
structure: the slope of the features along a direction is a difference of two evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mdplug.deployed import call, deploy
from mdplug.errors import InputError
from mdplug.potential import Potential
from mdplug.potentials.members import SharedMembers
from mdplug.workflows.dataset import Batch, Loader, pair_vectors

STEP_A = 1e-3  # of the difference along a direction
METHODS = ("laplace", "pops")


@dataclass(frozen=True)
class Rows:
    """Linear equations x . w = y, each with the standard deviation of its noise.

    Attributes:
        x: (R, F + Z) features less centre times scale, then counts of each element. y: (R,) eV or eV/A.
        noise: (R,). weight: (R,) how many equations a row stands for. structure: (R,). of_forces: (R,) bool.
    """

    x: np.ndarray
    y: np.ndarray
    noise: np.ndarray
    weight: np.ndarray
    structure: np.ndarray
    of_forces: np.ndarray

    def where(self, chosen: np.ndarray) -> Rows:
        """Those rows."""
        return Rows(*(value[chosen] for value in vars(self).values()))


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and spread of features (F,); by element, mean (Z, F) and whitening matrix (Z, F, F)."""

    centre: np.ndarray
    scale: np.ndarray
    centre_of: np.ndarray
    whiten: np.ndarray


def _local(potential: Potential, batch: Batch, vectors: Tensor) -> dict[str, Tensor]:
    system = batch.system
    with torch.no_grad():
        out: dict[str, Tensor] = potential.local(
            system.numbers, batch.pairs.index, vectors, len(system.numbers), system.system_index,
            system.total_charge, system.total_spin, system.head,
        )  # fmt: skip
    return out


def feature_statistics(potential: Potential, loader: Loader, species: Sequence[int]) -> FeatureStatistics:
    """Over all atoms of the data; covariances of rare elements lean on that of all."""
    n: dict[int, int] = {}
    first: dict[int, Any] = {}
    second: dict[int, Any] = {}
    for chosen in loader.plan():
        batch = loader.collate(chosen)
        features = _local(potential, batch, pair_vectors(batch))["features"].double().numpy()
        for k, z in enumerate(species):
            own = features[batch.system.numbers.numpy() == z]
            n[k] = n.get(k, 0) + len(own)
            first[k] = first.get(k, 0.0) + own.sum(axis=0)
            second[k] = second.get(k, 0.0) + own.T @ own
    width, total = len(next(iter(first.values()))), sum(n.values())
    mean = sum(first.values()) / total
    spread = np.sqrt(np.maximum(np.diag(sum(second.values())) / total - mean**2, 0.0))
    scale = np.where(spread > 1e-8 * spread.max(), 1.0 / np.maximum(spread, 1e-300), 0.0)
    centre_of = np.stack([first[k] / n[k] if n[k] else mean for k in range(len(species))])
    scatter = [second[k] - n[k] * np.outer(centre_of[k], centre_of[k]) for k in range(len(species))]
    pooled = sum(scatter) / max(total - len(species), 1)
    whiten = []
    for k in range(len(species)):
        values, vectors = np.linalg.eigh((scatter[k] + width * pooled) / (n[k] + width))
        whiten.append((vectors / np.sqrt(np.maximum(values, 1e-8 * values.max()))) @ vectors.T)
    return FeatureStatistics(mean, scale, centre_of, np.stack(whiten))


def gather(
    potential: Potential,
    loader: Loader,
    statistics: FeatureStatistics,
    species: Sequence[int],
    directions: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Rows:
    """The equations that labelled structures set to a correction of a potential.

    Args:
        potential: float64, gives "features". directions: random directions for the forces of each structure.
    """
    generator = torch.Generator().manual_seed(seed)
    deployed = deploy(potential)
    centre, scale = torch.from_numpy(statistics.centre), torch.from_numpy(statistics.scale)
    row_of = torch.zeros(119, dtype=torch.int64)
    row_of[list(species)] = torch.arange(len(species))
    parts: list[list[np.ndarray]] = []
    plan, errors = loader.plan(), []
    for done, chosen in enumerate(plan):
        progress(done, len(plan))
        batch = loader.collate(chosen)
        system, index = batch.system, batch.pairs.index
        at, s = system.system_index, len(chosen)

        def summed(features: Tensor, at: Tensor = at, s: int = s) -> Tensor:
            return torch.zeros(s, features.shape[1], dtype=torch.float64).index_add_(0, at, features.double())

        out = call(deployed, system, batch.pairs, True, False)
        vectors = pair_vectors(batch)
        features = (_local(potential, batch, vectors)["features"].double() - centre) * scale
        counts = torch.zeros(s, len(species), dtype=torch.float64)
        counts.index_put_((at, row_of[system.numbers]), torch.ones(len(at), dtype=torch.float64), accumulate=True)
        number = np.array(chosen)
        n = batch.n_atoms.numpy().astype(float)
        has = (batch.energy_weight > 0).numpy()
        x = torch.cat([summed(features), counts], dim=1).numpy()
        y = (batch.energy - out["energy"]).numpy()
        parts.append([x[has], y[has], n[has], np.ones(has.sum()), number[has], np.zeros(has.sum(), dtype=bool)])
        has = (batch.forces_weight > 0).numpy() & (n > 1)
        missing = batch.forces - out["forces"]
        errors.append(missing[torch.from_numpy(has)[at]].numpy())
        for _ in range(directions if has.any() else 0):
            d = torch.randn(system.positions.shape, dtype=torch.float64, generator=generator)
            length = torch.zeros(s, dtype=torch.float64).index_add_(0, at, d.square().sum(dim=1)).sqrt()
            d = d / length[at].unsqueeze(1)
            apart = d[index[1]] - d[index[0]]
            ends = [_local(potential, batch, vectors + sign * STEP_A * apart)["features"] for sign in (1, -1)]
            slope = summed((ends[0] - ends[1]).double() * scale) / (2 * STEP_A)
            x = torch.cat([-slope, torch.zeros_like(counts)], dim=1).numpy()
            y = torch.zeros(s, dtype=torch.float64).index_add_(0, at, (missing * d).sum(dim=1)).numpy()
            ones = np.ones(has.sum())
            parts.append([x[has], y[has], ones, (3 * n / directions)[has], number[has], ones.astype(bool)])
    x, y, noise, weight, structure, of_forces = (np.concatenate(column) for column in zip(*parts, strict=True))
    if not len(x):
        raise InputError("no structure has an energy or forces; there is nothing to fit members to")
    # Noise: an energy is off by so much per atom, a force component by so much.
    per_atom = np.sqrt(np.mean((y / noise)[~of_forces] ** 2)) if (~of_forces).any() else 1.0
    component = np.sqrt(np.mean(np.concatenate(errors) ** 2)) if of_forces.any() else 1.0
    noise = np.where(of_forces, component, per_atom * noise)
    return Rows(x, y, np.maximum(noise, 1e-12), weight, structure, of_forces)


def members_of(rows: Rows, method: str, members: int, seed: int) -> np.ndarray:
    """(M, F + Z) readouts that the labels leave open; only their differences matter.

    laplace: drawn from the Gaussian posterior of the weights (F. Bigi et al. 2024, as in `SharedMembers`).
    pops: each from where single labels would move the weights, the uniform distribution over the box that these
        corrections span along their principal axes (T. D. Swinburne and D. Perez, Mach. Learn.: Sci. Technol. 2025).
    """
    if method not in METHODS:
        raise InputError(f"no method {method!r} for members; known: {', '.join(METHODS)}")
    rng = np.random.default_rng(seed)
    x, y = rows.x / rows.noise[:, None], rows.y / rows.noise
    gram = (x * rows.weight[:, None]).T @ x
    ridge = 1e-9 * np.trace(gram) / len(gram) * np.eye(len(gram)) + np.eye(len(gram)) * 1e-6
    values, vectors = np.linalg.eigh(gram + ridge)
    root = vectors / np.sqrt(np.maximum(values, 1e-14 * values.max()))  # root root^T: the inverse
    if method == "laplace":
        return rng.normal(size=(members, len(values))) @ root.T
    mean = root @ (root.T @ ((x * rows.weight[:, None]).T @ y))
    reached = x @ root  # rows times the root of the inverse
    leverage = np.einsum("rf,rf->r", reached, reached)
    far = leverage > np.quantile(leverage, 0.5)  # a row that hardly moves the weights says nothing of them
    corrections = (reached[far] * ((y - x @ mean)[far] / leverage[far])[:, None]) @ root.T
    _, _, axes = np.linalg.svd(corrections, full_matrices=False)
    along = corrections @ axes.T
    low, high = np.quantile(along, (0.005, 0.995), axis=0)
    return mean + rng.uniform(low, high, size=(members, len(axes))) @ axes


def typical_ratio(members: np.ndarray, rows: Rows) -> float:
    """What sigma must be multiplied by to match the residuals: sqrt(pi/2) times the mean of |residual| / sigma.

    Of force components where there are some, else of energies.
    """
    chosen = rows.of_forces if rows.of_forces.any() else ~rows.of_forces
    sigma = (rows.x[chosen] @ (members - members.mean(axis=0)).T).std(axis=1, ddof=1)
    ratio = np.abs(rows.y[chosen]) / np.maximum(sigma, 1e-300)
    return float(np.sqrt(np.pi / 2) * np.mean(ratio[sigma > 0])) if (sigma > 0).any() else 1.0


def assemble(body: Potential, statistics: FeatureStatistics, members: np.ndarray) -> SharedMembers:
    """The potential of a body and its members (M, F + Z)."""
    width = len(statistics.centre)
    made = SharedMembers.of(body, len(members), width)
    parts = {
        "weight": members[:, :width], "offset": members[:, width:], "centre": statistics.centre,
        "scale": statistics.scale, "centre_of": statistics.centre_of, "whiten": statistics.whiten,
    }  # fmt: skip
    with torch.no_grad():
        for name, value in parts.items():
            getattr(made, name).copy_(torch.from_numpy(value))
    return made.requires_grad_(False)
